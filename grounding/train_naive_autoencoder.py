"""Train the fully connected autoencoder (model.architecture: vanilla_fc): cross-entropy of the pixels and nothing else.

Reads:  the config; MNIST from data.root (see digits.py)
Writes: output.checkpoint_path (last epoch), ..._epochXXX.pt every output.save_every_n_epochs, output.report_path
    python grounding/train_naive_autoencoder.py --config grounding/configs/0_naive_autoencoder.yaml
"""
from training import train


def main():
    train(__doc__, __file__, ('vanilla_fc',), plain=True)


if __name__ == '__main__':
    main()
