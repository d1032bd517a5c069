"""A network is as nonlinear as its activation's name says, or the name is refused."""

import numpy as np
import pytest
import torch
from torch import nn

from pyrovae.nn import MLP


@pytest.mark.parametrize(
    "name", ["Sequential", "ModuleList", "Flatten", "Linear", "Dropout", "MSELoss", "Threshold"]
)
def test_what_is_no_activation_is_refused(name):
    """An empty Sequential made the network linear, and nothing said so."""
    with pytest.raises(ValueError, match=f"takes no arguments, .* got '{name}'"):
        MLP(3, 2, (4,), name)


@pytest.mark.parametrize("name", ["ReLU", "Tanh", "GLU", "SiLU", "PReLU"])
def test_an_activation_bends(name):
    torch.manual_seed(0)
    net = MLP(3, 2, (8,), name)
    a, b = torch.randn(2, 3)
    assert (net(a + b) - net(a) - net(b) + net(torch.zeros(3))).abs().max() > 1e-3


def test_a_class_of_ones_own_is_taken_as_it_is():
    assert MLP(3, 2, (4,), nn.Dropout)(torch.zeros(3)).shape == (2,)


@pytest.mark.parametrize("hidden", [np.array([4, 5]), np.int64(4), range(4, 6), iter([4, 5])])
def test_sizes_may_be_whole_numbers_of_any_kind(hidden):
    assert MLP(3, 2, hidden)(torch.zeros(3)).shape == (2,)
