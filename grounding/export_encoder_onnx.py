"""The encoder alone, as ONNX for the browser: image (batch, 1, 28, 28) -> latent (batch, latent_dim), float32.

Reads:  the config, output.checkpoint_path (or --checkpoint)
Writes: --output, else artifacts/<experiment name>_encoder.onnx
    python grounding/export_encoder_onnx.py --config grounding/configs/5_asymmetric_resnet8_autoencoder.yaml
"""
import onnx_file


def main():
    onnx_file.run(__doc__, 'encoder')


if __name__ == '__main__':
    main()
