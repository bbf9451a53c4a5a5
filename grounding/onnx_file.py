"""One half of an autoencoder as an ONNX file: any batch size, and no file that does not compute what PyTorch does."""
import io
import logging
import warnings

import numpy as np
import onnxruntime
import torch

import autoencoders
from settings import artifact, fail, load_config, parser, start, write_atomic

TOLERANCE = 1e-4        # largest difference to PyTorch that is let through
BATCHES = (1, 2, 17)    # sizes that are compared


def export(module, example, input_name, output_name, path):
    """Write module (on the CPU, in evaluation mode) to path; returns the largest difference over the compared batches.

    example: inputs (17, ...) in the range of the page's. Raises SystemExit(1) above TOLERANCE, writing nothing.
    """
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')    # of the exporter about its own parts
        program = torch.onnx.export(module, (example[:2],), input_names=[input_name], output_names=[output_name],
                                    dynamic_shapes=({0: torch.export.Dim('batch')},), dynamo=True, verbose=False)
    buffer = io.BytesIO()
    program.save(buffer)                   # weights inside: the browser fetches one file
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=['CPUExecutionProvider'])
    difference = 0.0
    for size in BATCHES:
        with torch.no_grad():
            expected = module(example[:size]).numpy()
        got, = session.run([output_name], {input_name: example[:size].numpy()})
        if got.shape != expected.shape:
            fail(f'{path} is not written: onnxruntime gives {got.shape} where PyTorch gives {expected.shape}', status=1)
        difference = max(difference, float(np.abs(got - expected).max()))
    if not difference <= TOLERANCE:        # NaN is refused too
        fail(f'{path} is not written: onnxruntime differs from PyTorch by {difference:.1e}, more than {TOLERANCE:.0e}',
             status=1)
    write_atomic(path, lambda file: file.write(buffer.getvalue()))
    return difference


def run(doc, half):
    """The whole program of a script that exports one half, 'encoder' or 'decoder', and has the docstring `doc`."""
    p = parser(doc)
    p.add_argument('--checkpoint', help='instead of output.checkpoint_path')
    p.add_argument('--output', help='instead of the default path')
    args = p.parse_args()
    config = load_config(args)
    start(config)
    model, epoch = autoencoders.load(config, 'cpu', args.checkpoint)
    path = args.output or artifact(config, f'{half}.onnx')
    images = torch.rand(max(BATCHES), 1, 28, 28)
    if half == 'encoder':
        difference = export(model.encoder, images, 'image', 'latent', path)
    else:
        with torch.no_grad():
            latents = model.encoder(images)             # of the size that occurs
        difference = export(model.decoder, latents, 'latent', 'image', path)
    print(f'wrote {path}: epoch {epoch}, largest difference to PyTorch {difference:.1e}')
