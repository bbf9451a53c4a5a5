"""tools/bench.py measures what it says: one tiny step of P1, in a process of its own."""
from functools import partial

import pytest
import torch

from runs.presets import PRESETS
from tools import bench


def test_a_step_is_measured_in_parts(tmp_path):
    words = PRESETS['smoke']['p1'] + ' --dtype=float32 --prior_gate=0'
    step = bench.step_of('p1', words, tmp_path, timed=2, threads=1)
    assert isinstance(step, dict), step
    assert step['sentences'] == 8 and len(step['seconds']) == len(step['peak']) == len(step['data']) == 2
    assert min(step['seconds']) > 0 and 0.1 < step['gigabytes'] < 4
    assert sum(step['where'].values()) == pytest.approx(1)
    for part in ('products', *bench.PARTS):
        assert 0 < (min(step[part]) if part == 'data' else step[part]) < 5, part
    # The transformer block alone is 8 x 2 x T x (4 x 32 x 32 + 2 x 32 x 64) forward, T at least 6.
    assert step['operations'] > 3 * 8 * 2 * 6 * (4 * 32 * 32 + 2 * 32 * 64)
    assert 'product' in ' '.join(step['where']) and step['where']['matrix products'] > 0
    assert step['strangers'] == 0, 'attention and priors are parts of the step whose products are counted'
    assert 0 < step['left'] < 1, 'and matmul is all products but theirs'
    memory = bench.step_of('p1', words, tmp_path, timed=0, threads=1)
    assert memory['seconds'] == [] and 0.1 < memory['gigabytes'] < 4 and 'where' not in memory
    broken = bench.step_of('p1', words + ' --batch_size=0', tmp_path, timed=1, threads=1)
    assert isinstance(broken, str) and 'batch_size' in broken


def test_products_are_found_and_made_again():
    a, b = torch.randn(3, 4, 5), torch.randn(5, 6)
    with bench.Products() as products:
        for _ in range(2):
            a[0] @ b
        a.transpose(1, 2).bmm(torch.randn(1, 4, 2).expand(3, -1, -1))
        torch.nn.functional.conv2d(torch.randn(1, 2, 8, 8), torch.randn(3, 2, 3, 3), padding=1)
    assert sorted((operator.__name__.partition('.')[0], times) for (operator, _), times in products.counts.items()) == [
        ('bmm', 1), ('convolution', 1), ('mm', 2)]
    for operator, given in products.counts:
        again = bench.made(given, torch.device('cpu'))
        assert bench.look(again) == given, 'shape, stride and dtype'
        operator(*again)
    assert bench.cost_of_products(products.counts, torch.device('cpu')) > 0


def test_attention_and_priors_have_products_of_their_own():
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8)
    for grad, products in ((False, 2), (True, 6)):                  # each product has two more in its backward
        counts = bench.products_of(partial(bench.attention_step, grad, q, k, v), 3)
        assert sum(counts.values()) == 3 * products
    counts = bench.products_of(lambda: bench.priors_step(torch.randn(4, 6, 32, 32), 2.0, 4), 1)
    assert {operator.__name__.partition('.')[0] for operator, _ in counts} == {'mm', 'bmm'}
