#!/usr/bin/env bash
# The whole chain, P1 to P6, on two CPU cores: a small model on two-thing scenes, every gate printed at the end.
#   bash runs/cpu.sh [--out=out] [--seed=0] [--data_seed=0] [--complexity=1] [--leave_out=count] [--plan=false]
# --leave_out= (empty) constructs all six counterfactual families; by default one is left out, and its rows tell what else
# teaches it. --data_seed= makes another corpus of the same grammar, with held-out scenes that no choice was made on.
# --plan=true turns off everything that departs from the plan (docs/PLAN.md): same sizes, same steps.
set -euo pipefail
cd "$(dirname "$0")/.."
out=out seed=0 data_seed=0 complexity=1 leave_out=count plan=false
for option in "$@"; do
    case $option in
        --out=*) out=${option#*=} ;;
        --seed=*) seed=${option#*=} ;;
        --data_seed=*) data_seed=${option#*=} ;;
        --complexity=*) complexity=${option#*=} ;;
        --leave_out=*) leave_out=${option#*=} ;;
        --plan=true|--plan=false) plan=${option#*=} ;;
        *) echo "error: runs/cpu.sh knows --out=, --seed=, --data_seed=, --complexity=, --leave_out= and --plan=true, not $option" >&2; exit 2 ;;
    esac
done
python - <<'PYTHON' || exit 2
import sys
try:
    import torch, tiktoken, rustbpe, matplotlib, sklearn, rouge_score, tqdm
except ImportError as error:
    sys.exit(f'error: {error.name} is not installed; run: pip install -r requirements.txt')
PYTHON
settings() {      # of a phase, from runs/presets.py; the later word wins
    python runs/presets.py cpu "$1"
    if [ "$complexity" -gt 1 ]; then python runs/presets.py three "$1"; fi
    if [ "$plan" = true ]; then python runs/presets.py plan "$1"; fi
}
family="--leave_out=$leave_out"
if [ "$plan" = true ]; then family=""; fi

began=$SECONDS
python p1_canvas.py --out_dir=$out/p1 $(settings p1) --seed=$seed --data_seed=$data_seed --complexity=$complexity
python p2_contrast.py --out_dir=$out/p2 --init_from=$out/p1/ckpt.pt $(settings p2) $family
python p3_jitter.py --out_dir=$out/p3 --init_from=$out/p2/ckpt.pt $(settings p3)
python p4_decoder.py --out_dir=$out/p4 --init_from=$out/p3/ckpt.pt $(settings p4)
python p5_roundtrip.py --out_dir=$out/p5 --init_from=$out/p4/ckpt.pt $(settings p5)
echo "P1 to P5 took $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s"
# P6 twice: what the prior does is what the same steps without it do not.
python p6_diffusion.py --out_dir=$out/p6_control --init_from=$out/p5/ckpt.pt $(settings p6) --lambda_prior=0
python p6_diffusion.py --out_dir=$out/p6 --init_from=$out/p5/ckpt.pt $(settings p6) --control=$out/p6_control
python plot.py --out=$out --gates=true
echo "P1 to P6 took $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s"
