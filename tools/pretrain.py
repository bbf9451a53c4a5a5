"""The model that comes with the repository, made from a chain that has ended.

It is P6's or, if fewer of the criteria that the gates of both hold pass there, P5's: the averaged weights alone,
rounded to 16 bits. What the rounding costs is measured on the test scenes.

Reads:  out/p1 ... out/p6
Writes: pretrained/model.pt, onnx/ (for playground/), gates.json, gates.txt, README.md
    bash runs/cpu.sh && python -m tools.pretrain
    bash runs/english.sh && python -m tools.pretrain --out=out/english --to=pretrained/english --onnx=false
"""
import shlex
from pathlib import Path

import torch

import data
import p5_roundtrip
import plot
import runtime
from metrics import last_evaluations
from sample import TextCanvas
from tools.export import export

out = 'out'               # the folder that holds the run folders of the chain
to = 'pretrained'         # where it is written
onnx = True               # also export it for playground/
map_scenes = 400          # of the ONNX export, see tools/export.py
dtype = 'auto'            # autocast while it is measured, as of the phases
config = runtime.configure(globals())

PHASES = [path.name[:2] for path in runtime.scripts('p6')]


def still(name):
    """A criterion of P5's gate as P6's gate names it."""
    return name if name.startswith('still: ') else f'still: {name}'


def choose(gates):
    """'p6' or 'p5', and why in one sentence; gates: {phase: gate.json}."""
    if 'p6' not in gates:
        return 'p5', 'It is P5: there is no P6 that has ended.'
    before = {still(row['name']): row['pass'] for row in gates['p5']['criteria']}
    after = {row['name']: row['pass'] for row in gates['p6']['criteria'] if row['name'] in before}
    passed = {'p5': sum(before[name] for name in after), 'p6': sum(after.values())}
    phase = 'p6' if passed['p6'] >= passed['p5'] else 'p5'
    return phase, (f"It is {phase.upper()}: of the {len(after)} criteria that the gates of both hold P5 passes "
                   f"{passed['p5']} and P6 {passed['p6']}.")


def rounded(checkpoint):
    """What of a checkpoint is needed to use it, its averaged weights in 16 bits."""
    ema = {name: {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
           for name, weights in checkpoint['ema'].items()}
    state = {key: checkpoint['state'][key] for key in ('tokenizer', 'mean', 'std') if key in checkpoint['state']}
    kept = 'phase', 'step', 'arch', 'config', 'commit', 'metrics', 'origins'
    return {key: checkpoint[key] for key in kept} | {'ema': ema, 'state': state}


def measure(path, evaluations, text):
    """Rows of P5's gate for the model in a file, on the test scenes; evaluations: of the run that made it, for the
    criteria that ask for three in a row."""
    model = TextCanvas(path, 'cpu', dtype)
    metrics, ways, *_ = p5_roundtrip.evaluate(model.nets, text.splits['test'], text, model.config, model.autocast)
    return p5_roundtrip.gate(ways, metrics, [*evaluations[-3:-1], metrics], text.checked)


def cost_table(full, half):
    """Markdown: what the rows of a gate measure with weights of 32 bits and of 16."""
    def measured(value, passed):
        return f'{value:.4g}' if passed else f'**{value:.4g} FAIL**'

    lines = ['| criterion | target | float32 | float16 |', '|---|---|---|---|']
    for (name, target, value, passed, *_), (_, _, value_half, passed_half, *_) in zip(full, half):
        lines.append(f'| {name} | {target} | {measured(value, passed)} | {measured(value_half, passed_half)} |')
    return '\n'.join(lines)


README = '''# The model that comes with the repository

Made by `tools/pretrain.py` from a run of all phases, trained on {sentences}. {choice}

- `model.pt`: its settings and its averaged weights ({nets}), rounded to 16 bits. {use}
- `gates.json`, `gates.txt`: what each phase was asked and reached.

To make it again:

```
{again}
```

Checkpoint of {phase}, step {step}, commit {commit}; {hardware}, {dtype}, torch {torch}. Its phases were run as

```
{commands}
```

## What 16 bits cost

The criteria of P5, which repeat those of P1 to P4, on the test scenes, measured by `tools/pretrain.py` with the
averaged weights as the run left them and rounded as they are here:

{table}
'''


def readme(checkpoint, folders, choice, table):
    """The text of README.md; folders: of the chain, with their run.json."""
    phase, settings = checkpoint['phase'], checkpoint['config']
    facts = {folder.name: plot.read_json(folder / 'run.json', ('argv', 'commit', 'hardware', 'dtype', 'versions'))
             for folder in folders}
    chain, here = [f'--out={out}'] * (out != 'out'), [f'--to={to}'] * (to != 'pretrained')
    english, file = settings['corpus'], [] if Path(settings['corpus']).stem == 'wordnet' else [settings['corpus']]
    run = ['bash', 'runs/english.sh', *file, *chain] if english else ['bash', 'runs/cpu.sh', *chain]
    again = run, ['python', '-m', 'tools.pretrain', *chain, *here, *['--onnx=false'] * (not onnx)]
    named = Path(to).parent == Path('pretrained')
    use = (f'For `sample.py --model={Path(to).name}`.' if named else f'For `sample.py --init_from={to}/model.pt`.'
           if here else '`sample.py` uses it as long as `out/`\n  holds no newer model.')
    if onnx:
        use += '\n- `onnx/`: the same for the playground, `python -m playground`.'
    sizes = {name: sum(map(torch.numel, weights.values())) / 1e6 for name, weights in checkpoint['ema'].items()}
    grammar = f"{settings['num_scenes']} scenes of the built-in grammar, complexity {settings['complexity']}"
    return README.format(
        sentences=settings['corpus'] or grammar, choice=choice, table=table,
        use=use, nets=', '.join(f'{name} {size:.2f}M' for name, size in sizes.items()),
        again=' && '.join(map(shlex.join, again)), phase=phase.upper(), step=checkpoint['step'],
        commit=runtime.short(checkpoint['commit']), hardware=facts[phase]['hardware'],
        dtype=facts[phase]['dtype'].removeprefix('torch.'), torch=facts[phase]['versions']['torch'],
        commands='\n'.join(f"{shlex.join(['python', *run['argv']])}    # {runtime.short(run['commit'])}"
                           for run in facts.values()))


def main():
    folders = [folder for folder in (Path(out, phase) for phase in PHASES) if (folder / 'gate.json').is_file()]
    gates = {folder.name: plot.read_json(folder / 'gate.json', ('phase', 'pass', 'criteria')) for folder in folders}
    if 'p5' not in gates:
        runtime.fail(f'{out}/p5/gate.json does not exist: P5 has not ended; run: bash runs/cpu.sh')
    phase, choice = choose(gates)
    trained, model = Path(out, phase, 'ckpt.pt'), Path(to, 'model.pt')
    checkpoint = runtime.load_checkpoint(trained, phase, 'bash runs/cpu.sh')
    print(choice, flush=True)
    text = data.load(runtime.Config(checkpoint['config']), checkpoint=checkpoint)
    model.parent.mkdir(parents=True, exist_ok=True)
    runtime.write_checkpoint(model, rounded(checkpoint))
    if onnx:
        export(model, Path(to, 'onnx'), halved=True, scenes=map_scenes)
    table = cost_table(*(measure(path, last_evaluations(trained.parent), text) for path in (trained, model)))
    print(table)
    runtime.write_json(Path(to, 'gates.json'), gates)
    runtime.write_text(Path(to, 'gates.txt'), plot.gates_text(folders) + '\n')
    runtime.write_text(Path(to, 'README.md'), readme(checkpoint, folders, choice, table))
    size = sum(path.stat().st_size for path in Path(to).rglob('*') if path.is_file())
    print(f'wrote {to}: {model.stat().st_size / 1e6:.1f} MB of weights, {size / 1e6:.1f} MB in all')


if __name__ == '__main__':
    main()
