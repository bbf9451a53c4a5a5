#!/usr/bin/env bash
# The plan's full size, meant for ten minutes of one H200 (docs/SPEED.md; never run): 32x32 queries, D 384, 6 layers, batch
# 256, for the steps (P1: 1500), on the corpus and with the recipe of runs/cpu.sh.
#   bash runs/gpu.sh [folder] [--corpus=FILE]          NPROC=4 bash runs/gpu.sh   for four GPUs
# The plan's lengths and weights are the scripts' defaults: leave out all flags but --out_dir, --init_from and --control.
set -euo pipefail
out=out/gpu file=""
for option in "$@"; do
    case $option in
        --corpus=*) file=$(realpath -- "${option#*=}") ;;
        -*) echo "error: runs/gpu.sh knows a folder and --corpus=, not $option" >&2; exit 2 ;;
        *) out=$option ;;
    esac
done
cd "$(dirname "$0")/.."
launch=python
[ "${NPROC:-1}" = 1 ] || launch="torchrun --standalone --nproc_per_node=$NPROC"
python -c 'import rustbpe, rouge_score, tiktoken, matplotlib, sklearn, tqdm'     # not after five minutes
settings() {
    python runs/presets.py gpu "$1"
    if [ -n "$file" ]; then python runs/presets.py english_gpu "$1"; fi
}
began=$SECONDS
$launch p1_canvas.py --out_dir=$out/p1 $(settings p1) --corpus="$file"
$launch p2_contrast.py --out_dir=$out/p2 --init_from=$out/p1/ckpt.pt $(settings p2)
$launch p3_jitter.py --out_dir=$out/p3 --init_from=$out/p2/ckpt.pt $(settings p3)
$launch p4_decoder.py --out_dir=$out/p4 --init_from=$out/p3/ckpt.pt $(settings p4)
$launch p5_roundtrip.py --out_dir=$out/p5 --init_from=$out/p4/ckpt.pt $(settings p5)
$launch p6_diffusion.py --out_dir=$out/p6_control --init_from=$out/p5/ckpt.pt $(settings p6) --lambda_prior=0
$launch p6_diffusion.py --out_dir=$out/p6 --init_from=$out/p5/ckpt.pt $(settings p6) --control=$out/p6_control
python plot.py --out=$out --gates=true
echo "P1 to P6 took $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s"
