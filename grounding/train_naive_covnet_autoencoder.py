"""Train the convolutional baseline (model.architecture: naive_conv), without regularisation or augmentation.

The loss is the cross-entropy of the pixels: where all have gone black, the squared error has no gradient left.

Reads:  the config; MNIST from data.root (see digits.py)
Writes: output.checkpoint_path (last epoch), ..._epochXXX.pt every output.save_every_n_epochs, output.report_path
    python grounding/train_naive_covnet_autoencoder.py --config grounding/configs/1_naive_covnet_autoencoder.yaml
"""
import math
import time

import torch
from torch.nn import functional as F

import autoencoders
import digits
import settings


def main():
    config = settings.load_config(settings.parser(__doc__).parse_args())
    settings.expect(config, __file__, ('naive_conv',), plain=True)
    device = settings.start(config)
    splits, source = digits.load(config)
    print(source)
    training, output = config['training'], config['output']
    workers = settings.usable_workers(training['num_workers'])
    model = autoencoders.build(config).to(device)
    counts = autoencoders.parameter_counts(model)
    print(f'{config["experiment"]["name"]}: {counts["encoder"]:,} parameters in the encoder, '
          f'{counts["decoder"]:,} in the decoder; {device}')
    optimizer = torch.optim.AdamW(model.parameters(), lr=training['learning_rate'],
                                  weight_decay=training['weight_decay'])
    epochs, began = [], time.monotonic()
    for epoch in range(1, training['epochs'] + 1):
        model.train()
        total, seen, started = 0.0, 0, time.monotonic()
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
            settings.fail(f'epoch {epoch}: the training loss is {train_loss}; lower training.learning_rate', status=1)
        epochs.append({'epoch': epoch, 'train_loss': train_loss, 'val_loss': val_loss,
                       'seconds': time.monotonic() - started})
        print(f'epoch {epoch:3d}/{training["epochs"]}  train {train_loss:.5f}  val {val_loss:.5f}  '
              f'{epochs[-1]["seconds"]:.1f} s', flush=True)
        last = epoch == training['epochs']
        if last:
            autoencoders.save(output['checkpoint_path'], model, config, epoch, epochs[-1])
        if output['save_every_n_epochs'] and epoch % output['save_every_n_epochs'] == 0:
            autoencoders.save(autoencoders.epoch_path(config, epoch), model, config, epoch, epochs[-1])
        settings.write_json(output['report_path'], {
            'experiment': config['experiment']['name'], 'data': source, 'config': config, 'parameters': counts,
            'device': str(device), 'threads': torch.get_num_threads(), 'torch': torch.__version__,
            'seconds': time.monotonic() - began, 'epochs': epochs})
    print(f'wrote {output["checkpoint_path"]} and {output["report_path"]}')


if __name__ == '__main__':
    main()
