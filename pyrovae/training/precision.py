"""The precision of float32 matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pyrovae._tools import InputError, did_you_mean

__all__ = ["PRECISIONS", "check_precision", "matmul_precision"]

PRECISIONS = {"float32": "highest", "tf32": "high", "bf16": "medium"}


def check_precision(precision: str) -> str:
    """The name itself, if it is one of :data:`PRECISIONS`.

    Raises:
        ValueError: If it is not.
    """
    if precision not in PRECISIONS:
        raise InputError(
            f"Expected precision to be one of {list(PRECISIONS)}, got {precision!r}"
            f"{did_you_mean(str(precision), PRECISIONS)}."
        )
    return precision


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Multiply float32 matrices at some precision for a while.

    Weights, sums and everything but matrix products and convolutions stay float32.

    Args:
        precision: ``"float32"``, exact; ``"tf32"``, factors rounded to 10 bits of mantissa where
            the device has such units; ``"bf16"``, to 7 bits. Sums are in float32.

    Raises:
        ValueError: If ``precision`` is none of these.

    References:
        torch.set_float32_matmul_precision.
    """
    check_precision(precision)
    before, convolves = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(PRECISIONS[precision])
    torch.backends.cudnn.allow_tf32 = precision != "float32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolves
