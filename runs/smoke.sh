#!/usr/bin/env bash
# The whole chain in about a minute: everything runs, no gate passes.   bash runs/smoke.sh [folder]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/smoke}
tiny="--max_steps=4 --lr_steps=4 --warmup_steps=1 --eval_every=2 --log_every=1 --device=cpu"
python p1_canvas.py --out_dir=$out/p1 --num_scenes=300 --vocab_size=1024 --query_grid=8 --patch=4 --dim=32 --layers=1 --heads=2 \
    --hidden=64 --cross_layers=1 --cross_hidden=64 --rec_dim=32 --rec_layers=1 --batch_size=8 $tiny
python p2_contrast.py --out_dir=$out/p2 --init_from=$out/p1/ckpt.pt --batch_size=4 --readout_hidden=32 --z_dim=32 $tiny
python p3_jitter.py --out_dir=$out/p3 --init_from=$out/p2/ckpt.pt --batch_size=4 $tiny
python p4_decoder.py --out_dir=$out/p4 --init_from=$out/p3/ckpt.pt --batch_size=8 --dec_dim=32 --dec_layers=1 --dec_heads=2 \
    --dec_hidden=64 $tiny
python p5_roundtrip.py --out_dir=$out/p5 --init_from=$out/p4/ckpt.pt --batch_size=4 --generated=4 $tiny
python p6_diffusion.py --out_dir=$out/p6 --init_from=$out/p5/ckpt.pt --batch_size=4 --unet_dim=8 --unet_steps=1 --unet_batch=8 \
    --buffer_size=64 --sample_steps=4 --drawn=8 $tiny
python plot.py --out=$out --gates=true
