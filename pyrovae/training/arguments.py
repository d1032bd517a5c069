"""The arguments of fit(): what is taken for data and for an optimizer, and which numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyrovae._tools import InputError, InputTypeError
from pyrovae.data import Dataset

__all__ = ["as_dataset", "check_sizes", "make_optim"]


def as_dataset(data: Any) -> Dataset:
    """A data set, of training data alone if it is a tensor ``[N, ...]``.

    Raises:
        TypeError: If it is neither, or of whole numbers.
    """
    if isinstance(data, Dataset):
        return data
    if not isinstance(data, Tensor):
        raise InputTypeError(
            f"Expected a Dataset or a tensor [N, ...], got {type(data).__name__}: load a file with "
            f"pyrovae.load_data, or use torch.as_tensor(array)."
        )
    if not data.is_floating_point():
        raise InputTypeError(
            f"Expected floating-point data, got {data.dtype}: scale and use .float()."
        )
    return Dataset("tensor", data.shape[1:], data, valid=None, test=None)


def check_sizes(
    num_data: int, epochs: int, batch_size: int, patience: int | None, lr: float
) -> None:
    """Check the numbers that :func:`pyrovae.fit` is called with.

    Raises:
        ValueError: If one is out of range.
    """
    if epochs < 1:
        raise InputError(f"Expected epochs >= 1, got {epochs}.")
    if not 1 <= batch_size <= num_data:
        raise InputError(
            f"Expected a batch size between 1 and the {num_data} training data, got {batch_size}: "
            f"choose another."
        )
    if patience is not None and patience < 1:
        raise InputError(f"Expected patience >= 1, got {patience}.")
    if not lr > 0:
        raise InputError(f"Expected a learning rate > 0, got {lr}.")


def make_optim(optimizer: Any, lr: float) -> Any:
    """What :class:`pyrovae.SVI` takes for an optimizer: Adam at ``lr``, if there is none."""
    if optimizer is None:
        return lambda params: torch.optim.Adam(params, lr=lr, fused=True)
    if isinstance(optimizer, type) and issubclass(optimizer, Optimizer):
        return lambda params: optimizer(params, lr=lr)
    return optimizer
