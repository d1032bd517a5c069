"""The log-probability of many Bernoullis at once, beside torch's own."""

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from pyrovae.pairs.bernoulli import Bits, small


def test_what_is_small_of_both_odds_is_right_to_a_unit_of_float32():
    logits = torch.linspace(-200.0, 200.0, 1_000_001)
    exact = (-logits.double().abs()).exp()
    found = small(logits)
    assert (found.double() - exact).abs().max() < 2.0**-22
    near = logits.abs() < 87
    assert ((found.double() - exact)[near] / exact[near]).abs().max() < 1e-5
    assert small(torch.tensor([0.0, -0.0])).tolist() == [1.0, 1.0]
    assert small(torch.tensor([math.inf, -math.inf])).max() < 2e-38
    assert small(torch.tensor([math.nan])).isnan().all()
    assert torch.equal(small(logits.double()), (-logits.double().abs()).exp())


@pytest.mark.parametrize("size", [784, 13, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_slopes_are_those_of_the_cross_entropy(size, dtype):
    torch.manual_seed(0)
    logits = (6 * torch.randn(5, 3, size, dtype=dtype)).requires_grad_()
    value, weight = torch.rand(5, 3, size, dtype=dtype).requires_grad_(), torch.rand(5, 3)
    exact = -binary_cross_entropy_with_logits(logits, value, reduction="none").sum(-1)
    found = Bits.apply(logits, value)
    torch.testing.assert_close(found, exact, rtol=2e-6 if dtype == torch.float32 else 1e-14, atol=0)
    slopes = [
        torch.autograd.grad((weight.to(dtype) * each).sum(), (logits, value))
        for each in (found, exact)
    ]
    for mine, other in zip(*slopes, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
