"""One small autoencoder for all tests, trained and exported by the real scripts; one thread."""
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')    # read when torch is imported: on networks this small threads only wait

from types import SimpleNamespace

import pytest

from small_run import MAP, call, fake_digits, options, write_idx


@pytest.fixture(scope='session')
def data_root(tmp_path_factory):
    """300 + 100 fake digits as the four IDX files."""
    root = tmp_path_factory.mktemp('mnist')
    write_idx(root, 'train', *fake_digits(300, seed=0))
    write_idx(root, 't10k', *fake_digits(100, seed=1), compressed=True)
    return root


@pytest.fixture(scope='session')
def trained(tmp_path_factory, data_root):
    """Experiment 5, small: a folder with artifacts/ from training, both ONNX exports, the cloud and the assets."""
    root, before = tmp_path_factory.mktemp('root'), os.getcwd()
    os.chdir(root)
    try:
        # long enough that the decoder draws bars: the pages are tested on images that differ
        common = options(data_root, training__epochs=6, training__batch_size=20, training__learning_rate=0.003)
        call('train_covnet', *common)
        call('export_encoder_onnx', *common)
        call('export_decoder_onnx', *common)
        call('generate_latent_points', *common, *MAP)
        call('export_interactive_assets', *common, *MAP, '--projection-k', 5)
    finally:
        os.chdir(before)
    return SimpleNamespace(root=root, artifacts=root / 'artifacts', options=common)
