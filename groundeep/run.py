"""Train the whole system and print what it can do.

An image DBN learns dot arrays, a text RBM learns number words, and a joint RBM over their latents learns what goes
together; nothing is told what a number is. Then it names held-out images, draws words, compares images, and its layers
are compared with number and with what goes along with number.

Reads:  stimuli (made on first use); with --unimodal a checkpoint of another run
Writes: out_dir/ckpt.pt, run.json, metrics.jsonl, results.json, plots/
    python -m groundeep.run
    python -m groundeep.run --resume=true        # go on after Ctrl-C; on a finished run: evaluate and draw again
    python -m groundeep.run --hot_gibbs=false    # one device off; ablate.py does this for each
"""
import json
import os
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

import plot
import runtime
from groundeep import diagnose, evaluate, stimuli
from groundeep.dbn import DBN, batches, schedule
from groundeep.joint import IMAGE, TEXT, Devices, Joint

out_dir = 'out/groundeep/run'    # run folder: checkpoint, metrics, results, plots
resume = False                   # go on from out_dir/ckpt.pt
seed = 0                         # weights, batches, chains
device = 'auto'                  # cuda, mps or cpu
unimodal = ''                    # a checkpoint to take a trained image DBN and text RBM from; '': train them
# stimuli: see stimuli.py
folder = 'out/groundeep'         # where they are, or are put
data_seed = 0
side = 20                        # pixels
max_number = 9                   # to 32 works, with --side=36 --item_area=0.0025
train_images = 40_000
held_out_images = 1600           # of each of validation and test
frequency = 'uniform'            # of numbers in training: uniform or zipf
item_area = 0.008                # smallest disc, as a share of the image
size_octaves = 1.0
spacing_octaves = 1.0
text = 'words'                   # words, digits or mixed
# sizes
image_layers = '1000'            # hidden units of the image DBN, bottom up; 300,300 holds the number worse (docs/LOG.md)
text_hidden = 40                 # units of z_txt
joint_hidden = 500               # units of the joint RBM
# training
batch_size = 100                 # also the number of persistent chains
greedy = False                   # image DBN layer by layer; false: all layers on every batch (iterative)
image_epochs = 40                # of each layer when greedy, of all together when iterative
text_epochs = 15                 # cheap: a few words
joint_epochs = 20
image_lr = 0.1                   # each rate falls linearly to a tenth over its stage
text_lr = 0.05
joint_lr = 0.1
image_k = 1                      # Gibbs steps of the negative phase
joint_k = 1
image_persistent = False         # PCD in the DBNs; the joint RBM has it with mitigation
first_momentum = 0.5             # for the first momentum_epochs of a stage (Hinton 2012, section 9)
last_momentum = 0.9
momentum_epochs = 5
weight_decay = 1e-4
sparsity = 0.1                   # target activity of a hidden unit
sparsity_cost = 0.05             # how hard its bias is pulled there, in the image DBN; 0: not at all
# the document's devices: see joint.py
balance = True                   # gradient and variance balancing of the sub-spaces
warmup = True                    # auxiliary clamping before, among or (clamp_share=1) instead of free-phase updates
enumeration = True               # half of p(z_txt|z_img) in warm-up is summed over the texts of the batch
hot_gibbs = True                 # generating chains are annealed from a high temperature
gain = False                     # dynamic gain control
mitigation = True                # of mode collapse: persistent chains that are partly restarted, in free phases
warmup_epochs = 10
clamp_share = 1.0                # 0.5: a free phase in every other batch after the warm-up
draw_every = 8                   # of so many clamped batches one learns to draw, the others to name
clamp_steps = 5
hot = 0.5                        # inverse temperature at the start of a hot chain
refresh = 0.01
gain_rate = 0.01
# evaluation
chain_steps = 100                # of IMG->TXT and TXT->IMG
samples = 20                     # drawings of each word
name_upto = 9                    # the table's IMG->TXT is over 1 ... this
draw_upto = 5                    # its TXT->IMG over 1 ... this
judge_epochs = 8
permutations = 500               # of the RSA
watch = 200                      # validation images that the diagnostics of each epoch are computed on
save_every = 5                   # epochs between checkpoints
config = runtime.configure(globals())

HOLDS = ('step', 'config', 'net', 'rng')     # keys of a checkpoint
# What may differ between a checkpoint and the run that goes on from it.
FREE = {'out_dir', 'resume', 'device', 'folder', 'chain_steps', 'samples', 'name_upto', 'draw_upto', 'judge_epochs',
        'permutations', 'save_every', 'hot_gibbs', 'hot', 'watch'}


def sizes_of(text):
    """'500,300' -> [500, 300]. Raises SystemExit(2), after one line, on anything else."""
    parts = text.split(',')
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        runtime.fail(f'--image_layers={text}: expects sizes, bottom up, such as 500,500')
    return [int(part) for part in parts]


def check(config):
    """SystemExit(2), after one line, for settings that cannot be run."""
    for key in ('text_hidden', 'joint_hidden', 'image_epochs', 'text_epochs', 'joint_epochs', 'image_k', 'joint_k',
                'draw_every', 'clamp_steps', 'judge_epochs', 'save_every', 'name_upto', 'draw_upto'):
        if config[key] < 1:
            runtime.fail(f'--{key}={config[key]}: expects at least 1')
    for key, low, high in (('chain_steps', 10, 10**6), ('samples', 2, 10**4), ('watch', 3, config['held_out_images']),
                           ('batch_size', 2, config['train_images']), ('hot', 0, 1), ('clamp_share', 0, 1),
                           ('refresh', 0, 1), ('sparsity', 0, 1), ('first_momentum', 0, 0.999),
                           ('last_momentum', 0, 0.999), ('permutations', 0, 10**6), ('seed', 0, 2**62)):
        if not low <= config[key] <= high:
            runtime.fail(f'--{key}={config[key]}: expects {low} to {high}')
    for key in ('image_lr', 'text_lr', 'joint_lr', 'weight_decay', 'sparsity_cost', 'gain_rate', 'warmup_epochs',
                'momentum_epochs'):
        if config[key] < 0:
            runtime.fail(f'--{key}={config[key]}: expects at least 0')
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        runtime.fail('groundeep runs in one process; start it without torchrun')


def build(config):
    """The untrained Joint of the settings, on the CPU."""
    chains = config['batch_size']
    image = DBN([config['side'] ** 2, *sizes_of(config['image_layers'])], chains=chains)
    text = DBN([0, config['text_hidden']], groups=stimuli.LENGTH, classes=len(stimuli.ALPHABET), chains=chains)
    devices = Devices(**{field.name: config[field.name] for field in fields(Devices)})
    return Joint(image, text, config['joint_hidden'], chains, devices)


def stages_of(config):
    """The whole training, an entry an epoch: [(stage, epoch of the stage, layers that learn, epochs of the stage)]."""
    layers = len(sizes_of(config['image_layers']))
    plan = schedule('image', layers, config['image_epochs'], config['greedy'])
    plan += schedule('text', 1, config['text_epochs'], greedy=True)
    plan += [('joint', epoch, ()) for epoch in range(config['joint_epochs'])]
    return [(*entry, config[f'{entry[0]}_epochs']) for entry in plan]


def train_epoch(joint, part, stage, epoch, layers, epochs, config):
    """One epoch of one stage on tensors {'image', 'text'}."""
    how = {'lr': config[f'{stage}_lr'] * (1 - 0.9 * epoch / epochs), 'weight_decay': config['weight_decay'],
           'momentum': config['last_momentum' if epoch >= config['momentum_epochs'] else 'first_momentum'],
           'sparsity': config['sparsity'], 'sparsity_cost': config['sparsity_cost']}
    if stage != 'image':      # a few words: a sparse code would have to be shared by them
        how['sparsity_cost'] = 0.0
    for batch, rows in enumerate(batches(len(part['image']), config['batch_size'], part['image'].device)):
        if stage == 'joint':
            joint.learn(part['image'][rows], part['text'][rows], batch, epoch, k=config['joint_k'], **how)
        else:
            dbn = joint.image if stage == 'image' else joint.text
            dbn.learn(part[stage][rows], layers, k=config['image_k'], persistent=config['image_persistent'], **how)


def errors(joint, part, stage):
    """{'error/<layer>': reconstruction error} of the machines that learn in a stage, on a split {'image', 'text'}."""
    if stage == 'joint':
        return {'error/joint': joint.rbm.reconstruction_error(joint.latents(part['image'], part['text'])).item()}
    found, v = {}, part[stage]
    for i, rbm in enumerate((joint.image if stage == 'image' else joint.text).layers):
        found[f'error/{stage} {i + 1}'] = rbm.reconstruction_error(v).item()
        v = rbm.hidden(v)
    return found


def codes(joint, part, stage='joint'):
    """{layer: (N, units) NumPy} of a split {'image', 'text'}: each image layer, z_img, z_txt, and the joint code of the
    image alone (the model fills in the text itself, so that no layer but z_txt is told the word). With a stage, of the
    layers that have begun to learn by then."""
    up = joint.image.up(part['image'])[:-1]
    found = {f'image {i + 1}': layer for i, layer in enumerate(up)} | {'z_img': joint.latent(part['image'], IMAGE)}
    if stage != 'image':
        found['z_txt'] = joint.latent(part['text'], TEXT)
    if stage == 'joint':
        found['joint'] = joint.joint_code(part['image'])
    return {name: z.cpu().numpy() for name, z in found.items()}


def watched(joint, part, models, words, config, stage):
    """Diagnostics of an epoch on a few validation stimuli: reconstruction errors, statistics and RSA of each layer; in
    the joint stage also the alignment of z_img and z_txt, naming, drawing and the distinct drawings of a word."""
    found, layers = errors(joint, part, stage), codes(joint, part, stage)
    for name, z in layers.items():
        found |= {f'{key}/{name}': value for key, value in diagnose.layer_statistics(z).items()}
        rho = diagnose.rsa(diagnose.code_distances(z), models, permutations=0, seed=0)
        found |= {f'rsa {model}/{name}': value for model, (value, _) in rho.items()}
    if stage == 'joint':
        found |= {'alignment/cka': diagnose.alignment(layers['z_img'], layers['z_txt']),
                  'gain/z_img': joint.gain[IMAGE].item(), 'gain/z_txt': joint.gain[TEXT].item()}
        named = evaluate.name_images(joint, part['image'], words, config['chain_steps'])
        true = part['number'].cpu().numpy()
        found |= {f'named/{name}': evaluate.scores(said, true, config['name_upto'])['exact']
                  for name, said in named.items()}
        strings = [s for s, n in words.items() if n <= config['draw_upto']]
        drawn = evaluate.draw_words(joint, strings, 10, config['chain_steps'], part['image'].device) > 0.5
        counted = evaluate.count_components(drawn.flatten(0, 1).cpu().numpy(), config['side'])
        found['drawn/counter'] = float((counted == np.repeat([words[s] for s in strings], 10)).mean())
        found['distinct/share'] = evaluate.diversity(drawn.cpu().numpy())['distinct']
    return found


def as_tensors(split, device, rows=None):
    """A split of `stimuli` on the device: image (N, pixels) and text (N, characters) float32, number (N,)."""
    rows = slice(rows)
    return {'image': torch.as_tensor(split['image'][rows], dtype=torch.float32, device=device),
            'text': torch.as_tensor(stimuli.one_hot(split['text'][rows]), device=device),
            'number': torch.as_tensor(split['number'][rows], device=device)}


def save(run, step, joint):
    """Write the checkpoint; after Ctrl-C, end with status 130."""
    cuda = torch.cuda.get_rng_state(run.device) if run.device.type == 'cuda' else None
    runtime.write_checkpoint(run.checkpoint, {
        'phase': run.phase, 'step': step, 'config': dict(run.config), 'commit': run.commit,
        'net': dict(joint.state_dict()), 'rng': {'cpu': torch.get_rng_state(), 'cuda': cuda}})
    run.saved_step = step
    if run.interrupted:
        run.say(f'interrupted: saved {run.checkpoint} at step {step}; go on with --resume=true')
        raise SystemExit(130)


def restore(run, joint):
    """With --resume=true, take over the checkpoint's weights, chains and random state; returns its step, else 0.

    SystemExit(2), after one line, when it was made with other settings than those that may change (FREE).
    """
    if not (run.config['resume'] and run.checkpoint.exists()):
        runtime.start_over(run)
        return 0
    checkpoint = runtime.load_checkpoint(run.checkpoint, run.phase, 'python -m groundeep.run --resume=false', HOLDS)
    for key, value in checkpoint['config'].items():
        if key not in FREE and run.config.get(key) != value:
            runtime.fail(f'{run.checkpoint} was made with --{key}={runtime.as_text(value)}, not '
                         f'{runtime.as_text(run.config.get(key))}; use that, or --resume=false')
    joint.load_state_dict(checkpoint['net'])
    torch.set_rng_state(checkpoint['rng']['cpu'])
    if run.device.type == 'cuda' and checkpoint['rng']['cuda'] is not None:
        torch.cuda.set_rng_state(checkpoint['rng']['cuda'], run.device)
    run.saved_step = checkpoint['step']
    log = run.dir / 'metrics.jsonl'
    kept = [json.dumps(row) + '\n' for row in plot.read_lines(log) if row['step'] < run.saved_step]
    log.with_suffix('.tmp').write_text(''.join(kept), encoding='utf-8')
    os.replace(log.with_suffix('.tmp'), log)
    run.say(f'resumed {run.checkpoint} at step {run.saved_step}')
    return run.saved_step


def take_over(joint, config):
    """With --unimodal, copy the image DBN and the text RBM of that checkpoint; SystemExit(2), after one line, when it
    was made with other settings of theirs."""
    path = config['unimodal']
    checkpoint = runtime.load_checkpoint(path, 'groundeep', 'python -m groundeep.run', HOLDS)
    for key, value in checkpoint['config'].items():
        if (key in stimuli.SETTINGS or key.startswith(('image_', 'text_')) or key == 'batch_size') \
                and config[key] != value:
            runtime.fail(f'{path} was made with --{key}={runtime.as_text(value)}, not {runtime.as_text(config[key])}')
    for name, dbn in (('image.', joint.image), ('text.', joint.text)):
        dbn.load_state_dict({key.removeprefix(name): value for key, value in checkpoint['net'].items()
                             if key.startswith(name)})


# ---- the evaluation at the end --------------------------------------------------------------------------------------

def report(run, joint, splits, config):
    """Everything that is measured on the test split; draws the figures. Returns a nested dict of numbers."""
    side, upto = config['side'], config['draw_upto']
    words = stimuli.lexicon(config['max_number'], config['text'])
    test, true = as_tensors(splits['test'], run.device), splits['test']['number']
    train = as_tensors(splits['train'], run.device)
    run.say('evaluation: the judges')
    judge = evaluate.train_judge(train['image'], train['number'], side, config['max_number'], config['judge_epochs'],
                                 run.device)
    found = {'judges on real images': {
        'counter': float((evaluate.count_components(splits['test']['image'], side) == true).mean()),
        'classifier': float((judge.count(test['image']) == true).mean())}}

    run.say('evaluation: IMG->TXT and its baselines')
    named = evaluate.name_images(joint, test['image'], words, config['chain_steps'])
    found['img_to_txt'] = {name: evaluate.scores(said, true, config['name_upto']) for name, said in named.items()}
    found['img_to_txt'] |= evaluate.baselines(splits['train'], splits['test'], config['name_upto'], config['seed'])
    found['img_to_txt_all'] = {name: evaluate.scores(said, true) for name, said in named.items()}

    run.say('evaluation: TXT->IMG')
    strings = list(words)
    numbers = np.array([words[s] for s in strings])
    drawn = evaluate.draw_words(joint, strings, config['samples'], config['chain_steps'], run.device)
    found['txt_to_img'], counted = evaluate.drawing_scores(drawn, numbers, side, judge, upto)
    found['txt_to_img_baselines'] = evaluate.drawing_baselines(splits['train'], numbers, config['samples'], side, upto,
                                                               config['seed'])

    run.say('evaluation: RSA and comparisons')
    layers = codes(joint, test)
    few = np.concatenate([np.flatnonzero(true == n)[:10] for n in np.unique(true)])    # 10 a number, sorted by it
    models = diagnose.model_distances({name: value[few] for name, value in splits['test'].items()})
    distances = {name: diagnose.code_distances(z[few]) for name, z in layers.items()}
    found['rsa'] = {name: {model: {'rho': rho, 'p': p} for model, (rho, p) in
                           diagnose.rsa(d, models, config['permutations'], config['seed']).items()}
                    for name, d in distances.items()}
    rows = 20_000                                                                      # of training, for the read-outs
    train_codes = codes(joint, {name: value[:rows] for name, value in train.items()})
    design = {'number': np.log2(true), 'size': splits['test']['log_size'], 'spacing': splits['test']['log_spacing']}
    found['readout'] = {}
    for name in [name for name in layers if name != 'z_txt']:
        estimate = evaluate.readout(train_codes[name], splits['train']['number'][:rows], layers[name])
        choice, ratios = evaluate.comparisons(estimate, design, config['seed'])
        found['readout'][name] = {
            'weber': evaluate.weber_fraction(choice, ratios['number']),
            'r': evaluate.correlation(estimate, design['number']),
            **{f'weight of {key}': value for key, value in evaluate.choice_weights(choice, ratios).items()}}
    # What a reader with labels gets out of a layer: the ceiling of naming from it by anything as simple as a line.
    found['img_to_txt'] |= {f'logistic on {name}': evaluate.scores(
        evaluate.logistic(train_codes[name], splits['train']['number'][:rows], layers[name]), true, config['name_upto'])
        for name in ('z_img', 'joint')}
    found['layers'] = {name: diagnose.layer_statistics(z) for name, z in layers.items()}
    found['alignment'] = diagnose.alignment(layers['z_img'], layers['z_txt'])

    naming = evaluate.naming_curve(named['chain'], true)
    drawing = evaluate.naming_curve(counted.ravel(), np.repeat(numbers, config['samples']))
    weber = found['readout']['joint']['weber']                    # `choice` and `ratios` are the joint layer's too
    figures = {'filters': diagnose.filters(joint.image.layers[0].W.cpu(), side),
               'reconstructions': reconstructions(joint, test, true, side),
               'drawings': diagnose.picture_grid([row[:10].cpu() for row in drawn], side, strings),
               'chains': chains_over_time(joint, strings[:9], config, run.device),
               'rsa': diagnose.rsa_figure(distances, models, found['rsa']),
               'joint_code': diagnose.code_map(layers['joint'][few], true[few]),
               'behaviour': diagnose.behaviour(choice, ratios['number'], weber, naming, drawing),
               'trends': diagnose.trends([{key.partition('/')[2] or key: value for key, value in row.items()}
                                          for row in plot.read_lines(run.dir / 'metrics.jsonl')])}
    for name, fig in figures.items():
        plot.save(fig, run.dir / 'plots' / f'{name}.png')
    return found


def reconstructions(joint, test, true, side):
    """Test images of a few numbers, and what comes back from each layer."""
    first = [np.flatnonzero(true == n)[0] for n in np.unique(true)[:16]]
    images = test['image'][first]
    rows = [images, *(there_and_back(joint.image, images, depth) for depth in range(1, len(joint.image.layers) + 1))]
    titles = ['image', *(f'from layer {depth}' for depth in range(1, len(rows)))]
    return diagnose.picture_grid([row.cpu() for row in rows], side, titles, [str(true[i]) for i in first])


def there_and_back(dbn, v, depth):
    """v up through `depth` layers of a DBN and down again."""
    for rbm in dbn.layers[:depth]:
        v = rbm.hidden(v)
    for rbm in reversed(dbn.layers[:depth]):
        v = rbm.visible(v)
    return v


def chains_over_time(joint, strings, config, device):
    """One chain of TXT->IMG for each string: the drawing at ten moments of it."""
    codes = torch.as_tensor(stimuli.one_hot(stimuli.encode_text(strings)), device=device)
    steps = config['chain_steps']
    states = joint.complete(joint.latent(codes, TEXT), TEXT, steps, keep=steps)
    moments = np.unique(np.linspace(0, steps - 1, 10).round().astype(int))
    rows = torch.stack([joint.image.down(states[i]) for i in moments], dim=1).cpu()
    return diagnose.picture_grid(list(rows), config['side'], strings, [f'step {i + 1}' for i in moments])


def table(found, config):
    """The results as aligned text, one line a measurement."""
    lines = [('', 'exact', 'within 1')]
    named, drawn = (f"1-{min(config[key], config['max_number'])}" for key in ('name_upto', 'draw_upto'))
    for name, row in found['img_to_txt'].items():
        lines.append((f'IMG->TXT {named}, {name}', f"{row['exact']:.3f}", f"{row['near']:.3f}"))
    t = found['txt_to_img']
    for judge in ('counter', 'classifier'):
        real = found['judges on real images'][judge]
        lines.append((f'TXT->IMG {drawn}, {judge} ({real:.3f} on real images)',
                      f"{t[f'{judge}_exact']:.3f}", f"{t[f'{judge}_near']:.3f}"))
    for name, row in found['txt_to_img_baselines'].items():
        lines.append((f'TXT->IMG {drawn}, {name}, counter', f"{row['exact']:.3f}", f"{row['near']:.3f}"))
    lines.append(('TXT->IMG chance: the same drawings, dealt to other words', f"{t['chance_exact']:.3f}", ''))
    lines.append(('diversity: distinct drawings of a word, 1 - overlap of two', f"{t['distinct']:.3f}",
                  f"{t['distance']:.3f}"))
    for name, row in found['rsa'].items():
        text = ', '.join(f"{model} {value['rho']:+.2f}" for model, value in row.items())
        lines.append((f'RSA {name}: {text}', '', ''))
    for name, row in found['readout'].items():
        lines.append((f"read-out from {name}: Weber fraction, r with log number", f"{row['weber']:.3f}",
                      f"{row['r']:.3f}"))
    width = max(len(line[0]) for line in lines if line[1])
    return '\n'.join('  '.join((line[0].ljust(width), *(cell.rjust(8) for cell in line[1:]))).rstrip()
                     for line in lines)


def without_nan(value):
    """value with each NaN and infinity in its dicts and lists as None: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return runtime.finite(value)


def main():
    check(config)
    sizes_of(image_layers)
    run = runtime.start('groundeep', config | {'grad_accum': 1, 'dtype': 'float32'})
    run.config = config
    splits = stimuli.load(folder, config, run.say)
    joint = build(config).to(run.device)
    train, val = as_tensors(splits['train'], run.device), as_tensors(splits['val'], run.device, watch)
    models = diagnose.model_distances({name: value[:watch] for name, value in splits['val'].items()})
    words = stimuli.lexicon(max_number, text)
    first = restore(run, joint)
    if first == 0:
        joint.image.layers[0].start_biases(train['image'].mean(0))
        joint.text.layers[0].start_biases(train['text'].mean(0))
    plan = stages_of(config)
    if first == 0 and unimodal:
        take_over(joint, config)
        first = next(i for i, entry in enumerate(plan) if entry[0] == 'joint')
    began = time.monotonic()

    for step in run.steps(first, len(plan)):
        if step % save_every == 0 or step == len(plan) or run.interrupted:
            save(run, step, joint)
        if step == len(plan):
            break
        stage, epoch, layers, epochs = plan[step]
        if stage == 'joint' and epoch == 0:      # the latents' means are known only now
            joint.rbm.start_biases(joint.latents(train['image'], train['text']).mean(0))
        train_epoch(joint, train, stage, epoch, layers, epochs, config)
        if not all(value.isfinite().all() for value in joint.state_dict().values()):
            runtime.fail(f'step {step}: weights are not finite; last good checkpoint: {run.last_good()}; lower '
                         f'--{stage}_lr', status=1)
        # Looking must not change what comes next, or a run that looks at less would learn something else.
        with torch.random.fork_rng({run.device} if run.device.type == 'cuda' else ()):
            found = watched(joint, val, models, words, config, stage)
        run.log(step, found, prefix='val')
        run.latest = f'{stage} ' + ', '.join(f"{name.partition('/')[2]} {value:.4f}" for name, value in found.items()
                                             if name.startswith('error/'))

    found = report(run, joint, splits, config) | {'seconds': time.monotonic() - began, 'config': config}
    temporary = Path(run.dir / 'results.json.tmp')
    runtime.write_json(temporary, without_nan(runtime.plain(found)))
    os.replace(temporary, run.dir / 'results.json')
    run.say(table(found, config))
    run.say(f"{found['seconds']:.0f} s, written to {run.dir}")


if __name__ == '__main__':
    main()
