"""Train naive_conv or asymmetric_resnet with dropout and, where self_supervised is enabled, augmented digits.

With self_supervised.target: original the network sees an augmented digit and must draw the one it came from, so what
an augmentation changes is not worth a place in the latent (denoising autoencoders, Vincent et al. 2008, with shifts,
turns and masks for noise). With target: augmented it must draw what it sees.

Reads:  the config; MNIST from data.root (see digits.py)
Writes: output.checkpoint_path (last epoch), ..._epochXXX.pt every output.save_every_n_epochs, output.report_path
    python grounding/train_covnet.py --config grounding/configs/3_regularized_covnet.yaml
"""
from training import train


def main():
    train(__doc__, __file__, ('naive_conv', 'asymmetric_resnet'))


if __name__ == '__main__':
    main()
