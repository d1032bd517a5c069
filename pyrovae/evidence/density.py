"""ln p(x, z) and ln q(z | x) of given latents, and whether a guide has such a density."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import Transform, biject_to
from torch.distributions.constraints import MixtureSameFamilyConstraint

from pyrovae._tools import InputError
from pyrovae.pairs.pair import Given, Pair
from pyrovae.pairs.traces import Layout, Values, reduce_to, scored

__all__ = [
    "FromGuide",
    "Placed",
    "Scored",
    "guide_density",
    "joint_density",
    "refuse_nan",
    "require_density",
    "require_scorable",
    "to_support",
    "total",
    "uncovered_share",
]

# (Particle, datum) pairs from the prior that the guide is asked to score: enough to notice that a
# hundredth of the prior is out of its reach.
PRIOR_ROWS = 256


class Scored(NamedTuple):
    r"""What the model says of K latents for each of N data; terms are ``[K, N]`` in float64.

    Attributes:
        prior: ln p(z), or :math:`\ln p(u) = \ln p(z) + \ln |\partial T / \partial u|` where the
            latents were given as coordinates.
        likelihood: ln p(x | z).
        log_det: :math:`\ln |\partial T / \partial u|`; zero where the latents were given as z.
        latents: z by site.
        sites: The scores by site.
    """

    prior: Tensor
    likelihood: Tensor
    log_det: Tensor
    latents: Values
    sites: Values


class Placed(Given):
    r"""Sets latent sites to z = T(u) at given points u of real coordinates.

    T is :func:`torch.distributions.biject_to` of the site's support, which may depend on other
    latents; ``log_det`` collects :math:`\ln |\partial T / \partial u|` by site.
    """

    def __init__(self, points: Values) -> None:
        super().__init__(points)
        self.log_det: Values = {}

    def latent(self, msg: Any, value: Tensor) -> Tensor:
        """The image of a point."""
        transform = to_support(msg["name"], msg["fn"])
        image = transform(value)
        self.log_det[msg["name"]] = transform.log_abs_det_jacobian(value, image)
        return image


def joint_density(
    pair: Pair,
    rows: tuple,
    particles: int,
    values: Values,
    *,
    chunk: int | None = None,
    unconstrained: bool = False,
    fused: bool = False,
) -> Scored:
    """The model's density at K latents for each of N data.

    Args:
        pair: The pair, inspected.
        rows: Data ``[N, ...]`` with further arguments of the programs.
        particles: K.
        values: Latents ``[K, ..., N, ...]`` by site; of more than K, the first are taken.
        chunk: How many particles the model runs with at once; None is all.
        unconstrained: Take the values as points u of real coordinates (:class:`Placed`).
        fused: Whether a compiler is going to fuse what is asked for here.
    """
    layout, step = pair.layout, chunk or particles
    zero = rows[0].new_zeros(min(step, particles), len(rows[0]), dtype=torch.float64)
    parts = []
    for start in range(0, particles, step):
        count = min(step, particles - start)
        some = {name: value[start : start + count] for name, value in values.items()}
        placed = Placed(some) if unconstrained else None
        sites, latents = pair.score_model(rows, count, placed or some, fused=fused)
        parts.append(_split(layout, placed, sites, latents, zero[:count]))
    if len(parts) == 1:
        return parts[0]
    return Scored(
        torch.cat([part.prior for part in parts]),
        torch.cat([part.likelihood for part in parts]),
        torch.cat([part.log_det for part in parts]),
        _join([part.latents for part in parts]),
        _join([part.sites for part in parts]),
    )


def _split(
    layout: Layout, placed: Placed | None, sites: Values, latents: Values, zero: Tensor
) -> Scored:
    hidden = layout.latents + layout.enumerated
    prior = total((score for name, score in sites.items() if name in hidden), zero)
    likelihood = total((score for name, score in sites.items() if name not in hidden), zero)
    if placed is None:
        return Scored(prior, likelihood, zero, latents, sites)
    shape = layout, *zero.shape
    log_det = total((reduce_to(each, *shape) for each in placed.log_det.values()), zero)
    return Scored(prior + log_det, likelihood, log_det, latents, sites)


def _join(parts: list[Values]) -> Values:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def guide_density(pair: Pair, rows: tuple, particles: int, latents: Values) -> Tensor:
    """ln q(z | x) of K latents for each of N data, ``[K, N]`` in float64."""
    zero = rows[0].new_zeros(particles, len(rows[0]), dtype=torch.float64)
    return total(pair.score_guide(rows, particles, latents).values(), zero)


class FromGuide:
    """Draws from the guide.

    Args:
        pair: The pair, inspected.
        chunk: How many particles are scored at once.
        uncovered: The share of the prior's draws to which the guide gives no density.
    """

    unconstrained = False

    def __init__(self, pair: Pair, chunk: int, uncovered: float = 0.0) -> None:
        self.pair, self.chunk, self.uncovered = pair, chunk, uncovered

    @classmethod
    def checked(cls, pair: Pair, rows: tuple, chunk: int) -> FromGuide:
        """Draws from a guide that is known to have a density, and what of the prior it misses."""
        return cls(pair, chunk, uncovered_share(pair, rows))

    def prepare(self, rows: tuple, seed: int) -> dict[str, Tensor]:
        """Nothing to do."""
        return {}

    def draw(self, rows: tuple, particles: int) -> tuple[Values, Tensor]:
        """K latents for each datum, and their log-densities ``[K, N]`` in float64."""
        values, scores = self.pair.draw(rows, particles)
        zero = rows[0].new_zeros(particles, len(rows[0]), dtype=torch.float64)
        return values, total(scores.values(), zero)

    def score(
        self, rows: tuple, particles: int, values: Values, *, fused: bool = False
    ) -> tuple[Tensor, Tensor]:
        """ln p(z) and ln p(x | z) of the first K of drawn values, ``[K, N]`` in float64."""
        found = joint_density(
            self.pair,
            rows,
            particles,
            values,
            chunk=self.chunk,
            unconstrained=self.unconstrained,
            fused=fused,
        )
        return found.prior, found.likelihood

    def density(self, own: Tensor, prior: Tensor) -> Tensor:
        """Its own."""
        return own

    def log_prob(self, rows: tuple, particles: int, values: Values) -> Tensor:
        """The log-densities of values drawn elsewhere, ``[K, N]`` in float64."""
        return guide_density(self.pair, rows, particles, values)

    def prior(self, rows: tuple, particles: int) -> Values:
        """K draws from the model's prior for each datum."""
        return self.pair.draw_prior(rows, particles)


def total(scores: Iterable[Tensor], zero: Tensor) -> Tensor:
    """The sum of scores ``[K, N]`` in float64, onto a zero of that shape."""
    return sum((score.double() for score in scores), start=zero)


def refuse_nan(guide: Values, model: Values, first_row: int) -> None:
    """Say which site's score ``[K, N]`` is NaN, and for which datum.

    Args:
        guide: The guide's scores by site.
        model: The model's.
        first_row: The number of the first datum among them.

    Raises:
        ValueError: In any case.
    """
    for program, scores in (("guide", guide), ("model", model)):
        for name, score in scores.items():
            bad = score.isnan().any(0).nonzero()
            if len(bad):
                raise InputError(
                    f"The log-probability of site {name!r} in the {program} is NaN for datum "
                    f"{first_row + bad[0].item()}: look at its parameters there."
                )
    raise InputError(
        "A log-weight is infinity minus infinity: a guide's site has no finite log-probability "
        "at its own draw."
    )


def to_support(name: str, fn: Any) -> Transform:
    """The bijection from real coordinates to a latent's support.

    Args:
        name: The latent's site.
        fn: Its distribution.

    Raises:
        ValueError: If the latent is discrete, or no bijection is known.
    """
    if fn.support.is_discrete:
        raise InputError(
            f"Latent {name!r} is discrete, where annealing and refining need gradients: use "
            f"pyrovae.log_likelihood without refine_steps, or sum it out: mark it with "
            f"infer={{'enumerate': 'parallel'}} in the model and leave it out of the guide."
        )
    support = fn.support
    # A mixture's components share their support, for which torch registers no bijection itself.
    while isinstance(support, MixtureSameFamilyConstraint):
        support = support.base_constraint
    try:
        return biject_to(support)
    except NotImplementedError as error:
        raise InputError(
            f"Latent {name!r} lives on {fn.support}, to which no bijection from real numbers is "
            f"known: use pyrovae.log_likelihood, or register one with torch's biject_to."
        ) from error


def require_density(pair: Pair, rows: tuple) -> None:
    """Make sure that the guide's scores are a density of its latents.

    Args:
        pair: The pair, inspected.
        rows: A few data.

    Raises:
        ValueError: If the guide has auxiliary latents of its own, or point masses.
    """
    _refuse_odd(*_odd_sites(pair, rows))


def require_scorable(pair: Pair, rows: tuple, mend: str) -> Tensor:
    """Make sure that the guide can score latents that it did not draw.

    Args:
        pair: The pair, inspected.
        rows: A few data.
        mend: What to do where it cannot.

    Returns:
        The guide's log-densities of a few draws from the prior, ``[k, N]``.

    Raises:
        ValueError: If the guide's latents are transformed from auxiliary ones, or have no inverse.
    """
    auxiliary, points = _odd_sites(pair, rows)
    if auxiliary or points:
        raise InputError(
            f"The guide cannot score latents that it did not draw, because of its sites "
            f"{sorted({*auxiliary, *points})}: {mend}."
        )
    try:
        return _at_prior_draws(pair, rows)
    except (NotImplementedError, KeyError) as error:
        raise InputError(
            f"The guide cannot score latents that it did not draw ({error}): {mend}."
        ) from error


def uncovered_share(pair: Pair, rows: tuple) -> float:
    """The share of a few draws from the prior to which the guide gives no density.

    Returns:
        NaN where the guide can score nothing but its own draws.

    Raises:
        ValueError: If the guide has no density.
    """
    auxiliary, points = _odd_sites(pair, rows)
    _refuse_odd(auxiliary, points)
    if auxiliary or points:
        return math.nan
    try:
        found = _at_prior_draws(pair, rows)
    except (NotImplementedError, KeyError, ValueError):
        return math.nan
    return (found == -math.inf).double().mean().item()


def _at_prior_draws(pair: Pair, rows: tuple) -> Tensor:
    particles = max(1, PRIOR_ROWS // len(rows[0]))
    return guide_density(pair, rows, particles, pair.draw_prior(rows, particles))


def _refuse_odd(auxiliary: list[str], points: list[str]) -> None:
    # Both together are how Pyro's AutoContinuous guides are written (1.9.2): auxiliary draws, and
    # points that are functions of them and carry the Jacobian as their log-density.
    if auxiliary and not points:
        raise InputError(
            f"The guide's auxiliary sites {auxiliary} are no latents of the model, so that p(x, z) "
            f"over the guide's density does not average to p(x): sample them in the model too, "
            f"from a distribution of your choice."
        )
    if points and not auxiliary:
        raise InputError(
            f"The guide puts all its mass on one point at {points} (a Delta), so there are no "
            f"importance weights: give it a distribution with a density."
        )


def _odd_sites(pair: Pair, rows: tuple) -> tuple[list[str], list[str]]:
    """The guide's auxiliary sites, and its latents that are points without a density."""
    trace = pair.trace_guide(*rows, particles=1)
    sites = dict(scored(trace))
    points = [name for name, site in sites.items() if _is_delta(site["fn"])]
    return [name for name in sites if name not in pair.layout.latents], points


def _is_delta(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta)
