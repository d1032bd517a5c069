"""Whether the likelihood is as wide as the data: the coverage of its intervals."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae._tools import standard_error
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import Layout, is_bookkeeping, trace_posterior

__all__ = ["LEVELS", "Calibration", "calibrate", "randomized_ranks"]

LEVELS = (0.5, 0.8, 0.9, 0.95)
REPLICATES, ELEMENTS, SLACK = 39, 2**22, 0.02


class Calibration(NamedTuple):
    r"""How many of the observed values lie in the central intervals of p(x_d | z), z ~ q(z | x).

    Attributes:
        levels: What the intervals are to hold, L shares.
        coverage: What they hold, a share for each level: the mean over data of the share of a
            datum's values.
        error: Its standard error over data.

    If the data come from the model and q is its posterior, then (x, z) is a draw from the model,
    and the rank of x_d among replicates from p(x_d | z) is uniform: coverage is exact at every
    level. Ties are broken at random, so that the same holds of binary values, counts and grey
    levels. An interval of the mixture over z would not do: it has seen x, and covers too much.

    References:
        Johnson, Bayesian model assessment using pivotal quantities (2007), Bayesian Analysis 2(4);
        Czado, Gneiting and Held, Predictive model assessment for count data (2009), Biometrics
        65(4), for ranks of discrete values.
    """

    levels: tuple[float, ...]
    coverage: tuple[float, ...]
    error: tuple[float, ...]

    @property
    def off(self) -> list[int]:
        """The places of the levels that are missed by 0.02 and by three standard errors."""
        both = zip(self.levels, self.coverage, self.error, strict=True)
        misses = [(abs(share - level), error) for level, share, error in both]
        return [i for i, (d, e) in enumerate(misses) if d > max(SLACK, 0.0 if e != e else 3 * e)]

    @property
    def verdict(self) -> str:
        """In words: fine, too narrow, or too wide."""
        if not self.off:
            found = ", ".join(f"{share:.0%}" for share in self.coverage)
            asked = ", ".join(f"{level:.0%}" for level in self.levels)
            return f"Calibration is fine: intervals of {asked} hold {found} of the values."
        worst = max(self.off, key=lambda i: abs(self.coverage[i] - self.levels[i]))
        level, share = self.levels[worst], self.coverage[worst]
        kind = "narrow" if share < level else "wide"
        return (
            f"Calibration is off: the {level:.0%} intervals of the likelihood hold {share:.1%} of "
            f"the values, so it is too {kind} for these data at the guide's latents."
        )


def calibrate(pair: Pair, layout: Layout, rows: tuple) -> Calibration | None:
    """The coverage of the likelihood's intervals, at one draw of the latents of each datum.

    Args:
        pair: The pair.
        layout: What :func:`pyrovae.pairs.contract.inspect_pair` said of the pair.
        rows: Data ``[N, ...]`` with further arguments of both programs.

    Returns:
        None if the model observes nothing, or masks all that it does.
    """
    size = max(1, ELEMENTS // REPLICATES // max(rows[0][0].numel(), 1))
    tiles = zip(*(tensor.split(size) for tensor in rows), strict=True)
    found = torch.cat([_shares(pair, layout, tile) for tile in tiles], 1)
    found = found[:, ~found.isnan().any(0)]
    if not found.shape[1]:
        return None
    error = standard_error(found, 1)
    return Calibration(LEVELS, tuple(found.mean(1).tolist()), tuple(error.tolist()))


def _shares(pair: Pair, layout: Layout, rows: tuple) -> Tensor:
    """The share of each datum's values within each interval, ``[L, N]``; NaN where none is seen."""
    trace, n = trace_posterior(pair, layout, *rows), len(rows[0])
    half = torch.tensor(LEVELS, dtype=torch.float64, device=rows[0].device)[:, None, None] / 2
    inside, count = half.new_zeros(len(LEVELS), n), half.new_zeros(n)
    for name in layout.observed:
        site = trace.nodes[name]
        if is_bookkeeping(site):
            continue
        fn, events = site["fn"], site["fn"].event_dim
        seen = torch.ones(fn.batch_shape, dtype=torch.bool, device=half.device)
        if site["mask"] is not None:
            seen = seen & site["mask"]
        seen = seen.reshape(*seen.shape, *[1] * events).expand(*seen.shape, *fn.event_shape)
        ranks = randomized_ranks(fn, site["value"].expand(seen.shape))
        ranks, seen = (
            t.movedim(layout.dim - events, 0).reshape(n, -1).double() for t in (ranks, seen)
        )
        inside += (((ranks - 0.5).abs() <= half) * seen).sum(-1)
        count += seen.sum(-1)
    return inside / count


def randomized_ranks(fn: Any, value: Tensor, replicates: int = REPLICATES) -> Tensor:
    r"""Where each element of a value lies among replicates, between 0 and 1.

    .. math:: u = \frac{\#\{r : x^r < x\} + v \, (\#\{r : x^r = x\} + 1)}{R + 1}, \qquad
              v \sim \mathcal{U}(0, 1)

    Args:
        fn: The distribution of the replicates.
        value: Values ``[...]`` of its batch and event shape.
        replicates: R.

    Returns:
        u in the value's shape: uniform if the value is a draw from ``fn`` too.
    """
    drawn = fn.sample((replicates,))
    close = 1e-6 if fn.support.is_discrete else 0.0
    equal = ((drawn - value).abs() <= close).sum(0)
    less = (drawn < value - close).sum(0)
    v = torch.rand(value.shape, dtype=torch.float64, device=value.device)
    return (less + v * (equal + 1)) / (replicates + 1)
