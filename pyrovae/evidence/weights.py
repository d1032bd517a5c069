"""Importance weights that pass by once: their mean, its error, their tail, and the bound for fewer.

Sums and the largest few of K weights are kept, in float64: a float32 loses the small weights
beside a large one, and log-weights of images are in the hundreds of nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyrovae._tools import InputError

# Two parameters fitted to fewer points say nothing; ArviZ and R's loo draw the line here too.
LEAST_TAIL = 5
# A fit holds [data, grid, tail] numbers: 16 MB for eight data of a million samples.
FITTED_AT_ONCE = 8


def curve_points(num_samples: int, asked: Sequence[int] = ()) -> list[int]:
    """The numbers of samples to report the bound for: those asked for or 1, 10, 100, …, and K."""
    points = list(asked) or [10**n for n in range(len(str(num_samples)))]
    if not all(isinstance(k, int) and 1 <= k <= num_samples for k in points):
        raise InputError(f"Expected a curve over 1 to num_samples={num_samples}, got {points}.")
    return sorted({*points, num_samples})


class Sums:
    """The mean of K importance weights of each of N data, its error, and what their tail says.

    ``points`` are the numbers of samples to report the bound for; ``like`` is ``[N, ...]``.
    """

    def __init__(self, num_samples: int, points: list[int], like: Tensor) -> None:
        self.num_samples = num_samples
        self.top = like.new_full((len(like),), -math.inf, dtype=torch.float64)
        self.first, self.second = torch.zeros_like(self.top), torch.zeros_like(self.top)
        self.tail = Tail(num_samples, self.top)
        self.groups = [_Groups(k, self.top) for k in points]

    def add(self, log_weight: Tensor) -> None:
        """Add some log-weights, ``[k, N]`` in nats."""
        peak = torch.maximum(self.top, log_weight.amax(0))
        # Where all weights so far are zero, -inf - -inf would be NaN.
        shift = torch.where(peak.isinf(), 0.0, peak)
        decay, weight = (self.top - shift).exp(), (log_weight - shift).exp()
        self.first = self.first * decay + weight.sum(0)
        self.second = self.second * decay.square() + weight.square().sum(0)
        self.top = peak
        self.tail.add(log_weight)
        for group in self.groups:
            group.add(log_weight)

    def result(self) -> dict[str, Tensor]:
        """Fields of :class:`~pyrovae.evidence.result.LogLikelihood`, and ``curve`` ``[N, P]``."""
        k = self.num_samples
        ess = (self.first.square() / self.second).nan_to_num(nan=0.0)
        # The delta method: var(w) / K / mean(w)^2, in terms of the effective sample size.
        error = ((k / ess - 1).clamp(min=0) / (k - 1)).sqrt() if k > 1 else ess * math.nan
        tail = self.tail.ascending()
        khat, smoothed = pareto_smooth(tail, k)
        top = torch.where(self.top.isinf(), 0.0, self.top)[:, None]
        gain = (smoothed - top).exp().sum(1) - (tail[:, 1:] - top).exp().sum(1)
        return {
            "log_prob": self._log_mean(self.first),
            "standard_error": error,
            "ess": ess,
            "khat": khat,
            "smoothed": self._log_mean(self.first + gain),
            "curve": torch.stack([group.bound() for group in self.groups], 1),
        }

    def _log_mean(self, total: Tensor) -> Tensor:
        return torch.where(self.top.isinf(), self.top, self.top + (total / self.num_samples).log())


class _Groups:
    """The mean over groups of k samples of the logarithm of their mean weight."""

    def __init__(self, size: int, like: Tensor) -> None:
        self.size, self.total, self.count = size, torch.zeros_like(like), 0
        self.part, self.filled = torch.full_like(like, -math.inf), 0

    def add(self, log_weight: Tensor) -> None:
        missing = (self.size - self.filled) % self.size
        self._fill(log_weight[:missing])
        rest = log_weight[missing:]
        whole = len(rest) // self.size
        if whole:
            groups = rest[: whole * self.size].unflatten(0, (whole, self.size))
            self.total = self.total + groups.logsumexp(1).sum(0)
            self.count += whole
        self._fill(rest[whole * self.size :])

    def _fill(self, log_weight: Tensor) -> None:
        if not len(log_weight):
            return
        self.part = torch.logaddexp(self.part, log_weight.logsumexp(0))
        self.filled += len(log_weight)
        if self.filled == self.size:
            self.total, self.count = self.total + self.part, self.count + 1
            self.part, self.filled = torch.full_like(self.part, -math.inf), 0

    def bound(self) -> Tensor:
        return self.total / self.count - math.log(self.size)


def tail_length(num_samples: int) -> int:
    """How many of K weights count as their tail: min(K/5, 3√K) (arXiv 1507.02646, section 2.4)."""
    return math.ceil(min(0.2 * num_samples, 3 * math.sqrt(num_samples)))


class Tail:
    """The largest of K log-weights of each of N data ``like``, kept while the others pass by."""

    def __init__(self, num_samples: int, like: Tensor) -> None:
        self.keep = tail_length(num_samples) + 1
        self.waiting = [like.new_empty(0, len(like))]

    def add(self, log_weight: Tensor) -> None:
        """Look at some more log-weights, ``[k, N]``."""
        self.waiting.append(log_weight)
        # topk costs as much for few as for many, so it waits until there are some.
        if sum(map(len, self.waiting)) > 4 * self.keep:
            self.waiting = [self._largest()]

    def ascending(self) -> Tensor:
        """The :func:`tail_length` + 1 largest, ``[N, M + 1]``; fewer if there are fewer."""
        return self._largest().flip(0).T

    def _largest(self) -> Tensor:
        seen = torch.cat(self.waiting)
        return seen.topk(min(self.keep, len(seen)), dim=0).values


def pareto_smooth(tail: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    r"""Fit a generalized Pareto distribution to each datum's largest weights, and smooth them.

    .. math:: p(w \mid k, \sigma) = \tfrac1\sigma (1 + k w / \sigma)^{-1/k - 1}, \qquad
              \tilde w_{(i)} = w_0 + F^{-1}\Bigl(\frac{i - 1/2}{M}\Bigr)

    ``tail`` holds the :func:`tail_length` + 1 largest of K log-weights in ascending order,
    ``[N, M + 1]``; the first is the threshold w₀. Returns the shape k̂ with its weak prior at 0.5,
    ``[N]``: NaN where the tail has fewer than five weights (K < 21) and cannot be fitted, 0 where
    the weights are equal, infinite where most are zero. And the M smoothed log-weights ``[N, M]``,
    none above the largest raw one; the raw ones where no distribution fits.

    References:
        Zhang and Stephens (2009), A new and efficient estimation method for the generalized
        Pareto distribution; Vehtari et al. (arXiv 1507.02646), appendix C.
    """
    length, raw = min(tail_length(num_samples), tail.shape[1] - 1), tail[:, 1:]
    if length < LEAST_TAIL:
        return tail.new_full((len(tail),), math.nan), raw
    top = torch.where(tail[:, -1:].isinf(), 0.0, tail[:, -1:])
    weights = (tail - top).exp()
    excess = weights[:, 1:] - weights[:, :1]
    constant = ~(excess[:, -1] > 0)
    excess = torch.where(constant[:, None], torch.ones_like(excess), excess)
    khat, sigma = (torch.cat(f) for f in zip(*map(_fit, excess.split(FITTED_AT_ONCE)), strict=True))
    khat = torch.where(torch.isfinite(tail[:, 0]), khat, math.inf)
    p = (torch.arange(length, dtype=khat.dtype, device=khat.device) + 0.5) / length
    # At k = 0 the quantile is its limit, -σ ln(1 - p), which a small k gives without a branch.
    k = torch.where(khat.abs() < torch.finfo(khat.dtype).eps, 1e-12, khat)[:, None]
    quantiles = sigma[:, None] * torch.expm1(-k * torch.log1p(-p)) / k
    smoothed = (weights[:, :1] + quantiles).clamp(max=1).log() + top
    fits = (khat.isfinite() & (sigma > 0) & ~constant)[:, None] & smoothed.isfinite()
    return torch.where(constant, 0.0, khat), torch.where(fits, smoothed, raw)


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
