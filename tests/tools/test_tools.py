"""The small tools that every folder uses."""

import math

import numpy as np
import pytest
import torch

from pyrovae._tools import standard_error


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_the_standard_error_is_that_of_numpy(dim):
    values = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = values.numpy().std(dim, ddof=1) / math.sqrt(values.shape[dim])
    np.testing.assert_allclose(standard_error(values, dim), expected, rtol=1e-14)


@pytest.mark.parametrize("shape", [(1,), (1, 3), (0,)])
def test_fewer_than_two_values_have_no_standard_error(shape):
    found = standard_error(torch.zeros(shape, dtype=torch.float64))
    assert found.isnan().all()
    assert found.shape == shape[1:]
    assert found.dtype == torch.float64
