#!/usr/bin/env bash
# The whole chain in about a minute: everything runs, no gate passes.   bash runs/smoke.sh [folder]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/smoke}
settings() { python runs/presets.py smoke "$1"; }
python p1_canvas.py --out_dir=$out/p1 $(settings p1)
python p2_contrast.py --out_dir=$out/p2 --init_from=$out/p1/ckpt.pt $(settings p2)
python p3_jitter.py --out_dir=$out/p3 --init_from=$out/p2/ckpt.pt $(settings p3)
python p4_decoder.py --out_dir=$out/p4 --init_from=$out/p3/ckpt.pt $(settings p4)
python p5_roundtrip.py --out_dir=$out/p5 --init_from=$out/p4/ckpt.pt $(settings p5)
python p6_diffusion.py --out_dir=$out/p6 --init_from=$out/p5/ckpt.pt $(settings p6)
python plot.py --out=$out --gates=true
