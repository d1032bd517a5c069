"""Log-probabilities of sites, with fewer passes over memory where the distribution allows it."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["log_prob"]

BERNOULLI = (dist.Bernoulli, torch.distributions.Bernoulli)


def log_prob(site: dict, *, fused: bool = False) -> Tensor:
    r"""A site's log-probability; without gradients, many Bernoullis at once in one pass.

    .. math:: \sum_d x_d l_d - \ln(1 + e^{l_d})
              = \sum_d x_d l_d - \max(l_d, 0) - \sum_g \ln \prod_{d \in g} (1 + e^{-|l_d|})

    Every factor lies between 1 and 2, so that a logarithm of the product of a few of them loses
    nothing and costs as much as one of a single factor.

    Args:
        site: A sample site of a trace.
        fused: Whether a compiler is going to fuse what is asked for here.
    """
    base, events, value = site["fn"], 0, site["value"]
    while isinstance(base, torch.distributions.Independent):
        base, events = base.base_dist, events + base.reinterpreted_batch_ndims
    if events == 0 or type(base) not in BERNOULLI or torch.is_grad_enabled():
        return site["fn"].log_prob(value, *site["args"], **site["kwargs"])
    logits, value = base.logits.flatten(-events), value.flatten(-events).to(base.logits.dtype)
    if not fused:
        return torch.linalg.vecdot(logits, value) - softplus(logits).sum(-1)
    factors = 1 + (-logits.abs()).exp()
    products = factors.unflatten(-1, (_divisor(factors.shape[-1]), -1)).prod(-2)
    return (value * logits - logits.clamp(min=0)).sum(-1) - products.log().sum(-1)


def _divisor(size: int) -> int:
    """How many factors to multiply: the largest number up to 8 that divides them evenly."""
    return next(n for n in range(8, 0, -1) if size % n == 0)
