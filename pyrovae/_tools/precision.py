"""The precision of float32 matrix products, for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from pyrovae._tools import InputError, did_you_mean, warn

PRECISIONS = {"float32": "highest", "tf32": "high", "bf16": "medium"}


def check_precision(precision: str) -> None:
    """Refuse the name of a precision that is none of :data:`PRECISIONS`."""
    if precision not in PRECISIONS:
        raise InputError(
            f"Expected the precision to be one of {', '.join(PRECISIONS)}, got "
            f"{str(precision)!r}{did_you_mean(str(precision), PRECISIONS)}."
        )


def require_effect(precision: str, device: torch.device, weights: Iterable[Tensor]) -> None:
    """Refuse a precision with which products on a device come out as those of float32."""
    check_precision(precision)
    if precision == "float32":
        return
    # None may be known yet, as where a function states them by pyro.param.
    dtypes = {weight.dtype for weight in weights}
    if dtypes and torch.float32 not in dtypes:
        raise InputError(
            f"Expected float32 weights for precision={precision!r}, as only their products are "
            f"rounded: leave it out for a pair of another type."
        )
    if not rounds(precision, device):
        raise InputError(
            f"Expected a device with {precision} units for precision={precision!r}, as the "
            f"products on {device} are those of float32: leave it out."
        )


def warn_without_effect(precision: str, device: torch.device) -> None:
    """Say that a precision changes nothing on a device, where that is so."""
    if precision != "float32" and not rounds(precision, device):
        warn(f"precision={precision!r} changes nothing: products on {device} stay in float32.")


def rounds(precision: str, device: torch.device) -> bool:
    """Whether factors are rounded on a device, told by a product that shows it."""
    # tf32 has no 2⁻¹² beside 1, bf16 no 2⁻⁹. On a CPU torch 2.14 takes bf16 for AMX alone: with the
    # AVX-512 instructions for bf16 products stay those of float32. Small ones are never rounded.
    factor = torch.full((64, 64), 1 + 2.0 ** (-9 if precision == "bf16" else -12), device=device)
    with matmul_precision(precision):
        return bool((factor @ torch.eye(64, device=device) == 1).all())


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Multiply float32 matrices at some precision for a while; all else stays float32.

    ``"float32"`` is exact; ``"tf32"`` rounds factors to 10 bits of mantissa, ``"bf16"`` to 7 bits,
    and their products are added in float32 (see ``torch.set_float32_matmul_precision``). Where the
    device has no such units, products are those of float32: see :func:`rounds`.
    """
    check_precision(precision)
    each = precision_settings()
    # Torch's older settings have no word for all that the newer ones may say: then as at first.
    multiplied, convolved = "highest", True
    with suppress(RuntimeError):
        multiplied = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        convolved = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(PRECISIONS[precision])
    torch.backends.cudnn.allow_tf32 = precision != "float32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(multiplied)
        torch.backends.cudnn.allow_tf32 = convolved
        for setting, value in zip(_settings(), each, strict=True):
            setting.fp32_precision = value


def precision_settings() -> tuple[str, ...]:
    """How float32 matrices are multiplied on each kind of device, and convolved by cuDNN."""
    return tuple(setting.fp32_precision for setting in _settings())


def _settings() -> tuple[Any, ...]:
    found: Any = torch.backends
    return found.cuda.matmul, found.mkldnn.matmul, found.cudnn.conv, found.cudnn.rnn
