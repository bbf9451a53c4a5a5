"""What a training script needs that is not its idea: settings, device, ranks, schedule, EMA, checkpoints, log, gate.

The loop itself stays in plain sight in each phase script; p1_canvas.py shows these functions in their places.
"""
import ast
import atexit
import csv
import difflib
import errno
import io
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import tokenize
import warnings
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

DIVERGED = 3             # exit status of a run whose loss or weights are no longer finite
PROGRESS_SECONDS = 20    # between two progress lines when stderr is not a terminal
EXPECTS = {int: 'a whole number', float: 'a finite number', bool: 'true or false', str: 'text'}
BOUNDS = re.compile(r'>= ([\d.]+)(?::|$)|([\d.]+) to ([\d.]+)(?::|$)')      # what a setting's comment may begin with
PURPOSES = 'scenes', 'jitter', 'diffusion', 'buffer', 'noise', 'words'      # what a step draws random numbers for


def fail(message, status=2):
    """Print `error: message` as one line on stderr (rank 0 only) and raise SystemExit(status) on every rank."""
    if os.environ.get('RANK', '0') == '0':
        print('error: ' + ' '.join(str(message).split()), file=sys.stderr, flush=True)
    raise SystemExit(status)


# ---- settings -------------------------------------------------------------------------------------------------------

class Config(dict):
    """Settings by name: config.batch_size is config['batch_size']. origins: {name: the phase that set it}."""

    origins = {}

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def configure(module, argv=None, after='', inherited=None):
    """The settings of a script: its own int, float, bool and str globals, overridden in place by `--key=value` words,
    and, for a phase, all settings of the checkpoint before it, which the words may override too.

    module: the script's `globals()`. argv: by default the command line, and that only when the script is the program
    (`__main__`), so importing it changes nothing. An int takes `1e4`, a float takes `3`; nothing else is converted. A
    comment that begins with `>= 1:` or `0 to 1:` bounds its setting. after: the phase whose checkpoint `init_from`
    names; inherited: its Config, if it is at hand. `--help` lists every key with its value and the comment beside it.
    Returns a Config. Raises SystemExit(2), after one line, on a word that does not set a known key, or that changes a
    size of nets that are there already.
    """
    phase, is_program = Path(module['__file__']).name[:2], module['__name__'] == '__main__'
    comments = assignments(module['__file__'])
    listed = {key: module[key] for key in comments if key[0] != '_' and type(module.get(key)) in EXPECTS}
    words = list(sys.argv[1:] if is_program else []) if argv is None else list(argv)
    asks, sizes = {'--help', '-h'} & set(words), {}
    if after and inherited is None and is_program:
        given = [word.removeprefix('--init_from=') for word in words if word.startswith('--init_from=')]
        listed['init_from'] = given[-1] if given else listed['init_from']
        inherited, sizes = settings_before(listed['init_from'], after, missing_ok=asks)
    config = Config((inherited or {}) | listed)
    config.origins = {**getattr(inherited, 'origins', {}), **dict.fromkeys(listed, phase)}
    if after:
        earlier = {key: text for script in scripts(after) for key, text in assignments(script).items() if text}
        comments = earlier | {key: text or earlier.get(key, '') for key, text in comments.items()}
    if asks:
        print_help(module['__doc__'] or '', config, listed, comments)
        raise SystemExit(0)
    for word in words:
        key, equals, text = word.removeprefix('--').partition('=')
        if word.startswith('--') and not equals and key in config:
            fail(f'{word} has no value; write it with an equals sign, such as --{key}={as_text(config[key])}')
        if not (word.startswith('--') and equals and key in config):
            nearest = difflib.get_close_matches(key, config, n=1, cutoff=0)[0]
            fail(f'unknown setting {word!r}; the nearest is --{nearest}={as_text(config[nearest])}, --help lists all')
        try:
            value = parse(text, type(config[key]))
        except (ValueError, OverflowError):
            fail(f'--{key}={text}: expects {EXPECTS[type(config[key])]}, such as {as_text(config[key])}')
        check_bounds(key, text, value, comments.get(key, ''))
        if value != sizes.get(key, value):
            fail(f'--{key}={text}: the nets of the phase before have {key} {as_text(sizes[key])}; set it where they '
                 f'are made, in {config.origins[key]}')
        config[key], config.origins[key] = value, phase
    module.update({key: config[key] for key in listed})
    return config


def check_bounds(key, text, value, comment):
    """SystemExit(2), after one line, if a value is not within what the comment beside a setting begins with."""
    bounds = BOUNDS.match(comment)
    least, low, high = bounds.groups() if bounds else (None, None, None)
    if least is not None and value < float(least):
        fail(f'--{key}={text}: expects at least {least}')
    if low is not None and not float(low) <= value <= float(high):
        fail(f'--{key}={text}: expects {low} to {high}')


def scripts(last):
    """The scripts of P1 to `last`, in order."""
    return sorted(path for path in Path(__file__).parent.glob('p[1-9]_*.py') if path.name[:2] <= last)


def settings_before(path, phase, missing_ok=False):
    """(Config, sizes of the nets) in the checkpoint of the phase before; the scripts' own if missing_ok and it is not
    there."""
    if missing_ok and not Path(path).is_file():
        usual = Config({key: value for script in scripts(phase) for key, value in defaults(script).items()})
        usual.origins = {key: script.name[:2] for script in scripts(phase) for key in defaults(script)}
        return usual, {}
    checkpoint = load_checkpoint(path, phase, f'python {scripts(phase)[-1].name}', mmap=True)     # weights stay on disk
    inherited = Config(checkpoint['config'])
    inherited.origins = checkpoint['origins']
    missing = [key for script in scripts(phase) for key in defaults(script) if key not in inherited]
    if missing:
        fail(f'{path} is older than the scripts: it has no {", ".join(missing)}; run the phases again')
    return inherited, checkpoint['arch']


def parse(text, kind):
    """text as an int, float, bool or str (`kind`). Raises ValueError when it is not one."""
    if kind is str:
        return text
    if kind is bool:
        return bool(('false', 'true').index(text.lower()))
    try:
        return kind(int(text))    # first, because a float would round a long seed
    except ValueError:
        number = float(text)
    if not math.isfinite(number) or kind(number) != number:
        raise ValueError(text)
    return kind(number)


def as_text(value):
    """A setting as one writes it on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def assignments(path):
    """{name: trailing comment or ''} of the `name = ...` lines at the left margin of a Python file, in order. A comment
    goes on in indented lines of nothing else.

    Imported names are not among them, so `from p2_contrast import temperature` makes no key of P5.
    """
    comments, before, name, line = {}, None, None, 0
    with open(path, encoding='utf-8') as source:
        for token in tokenize.generate_tokens(source.readline):
            if token.string == '=' and before.type == tokenize.NAME and before.start[1] == 0:
                name, line = before, before.start[0]
                comments.setdefault(name.string, '')
            elif token.type == tokenize.COMMENT and name and token.start[0] == name.start[0]:
                comments[name.string] = token.string.lstrip('# ')
            elif token.type == tokenize.COMMENT and name and token.start[0] == line + 1 and token.start[1]:
                comments[name.string], line = f"{comments[name.string]} {token.string.lstrip('# ')}".strip(), line + 1
            before = token
    return comments


def defaults(path):
    """{name: value} of the settings of a script, read from its text."""
    values = {}
    for line in ast.parse(Path(path).read_text(encoding='utf-8')).body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name) and isinstance(
                line.value, (ast.Constant, ast.UnaryOp)):
            values[line.targets[0].id] = ast.literal_eval(line.value)
    return {key: value for key, value in values.items() if type(value) in EXPECTS and key.islower()}


def print_help(doc, config, listed, comments):
    """Print the docstring, then `--key=value  comment` for each key: the script's own, then those that it takes over,
    with the phase that set them. Lines of 120 (rank 0)."""
    def rows(keys, origin=lambda key: ''):
        flags = {key: f'--{key}={as_text(config[key])}' for key in keys}
        width = max(map(len, flags.values()), default=0)
        return [textwrap.fill(origin(key) + comments.get(key, ''), 120, initial_indent=f'  {flags[key]:{width}}  ',
                              subsequent_indent=' ' * (width + 4)) or f'  {flags[key]}' for key in keys]

    lines, inherited = rows(listed), [key for key in config if key not in listed]
    if inherited:
        note = '' if Path(config['init_from']).is_file() else " (not there yet: the scripts' own values)"
        lines += ['', f"From {config['init_from']}{note}, unless given here; in brackets the phase that set it:",
                  *rows(inherited, lambda key: f'[{config.origins[key]}] ')]
    if os.environ.get('RANK', '0') == '0':
        try:
            print(doc.strip() + '\n', *lines, sep='\n', flush=True)
        except BrokenPipeError:                                        # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---- device, ranks, run folder --------------------------------------------------------------------------------------

def find_device(name):
    """torch.device of a name like 'cpu' or 'cuda:1'; 'auto' is CUDA, else MPS, else CPU. SystemExit(2) if absent."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):    # no such name, no driver; CUDA is not built into this torch
        fail(f'--device={name} is not available here; use --device=auto or --device=cpu')


def find_dtype(name, device):
    """torch.bfloat16 or torch.float32; 'auto' is bf16 where the hardware computes in it. SystemExit(2) else."""
    if name not in ('auto', 'bfloat16', 'float32'):
        fail(f'--dtype={name}: expects auto, bfloat16 or float32')
    if name != 'auto':
        return getattr(torch, name)
    native = False
    if device.type == 'cuda':
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == 'cpu':
        able = torch.cpu.get_capabilities()
        native = able.get('amx_bf16') or able.get('avx512_bf16')       # measured 4-6 times faster than fp32
    return torch.bfloat16 if native else torch.float32


def start(phase, config, arch={}):
    """Set up device, ranks (from torchrun's environment), seed and run folder; returns the Run.

    arch: the sizes of its nets, for the checkpoint. What `resume` writes to `run.json` is collected here: argv, config,
    versions, git commit, hardware, start time.
    Raises SystemExit(2), after one line, when the device is missing, the batch does not divide evenly, or `out_dir`
    cannot be written.
    """
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    if config['batch_size'] % (world * config['grad_accum']):
        fail(f"batch_size {config['batch_size']} does not divide by {world} ranks x grad_accum {config['grad_accum']}")
    here, gpus = int(os.environ.get('LOCAL_WORLD_SIZE', 1)), torch.cuda.device_count()
    if world > 1 and gpus and (config['device'] == 'auto' or config['device'].startswith('cuda')):
        if here > gpus:
            fail(f'{here} ranks on a machine of {gpus} GPUs: start fewer, or add --device=cpu')
        device = find_device(f"cuda:{os.environ['LOCAL_RANK']}")
    else:
        device = find_device(config['device'])
    if device.type == 'cuda':
        torch.cuda.set_device(device)        # or its random state would not be the one that is saved and replayed
        # Reported to plan anew for each shape, which a free run changes at every token; not measured here.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if world > 1:
        if device.type == 'mps':
            fail('ranks run on CUDA or on the CPU: add --device=cpu')
        # Rank 0 may take hours over a large corpus while the others wait at a barrier.
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', timeout=timedelta(hours=12))
        atexit.register(dist.destroy_process_group)
    torch.manual_seed(config['seed'])    # the same on all ranks: nets start out equal without a broadcast
    # Before the first step there is nothing to save, so Ctrl-C just ends; Run.steps puts a gentler handler in place.
    signal.signal(signal.SIGINT, lambda *_: fail('interrupted', status=130))
    run = Run(phase, config, device, rank, world, arch)
    sys.excepthook = run.on_error
    run.facts = {'phase': phase, 'argv': [Path(sys.argv[0]).name, *sys.argv[1:]], 'config': config,
                 'origins': getattr(config, 'origins', {}), 'commit': run.commit, 'hardware': hardware(device),
                 'device': str(device), 'dtype': str(run.dtype), 'world': world, 'versions': {
                     'python': platform.python_version(), 'torch': torch.__version__, 'numpy': numpy.__version__},
                 'started': time.strftime('%Y-%m-%dT%H:%M:%S%z')}
    try:
        run.dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run.dir):      # before the hours that preparing a corpus may take
            pass
        if run.master:
            run.tensorboard = open_tensorboard(run.dir) if config.get('tensorboard') else None
    except OSError as error:
        fail(f'cannot write to {run.dir}: {error.strerror}; choose another --out_dir')
    run.say(f'{phase}: {provenance(device, run.commit)}, {run.dtype}, ranks {world}, writes {run.dir}')
    return run


def git_commit():
    """This repository's commit, with `-dirty` when a tracked file differs; None outside git."""
    try:
        return subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'], text=True,
                              cwd=Path(__file__).parent, capture_output=True).stdout.strip() or None
    except OSError:
        return None


def hardware(device):
    """The device in a few words."""
    if device.type == 'cuda':
        return f'{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}'
    name = torch.cpu.get_capabilities().get('cpu_name') or platform.processor()
    return f'{device.type} {name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads'


def short(commit):
    """A commit in seven digits."""
    return (commit or 'no git')[:7] + '-dirty' * (commit or '').endswith('dirty')


def provenance(device, commit):
    """What a log begins with: commit, versions and hardware."""
    return (f'commit {short(commit)}, Python {platform.python_version()}, torch {torch.__version__}, '
            f'{hardware(device)}')


DISK_ERRORS = errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG


class Run:
    """One run of a phase: where it computes, which rank this is, where it writes, and its log."""

    def __init__(self, phase, config, device, rank=0, world=1, arch={}):
        self.phase, self.config, self.device, self.rank, self.world = phase, config, device, rank, world
        self.arch = arch            # sizes of the nets
        self.master = rank == 0
        self.dir = Path(config['out_dir'])
        self.checkpoint = self.dir / 'ckpt.pt'
        self.dtype = find_dtype(config['dtype'], device)
        self.commit = git_commit()
        self.facts = {}             # of run.json
        self.history = []           # the phases before this one: [{phase, step, config, metrics, pass}]
        self.saved_step = None      # of this run's checkpoint
        self.signalled = False      # this rank got Ctrl-C or SIGTERM
        self.interrupted = False    # some rank did, and all know: save at the top of this step
        self.latest = ''            # training loss, for the progress line
        self.watched = (), None     # names, and their values in the first step in which one was not finite, or the last
        self.tensorboard = None

    def autocast(self):
        """A fresh autocast context: bf16 matrix products where `dtype` says so, otherwise nothing."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def generator(self, step, purpose, device='cpu'):
        """The random numbers of a step for one of PURPOSES, the same on all ranks."""
        return generator(self.config['seed'], step, purpose, device)

    def say(self, text):
        """Print a line (rank 0), above the progress bar if there is one."""
        if self.master:
            tqdm.write(str(text))
            sys.stdout.flush()

    def last_good(self):
        """This run's checkpoint in words: `save` refuses weights that are not finite, so it is good."""
        return 'none yet' if self.saved_step is None else f'{self.checkpoint} (step {self.saved_step})'

    def steps(self, first, last):
        """Yield first, ..., last, with progress and an ETA on rank 0.

        Ctrl-C or SIGTERM lets the step in hand finish and yields the next with `run.interrupted` set on every rank;
        `save` at its top then ends the program. In one process, a second Ctrl-C kills at once.
        Raises SystemExit(2) when first > last.
        """
        if first > last:
            fail(f'the checkpoint is at step {first}, past max_steps {last}; raise --max_steps or use --resume=false')
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        bar = tqdm(total=last, initial=first, unit='step', desc=self.phase, dynamic_ncols=True,
                   disable=not (self.master and sys.stderr.isatty()))
        began = shown = time.monotonic()
        try:
            for step in range(first, last + 1):
                self.interrupted = self._on_any_rank(self.signalled)
                yield step
                bar.set_postfix_str(self.latest, refresh=False)
                bar.update(step < last)    # the last step is there to be evaluated, not trained
                now = time.monotonic()
                if bar.disable and now - shown >= PROGRESS_SECONDS:
                    shown, rate = now, (step + 1 - first) / (now - began)
                    eta = tqdm.format_interval((last - step - 1) / rate)
                    self.say(f'{self.phase} step {step + 1}/{last}  {rate:.3g} steps/s  ETA {eta}  {self.latest}')
        finally:
            bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _on_signal(self, number, frame):
        self.signalled = True
        if self.world == 1:    # torchrun hands a rank the same signal twice, so there a second one means nothing
            signal.signal(number, signal.SIG_DFL)

    def on_error(self, kind, error, trace):
        """For sys.excepthook: a disk that refuses is one line, and so is, among ranks, a connection that broke because
        another rank ended."""
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            print(f'error: cannot write {error.filename or self.dir}: {error.strerror}; last good checkpoint: '
                  f'{self.last_good()}; go on with --resume=true', file=sys.stderr, flush=True)
        elif self.world > 1 and isinstance(error, (RuntimeError, OSError)) and re.search(
                'onnection|roken pipe|NCCL|imed out', str(error)):
            print(f'error: rank {self.rank} has lost another rank; last good checkpoint: {self.last_good()}; '
                  'go on with --resume=true', file=sys.stderr, flush=True)
        else:
            sys.__excepthook__(kind, error, trace)

    def _on_any_rank(self, flag):
        if self.world == 1:
            return flag
        flag = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return flag.item() > 0

    @torch.no_grad()
    def watch(self, step, values):
        """Take note of the scalar tensors among the values of a training step, without waiting for the device.

        After the first that is not finite all are, so that step's are kept, for check() to name."""
        scalars = {name: value for name, value in values.items() if torch.is_tensor(value)}
        now = torch.stack([torch.full((), float(step), device=self.device),      # the norm of no gradients is on a CPU
                           *(v.float().to(self.device) for v in scalars.values())])
        names, kept = self.watched
        if names == tuple(scalars):
            now = torch.where(kept.isfinite().all(), now, kept)
        else:                                # other terms from here on
            self.check()
        self.watched = tuple(scalars), now

    def check(self):
        """SystemExit(DIVERGED), after one line, if a value that watch() saw was not finite. Every rank must call it."""
        names, kept = self.watched
        if kept is None:
            return
        kept = kept.clone()
        mean_over_ranks(kept, self)
        step, *values = kept.tolist()
        bad = [f'{name} is {value}' for name, value in zip(names, values) if not math.isfinite(value)]
        if bad:
            fail(f'step {step:.0f}: {", ".join(bad)}; last good checkpoint: {self.last_good()}', status=DIVERGED)

    def log(self, step, values, prefix):
        """Append {'step': step, 'prefix/name': value, ...} to `metrics.jsonl` (rank 0).

        values: name -> number, or tensor of any shape (a vector becomes a list); all tensors cost one device sync.
        With prefix 'train' every rank must call it: tensors are averaged over the ranks, and a NaN or infinity, in
        these values or in those that watch() saw, raises SystemExit(DIVERGED) after one line. With another prefix what
        is not finite is written as null.
        """
        if prefix == 'train':
            self.check()
        tensors = {name: value.detach().to(self.device, torch.float32)
                   for name, value in values.items() if torch.is_tensor(value)}
        if tensors:
            flat = torch.cat([value.flatten() for value in tensors.values()])
            if prefix == 'train':
                mean_over_ranks(flat, self)
            parts = flat.cpu().split([value.numel() for value in tensors.values()])
            values = {**values, **{name: part.view(tensors[name].shape) for name, part in zip(tensors, parts)}}
        values = plain(values)
        bad = [f'{name} is {value}' for name, value in values.items() if finite(value) != value]
        if prefix == 'train' and bad:
            fail(f'step {step}: {", ".join(bad)}; last good checkpoint: {self.last_good()}', status=DIVERGED)
        if not self.master:
            return
        if prefix == 'train' and 'loss' in values:
            self.latest = f"loss {values['loss']:.4g}"
        row = {f'{prefix}/{name}': finite(value) for name, value in values.items()}
        with open(self.dir / 'metrics.jsonl', 'a', encoding='utf-8') as file:
            file.write(json.dumps({'step': step, **row}) + '\n')
        if prefix == 'val':
            write_csv(self.dir)
        for name, value in row.items():
            if self.tensorboard:
                several = value if isinstance(value, list) else [value]             # one a channel
                for c, number in enumerate(several):
                    if isinstance(number, (int, float)):
                        self.tensorboard.add_scalar(f'{name}/{c}' if value is several else name, number, step)


def evaluations(folder):
    """The evaluations in a run folder's metrics.jsonl, in order: [{'step', metric: value}]; not finite is nan."""
    path, rows = Path(folder, 'metrics.jsonl'), []
    lines = path.read_text(encoding='utf-8').splitlines(keepends=True) if path.exists() else []
    for row in (json.loads(line) for line in lines if line.endswith('\n')):        # a kill may leave half a line
        if any(key.startswith('val/') for key in row):
            rows.append({key.removeprefix('val/'): with_nan(value) for key, value in row.items()})
    return rows


def write_csv(folder):
    """metrics.csv beside metrics.jsonl: one row an evaluation, a column a metric, or several for a list."""
    rows = []
    for row in evaluations(folder):
        rows.append({})
        for key, value in row.items():
            rows[-1] |= {f'{key}/{k}': v for k, v in enumerate(value)} if isinstance(value, list) else {key: value}
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_text(Path(folder, 'metrics.csv'), text.getvalue())


def open_tensorboard(folder):
    """A SummaryWriter in a folder of its own, or the curves of two runs would be drawn as one. Raises SystemExit(2)
    when tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        fail('--tensorboard=true needs a package: pip install tensorboard')
    writer = SummaryWriter(str(folder / 'tensorboard' / time.strftime('%Y-%m-%d_%H-%M-%S')))
    atexit.register(writer.close)
    return writer


def add_pictures(run, step):
    """Show TensorBoard, when it is on, the figures of a step that plot.py has drawn into the run folder."""
    if run.tensorboard:
        from PIL import Image    # matplotlib brings it, and has drawn them
        for path in sorted(run.dir.glob(f'plots/*_{step:06d}.png')):
            pixels = numpy.array(Image.open(path).convert('RGB'))
            run.tensorboard.add_image(path.stem.rpartition('_')[0], pixels, step, dataformats='HWC')


def plain(values):
    """values with tensors and NumPy numbers, at any depth, as Python numbers and lists: what a checkpoint may hold."""
    return json.loads(json.dumps(values, default=lambda value: value.tolist()))


def finite(value):
    """value with each NaN and infinity, also in a list, as None: JSON has no word for them."""
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def with_nan(value):
    """value with each None, also in a list, as NaN: what finite() has written."""
    if isinstance(value, list):
        return [with_nan(item) for item in value]
    return math.nan if value is None else value


def write_text(path, text):
    """Write a file in one move: a kill at any moment leaves the old one or the new one."""
    temporary = Path(f'{path}.tmp')
    temporary.write_text(text, encoding='utf-8')
    os.replace(temporary, path)


def write_json(path, value):
    """Write a value as indented JSON, in one move."""
    write_text(path, json.dumps(value, indent=2) + '\n')


def generator(seed, step, purpose, device='cpu'):
    """A torch.Generator that a seed, a step and one of PURPOSES determine; numbers for one purpose do not hang on how
    many another takes."""
    return torch.Generator(device).manual_seed(1_000_003 * seed + step + 500_000_003 * PURPOSES.index(purpose))


# ---- optimisation ---------------------------------------------------------------------------------------------------

def cosine_lr(step, peak, warmup_steps, lr_steps):
    """Learning rate at a step: linear warm-up from peak / warmup_steps, cosine to a tenth at lr_steps, then flat."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, lr_steps - warmup_steps))
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def adamw(nets, learning_rate, weight_decay, scale={}):
    """AdamW over {name: net} with betas (0.9, 0.95); parameters of one dimension (biases, gains) do not decay.

    scale: net name -> multiplier of its learning rate, 1 for a net left out. Each group keeps it, and the name of its
    net as 'net', so that the loop can write `group['lr'] = lr * group['scale']`.
    """
    groups = []
    for name, net in nets.items():
        factor = scale.get(name, 1.0)
        for decays in (True, False):
            params = [p for p in net.parameters() if p.requires_grad and (p.dim() > 1) == decays]
            if params:
                groups.append({'params': params, 'weight_decay': weight_decay if decays else 0.0,
                               'scale': factor, 'lr': learning_rate * factor, 'net': name})
    fused = all(p.device.type in ('cpu', 'cuda') for group in groups for p in group['params']) or None
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=fused)


class EMA:
    """Exponential moving average of the parameters of {name: net}; buffers are copied. Build it on the final device.

    The decay warms up as min(decay, (1 + step) / (10 + step)), so that the random initial weights are soon forgotten.
    """

    def __init__(self, nets, decay):
        self.decay = decay
        self.live = {(name, key): value for name, net in nets.items()
                     for key, value in net.state_dict(keep_vars=True).items()}
        self.mean = {key: value.detach().clone() for key, value in self.live.items()}
        self.params = [key for key, value in self.live.items() if isinstance(value, nn.Parameter)]
        self.buffers = [key for key, value in self.live.items() if not isinstance(value, nn.Parameter)]

    @torch.no_grad()
    def update(self, step):
        """Move the average towards the nets, after optimizer step `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        mean, live = [self.mean[key] for key in self.params], [self.live[key] for key in self.params]
        torch._foreach_lerp_(mean, live, 1 - decay)
        for key in self.buffers:
            self.mean[key].copy_(self.live[key])

    @contextmanager
    def weights(self):
        """`with ema.weights():` the nets hold the averages and run eagerly: an evaluation has batches of its own
        shapes, and each would be compiled for few calls (17 graphs instead of 7 in P2). Weights and random state come
        back, even after an error, so that an evaluation leaves no trace in the training after it."""
        trained = {key: value.detach().clone() for key, value in self.live.items()}
        self._fill(self.mean)
        try:
            with torch.random.fork_rng({value.device for value in self.live.values() if value.is_cuda}), eagerly():
                yield
        finally:
            self._fill(trained)

    @torch.no_grad()
    def _fill(self, source):
        for key, value in self.live.items():
            value.copy_(source[key])

    def state_dict(self):
        """{net name: {key: tensor}}, where each entry loads into its net."""
        state = {name: {} for name, _ in self.mean}
        for (name, key), value in self.mean.items():
            state[name][key] = value
        return state

    def load_state_dict(self, state):
        """Take over a state_dict. Raises KeyError or RuntimeError when it is of other nets."""
        for (name, key), value in self.mean.items():
            value.copy_(state[name][key])


def compile_nets(nets, run):
    """torch.compile {name: net} in place, which keeps state-dict keys clean, if config['compile'] and on CUDA.

    Never on a CPU, where compiling took up to four minutes and gained 9% at most.
    """
    if run.config['compile'] and run.device.type == 'cuda':
        # Widths are multiples of 8 and four decoders share a class: more graphs than Dynamo's 8, and each of one shape.
        torch._dynamo.config.recompile_limit = 64
        for net in nets.values():
            net.compile(dynamic=False)


def eagerly():
    """A context in which compiled nets run eagerly and nothing is compiled."""
    if 'torch._dynamo' not in sys.modules:      # nothing is; to load the compiler for this would take two seconds
        return nullcontext()
    return torch.compiler.set_stance('force_eager')


def count_parameters(net):
    """How many numbers the parameters of a net hold."""
    return sum(p.numel() for p in net.parameters())


# ---- ranks ----------------------------------------------------------------------------------------------------------

def local_slice(run, n):
    """This rank's slice of a global batch of n rows. Raises ValueError unless ranks get equal shares."""
    if n % run.world:
        raise ValueError(f'{n} rows do not divide by {run.world} ranks')
    share = n // run.world
    return slice(run.rank * share, (run.rank + 1) * share)


def barrier(run):
    """Wait until every rank is here."""
    if run.world > 1:
        dist.barrier()


def mean_over_ranks(flat, run):
    """Replace a tensor by its mean over the ranks, in place. One process: nothing."""
    if run.world > 1:
        dist.all_reduce(flat)    # a sum, then a division: gloo has no mean
        flat /= run.world


def from_master(x, run):
    """A tensor as rank 0 has it, on every rank, in place."""
    if run.world > 1:
        dist.broadcast(x, 0)
    return x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, run):
        ctx.run = run
        out = x.new_empty(run.world * len(x), *x.shape[1:])
        dist.all_gather(list(out.chunk(run.world)), x.contiguous())    # into views of out
        return out

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[local_slice(ctx.run, len(grad))], None


def gather(x, run):
    """(n, ...) on each rank -> (world * n, ...) on every rank, in rank order, with gradient; n is equal on all ranks.

    Rank r then computes a loss L_r of all rows; their mean over the ranks is the L that is to fall: each may compute
    all of it, or that of its own rows against all. The backward *sums* over the ranks, so that rank r gets
    world * dL/dx_r.
    average_gradients divides by world, which leaves sum_r dL/dx_r dx_r/dtheta: exactly what one process finds on the
    whole batch. The same holds for a loss that is a mean over a rank's own rows, so the two may be added.
    """
    return x if run.world == 1 else _Gather.apply(x, run)


def contrastive_backward(forward, embed, loss_of_all, batch, grad_accum):
    """The backward pass of a loss over all rows of a batch and of the losses that need no other row -> (their sum,
    {term: value}), detached; terms of this rank's rows.

    forward(part of the batch) -> (z, local loss, its terms); embed(part) -> z alone, which is the first thing that
    forward does; loss_of_all(z, batch) -> (scalar, its terms). With grad_accum > 1 by gradient caching (Gao et al.
    2021), so that memory holds one part at a time: first all z without graphs, then the gradient of the loss at z, then
    each part again with its share of that gradient; terms are means over the parts. Dropout repeats itself by replaying
    the random state."""
    if grad_accum == 1:
        z, local, local_terms = forward(batch)
        loss, terms = loss_of_all(z, batch)
        loss = loss + local
        loss.backward()
        return loss.detach(), {name: value.detach() for name, value in (terms | local_terms).items()}
    parts, states, cached, means = batch.parts(grad_accum), [], [], {}
    for part in parts:
        states.append((torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None))
        with torch.no_grad():
            cached.append(embed(part))
    z = torch.cat(cached).requires_grad_()
    loss, terms = loss_of_all(z, batch)
    loss.backward()
    for part, state, gradient in zip(parts, states, z.grad.split([len(c) for c in cached])):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1])
        z, local, local_terms = forward(part)
        ((z * gradient).sum() + local / len(parts)).backward()
        loss = loss.detach() + local.detach() / len(parts)
        for name, value in local_terms.items():
            means[name] = means.get(name, 0.0) + value.detach() / len(parts)
    return loss, {name: value.detach() for name, value in terms.items()} | means


def average_gradients(nets, run):
    """Replace each gradient of {name: net} by its mean over the ranks, in one all-reduce. One process: nothing."""
    if run.world == 1:
        return
    grads = [p.grad for net in nets.values() for p in net.parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    mean_over_ranks(flat, run)
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads])):
        grad.copy_(mean.view_as(grad))


# ---- checkpoints and gates ------------------------------------------------------------------------------------------

def save(run, step, nets, optimizer, ema, state):
    """Write `ckpt.pt` (rank 0): all it takes to go on from the top of `step`. After Ctrl-C, ends with status 130.

    state: what else a resumed run needs, plain values and tensors; state['metrics'] is the last evaluation.
    The file is replaced in one move: a kill at any moment leaves the old one or the new one. Raises SystemExit(1),
    after one line, when weights are not finite or the disk refuses; the old file stays.
    """
    run.check()
    for name, net in nets.items():
        if not all(p.isfinite().all() for p in net.parameters()):
            fail(f'step {step}: weights of {name} are not finite; last good checkpoint: {run.last_good()}', DIVERGED)
    states = [random_state(run)] * run.world
    if run.world > 1:
        dist.all_gather_object(states, random_state(run))
    if run.master:
        write_checkpoint(run.checkpoint, {
            'phase': run.phase, 'step': step, 'arch': run.arch, 'config': dict(run.config), 'commit': run.commit,
            'origins': run.config.origins, 'history': plain(run.history), 'metrics': plain(state['metrics']),
            'state': {name: value for name, value in state.items() if name != 'metrics'},
            'nets': {name: dict(net.state_dict()) for name, net in nets.items()}, 'ema': ema.state_dict(),
            'optimizer': optimizer.state_dict(), 'rng': states})
        add_pictures(run, step)
    if run.world > 1:
        dist.barrier()        # a rank that leaves early makes torchrun stop rank 0 while it writes
    run.saved_step = step
    if run.interrupted:
        run.say(f'interrupted: saved {run.checkpoint} at step {step}; go on with the same command and --resume=true')
        raise SystemExit(130)


def random_state(run):
    """This rank's generators: {'cpu', 'cuda' (None without)}, on the CPU."""
    cuda = torch.cuda.get_rng_state(run.device) if run.device.type == 'cuda' else None
    return {'cpu': torch.get_rng_state(), 'cuda': cuda}


def write_checkpoint(path, checkpoint):
    """torch.save through a temporary file beside path. Raises SystemExit(1), after one line, when the disk refuses."""
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:    # torch's zip writer turns a full disk into a RuntimeError of its own
        temporary.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        fail(f'cannot save {path}: {cause}; an older checkpoint there is untouched', status=1)


HOLDS = ('step', 'arch', 'config', 'origins', 'metrics', 'history', 'nets', 'ema', 'optimizer', 'rng', 'state')


def load_checkpoint(path, phase, made_by, holds=HOLDS, mmap=False):
    """Read a checkpoint as CPU tensors. phase: 'p1', or a tuple of those that will do; made_by: command that makes it;
    holds: keys that it must have; mmap: tensors stay on disk until they are looked at.

    Returns the dict that `save` wrote. Raises SystemExit(2), after one line, when the file is missing, truncated, holds
    more than plain data (nothing in it is ever run) or is of another phase.
    """
    if Path(path).is_dir():
        fail(f'{path} is a folder; its checkpoint is {Path(path) / "ckpt.pt"}')
    if not Path(path).is_file():
        fail(f'{path} does not exist; make it with: {made_by}')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')    # about a pickle that is not ours; the line below says it better
            checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
        made_by_phase, _ = checkpoint['phase'], [checkpoint[key] for key in holds]
    except Exception as error:    # a damaged zip or pickle raises a dozen different types
        fail(f'{path} is truncated or no checkpoint of ours ({type(error).__name__}); make it with: {made_by}')
    phases = phase if isinstance(phase, tuple) else (phase,)
    if made_by_phase not in phases:
        fail(f'{path} is a checkpoint of {made_by_phase}, not of {" or ".join(phases)}; make it with: {made_by}')
    return checkpoint


def load_weights(nets, checkpoint, names):
    """The averaged weights of a checkpoint into these of nets {name: Module}. SystemExit(2), after one line, where the
    nets have changed since it was made."""
    for name in names:
        try:
            nets[name].load_state_dict(checkpoint['ema'][name])
        except (KeyError, RuntimeError):
            fail(f"the {name} in the checkpoint of {checkpoint['phase']} has other weights than now: it was made by "
                 'another version of model.py; run the phases again')


def resume(run, nets, optimizer, ema, state):
    """With config['resume'], restore nets, optimizer, EMA, random state, history and `state`, in place; returns the
    step to go on from.

    Returns 0 when the run starts afresh; checkpoint, log and gate in the folder are then kept under `.old` names.
    Raises SystemExit(2), after one line, when the checkpoint cannot be read, is of nets of other sizes or has learnt
    other token ids than state['tokenizer']; nothing in the folder has changed then. Decay and scales of the optimizer
    are those of this run's config. From here on each rank draws its own dropout.
    """
    if not (run.config['resume'] and run.checkpoint.exists()):
        start_over(run)
        own_random_state(run)
        write_facts(run)
        return 0
    checkpoint = load_checkpoint(run.checkpoint, run.phase, f'python {Path(sys.argv[0]).name} --resume=false')
    check_tokenizer(state.get('tokenizer'), checkpoint)
    try:
        for name, net in nets.items():
            net.load_state_dict(checkpoint['nets'][name])
        ema.load_state_dict(checkpoint['ema'])
        settings = [{key: value for key, value in group.items() if key not in ('params', 'lr')}     # a step sets lr
                    for group in optimizer.param_groups]
        optimizer.load_state_dict(checkpoint['optimizer'])
        for group, setting in zip(optimizer.param_groups, settings):
            group.update(setting)
    except (KeyError, RuntimeError, ValueError) as error:
        fail(f'{run.checkpoint} does not fit the nets of these settings: {str(error)[:200]}')
    run.history, run.saved_step = checkpoint['history'], checkpoint['step']
    if len(checkpoint['rng']) == run.world:
        generators = checkpoint['rng'][run.rank]
        torch.set_rng_state(generators['cpu'])
        if run.device.type == 'cuda' and generators['cuda'] is not None:
            torch.cuda.set_rng_state(generators['cuda'], run.device)
    else:                              # other ranks than it was saved by
        own_random_state(run)
    log = run.dir / 'metrics.jsonl'
    if run.master and log.exists():    # what was logged after the checkpoint is about to be logged again
        lines = [line for line in log.read_text(encoding='utf-8').splitlines(keepends=True) if line.endswith('\n')]
        write_text(log, ''.join(line for line in lines if json.loads(line)['step'] < run.saved_step))
    if run.master:
        (run.dir / 'gate.json').unlink(missing_ok=True)        # the verdict on an earlier end
    write_facts(run)
    differ = [f'{key}={value} (was {checkpoint["config"].get(key)})' for key, value in run.config.items()
              if key not in ('out_dir', 'init_from', 'resume') and value != checkpoint['config'].get(key)]
    run.say(f'resumed {run.checkpoint} at step {run.saved_step}' + ', with other settings: ' * bool(differ)
            + ', '.join(differ))
    state.update(checkpoint['state'], metrics=checkpoint['metrics'])
    return run.saved_step


def write_facts(run):
    """run.json, once nothing is left that could refuse to begin: until then it tells of the run before."""
    if run.master and run.facts:
        write_json(run.dir / 'run.json', run.facts)


def check_tokenizer(tokens, checkpoint):
    """SystemExit(2), after one line, if the nets of a checkpoint have learnt other token ids than Tokenizer.state()."""
    if checkpoint['state'].get('tokenizer') != tokens:
        fail('the checkpoint has learnt other token ids: the corpus or data.py has changed since; start again with '
             'p1_canvas.py')


def own_random_state(run):
    """Give every rank but the first a random state of its own."""
    if run.rank:
        torch.manual_seed(1_000_003 * run.config['seed'] + 7919 * run.rank + (run.saved_step or 0))


def start_over(run):
    """Rename what earlier runs left in the folder to `.old`, `.old2`, ..., so that a forgotten --resume=true loses
    nothing, however often it is forgotten."""
    names = 'ckpt.pt', 'metrics.jsonl', 'metrics.csv', 'gate.json', 'samples.jsonl', 'run.json'
    ending = next(ending for ending in ('.old', *(f'.old{n}' for n in range(2, 10_000)))
                  if not any((run.dir / f'{name}{ending}').exists() for name in names))
    if run.config['resume']:
        run.say(f'nothing to resume: {run.checkpoint} does not exist, so this run starts afresh')
    elif run.checkpoint.exists():
        run.say(f'starting afresh: {run.checkpoint} is kept as {run.checkpoint.name}{ending}')
    for name in names:
        if run.master and (run.dir / name).exists():
            os.replace(run.dir / name, run.dir / f'{name}{ending}')


def inherit(run):
    """The checkpoint that `init_from` names, of the phase before; says its sizes, the settings that come from it where
    they are not the scripts' defaults, and how its gate stood; keeps all of that in `run.history`."""
    path, before = run.config['init_from'], f'p{int(run.phase[1]) - 1}'
    checkpoint = load_checkpoint(path, before, f'python {scripts(before)[-1].name}')
    sizes = ', '.join(f'{key} {value}' for key, value in checkpoint['arch'].items())
    run.say(f"from {path} ({checkpoint['phase']}, step {checkpoint['step']}): {sizes}")
    usual = {key: value for script in scripts(before) for key, value in defaults(script).items()}
    changed = [f'{key} {as_text(run.config[key]) or repr("")} ({run.config.origins[key]})'
               for key, value in usual.items() if key not in checkpoint['arch']
               and run.config.origins[key] != run.phase and run.config[key] != value]
    run.say(f"settings taken over, where not the usual: {', '.join(changed) or 'none'}")
    gate = previous_gate(path)
    entry = {key: checkpoint[key] for key in ('phase', 'step', 'config', 'metrics')}
    run.history = checkpoint['history'] + [{**entry, 'pass': gate['pass'] if gate else None}]
    return checkpoint


def previous_gate(path):
    """The gate.json beside a checkpoint as a dict, or None; says (rank 0) when it failed or is missing."""
    try:
        gate = json.loads(Path(path).with_name('gate.json').read_text(encoding='utf-8'))
    except (OSError, ValueError):
        gate, note = None, f'no gate.json beside {path}: that run has not finished'
    else:
        failed = sum(not row['pass'] for row in gate['criteria'])
        note = f"{gate['phase'].upper()}'s gate failed ({failed} of {len(gate['criteria'])} criteria)"
    if not (gate and gate['pass']) and os.environ.get('RANK', '0') == '0':
        print(f'note: {note}; going on', flush=True)
    return gate


def write_gate(run, rows):
    """Write `gate.json` and print it as a table (rank 0); returns whether every row passed.

    rows: (name, target text, measured number or text, passed[, baseline text]).
    """
    criteria, table = [], [('criterion', 'target', 'measured', 'baseline', '')]
    for name, target, measured, passed, *baseline in rows:
        measured = measured if isinstance(measured, str) else float(measured)
        criteria.append({'name': name, 'target': target, 'measured': finite(measured), 'pass': bool(passed)})
        criteria[-1].update({'baseline': text for text in baseline})
        shown = measured if isinstance(measured, str) else f'{measured:.4g}'
        table.append((name, target, shown, *(baseline or ('',)), 'PASS' if passed else 'FAIL'))
    passed = all(row['pass'] for row in criteria)
    if run.master:
        write_json(run.dir / 'gate.json', {'phase': run.phase, 'pass': passed, 'criteria': criteria})
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        run.say('  '.join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    run.say(f'{run.phase} gate: {"PASS" if passed else "FAIL"}')
    return passed
