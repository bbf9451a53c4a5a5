#!/usr/bin/env bash
# The plan's full size: 32x32 queries, D 384, 6 layers, batch 256; the defaults at the top of each script are used as they are.
#   bash runs/gpu.sh [folder]          NPROC=4 bash runs/gpu.sh   for four GPUs
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/gpu}
launch="torchrun --standalone --nproc_per_node=${NPROC:-1}"
began=$SECONDS
$launch p1_canvas.py --out_dir=$out/p1
$launch p2_contrast.py --out_dir=$out/p2 --init_from=$out/p1/ckpt.pt
$launch p3_jitter.py --out_dir=$out/p3 --init_from=$out/p2/ckpt.pt
$launch p4_decoder.py --out_dir=$out/p4 --init_from=$out/p3/ckpt.pt
$launch p5_roundtrip.py --out_dir=$out/p5 --init_from=$out/p4/ckpt.pt
$launch p6_diffusion.py --out_dir=$out/p6_control --init_from=$out/p5/ckpt.pt --lambda_prior=0
$launch p6_diffusion.py --out_dir=$out/p6 --init_from=$out/p5/ckpt.pt --control=$out/p6_control
python plot.py --out=$out --gates=true
echo "P1 to P6 took $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s"
