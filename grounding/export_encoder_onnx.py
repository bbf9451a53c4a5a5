"""The encoder alone, as ONNX for the browser: image (batch, 1, 28, 28) -> latent (batch, latent_dim), float32.

Reads:  the config, output.checkpoint_path (or --checkpoint)
Writes: --output, else artifacts/<experiment name>_encoder.onnx
    python grounding/export_encoder_onnx.py --config grounding/configs/5_asymmetric_resnet8_autoencoder.yaml
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
    path = args.output or settings.artifact(config, 'encoder.onnx')
    example = torch.rand(max(onnx_file.BATCHES), 1, 28, 28)
    difference = onnx_file.export(model.encoder, example, 'image', 'latent', path)
    print(f'wrote {path}: epoch {epoch}, largest difference to PyTorch {difference:.1e}')


if __name__ == '__main__':
    main()
