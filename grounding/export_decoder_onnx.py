"""The decoder alone, as ONNX for the browser: latent (batch, latent_dim) -> image (batch, 1, 28, 28), float32.

Reads:  the config, output.checkpoint_path (or --checkpoint)
Writes: --output, else artifacts/<experiment name>_decoder.onnx
    python grounding/export_decoder_onnx.py --config grounding/configs/5_asymmetric_resnet8_autoencoder.yaml
"""
import onnx_file


def main():
    onnx_file.run(__doc__, 'decoder')


if __name__ == '__main__':
    main()
