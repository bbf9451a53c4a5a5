"""Sizes and steps of every preset, as words of a phase's command line. A phase takes what is not here from the
checkpoint before it, so a setting that holds for several phases stands in the first of them.

    python runs/presets.py cpu p1          # prints the words, for the scripts of this folder
"""
import sys


def steps(count, warmup, every, rate):
    """How long a phase is, and its learning rate."""
    return (f'--max_steps={count} --lr_steps={count} --warmup_steps={warmup} --eval_every={every} '
            f'--learning_rate={rate}')


# The plan's 0.05 for cov and var is too weak for a small model; its tv and wavelet press the gradients' kurtosis to
# twice that of photographs (docs/LOG.md).
PRIORS = '--lambda_cov=0.5 --lambda_var=0.5 --lambda_tv=0.05 --lambda_wavelet=0.05'
GRAMMAR = '--num_scenes=20000'
CONTRAST = '--temperature=0.1 --mine_every=250'       # at the plan's 0.07 the gaps of attributes stop growing near 0.25
LATTICE = '--lambda_lattice=0.2', '--lambda_lattice=0.05'      # jitter brings the query grid out: in P3, and after it
PULL = '--encoder_scale=1 --lambda_prior=1 --t_low=0.4 --t_high=0.8'     # at a small t the prior smooths and no more

PRESETS = {
    # Two CPU cores, half an hour with bf16.
    'cpu': {
        'p1': f'{GRAMMAR} --vocab_size=768 --query_grid=8 --patch=4 --dim=128 --layers=3 --heads=4 --hidden=256 '
              '--cross_layers=2 --cross_hidden=256 --rec_dim=128 --rec_layers=2 --dropout=0 --batch_size=64 '
              f'--prior_samples=32 {PRIORS} --ema_decay=0.99 --log_every=20 ' + steps(800, 50, 100, 2e-3),
        'p2': f'--batch_size=16 --rec_samples=48 {CONTRAST} ' + steps(2000, 50, 250, 1e-3),
        'p3': f'{LATTICE[0]} ' + steps(300, 20, 100, 5e-4),
        'p4': '--dec_dim=128 --dec_layers=2 --dec_heads=4 --dec_hidden=256 --dec_dropout=0 --batch_size=64 '
              + steps(1500, 50, 750, 2e-3),
        'p5': f'{LATTICE[1]} --batch_size=16 --dec_samples=64 --generated=16 ' + steps(300, 20, 100, 1e-3),
        # three evaluations of the encoder: 1000, 1150, 1300
        'p6': '--unet_dim=32 --unet_steps=1000 --unet_batch=32 --unet_learning_rate=1e-3 --buffer_size=2048 '
              f'--refresh=16 --prior_rows=16 --drawn=64 --sample_steps=30 {PULL} ' + steps(1300, 20, 1150, 5e-4)},
    # The plan's sizes and batch, for the steps and with the recipe of `cpu`; rates are a third of those there, for the
    # nets are three times as wide. The plan's lengths and weights are the scripts' defaults.
    'gpu': {
        'p1': f'{GRAMMAR} --dropout=0 {PRIORS} --ema_decay=0.99 ' + steps(1500, 100, 500, 7e-4),
        'p2': f'{CONTRAST} ' + steps(2000, 50, 500, 3e-4),
        'p3': steps(300, 20, 100, 1.7e-4),
        'p4': '--dec_dropout=0 ' + steps(1500, 50, 750, 7e-4),
        'p5': steps(300, 20, 100, 3e-4),
        'p6': f'--unet_steps=1000 {PULL} ' + steps(1300, 20, 1150, 1.7e-4)},
    # A minute: everything runs, no gate passes.
    'smoke': {
        'p1': '--num_scenes=300 --vocab_size=1024 --query_grid=8 --patch=4 --dim=32 --layers=1 --heads=2 --hidden=64 '
              '--cross_layers=1 --cross_hidden=64 --rec_dim=32 --rec_layers=1 --batch_size=8 --log_every=1 '
              '--device=cpu ' + steps(4, 1, 2, 2e-4),
        'p2': '--batch_size=4 --readout_hidden=32 --z_dim=32 ' + steps(4, 1, 2, 2e-4),
        'p3': steps(4, 1, 2, 1e-4),
        'p4': '--batch_size=8 --dec_dim=32 --dec_layers=1 --dec_heads=2 --dec_hidden=64 ' + steps(4, 1, 2, 1e-4),
        'p5': '--batch_size=4 --generated=4 ' + steps(4, 1, 2, 1e-4),
        'p6': '--unet_dim=8 --unet_steps=1 --unet_batch=8 --buffer_size=64 --sample_steps=4 --drawn=8 '
              + steps(4, 1, 2, 1e-4)}}

# Ordinary English (runs/english.sh). A small vocabulary, so that few tokens are rare; sentences joined and tokens replaced,
# so that long sentences and rare tokens are read too; attention aligned, or reading is learnt ten times later; a gist
# of the words, or contrast finds its pairs late (docs/LOG.md). Measured to P5, with P4 of 700 steps without controls.
ENGLISH = '--vocab_size=2048 --random_tokens=0.1 --joined=0.5 --aligned=true --gist=4'
PRESETS['english'] = {
    'p1': f'{ENGLISH} --query_grid=8 --patch=4 --dim=192 --layers=2 --heads=6 --hidden=768 --cross_layers=1 '
          '--cross_hidden=384 --rec_dim=192 --rec_layers=3 --dropout=0 --batch_size=32 --prior_samples=16 '
          f'{PRIORS} --ema_decay=0.99 ' + steps(800, 200, 100, 1.5e-3),
    'p2': '--batch_size=128 --negatives=1 --rec_samples=16 --temperature=0.05 --leave_out= --mine_every=0 '
          + steps(800, 50, 200, 1e-3),
    'p3': f'{LATTICE[0]} --batch_size=32 --rec_samples=32 ' + steps(100, 20, 50, 5e-4),
    'p4': '--dec_dim=192 --dec_layers=3 --dec_heads=6 --dec_hidden=768 --dec_dropout=0 --batch_size=32 '
          '--paraphrases=1 ' + steps(800, 100, 400, 1.5e-3),
    'p5': f'{LATTICE[1]} --batch_size=16 --dec_samples=32 --generated=16 ' + steps(100, 20, 50, 5e-4),
    'p6': '--unet_dim=32 --unet_steps=400 --unet_batch=32 --unet_learning_rate=1e-3 --buffer_size=2048 '
          f'--refresh=16 --prior_rows=16 --drawn=64 --sample_steps=30 {PULL} ' + steps(500, 20, 450, 5e-4)}
# What runs/gpu.sh --corpus= adds to `gpu`; never run.
PRESETS['english_gpu'] = {'p1': ENGLISH, 'p2': '--temperature=0.05 --leave_out='}
# What --long=true adds: four to eight times the steps of P2 and P4, at most a night; not run yet.
PRESETS['english_long'] = {
    'p1': '--max_steps=2000 --lr_steps=2000 --eval_every=250',
    'p2': '--batch_size=256 --rec_samples=32 --max_steps=6000 --lr_steps=6000 --eval_every=500',
    'p3': '--max_steps=300 --lr_steps=300 --eval_every=100',
    'p4': '--max_steps=3000 --lr_steps=3000 --eval_every=1000',
    'p5': '--max_steps=400 --lr_steps=400 --eval_every=100'}

# What runs/cpu.sh adds to `cpu`, the later word wins. plan: nothing that departs from the plan (docs/PLAN.md), all
# families constructed; three: scenes of three things, whose stages come twice.
PRESETS['plan'] = {
    'p1': '--lambda_cov=0.05 --lambda_var=0.05 --lambda_tv=0.1 --lambda_wavelet=0.1 --lambda_common=0 '
          '--lambda_lattice=0 --prior_gate=0 --prior_ramp=0 --simple_share=0 --lambda_rec=0 --canvas_noise=0',
    'p2': '--staged=false --pyramid=false --mine_every=0 --anchors=false --leave_out= --temperature=0.07',
    'p3': '--lambda_lattice=0 --mine_at_start=false',
    'p4': '--paraphrase_share=0',
    'p5': '--lambda_lattice=0',
    'p6': '--encoder_scale=0.2 --lambda_prior=0.1 --t_low=0.05 --t_high=0.3'}
PRESETS['three'] = {'p2': '--max_steps=4500 --lr_steps=4500', 'p4': '--max_steps=3000 --lr_steps=3000'}

# P7, all families of counterfactuals constructed. P2 is as long as in `cpu`: in half the steps the table shows little
# but when its stages end. The others are half as long and evaluated at their ends, P4 without its controls, and P6 has
# one joint step, for with that it measures what P5 did.
PRESETS['ablation'] = {
    'p1': f"{PRESETS['cpu']['p1']} " + steps(500, 50, 500, 2e-3),
    'p2': f"{PRESETS['cpu']['p2']} --leave_out= --eval_every=2000",
    'p3': f"{PRESETS['cpu']['p3']} " + steps(150, 20, 150, 5e-4),
    'p4': f"{PRESETS['cpu']['p4']} --controls=false " + steps(800, 50, 800, 2e-3),
    'p5': f"{PRESETS['cpu']['p5']} " + steps(150, 20, 150, 1e-3),
    'p6': '--unet_dim=32 --unet_steps=399 --unet_batch=32 --unet_learning_rate=1e-3 --buffer_size=2048 --refresh=16 '
          '--prior_rows=16 --drawn=64 --sample_steps=30 ' + steps(400, 100, 400, 1e-4)}
PRESETS['ablation_gpu'] = {
    'p1': '--ema_decay=0.99 --max_steps=4000 --lr_steps=4000', 'p2': '--leave_out= --max_steps=4000 --lr_steps=4000',
    'p3': '--max_steps=1000 --lr_steps=1000', 'p4': '--controls=false --max_steps=3000 --lr_steps=3000',
    'p5': '--max_steps=1000 --lr_steps=1000', 'p6': '--unet_steps=2999 --max_steps=3000 --lr_steps=3000'}
PRESETS['ablation_smoke'] = {phase: f'{words} {steps(2, 1, 2, 1e-4)}' + ' --controls=false' * (phase == 'p4')
                             for phase, words in PRESETS['smoke'].items()}


if __name__ == '__main__':
    preset, phase = sys.argv[1:]
    if preset not in PRESETS or phase not in PRESETS['cpu']:
        sys.exit(f'error: no {preset} {phase}: expects one of {", ".join(PRESETS)}, and one of '
                 f'{", ".join(PRESETS["cpu"])}')
    print(PRESETS[preset].get(phase, ''))
