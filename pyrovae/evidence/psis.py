"""Pareto smoothing of importance weights' tails, for many data at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Tail", "pareto_khat", "pareto_smooth", "tail_length"]


def tail_length(num_samples: int) -> int:
    """How many of K weights count as their tail: min(K/5, 3√K), rounded up.

    References:
        Vehtari et al., Pareto Smoothed Importance Sampling (arXiv 1507.02646), section 2.4.
    """
    return math.ceil(min(0.2 * num_samples, 3 * math.sqrt(num_samples)))


class Tail:
    """The largest of K log-weights of each datum, kept while the others pass by.

    Args:
        num_samples: K.
        like: A tensor ``[N]`` of the log-weights' dtype and device.
    """

    def __init__(self, num_samples: int, like: Tensor) -> None:
        self.keep = tail_length(num_samples) + 1
        self.waiting = [like.new_empty(0, len(like))]

    def add(self, log_weight: Tensor) -> None:
        """Look at some more log-weights, ``[k, N]``."""
        self.waiting.append(log_weight)
        if sum(map(len, self.waiting)) > 4 * self.keep:
            self.waiting = [self._largest()]

    def ascending(self) -> Tensor:
        """The :func:`tail_length` + 1 largest, ``[N, M + 1]``; fewer if there are fewer."""
        return self._largest().flip(0).T

    def _largest(self) -> Tensor:
        seen = torch.cat(self.waiting)
        return seen.topk(min(self.keep, len(seen)), dim=0).values


def pareto_khat(tail: Tensor, num_samples: int) -> Tensor:
    """The Pareto shape k̂ of each datum's weights, ``[N]``, as :func:`pareto_smooth` has it."""
    return pareto_smooth(tail, num_samples)[0]


def pareto_smooth(tail: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    r"""Fit a generalized Pareto distribution to each datum's largest weights, and smooth them.

    .. math:: p(w \mid k, \sigma) = \tfrac1\sigma (1 + k w / \sigma)^{-1/k - 1}, \qquad
              \tilde w_{(i)} = w_0 + F^{-1}\Bigl(\frac{i - 1/2}{M}\Bigr)

    Args:
        tail: The :func:`tail_length` + 1 largest log-weights of each datum in ascending order,
            ``[N, M + 1]``, in nats; the first is the threshold w₀.
        num_samples: The number of weights K that they were taken from.

    Returns:
        The shape k̂ with its weak prior at 0.5, ``[N]``: NaN where the tail has fewer than five
        weights (K < 21) and cannot be fitted, 0 where the weights are equal, infinite where most
        weights are zero. And the M smoothed log-weights ``[N, M]``, none above the largest raw
        one; the raw ones where no distribution fits.

    References:
        Zhang and Stephens (2009), A new and efficient estimation method for the generalized
        Pareto distribution; Vehtari et al. (arXiv 1507.02646), appendix C.
    """
    length, raw = min(tail_length(num_samples), tail.shape[1] - 1), tail[:, 1:]
    if length < 5:
        return tail.new_full((len(tail),), math.nan), raw
    top = torch.where(tail[:, -1:].isinf(), 0.0, tail[:, -1:])
    weights = (tail - top).exp()
    excess = weights[:, 1:] - weights[:, :1]
    constant = ~(excess[:, -1] > 0)
    excess = torch.where(constant[:, None], torch.ones_like(excess), excess)
    khat, sigma = (torch.cat(f) for f in zip(*map(_fit, excess.split(8)), strict=True))
    khat = torch.where(torch.isfinite(tail[:, 0]), khat, math.inf)
    smoothed = (weights[:, :1] + _quantiles(khat, sigma, length)).clamp(max=1).log() + top
    fits = (khat.isfinite() & (sigma > 0) & ~constant)[:, None] & smoothed.isfinite()
    return torch.where(constant, 0.0, khat), torch.where(fits, smoothed, raw)


def _fit(excess: Tensor) -> tuple[Tensor, Tensor]:
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
    return (n * k + 5) / (n + 10), -k / b[:, 0]


def _quantiles(khat: Tensor, sigma: Tensor, length: int) -> Tensor:
    """F⁻¹((i − 1/2) / M) for i = 1, …, M, ``[N, M]``."""
    p = (torch.arange(length, dtype=khat.dtype, device=khat.device) + 0.5) / length
    k = torch.where(khat.abs() < torch.finfo(khat.dtype).eps, 1e-12, khat)[:, None]
    return sigma[:, None] * torch.expm1(-k * torch.log1p(-p)) / k
