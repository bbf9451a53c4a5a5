"""The three autoencoders, what they count, and their checkpoints.

Encoder: (B, 1, 28, 28) in [0, 1] -> latent (B, latent_dim), unbounded. Decoder: latent -> (B, 1, 28, 28) in [0, 1].
"""
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from settings import fail, write_atomic, write_json

FORMAT = 'grounding autoencoder 1'


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016); a 1x1 convolution where the shape changes."""

    def __init__(self, before, after, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after))
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False),
                                                                 nn.BatchNorm2d(after))

    def forward(self, x):
        return torch.relu(self.body(x) + self.shortcut(x))


class Autoencoder(nn.Module):
    """encoder and decoder, so that D(E(x)) is model(x)."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def logits(self, x):
        """D(E(x)) before the decoder's last layer, the sigmoid: what the cross-entropy is computed from."""
        return self.decoder[:-1](self.encoder(x))


def vanilla_fc(model, p):
    """Fully connected layers, 784 -> hidden_dims -> latent_dim and back."""
    sizes = [784, *model['hidden_dims']]
    encoder, decoder = [nn.Flatten()], []
    for a, b in zip(sizes, sizes[1:]):
        encoder += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(p)]
    encoder += [nn.Linear(sizes[-1], model['latent_dim'])]
    for a, b in zip([model['latent_dim'], *sizes[:0:-1]], sizes[:0:-1]):
        decoder += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(p)]
    decoder += [nn.Linear(sizes[1], 784), nn.Unflatten(1, (1, 28, 28)), nn.Sigmoid()]
    return Autoencoder(nn.Sequential(*encoder), nn.Sequential(*decoder))


def conv_decoder(model, p):
    """latent -> 7x7 -> 14x14 -> 28x28: what both convolutional architectures share."""
    low, high = model['channels']
    return nn.Sequential(
        nn.Linear(model['latent_dim'], high * 49), nn.ReLU(), nn.Dropout(p), nn.Unflatten(1, (high, 7, 7)),
        nn.ConvTranspose2d(high, low, 4, 2, 1), nn.ReLU(),      # stride divides kernel: no checkerboard
        nn.ConvTranspose2d(low, 1, 4, 2, 1), nn.Sigmoid())


def naive_conv(model, p):
    """Two strided convolutions and a linear layer; dropout on the features, not on the latent."""
    low, high = model['channels']
    encoder = nn.Sequential(
        nn.Conv2d(1, low, 3, 2, 1), nn.ReLU(), nn.Conv2d(low, high, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Dropout(p), nn.Linear(high * 49, model['latent_dim']))
    return Autoencoder(encoder, conv_decoder(model, p))


def asymmetric_resnet(model, p):
    """ResNet-(6n + 2) encoder (He et al. 2016, section 4.2: three stages of 16, 32, 64 channels) before the plain
    decoder. The last stage is flattened, not averaged: a mean over places could not say where a stroke is."""
    n = (model['resnet_depth'] - 2) // 6
    layers, before = [nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()], 16
    for after, stride in ((16, 1), (32, 2), (64, 2)):
        for i in range(n):
            layers.append(Block(before, after, stride if i == 0 else 1))
            before = after
    layers += [nn.Flatten(), nn.Dropout(p), nn.Linear(64 * 49, model['latent_dim'])]
    return Autoencoder(nn.Sequential(*layers), conv_decoder(model, p))


def build(config):
    """The Autoencoder of a validated config."""
    makers = {'vanilla_fc': vanilla_fc, 'naive_conv': naive_conv, 'asymmetric_resnet': asymmetric_resnet}
    dropout = config['regularization']['dropout']
    return makers[config['model']['architecture']](config['model'], dropout['p'] if dropout['enabled'] else 0.0)


def parameter_counts(model):
    """{'encoder', 'decoder', 'total': trainable parameters}."""
    counts = {name: sum(p.numel() for p in getattr(model, name).parameters() if p.requires_grad)
              for name in ('encoder', 'decoder')}
    return counts | {'total': sum(counts.values())}


@torch.no_grad()
def encode(model, images, device, batch=512):
    """Latents (N, latent_dim) as a NumPy array of float32. Leaves the model in evaluation mode."""
    model.eval()
    return torch.cat([model.encoder(part.to(device)).cpu() for part in images.split(batch)]).numpy()


@torch.no_grad()
def decode(model, latents, device, batch=512):
    """Images (N, 1, 28, 28) on the CPU of a NumPy array of latents. Leaves the model in evaluation mode."""
    model.eval()
    return torch.cat([model.decoder(part.to(device)).cpu()
                      for part in torch.as_tensor(latents, dtype=torch.float32).split(batch)])


@torch.no_grad()
def reconstruction_error(model, images, device, batch=512):
    """Mean squared error a pixel of D(E(x)), in evaluation mode."""
    model.eval()
    total = sum(F.mse_loss(model(part.to(device)), part.to(device), reduction='sum').item()
                for part in images.split(batch))
    return total / images.numel()


@torch.no_grad()
def cross_entropy(model, images, device, batch=512):
    """Cross-entropy a pixel of D(E(x)), nats, in evaluation mode."""
    model.eval()
    total = 0.0
    for part in images.split(batch):
        part = part.to(device)
        total += F.binary_cross_entropy_with_logits(model.logits(part), part, reduction='sum').item()
    return total / images.numel()


def save(path, model, config, epoch, metrics):
    """Write a checkpoint of plain types, in one move."""
    state = {'format': FORMAT, 'epoch': epoch, 'config': config, 'metrics': metrics,
             'model': {name: value.cpu() for name, value in model.state_dict().items()}}
    write_atomic(path, lambda file: torch.save(state, file))


def epoch_path(config, epoch):
    """..._epochXXX.pt beside output.checkpoint_path."""
    path = Path(config['output']['checkpoint_path'])
    return path.with_name(f'{path.stem}_epoch{epoch:03d}{path.suffix or ".pt"}')


def keep(config, model, epochs, source, train_digits):
    """After an epoch: the checkpoints that are due, and the report of the epochs so far.

    epochs: one dict an epoch, with 'epoch', 'steps' and 'seconds'; source: which data, in words; train_digits: how
    many. The checkpoint of the last epoch says that the run has ended, so it comes after the report.
    """
    output, epoch = config['output'], epochs[-1]['epoch']
    write_json(output['report_path'], {
        'experiment': config['experiment']['name'], 'data': source, 'train_digits': train_digits, 'config': config,
        'parameters': parameter_counts(model), 'device': str(next(model.parameters()).device),
        'threads': torch.get_num_threads(), 'torch': torch.__version__,
        'steps': sum(e['steps'] for e in epochs), 'seconds': sum(e['seconds'] for e in epochs),
        'cpu_seconds': sum(e['cpu_seconds'] for e in epochs), 'epochs': epochs})
    if epoch == config['training']['epochs']:
        save(output['checkpoint_path'], model, config, epoch, epochs[-1])
    if output['save_every_n_epochs'] and epoch % output['save_every_n_epochs'] == 0:
        save(epoch_path(config, epoch), model, config, epoch, epochs[-1])


def load(config, device, path=None):
    """(model in evaluation mode, epoch) from path, by default output.checkpoint_path.

    Raises SystemExit(2), after one line, for a file that is missing, damaged, or holds another model than the config's.
    """
    given, path = path is not None, path or config['output']['checkpoint_path']
    trainer = {'vanilla_fc': 'train_naive_autoencoder.py', 'naive_conv': 'train_covnet.py or '
               'train_naive_covnet_autoencoder.py', 'asymmetric_resnet': 'train_covnet.py'}
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        hint = 'check the path' if given else (f'train it with {trainer[config["model"]["architecture"]]} and this '
                                               'config, or pass --checkpoint')
        fail(f'{path}: no such checkpoint; {hint}')
    except Exception:    # torch raises half a dozen unrelated types for a damaged or foreign file
        fail(f'{path}: cannot be read as a checkpoint of this folder; train again')
    if not isinstance(state, dict) or state.get('format') != FORMAT:
        fail(f'{path}: not a checkpoint of this folder ({FORMAT})')
    if state['config']['model'] != config['model']:
        fail(f'{path}: holds the model {state["config"]["model"]}, but the config asks for {config["model"]}')
    model = build(config)
    try:
        model.load_state_dict(state['model'])
    except RuntimeError:
        fail(f'{path}: its weights do not fit {config["model"]}; train again')
    return model.to(device).eval(), state['epoch']
