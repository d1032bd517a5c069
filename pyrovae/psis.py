"""The Pareto shape of importance weights' tails, for many data at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["pareto_khat", "tail_length"]


def tail_length(num_samples: int) -> int:
    """How many of K weights count as their tail: min(K/5, 3√K), rounded up.

    References:
        Vehtari et al., Pareto Smoothed Importance Sampling (arXiv 1507.02646), section 2.4.
    """
    return math.ceil(min(0.2 * num_samples, 3 * math.sqrt(num_samples)))


def pareto_khat(tail: Tensor, num_samples: int) -> Tensor:
    r"""Fit a generalized Pareto distribution to each datum's largest weights.

    .. math:: p(w \mid k, \sigma) = \tfrac1\sigma (1 + k w / \sigma)^{-1/k - 1}

    Args:
        tail: The :func:`tail_length` + 1 largest log-weights of each datum in ascending order,
            ``[N, M + 1]``, in nats; the first is the threshold.
        num_samples: The number of weights K that they were taken from.

    Returns:
        The shape k̂ with its weak prior at 0.5, ``[N]``: NaN where the tail has fewer than five
        weights (K < 21) and cannot be fitted, 0 where the weights are equal, infinite where most
        weights are zero.

    References:
        Zhang and Stephens (2009), A new and efficient estimation method for the generalized
        Pareto distribution; Vehtari et al. (arXiv 1507.02646), appendix C.
    """
    length = min(tail_length(num_samples), tail.shape[1] - 1)
    if length < 5:
        return tail.new_full((len(tail),), math.nan)
    weights = (tail - tail[:, -1:]).exp()
    excess = weights[:, 1:] - weights[:, :1]
    constant = ~(excess[:, -1] > 0)
    excess = torch.where(constant[:, None], torch.ones_like(excess), excess)
    khat = torch.cat([_fit(rows) for rows in excess.split(8)])
    khat = torch.where(torch.isfinite(tail[:, 0]), khat, math.inf)
    return torch.where(constant, 0.0, khat)


def _fit(excess: Tensor) -> Tensor:
    n = excess.shape[1]
    grid = 30 + int(math.sqrt(n))
    steps = torch.arange(1, grid + 1, dtype=excess.dtype, device=excess.device) - 0.5
    quartile = excess[:, int(n / 4 + 0.5) - 1].clamp(min=torch.finfo(excess.dtype).tiny)
    b = (1 - (grid / steps).sqrt()) / (3 * quartile[:, None]) + 1 / excess[:, -1:]
    k = torch.log1p(-b[:, :, None] * excess[:, None, :]).mean(-1)
    profile = n * ((-b / k).log() - k - 1)
    weight = torch.softmax(profile.nan_to_num(nan=-math.inf), dim=1)
    b = (b * weight).sum(1, keepdim=True)
    k = torch.log1p(-b * excess).mean(1)
    return (n * k + 5) / (n + 10)
