"""The decoder alone, as ONNX for the browser: latent (batch, latent_dim) -> image (batch, 1, 28, 28), float32.

Reads:  the config, output.checkpoint_path (or --checkpoint)
Writes: --output, else artifacts/<experiment name>_decoder.onnx
    python grounding/export_decoder_onnx.py --config grounding/configs/5_asymmetric_resnet8_autoencoder.yaml
"""
import torch

import autoencoders
import onnx_file
import settings


def main():
    p = settings.parser(__doc__)
    p.add_argument('--checkpoint', help='instead of output.checkpoint_path')
    p.add_argument('--output', help='instead of the default path')
    args = p.parse_args()
    config = settings.load_config(args)
    settings.start(config)
    model, epoch = autoencoders.load(config, 'cpu', args.checkpoint)
    path = args.output or settings.artifact(config, 'decoder.onnx')
    with torch.no_grad():
        example = model.encoder(torch.rand(max(onnx_file.BATCHES), 1, 28, 28))    # latents of the size that occurs
    difference = onnx_file.export(model.decoder, example, 'latent', 'image', path)
    print(f'wrote {path}: epoch {epoch}, largest difference to PyTorch {difference:.1e}')


if __name__ == '__main__':
    main()
