"""Train the convolutional baseline (model.architecture: naive_conv), without regularisation or augmentation.

Reads:  the config; MNIST from data.root (see digits.py)
Writes: output.checkpoint_path (last epoch), ..._epochXXX.pt every output.save_every_n_epochs, output.report_path
    python grounding/train_naive_covnet_autoencoder.py --config grounding/configs/1_naive_covnet_autoencoder.yaml
"""
from training import train


def main():
    train(__doc__, __file__, ('naive_conv',), plain=True)


if __name__ == '__main__':
    main()
