"""The log-probability of many Bernoullis at once, for a compiler to fuse."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# The exponent of 1 in a float32, and where it stands; below 2⁻¹²⁶ numbers are subnormal.
ONE, PLACE, LEAST = 127, 23, -126.0
# Terms of the series of 2^r: for |r| ≤ ½ the next one is below 2⁻²³.
TERMS = [math.log(2) ** n / math.factorial(n) for n in range(7)]


class Bits(torch.autograd.Function):
    r"""The log-probability of many Bernoullis x at logits l ``[..., D]``, summed over D.

    .. math:: \sum_d x_d l_d - \max(l_d, 0) - \sum_g \ln \prod_{d \in g} (1 + e^{-|l_d|}), \qquad
              \partial_{l_d} = x_d - \mathrm{sigmoid}(l_d)

    Every factor lies between 1 and 2, so that a logarithm of the product of a few of them loses
    nothing and costs as much as one of a single factor; its derivative is not asked for.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(logits, value)
        factors = 1 + small(logits)
        few = next(n for n in range(8, 0, -1) if factors.shape[-1] % n == 0)
        products = factors.unflatten(-1, (few, -1)).prod(-2)
        return (value * logits - logits.clamp(min=0)).sum(-1) - products.log().sum(-1)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None]:
        logits, value = ctx.saved_tensors
        wide, (by_logits, by_value) = slope[..., None], ctx.needs_input_grad
        part = small(logits)
        chance = torch.where(logits < 0, part, 1.0) / (1 + part)
        return (
            wide * (value - chance) if by_logits else None,
            wide * logits if by_value else None,
        )


def small(logits: Tensor) -> Tensor:
    r"""What is small of both odds, to a unit of float32.

    .. math:: e^{-|l|} = 2^n \sum_{k=0}^6 \frac{(r \ln 2)^k}{k!}, \qquad
              n = \mathrm{round}(-|l| / \ln 2), \quad r = -|l| / \ln 2 - n

    On a CPU that takes half the time of the exponential function, which Inductor calls out of line
    (torch 2.14).
    """
    if logits.dtype != torch.float32 or logits.device.type != "cpu":
        return (-logits.abs()).exp()
    power = (logits.abs() * (-1 / math.log(2))).clamp(min=LEAST)
    whole = power.round()
    rest, series = power - whole, torch.full_like(logits, TERMS[-1])
    for term in reversed(TERMS[:-1]):
        series = series * rest + term
    return series * ((whole.to(torch.int32) + ONE) << PLACE).view(torch.float32)
