"""Train the fully connected autoencoder (model.architecture: vanilla_fc): cross-entropy of the pixels and
nothing else.

The squared error behind a sigmoid does not train: where all pixels have gone black, it has no gradient left.

Reads:  the config; MNIST from data.root (see digits.py)
Writes: output.checkpoint_path (last epoch), ..._epochXXX.pt every output.save_every_n_epochs, output.report_path
    python grounding/train_naive_autoencoder.py --config grounding/configs/0_naive_autoencoder.yaml
train_naive_covnet_autoencoder.py runs the same loop on the convolutional network.
"""
import math
import time

import torch
from torch.nn import functional as F

import autoencoders
import digits
import settings


def train(doc, script, architecture):
    """The whole program of the trainer `script` with the docstring `doc`: it trains configs of one architecture."""
    config = settings.load_config(settings.parser(doc).parse_args())
    settings.expect(config, script, (architecture,), plain=True)
    device = settings.start(config)
    splits, source = digits.load(config)
    print(source)
    training = config['training']
    workers = settings.usable_workers(training['num_workers'])
    model = autoencoders.build(config).to(device)
    counts = autoencoders.parameter_counts(model)
    print(f'{config["experiment"]["name"]}: {counts["encoder"]:,} parameters in the encoder, '
          f'{counts["decoder"]:,} in the decoder; {device}')
    optimizer = torch.optim.AdamW(model.parameters(), lr=training['learning_rate'],
                                  weight_decay=training['weight_decay'])
    epochs = []
    for epoch in range(1, training['epochs'] + 1):
        model.train()
        total, seen, started, cpu_started = 0.0, 0, time.monotonic(), time.process_time()
        loader = digits.batches(splits['train'].images, training['batch_size'], 1, workers,
                                seed=config['experiment']['seed'] * 10_000 + epoch, progress=f'epoch {epoch}')
        for x, in loader:
            x = x.to(device)                                                  # (B, 1, 28, 28)
            loss = F.binary_cross_entropy_with_logits(model.logits(x), x)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total, seen = total + loss.detach() * len(x), seen + len(x)       # no device sync inside the epoch
        train_loss = float(total) / seen
        val_loss = autoencoders.cross_entropy(model, splits['val'].images, device)
        if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
            settings.fail(f'epoch {epoch}: the loss is {train_loss} in training, {val_loss} in validation; '
                          'lower training.learning_rate', status=1)
        epochs.append({'epoch': epoch, 'train_loss': train_loss, 'val_loss': val_loss,
                       'seconds': time.monotonic() - started, 'cpu_seconds': time.process_time() - cpu_started})
        print(f'epoch {epoch:3d}/{training["epochs"]}  train {train_loss:.5f}  val {val_loss:.5f}  '
              f'{epochs[-1]["seconds"]:.1f} s', flush=True)
        autoencoders.keep(config, model, epochs, source)
    print(f'wrote {config["output"]["checkpoint_path"]} and {config["output"]["report_path"]}')


def main():
    train(__doc__, __file__, 'vanilla_fc')


if __name__ == '__main__':
    main()
