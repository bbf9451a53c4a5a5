"""The loop of the three trainers, which differ in the configs that they take.

The loss is the cross-entropy of the pixels: behind a sigmoid the squared error can stall, because where all pixels have
gone black it has next to no gradient left.
"""
import math
import time

import torch
from torch.nn import functional as F

import autoencoders
import digits
import settings
from latents import knn_predictions


def train(doc, script, architectures, plain=False):
    """The whole program of the trainer `script` with the docstring `doc`.

    architectures: those it trains; plain: it takes no config with dropout or augmentations.
    """
    config = settings.load_config(settings.parser(doc).parse_args())
    settings.expect(config, script, architectures, plain)
    device = settings.start(config)
    splits, source = digits.load(config)
    print(source)
    if config['analysis']['k'] > len(splits['train']):    # said before an epoch is spent
        settings.fail(f'analysis.k is {config["analysis"]["k"]}, but there are only {len(splits["train"])} training '
                      'digits')
    training, augmentation = config['training'], config['self_supervised']
    repeats = augmentation['augmentations_per_sample'] if augmentation['enabled'] else 1
    workers = settings.usable_workers(training['num_workers'])
    model = autoencoders.build(config).to(device, memory_format=torch.channels_last)     # faster: ResNet-8 by 1.4
    counts = autoencoders.parameter_counts(model)
    print(f'{config["experiment"]["name"]}: {counts["encoder"]:,} parameters in the encoder, '
          f'{counts["decoder"]:,} in the decoder; {device}')
    print(f'{len(splits["train"]):,} digits x {repeats} an epoch')
    optimizer = torch.optim.AdamW(model.parameters(), lr=training['learning_rate'],
                                  weight_decay=training['weight_decay'])
    epochs, labels = [], splits['train'].labels.numpy()
    for epoch in range(1, training['epochs'] + 1):
        model.train()
        total, seen, started, cpu_started = 0.0, 0, time.monotonic(), time.process_time()
        loader = digits.batches(splits['train'].images, training['batch_size'], repeats, workers,
                                seed=config['experiment']['seed'] * 10_000 + epoch, progress=f'epoch {epoch}')
        for x, in loader:
            x = x.to(device)                                                  # (B, 1, 28, 28)
            seen_by_encoder = digits.augment(x, augmentation) if augmentation['enabled'] else x
            target = x if augmentation['target'] == 'original' else seen_by_encoder
            loss = F.binary_cross_entropy_with_logits(model.logits(seen_by_encoder), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total, seen = total + loss.detach() * len(x), seen + len(x)       # no device sync inside the epoch
        train_loss = float(total) / seen
        val_loss = autoencoders.cross_entropy(model, splits['val'].images, device)
        if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
            settings.fail(f'epoch {epoch}: the loss is {train_loss} in training, {val_loss} in validation; '
                          'lower training.learning_rate', status=1)
        seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu_started
        predicted = knn_predictions(autoencoders.encode(model, splits['train'].images, device), labels,
                                    autoencoders.encode(model, splits['val'].images, device), **config['analysis'])
        accuracy = float((predicted == splits['val'].labels.numpy()).mean())
        epochs.append({'epoch': epoch, 'train_loss': train_loss, 'val_loss': val_loss, 'val_knn_accuracy': accuracy,
                       'steps': len(loader), 'seconds': seconds, 'cpu_seconds': cpu_seconds})   # not of the neighbours
        print(f'epoch {epoch:3d}/{training["epochs"]}  train {train_loss:.5f}  val {val_loss:.5f}  '
              f'kNN {accuracy:.3f}  {seconds:.1f} s', flush=True)
        autoencoders.keep(config, model, epochs, source, len(splits['train']))
    print(f'wrote {config["output"]["checkpoint_path"]} and {config["output"]["report_path"]}')
