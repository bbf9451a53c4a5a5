#!/usr/bin/env bash
# The plan's full size, meant for ten minutes of one H200 (arithmetic in README, "On GPUs, on paper"; never run): 32x32 queries, D 384,
# 6 layers, batch 256, for the steps (P1: 1500), on the corpus and with the recipe of runs/cpu.sh. Learning rates are a third of those
# there: the nets are three times as wide.
#   bash runs/gpu.sh [folder]          NPROC=4 bash runs/gpu.sh   for four GPUs
# The plan's lengths and weights are the scripts' defaults: leave out all flags but --out_dir, --init_from, and P6's --control.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/gpu}
launch=python
[ "${NPROC:-1}" = 1 ] || launch="torchrun --standalone --nproc_per_node=$NPROC"
python -c 'import rustbpe, rouge_score, tiktoken, matplotlib, sklearn, tqdm'     # not after five minutes
priors="--lambda_cov=0.5 --lambda_var=0.5 --lambda_tv=0.05 --lambda_wavelet=0.05"
for_steps() { echo "--max_steps=$1 --lr_steps=$1 --warmup_steps=$2 --eval_every=$3 --learning_rate=$4 --ema_decay=0.99"; }
began=$SECONDS
$launch p1_canvas.py --out_dir=$out/p1 --num_scenes=20000 --dropout=0.0 $priors $(for_steps 1500 100 500 7e-4)
$launch p2_contrast.py --out_dir=$out/p2 --init_from=$out/p1/ckpt.pt $priors --temperature=0.1 --mine_every=250 $(for_steps 2000 50 500 3e-4)
$launch p3_jitter.py --out_dir=$out/p3 --init_from=$out/p2/ckpt.pt $priors --temperature=0.1 $(for_steps 300 20 100 1.7e-4)
$launch p4_decoder.py --out_dir=$out/p4 --init_from=$out/p3/ckpt.pt --dropout=0.0 $(for_steps 1500 50 750 7e-4)
$launch p5_roundtrip.py --out_dir=$out/p5 --init_from=$out/p4/ckpt.pt $priors --temperature=0.1 $(for_steps 300 20 100 3e-4)
sharpen="--init_from=$out/p5/ckpt.pt --unet_steps=1000 --encoder_scale=1 $(for_steps 1300 20 1150 1.7e-4)"
$launch p6_diffusion.py --out_dir=$out/p6_control --lambda_prior=0 $sharpen
$launch p6_diffusion.py --out_dir=$out/p6 --control=$out/p6_control --lambda_prior=1 --t_low=0.4 --t_high=0.8 $sharpen
python plot.py --out=$out --gates=true
echo "P1 to P6 took $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s"
