"""Whether ranks are uniform: simultaneous bands of their distribution function, and its shape."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Shape = Literal["fine", "too narrow", "too wide", "biased", "misshapen"]

# Simulated sets of uniform ranks: the least probability that they can tell is 1 in 20,000, a
# twentieth of what 50 statistics at 5% together ask for.
SIMULATED = 20_000
# Bins of predicted probabilities, and the least expected variance of a count in one, below which
# no normal approximation holds.
BINS, LEAST_VARIANCE = 10, 2.0
# Standard errors of a moment below which a shape is called by none.
PLAIN = 2.0


class RankTest(NamedTuple):
    """A test of one statistic: the probability of what was found if all is right, and its shape."""

    name: str
    p_value: float
    shape: Shape


class Reliability(NamedTuple):
    """What became of the probabilities that a guide gave to the values of a discrete latent.

    Attributes:
        predicted: Their mean in each of ten bins, ``[10]``; NaN in an empty one.
        observed: The share of them that came true, ``[10]``.
        size: How many there are, ``[10]``.
        p_value: Of the bin that is off the most, for ten bins.
        shape: ``"too narrow"`` where large probabilities come true less often than they say.
    """

    predicted: Tensor
    observed: Tensor
    size: Tensor
    p_value: float
    shape: Shape

    @property
    def error(self) -> float:
        """The expected calibration error: the mean distance of shares from probabilities."""
        off = (self.predicted - self.observed).abs().nan_to_num() * self.size
        return (off.sum() / self.size.sum()).item()


def draw_ranks(draws: Tensor, value: Tensor, slack: Tensor | float = 0.0) -> Tensor:
    r"""The rank of a value among draws, ties broken at random.

    .. math:: r = \#\{s : z_s < z\} + u, \qquad u \sim \mathrm{Uniform}\{0, \dots, \#\{z_s = z\}\}

    Args:
        draws: ``[S, N, D]``.
        value: ``[N, D]``.
        slack: How far equal numbers may be apart.

    Returns:
        Between 0 and S, ``[N, D]``.
    """
    equal = ((draws - value).abs() <= slack).sum(0)
    less = (draws < value - slack).sum(0)
    return less + (torch.rand(value.shape, device=value.device) * (equal + 1)).long()


def p_value(ranks: Tensor, most: int) -> float:
    """The probability that uniform ranks ``[N]`` in 0 to ``most`` are as far off, at the worst."""
    found = _worst(_cumulated(ranks, most)[None].numpy(), len(ranks))
    return (1 + float((_null(len(ranks), most) <= found).sum())) / (1 + SIMULATED)


def band(num_data: int, most: int, level: float) -> tuple[Tensor, Tensor]:
    r"""Simultaneous bounds of the distribution function of uniform ranks, at 1/(S+1) to S/(S+1).

    .. math:: \Pr\bigl(\forall i : l_i \le \hat F(z_i) \le u_i\bigr) = 1 - \alpha, \qquad
              N \hat F(z_i) \sim \mathrm{Bin}(N, z_i)

    The bounds are quantiles of the binomial distributions, at a level γ that simulated ranks meet
    everywhere with probability 1 − α.

    Args:
        num_data: N.
        most: The largest rank S.
        level: α.

    Returns:
        The bounds, ``[S]`` each.

    References:
        Säilynoja, Bürkner and Vehtari, Graphical test for discrete uniformity and its applications
        in goodness of fit evaluation and multiple sample comparison (arXiv 2103.10522), section 2.
    """
    gamma = np.quantile(_null(num_data, most), level, method="higher")
    table = _binomial(num_data, most)
    low = (table < gamma / 2).sum(1) / num_data
    high = (table < 1 - gamma / 2).sum(1) / num_data
    return torch.as_tensor(low), torch.as_tensor(high)


def distribution(ranks: Tensor, most: int) -> Tensor:
    """The share of ranks ``[N]`` below 1 to S, ``[S]``."""
    return _cumulated(ranks, most).double() / len(ranks)


def shape_of(ranks: Tensor, most: int) -> Shape:
    """What ranks that are not uniform say of the draws: their mean, or their spread."""
    moved, spread = moments(ranks, most)
    if max(abs(moved), abs(spread)) < PLAIN:
        return "misshapen"
    if abs(moved) >= abs(spread):
        return "biased"
    return "too narrow" if spread > 0 else "too wide"


def moments(ranks: Tensor, most: int) -> tuple[float, float]:
    """How far the mean of ranks ``[N]``, and their spread, is off, in standard errors of each.

    Of m = ``most`` + 1 equally likely ranks; of two, each lies as far from the middle.
    """
    m, n = most + 1, len(ranks)
    u = (ranks.double() + 0.5) / m - 0.5
    variance = (1 - m**-2) / 12
    spread = u.square().mean().item() - variance
    if m > 2:
        spread /= math.sqrt(variance * (1 - 4 * m**-2) / 15 / n)
    return u.mean().item() / math.sqrt(variance / n), spread


def reliability(placed: Tensor, probs: Tensor, came: Tensor) -> Reliability:
    """Hold probabilities against what came true, 0 or 1, ``[N, E]`` for E events of a datum.

    ``placed`` are the same probabilities, which choose the bin: where both are averages of draws,
    those of one would otherwise be too large in the upper bins by chance. A bin's events of one
    datum need not be independent. What is NaN is left out.
    """
    placed, probs, came = placed.double(), probs.double(), came.double()
    known = ~placed.isnan()
    place = torch.where(known, placed * BINS, 0.0).long().clamp(max=BINS - 1)
    placed, probs, came = (torch.where(known, v, 0.0) for v in (placed, probs, came))

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(len(values), BINS).scatter_add_(1, place, values)

    count, said, seen = (total(v).sum(0) for v in (known.double(), probs, came))
    variance = total(probs * (1 - probs)).sum(0)
    spread = torch.maximum(variance, total(came - probs).square().sum(0))
    z = torch.where(variance >= LEAST_VARIANCE, (seen - said) / spread.sqrt(), 0.0)
    worst = min(1.0, BINS * math.erfc(z.abs().max().item() / math.sqrt(2)))
    slope = ((came - probs) * (placed - placed.sum() / known.sum())).sum()
    shape: Shape = "too narrow" if slope < 0 else "too wide"
    return Reliability(said / count, seen / count, count, worst, shape)


def _cumulated(ranks: Tensor, most: int) -> Tensor:
    counts = torch.bincount(ranks.long().cpu(), minlength=most + 1)
    return counts.cumsum(0)[:-1]


@lru_cache(maxsize=16)
def _binomial(num_data: int, most: int) -> np.ndarray:
    """Distribution functions of binomials (N, i / (S + 1)), ``[S, N + 1]``."""
    k = torch.arange(num_data + 1, dtype=torch.float64)
    z = (torch.arange(1, most + 1, dtype=torch.float64) / (most + 1))[:, None]
    mass = torch.distributions.Binomial(num_data, z).log_prob(k).exp()
    return mass.cumsum(1).clamp(max=1).numpy()


@lru_cache(maxsize=16)
def _null(num_data: int, most: int) -> np.ndarray:
    """What :func:`_worst` is of uniform ranks, of many sets of them."""
    shares = np.full(most + 1, 1 / (most + 1))
    counts = np.random.default_rng(0).multinomial(num_data, shares, SIMULATED)
    return _worst(counts.cumsum(1)[:, :-1], num_data)


def _worst(cumulated: np.ndarray, num_data: int) -> np.ndarray:
    """The least two-sided binomial probability over points, of counts ``[sets, S]``."""
    most = cumulated.shape[1]
    table, points = _binomial(num_data, most), np.arange(most)
    below = table[points, cumulated]
    before = np.where(cumulated > 0, table[points, np.maximum(cumulated - 1, 0)], 0.0)
    return 2 * np.minimum(below, 1 - before).min(1)
