"""What every script of this folder needs that is not its idea: YAML configs, one-line errors, device, atomic writes."""
import argparse
import json
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import yaml

# section -> key -> (types, required). 'all' is a word for a number of samples: everything there is.
NUMBER, COUNT = (int, float), (int, 'all')
SCHEMA = {
    'experiment': {'name': ((str,), True), 'seed': ((int,), True)},
    'data': {'root': ((str,), True), 'download': ((bool,), False), 'train_samples': (COUNT, True),
             'val_samples': ((int,), True), 'test_samples': (COUNT, True)},
    'model': {'architecture': ((str,), True), 'latent_dim': ((int,), True)},
    'training': {'batch_size': ((int,), True), 'epochs': ((int,), True), 'learning_rate': (NUMBER, True),
                 'weight_decay': (NUMBER, True), 'device': ((str,), True), 'num_workers': ((int,), True)},
    'regularization': {'dropout': ((dict,), True)},
    'self_supervised': {'enabled': ((bool,), True), 'augmentations_per_sample': ((int,), False),
                        'target': ((str,), False), 'translation': (NUMBER, False), 'rotation': (NUMBER, False),
                        'scale': (NUMBER, False), 'intensity': (NUMBER, False), 'noise': (NUMBER, False),
                        'masking': (NUMBER, False)},
    'output': {'checkpoint_path': ((str,), True), 'report_path': ((str,), True),
               'save_every_n_epochs': ((int,), True), 'analysis_path': ((str,), False),
               'manifold_analysis_path': ((str,), False)},
    'analysis': {'k': ((int,), True), 'metric': ((str,), True)},
}
DROPOUT = {'enabled': ((bool,), True), 'p': (NUMBER, True)}
ARCHITECTURES = {                                       # what each adds to `model`
    'vanilla_fc': {'hidden_dims': ((list,), True)},
    'naive_conv': {'channels': ((list,), True)},
    'asymmetric_resnet': {'channels': ((list,), True), 'resnet_depth': ((int,), True)},
}
DEFAULTS = {'data': {'download': False},
            'self_supervised': {'augmentations_per_sample': 1, 'target': 'original', 'translation': 0.0,
                                'rotation': 0.0, 'scale': 0.0, 'intensity': 0.0, 'noise': 0.0, 'masking': 0.0}}
METRICS = ('euclidean', 'cosine', 'manhattan')
# (section, key) -> lowest and highest value
LIMITS = {('data', 'val_samples'): (1, None), ('data', 'train_samples'): (1, None), ('data', 'test_samples'): (1, None),
          ('model', 'latent_dim'): (1, 784), ('training', 'batch_size'): (1, None), ('training', 'epochs'): (1, None),
          ('training', 'learning_rate'): (1e-12, 1e30), ('training', 'weight_decay'): (0, None),
          ('training', 'num_workers'): (0, None), ('self_supervised', 'augmentations_per_sample'): (1, None),
          ('self_supervised', 'translation'): (0, 14), ('self_supervised', 'rotation'): (0, 180),
          ('self_supervised', 'scale'): (0, 0.9), ('self_supervised', 'intensity'): (0, 1),
          ('self_supervised', 'noise'): (0, 1), ('self_supervised', 'masking'): (0, 28),
          ('output', 'save_every_n_epochs'): (0, None), ('analysis', 'k'): (1, None),
          ('experiment', 'seed'): (0, 2**32 - 1)}                        # what NumPy and scikit-learn take


def fail(message, status=2):
    """Print `error: message` as one line on stderr and raise SystemExit(status)."""
    print('error: ' + ' '.join(str(message).split()), file=sys.stderr, flush=True)
    raise SystemExit(status)


# ---- command line ---------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse with errors of one line. doc: the script's docstring, shown as it is by --help."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        fail(f'{message}; {self.prog} --help lists the options')


def parser(doc):
    """A parser with the options of every script: --config, --data_root, --set. doc: the script's docstring."""
    p = Parser(doc)
    p.add_argument('--config', required=True, help='YAML file of the experiment, see configs/')
    p.add_argument('--data_root', help='folder of the four MNIST files, instead of data.root')
    p.add_argument('--set', action='append', default=[], metavar='SECTION.KEY=VALUE',
                   help='override a setting of the config; may be given several times')
    return p


def add_map_options(p, max_points):
    """The options of the two scripts that lay a split out on a UMAP."""
    p.add_argument('--split', choices=('train', 'val', 'test'), default='test')
    p.add_argument('--max-points', type=positive, default=max_points, help=f'at most so many digits ({max_points})')
    p.add_argument('--l2-normalize', action='store_true', help='compare directions of latents: length 1 before UMAP')
    p.add_argument('--umap-n-neighbors', type=neighbors, default=30)
    p.add_argument('--umap-min-dist', type=fraction, default=0.1)


def neighbors(text):
    """argparse type: a whole number of at least 2."""
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f'{text} is less than 2')
    return number


def fraction(text):
    """argparse type: a number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f'{text} is not between 0 and 1')
    return number


def positive(text):
    """argparse type: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f'{text} is less than 1')
    return number


# ---- config ---------------------------------------------------------------------------------------------------------

def load_config(args):
    """The validated config {section: {key: value}} of parsed arguments, with defaults filled in.

    Raises SystemExit(2), after one line, on an unreadable file, an unknown section or key, a value of a wrong type, or
    a --data_root that is no folder: who names a folder does not want the embedded digits instead.
    """
    config = load_yaml(args.config)
    for override in args.set + ([f'data.root={json.dumps(args.data_root)}'] if args.data_root else []):
        path, equals, text = override.partition('=')
        *parents, key = path.split('.')
        place = config
        for name in parents:
            place = place.get(name) if isinstance(place, dict) else None
        if not equals or not parents or not isinstance(place, dict):
            fail(f'--set {override}: expects SECTION.KEY=VALUE, such as training.epochs=3')
        try:
            place[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            fail(f'--set {override}: the value is not YAML')
    config = validate(config, args.config)
    if args.data_root and not Path(args.data_root).is_dir() and not config['data']['download']:
        fail(f'--data_root {args.data_root}: no such folder; it should hold the four MNIST files')
    return config


def expect(config, script, architectures, plain=False):
    """SystemExit(2) when a trainer is given a config that is for another one; plain: it neither drops nor augments."""
    name, architecture = Path(script).name, config['model']['architecture']
    if architecture not in architectures:
        fail(f'{name} trains {" and ".join(architectures)}, but model.architecture is {architecture}; use '
             + ('train_naive_autoencoder.py' if architecture == 'vanilla_fc' else 'train_covnet.py'))
    if plain and (config['regularization']['dropout']['enabled'] or config['self_supervised']['enabled']):
        fail(f'{name} has neither dropout nor augmentations, but the config enables them; disable both'
             + (', or use train_covnet.py' if architecture == 'naive_conv' else ''))


def load_yaml(path):
    """The mapping in a YAML file. Raises SystemExit(2) when it cannot be read."""
    try:
        config = yaml.safe_load(Path(path).read_text(encoding='utf-8'))
    except OSError as error:
        fail(f'--config {path}: {error.strerror}; the experiments are in grounding/configs/')
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        fail(f'{path}: not YAML: {error}')
    if not isinstance(config, dict):
        fail(f'{path}: expects sections ({", ".join(SCHEMA)})')
    return config


def validate(config, path):
    """config with defaults filled in; SystemExit(2) naming the file, section and key on the first mistake."""
    for section in SCHEMA:
        if not isinstance(config.get(section), dict):
            fail(f'{path}: section {section} is missing or is no mapping; expects its keys '
                 f'{", ".join(SCHEMA[section])}')
    for section in config:
        if section not in SCHEMA:
            fail(f'{path}: unknown section {section!r}; expects {", ".join(SCHEMA)}')
    architecture = config['model'].get('architecture')
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        fail(f'{path}: model.architecture is {architecture!r}; expects {", ".join(ARCHITECTURES)}')
    checked = {}
    for section, keys in SCHEMA.items():
        keys = keys | ARCHITECTURES[architecture] if section == 'model' else keys
        values = DEFAULTS.get(section, {}) | config[section]
        check_keys(values, keys, section, path)
        checked[section] = values
    check_keys(checked['regularization']['dropout'], DROPOUT, 'regularization.dropout', path)
    check_values(checked, path)
    return checked


def check_keys(values, keys, section, path):
    """SystemExit(2) on an unknown key, a missing required one, or a value of a wrong type. true is not a number."""
    for key, value in values.items():
        if key not in keys:
            fail(f'{path}: unknown key {section}.{key}; expects {", ".join(keys)}')
        types, _ = keys[key]
        words = [t for t in types if isinstance(t, str)]
        kinds = [t for t in types if isinstance(t, type)]
        if value not in words and type(value) not in kinds:
            expected = ' or '.join([t.__name__ for t in kinds] + words)
            hint = ' (YAML reads 1e-3 as text: write 1.0e-3)' if isinstance(value, str) and float in kinds else ''
            fail(f'{path}: {section}.{key} is {value!r}; expects {expected}{hint}')
    for key, (_, required) in keys.items():
        if required and key not in values:
            fail(f'{path}: {section}.{key} is missing')


def check_values(config, path):
    """SystemExit(2) on a value outside its limits."""
    for (section, key), (low, high) in LIMITS.items():
        value = config[section][key]
        if value != 'all' and not (low <= value and (high is None or value <= high)):
            fail(f'{path}: {section}.{key} is {value}; expects at least {low}' + (f', at most {high}' if high else ''))
    model, p = config['model'], config['regularization']['dropout']['p']
    if not 0 <= p < 1:
        fail(f'{path}: regularization.dropout.p is {p}; expects 0 <= p < 1')
    if config['analysis']['metric'] not in METRICS:
        fail(f'{path}: analysis.metric is {config["analysis"]["metric"]!r}; expects {", ".join(METRICS)}')
    if config['self_supervised']['target'] not in ('original', 'augmented'):
        fail(f'{path}: self_supervised.target is {config["self_supervised"]["target"]!r}; expects original, augmented')
    for key in ('channels', 'hidden_dims'):
        sizes = model.get(key, [1, 1])
        if not sizes or any(type(n) is not int or n < 1 for n in sizes) or (key == 'channels' and len(sizes) != 2):
            fail(f'{path}: model.{key} is {sizes}; expects whole numbers, at least 1'
                 + (', two of them: one a halving of the image' if key == 'channels' else ''))
    depth = model.get('resnet_depth', 8)
    if depth < 8 or depth % 6 != 2:
        fail(f'{path}: model.resnet_depth is {depth}; expects 6n + 2: 8, 14, 20, ...')
    name = config['experiment']['name']
    if not name or Path(name).name != name:
        fail(f'{path}: experiment.name is {name!r}; expects a word that can stand in a file name')


# ---- device, seed ---------------------------------------------------------------------------------------------------

def start(config):
    """Seed every generator and end Ctrl-C in one line; returns the torch.device of training.device.

    auto is CUDA, else MPS, else CPU. Raises SystemExit(2) for a device that is not there.
    """
    signal.signal(signal.SIGINT, lambda *_: fail('interrupted; files written before are whole', status=130))
    seed = config['experiment']['seed']
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    name = config['training']['device']
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        torch.zeros(1, device=name).cpu()               # the device `meta` has a name, but no numbers
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError):     # no such name, no driver, not built into this torch
        fail(f'training.device: {name} is not available here; use auto or cpu')


def usable_workers(num_workers):
    """num_workers, or 0 with a line on stdout where workers could not hand tensors over through shared memory."""
    manager = Path(torch.__file__).parent / 'bin' / 'torch_shm_manager'
    if num_workers and not os.access(manager, os.X_OK):
        print(f'num_workers {num_workers} -> 0: torch_shm_manager is not executable here')
        return 0
    return num_workers


# ---- files ----------------------------------------------------------------------------------------------------------

def write_atomic(path, write):
    """Call write(file) on a temporary binary file beside path, flush it, then rename: old or new, never half."""
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        fail(f'cannot write {path}: {error.strerror}')
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value, indent=2):
    """Write a value as JSON, indented or (None) compact. NaN is refused (ValueError): JSON has no word for it."""
    separators = None if indent else (',', ':')
    text = json.dumps(value, indent=indent, allow_nan=False, separators=separators) + '\n'
    write_atomic(path, lambda file: file.write(text.encode()))


def artifact(config, ending):
    """The default path of a result: artifacts/<experiment name>_<ending>, from where the script was started."""
    return Path('artifacts') / f'{config["experiment"]["name"]}_{ending}'
