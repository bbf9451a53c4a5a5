#!/usr/bin/env bash
# The whole chain, P1 to P6, on ordinary English: --corpus of your own, or the example sentences of WordNet.
#   bash runs/english.sh [FILE.txt or FILE.jsonl] [--out=out/english] [--seed=0] [--long=false]
# FILE: a sentence a line, or rows as the README has them. Without one it takes WordNet's, which need WordNet
# (python -m tools.wordnet says how to get it). --long=true: four to eight times the steps of P2 and P4. The
# same command goes on where it was stopped; a phase that has ended is kept.
set -euo pipefail
file="" out=out/english seed=0 long=false
for option in "$@"; do
    case $option in
        --out=*) out=${option#*=} ;;
        --seed=*) seed=${option#*=} ;;
        --long=true|--long=false) long=${option#*=} ;;
        -*) echo "error: runs/english.sh knows a FILE, --out=, --seed= and --long=true, not $option" >&2; exit 2 ;;
        *) file=$(realpath -- "$option") ;;
    esac
done
cd "$(dirname "$0")/.."
if [ -z "$file" ]; then
    file=out/wordnet.txt
    mkdir -p out
    if [ ! -f "$file" ]; then python -m tools.wordnet --out="$file"; fi
fi
run() {           # script phase, then words of its command line; from runs/presets.py, the later word wins
    folder=$out/$2 words=$(python runs/presets.py english "${2%_control}")
    if [ "$long" = true ]; then words="$words $(python runs/presets.py english_long "${2%_control}")"; fi
    if [ -f "$folder/gate.json" ]; then echo "$2 has ended: $folder is kept"; return; fi
    if [ -f "$folder/ckpt.pt" ]; then words="$words --resume=true"; fi
    python "$1" --out_dir="$folder" $words "${@:3}"
}

began=$SECONDS
run p1_canvas.py p1 --corpus="$file" --seed="$seed"
run p2_contrast.py p2 --init_from="$out/p1/ckpt.pt"
run p3_jitter.py p3 --init_from="$out/p2/ckpt.pt"
run p4_decoder.py p4 --init_from="$out/p3/ckpt.pt"
run p5_roundtrip.py p5 --init_from="$out/p4/ckpt.pt"
run p6_diffusion.py p6_control --init_from="$out/p5/ckpt.pt" --lambda_prior=0
run p6_diffusion.py p6 --init_from="$out/p5/ckpt.pt" --control="$out/p6_control"
python plot.py --out="$out" --gates=true
python -m tools.page --init_from="$out/p6/ckpt.pt" --p4="$out/p4/ckpt.pt" --out="$out/page"
echo "P1 to P6 took $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s"
