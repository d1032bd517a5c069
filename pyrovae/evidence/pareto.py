"""The shape k-hat of the tail of importance weights: a generalized Pareto distribution, fitted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Two parameters fitted to fewer points say nothing; ArviZ and R's loo draw the line here too.
LEAST_TAIL = 5
# A fit holds [data, grid, tail] numbers: 16 MB for eight data of a million samples.
FITTED_AT_ONCE = 8
# Log-weights that lie within so many steps of float32 of each other are equal up to rounding: each
# is a sum of terms that are rounded at their own sizes. With an exact posterior the tail of a
# linear Gaussian model spans 0.5 to 500 steps, and has too few values to be fitted below 64. What
# such weights can add to log p(x) is less than 1e-5 of it.
ROUNDING = 64 * torch.finfo(torch.float32).eps


def tail_length(num_samples: int) -> int:
    """How many of K weights count as their tail: min(K/5, 3√K) (arXiv 1507.02646, section 2.4)."""
    return math.ceil(min(0.2 * num_samples, 3 * math.sqrt(num_samples)))


def pareto_smooth(tail: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    r"""Fit a generalized Pareto distribution to each datum's largest weights, and smooth them.

    .. math:: p(w \mid k, \sigma) = \tfrac1\sigma (1 + k w / \sigma)^{-1/k - 1}, \qquad
              \tilde w_{(i)} = w_0 + F^{-1}\Bigl(\frac{i - 1/2}{M}\Bigr)

    ``tail`` holds the :func:`tail_length` + 1 largest of K log-weights in ascending order,
    ``[N, M + 1]``; the first is the threshold w₀, and weights that equal it are no part of the
    tail, as in ArviZ 0.23. Returns the shape k̂ with its weak prior at 0.5, ``[N]``: NaN where the
    tail has fewer than five weights (K < 21) and cannot be fitted, 0 where the weights are equal
    up to rounding, infinite where most are zero, or where all but a few are equal. And the M
    smoothed log-weights ``[N, M]``, none above the largest raw one; the raw ones where no
    distribution fits.

    References:
        Zhang and Stephens (2009), A new and efficient estimation method for the generalized
        Pareto distribution; Vehtari et al. (arXiv 1507.02646), appendix C.
    """
    length, raw = min(tail_length(num_samples), tail.shape[1] - 1), tail[:, 1:]
    if length < LEAST_TAIL:
        return tail.new_full((len(tail),), math.nan), raw
    largest = tail[:, -1]
    equal = largest.isfinite() & (largest - tail[:, 0] <= ROUNDING * largest.abs().clamp(min=1))
    # A datum without finite weights, or with a threshold of zero, has no tail at all.
    khat = torch.where(tail[:, 0].isfinite(), 0.0, math.inf).to(tail)
    khat, smoothed = torch.where(largest.isfinite(), khat, 0.0), raw.clone()
    left = tail[:, 0].isfinite() & ~equal
    weights = (tail - largest[:, None]).exp()
    ties = (weights[:, 1:] <= weights[:, :1]).sum(1)
    for tied in ties[left].unique().tolist():
        rows = left & (ties == tied)
        khat[rows], smoothed[rows, tied:] = _smooth(tail[rows, tied:])
    return khat, smoothed


def _smooth(tail: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a finite tail whose weights all lie above the threshold."""
    length, raw, top = tail.shape[1] - 1, tail[:, 1:], tail[:, -1:]
    if length < LEAST_TAIL:
        return tail.new_full((len(tail),), math.inf), raw
    weights = (tail - top).exp()
    excess = weights[:, 1:] - weights[:, :1]
    khat, sigma = (torch.cat(f) for f in zip(*map(_fit, excess.split(FITTED_AT_ONCE)), strict=True))
    p = (torch.arange(length, dtype=khat.dtype, device=khat.device) + 0.5) / length
    # At k = 0 the quantile is its limit, -σ ln(1 - p), which a small k gives without a branch.
    k = torch.where(khat.abs() < torch.finfo(khat.dtype).eps, 1e-12, khat)[:, None]
    quantiles = sigma[:, None] * torch.expm1(-k * torch.log1p(-p)) / k
    smoothed = (weights[:, :1] + quantiles).clamp(max=1).log() + top
    fits = (khat.isfinite() & (sigma > 0))[:, None] & smoothed.isfinite()
    return khat, torch.where(fits, smoothed, raw)


def _fit(excess: Tensor) -> tuple[Tensor, Tensor]:
    """k̂ and σ by the posterior mean of b = -k/σ over a grid, all as Zhang and Stephens have it.

    The grid's size, its place at the first quartile, and the prior on k̂, which counts as ten
    weights at 0.5, are theirs and Vehtari's.
    """
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


def systematic(weight: Tensor, count: int) -> Tensor:
    """Which of K draws to take, by one uniform number for each of their weights ``[K, ...]``.

    Each is taken its share of ``count`` times, rounded up or down: indices ``[count, ...]``.

    References:
        Douc, Cappé and Moulines, Comparison of Resampling Schemes for Particle Filtering
        (arXiv cs/0507025).
    """
    steps = torch.arange(count, dtype=weight.dtype, device=weight.device)
    at = (steps + torch.rand_like(weight[0])[..., None]) / count
    ladder = weight.movedim(0, -1).cumsum(-1)
    found = torch.searchsorted(ladder / ladder[..., -1:], at)
    return found.clamp(max=len(weight) - 1).movedim(-1, 0)
