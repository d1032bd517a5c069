"""The log-probability of many Bernoullis at once, for a compiler to fuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
        factors = 1 + (-logits.abs()).exp()
        few = next(n for n in range(8, 0, -1) if factors.shape[-1] % n == 0)
        products = factors.unflatten(-1, (few, -1)).prod(-2)
        return (value * logits - logits.clamp(min=0)).sum(-1) - products.log().sum(-1)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None]:
        logits, value = ctx.saved_tensors
        wide, (by_logits, by_value) = slope[..., None], ctx.needs_input_grad
        return (
            wide * (value - logits.sigmoid()) if by_logits else None,
            wide * logits if by_value else None,
        )
