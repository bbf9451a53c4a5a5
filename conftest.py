"""Every test: one thread, in the programs that it starts too, because on tensors this small threads mostly wait for one
another; and the same random numbers."""
import os

os.environ['OMP_NUM_THREADS'] = '1'       # read when torch is imported

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
