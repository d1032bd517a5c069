"""The coverage of the likelihood's intervals, and what classifiers read off posterior means."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrovae._tools import standard_error
from pyrovae._tools.seeding import subseed
from pyrovae.diagnostics.units import by_datum, unmasked
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import is_bookkeeping, samples

LEVELS = (0.5, 0.8, 0.9, 0.95)
# 39 replicates make 40 equal steps of rank, on which the ends of all four intervals fall.
REPLICATES = 39
# The most replicated values held at once, 16 MB of float32.
ELEMENTS = 2**22
# A miss smaller than this is of no practical interest, however small its standard error.
SLACK = 0.02
NEIGHBOURS = 5
# Nearest neighbours compare all pairs of data: ten thousand keep that under a second.
PROBED = 10_000


class Calibration(NamedTuple):
    r"""The share of observed values in the central intervals of p(x_d | z), z ~ q(z | x).

    Attributes:
        levels: The L nominal shares.
        coverage: The shares found, one for each level: the mean over data of the share of a
            datum's values inside the interval.
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
        """The indices of the levels missed by more than 0.02 and by three standard errors."""
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


def interval_coverage(pair: Pair, rows: tuple) -> Calibration | None:
    """The coverage of the likelihood's intervals, at one draw of the latents of each datum.

    None if the model observes nothing, or masks all that it does.
    """
    size = max(1, ELEMENTS // REPLICATES // max(rows[0][0].numel(), 1))
    tiles = zip(*(tensor.split(size) for tensor in rows), strict=True)
    found = torch.cat([_shares(pair, tile) for tile in tiles], 1)
    found = found[:, ~found.isnan().any(0)]
    if not found.shape[1]:
        return None
    error = standard_error(found, 1)
    return Calibration(LEVELS, tuple(found.mean(1).tolist()), tuple(error.tolist()))


def _shares(pair: Pair, rows: tuple) -> Tensor:
    """The share of each datum's values within each interval, ``[L, N]``; NaN where none is seen."""
    sites, n = samples(pair.trace_posterior(*rows)), len(rows[0])
    half = torch.tensor(LEVELS, dtype=torch.float64, device=rows[0].device)[:, None, None] / 2
    inside, count = half.new_zeros(len(LEVELS), n), half.new_zeros(n)
    for name in pair.known.observed:
        site = sites[name]
        if is_bookkeeping(site):
            continue
        fn, events = site["fn"], site["fn"].event_dim
        shape = fn.batch_shape + fn.event_shape
        seen = unmasked(site).expand(shape)
        ranks = randomized_ranks(fn, site["value"].expand(shape))
        ranks, seen = (by_datum(t, events, pair.known, (1, n))[0].double() for t in (ranks, seen))
        inside += (((ranks - 0.5).abs() <= half) * seen).sum(-1)
        count += seen.sum(-1)
    return inside / count


def randomized_ranks(fn: Any, value: Tensor, replicates: int = REPLICATES) -> Tensor:
    r"""Where each element of a value lies among replicates, between 0 and 1.

    .. math:: u = \frac{\#\{r : x^r < x\} + v \, (\#\{r : x^r = x\} + 1)}{R + 1}, \qquad
              v \sim \mathcal{U}(0, 1)

    u has the value's shape; it is uniform if the value is a draw from ``fn`` too.
    """
    drawn = fn.sample((replicates,))
    close = 1e-6 if fn.support.is_discrete else 0.0
    equal = ((drawn - value).abs() <= close).sum(0)
    less = (drawn < value - close).sum(0)
    v = torch.rand(value.shape, dtype=torch.float64, device=value.device)
    return (less + v * (equal + 1)) / (replicates + 1)


class Probe(NamedTuple):
    """The accuracy of classifiers on data that they were not fitted to.

    Attributes:
        linear: Of multinomial logistic regression on the standardized posterior means.
        knn: Of the vote of the five nearest neighbours among them.
        chance: Of always predicting the most frequent class.
        classes: The number of classes.
        num_test: The number of data that accuracy is measured on.
    """

    linear: float
    knn: float
    chance: float
    classes: int
    num_test: int


def is_probable(labels: Tensor) -> bool:
    """Whether labels are whole numbers of at least two classes, with ten data or more."""
    whole = not labels.is_floating_point() and not labels.is_complex()
    return whole and labels.dim() == 1 and len(labels) >= 10 and len(labels.unique()) > 1


def fit_probe(features: Tensor, labels: Tensor, seed: int) -> Probe:
    """Fit classifiers of ``[N, D]`` to half of the data, and measure them on the other half.

    References:
        Alain and Bengio, Understanding intermediate layers using linear classifier probes
        (arXiv 1610.01644).
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    order = np.random.default_rng(subseed(seed, 0)).permutation(len(labels))[:PROBED]
    x, y = features.double().cpu().numpy()[order], labels.cpu().numpy()[order]
    half = len(y) // 2
    (fitted, tested), (known, asked) = ((each[:half], each[half:]) for each in (x, y))
    values, counts = np.unique(known, return_counts=True)
    chance = float((asked == values[counts.argmax()]).mean())
    linear = knn = chance
    if len(values) > 1:
        kinds = LogisticRegression(max_iter=500), KNeighborsClassifier(min(NEIGHBOURS, half))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fits = [make_pipeline(StandardScaler(), kind).fit(fitted, known) for kind in kinds]
        linear, knn = (float(each.score(tested, asked)) for each in fits)
    return Probe(linear, knn, chance, len(torch.unique(labels)), len(asked))
