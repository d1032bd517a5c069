"""Small networks whose inputs may carry any number of leading dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn

__all__ = ["MLP"]


class MLP(nn.Module):
    r"""A fully connected network from events of one shape to events of another.

    .. math:: h_0 = \mathrm{vec}(x), \quad h_{i+1} = a(W_i h_i + b_i), \quad
              y = W_L h_L + b_L

    Everything to the left of the input event is a batch dimension, so a plate of particles
    costs no reshaping: ``[K, N, *in_shape]`` gives ``[K, N, *out_shape]``.

    Args:
        in_shape: The event shape of the input, ``[D]`` or ``[C, H, W]``; an int means ``[D]``.
        out_shape: The event shape of the output.
        hidden: The widths of the hidden layers; ``()`` makes the map affine.
        activation: The name of a :mod:`torch.nn` module (``"ReLU"``), or its class.

    Raises:
        ValueError: If a width is not positive or the activation is not in :mod:`torch.nn`.

    Example:
        >>> MLP(20, (1, 28, 28))(torch.zeros(5, 3, 20)).shape
        torch.Size([5, 3, 1, 28, 28])
    """

    def __init__(
        self,
        in_shape: int | Sequence[int],
        out_shape: int | Sequence[int],
        hidden: int | Sequence[int] = (400,),
        activation: str | type[nn.Module] = "ReLU",
    ) -> None:
        super().__init__()
        self.in_shape, self.out_shape = _shape(in_shape), _shape(out_shape)
        widths = [prod(self.in_shape), *_shape(hidden), prod(self.out_shape)]
        if min(widths) < 1:
            raise ValueError(f"Expected layers of positive width, got {widths}.")
        activation = _activation(activation)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), activation()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., *in_shape]`` to ``[..., *out_shape]``."""
        batch = x.shape[: x.dim() - len(self.in_shape)]
        if x.shape[len(batch) :] != self.in_shape:
            raise ValueError(
                f"Expected events of shape {list(self.in_shape)}, got a tensor {list(x.shape)}."
            )
        return self.layers(x.reshape(*batch, -1)).reshape(*batch, *self.out_shape)


def _shape(shape: int | Sequence[int]) -> torch.Size:
    return torch.Size([shape] if isinstance(shape, int) else shape)


def _activation(activation: str | type[nn.Module]) -> type[nn.Module]:
    found = getattr(nn, activation, None) if isinstance(activation, str) else activation
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"Expected an activation of torch.nn such as 'ReLU', got {activation!r}.")
    return found
