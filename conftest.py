"""Every test: one thread, in the programs that it starts too, because on tensors this small threads mostly wait for one
another; the same random numbers; and Python's own answer to Ctrl-C. In CI (environment variable CI) a part that cannot
be tested is an error."""
import os

os.environ['OMP_NUM_THREADS'] = '1'       # read when torch is imported

import signal
from types import SimpleNamespace

import pytest


@pytest.fixture(autouse=True)
def fresh():
    import torch                          # here: the process that hands out the tests needs it not
    torch.manual_seed(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)       # a run in this process puts its own in place


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """A folder, one a test file, in which the corpus of runs/smoke.sh is prepared, with 64 held-out scenes: .folder,
    .config (the settings of P1)."""
    import data
    import p1_canvas
    from runtime import Config
    folder = tmp_path_factory.mktemp('small')
    config = Config(p1_canvas.config | {'num_scenes': 300, 'vocab_size': 1024})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(data, 'HELD_OUT_SIZE', 64)
        data.load(config)
    return SimpleNamespace(folder=folder, config=config)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    if os.environ.get('CI') and report.skipped and 'NOT TESTED' in report.longrepr[2]:
        report.outcome, report.longrepr = 'failed', report.longrepr[2]
    return report
