"""Densities of latents, and where importance samples come from: the guide, or a mixture."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from itertools import repeat
from typing import Any, NamedTuple

import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import Transform, biject_to
from torch.distributions.constraints import MixtureSameFamilyConstraint

from pyrovae._tools import InputError
from pyrovae._tools.seeding import seeded
from pyrovae.pairs.pair import Given, Pair
from pyrovae.pairs.traces import Values, reduce_to, scored

# (Particle, datum) pairs from the prior that the guide is asked to score: enough to notice that a
# hundredth of the prior is out of its reach.
PRIOR_ROWS = 256


class Scored(NamedTuple):
    r"""What the model says of K latents for each of N data; terms are ``[K, N]`` in float64.

    ``prior`` is ln p(z), or :math:`\ln p(u) = \ln p(z) + \ln |\partial T / \partial u|` where the
    latents were given as coordinates, and ``log_det`` that logarithm, zero otherwise;
    ``likelihood`` is ln p(x | z); ``latents`` are z and ``sites`` the scores, by site.
    """

    prior: Tensor
    likelihood: Tensor
    log_det: Tensor
    latents: Values
    sites: Values


class _Placed(Given):
    """Sets latent sites to z = T(u) at given points u, and collects ln |∂T/∂u| by site.

    T is that of the site's support, which may depend on other latents.
    """

    def __init__(self, points: Values) -> None:
        super().__init__(points)
        self.log_det: Values = {}

    def latent(self, msg: Any, value: Tensor) -> Tensor:
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
    unconstrained: bool = False,
    fused: bool = False,
) -> Scored:
    """The model's density at K latents ``[K, ..., N, ...]`` by site for each of N data.

    ``unconstrained`` takes the values as points u of real coordinates; ``fused`` says that a
    compiler is going to fuse what is asked for here.
    """
    layout, zero = pair.layout, _zero(rows, particles)
    placed = _Placed(values) if unconstrained else None
    sites, latents = pair.score_model(rows, particles, placed or values, fused=fused)
    hidden = layout.latents + layout.enumerated
    prior = total((score for name, score in sites.items() if name in hidden), zero)
    likelihood = total((score for name, score in sites.items() if name not in hidden), zero)
    if placed is None:
        return Scored(prior, likelihood, zero, latents, sites)
    parts = (reduce_to(each, layout, *zero.shape) for each in placed.log_det.values())
    log_det = total(parts, zero)
    return Scored(prior + log_det, likelihood, log_det, latents, sites)


def guide_density(pair: Pair, rows: tuple, particles: int, latents: Values) -> Tensor:
    """ln q(z | x) of K latents for each of N data, ``[K, N]`` in float64."""
    return total(pair.score_guide(rows, particles, latents).values(), _zero(rows, particles))


def total(scores: Iterable[Tensor], zero: Tensor) -> Tensor:
    """The sum of scores ``[K, N]`` in float64, onto a zero of that shape."""
    return sum((score.double() for score in scores), start=zero)


def chunked(values: Values, particles: int, chunk: int) -> list[tuple[int, Values]]:
    """The first K particles of values in chunks, each with its number of particles."""
    ends = [(start, min(start + chunk, particles)) for start in range(0, particles, chunk)]
    return [(b - a, {name: value[a:b] for name, value in values.items()}) for a, b in ends]


def _zero(rows: tuple, particles: int) -> Tensor:
    return rows[0].new_zeros(particles, len(rows[0]), dtype=torch.float64)


def to_support(name: str, fn: Any) -> Transform:
    """The bijection from real coordinates to the support of a latent's distribution."""
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


class Proposal:
    """Where the particles of importance sampling come from: here, from the guide.

    ``chunk`` is how many particles are scored at once; ``uncovered`` is the share of the prior's
    draws to which the proposal gives no density, NaN where that cannot be told; ``unconstrained``
    says that its values are points u of real coordinates instead of latents.
    """

    unconstrained = False

    def __init__(self, pair: Pair, chunk: int, uncovered: float = 0.0) -> None:
        self.pair, self.chunk, self.uncovered = pair, chunk, uncovered

    def prepare(self, rows: tuple, seed: int) -> dict[str, Tensor]:
        """Get ready for other data; what there is to report of them, ``[N]`` by name."""
        return {}

    def draw(self, rows: tuple, particles: int) -> tuple[Values, Tensor]:
        """K values for each datum, and the log-density of each ``[K, N]`` that is cheap to have."""
        values, scores = self.pair.draw(rows, particles)
        zero = rows[0].new_zeros(particles, len(rows[0]), dtype=torch.float64)
        return values, total(scores.values(), zero)

    def score(
        self, rows: tuple, particles: int, values: Values, *, fused: bool = False
    ) -> tuple[Tensor, Tensor]:
        """ln p(z) and ln p(x | z) of the first K of drawn values, ``[K, N]`` in float64."""
        parts = [
            joint_density(
                self.pair, rows, count, some, unconstrained=self.unconstrained, fused=fused
            )[:2]
            for count, some in chunked(values, particles, self.chunk)
        ]
        prior, likelihood = (torch.cat(each) for each in zip(*parts, strict=True))
        return prior, likelihood

    def density(self, own: Tensor, prior: Tensor) -> Tensor:
        """The log-density to weigh with, given what :meth:`draw` and :meth:`score` said."""
        return own

    def log_prob(self, rows: tuple, particles: int, values: Values) -> Tensor:
        """The log-densities of values drawn elsewhere, ``[K, N]`` in float64."""
        return guide_density(self.pair, rows, particles, values)

    def prior(self, rows: tuple, particles: int) -> Values:
        """K draws from the model's prior for each datum, as values."""
        return self.pair.draw_prior(rows, particles)


class Defensive(Proposal):
    r"""Draws from a proposal, and for a share α of the particles from the prior.

    .. math:: m(z) = (1 - \alpha)\, q(z \mid x) + \alpha\, p(z), \qquad
              \frac{p(x, z)}{m(z)} \le \frac{p(x \mid z)}{\alpha}

    Whole traces are mixed, so that any structure of latents will do. The number of draws from
    each of the two is fixed, and their order random: α is that number's share.

    References:
        Hesterberg (1995), Weighted average importance sampling and defensive mixture
        distributions; Owen and Zhou (2000), Safe and effective importance sampling.
    """

    def __init__(self, base: Proposal, share: float) -> None:
        super().__init__(base.pair, base.chunk)
        self.base, self.unconstrained = base, base.unconstrained
        self.asked = self.share = share

    def prepare(self, rows: tuple, seed: int) -> dict[str, Tensor]:
        """As the base."""
        return self.base.prepare(rows, seed)

    def draw(self, rows: tuple, particles: int) -> tuple[Values, Tensor]:
        """K values for each datum, and their log-densities under the base."""
        # At least one draw of each: without the prior's nothing bounds the weights, and without
        # the base's its log-share is minus infinity.
        count = min(max(round(self.asked * particles), 1), particles - 1)
        self.share = count / particles
        drawn, density = self.base.draw(rows, particles - count)
        prior = self.base.prior(rows, count)
        order = torch.randperm(particles, device=density.device)
        values = {name: torch.cat([drawn[name], prior[name]])[order] for name in drawn}
        return values, torch.cat([density, self.base.log_prob(rows, count, prior)])[order]

    def density(self, own: Tensor, prior: Tensor) -> Tensor:
        """The log-density of the mixture."""
        return torch.logaddexp(own + math.log1p(-self.share), prior + math.log(self.share))


class Compiled(Proposal):
    """A proposal whose draws and scores are compiled graphs, made for the first data it is given.

    ``tile`` is how many particles are drawn at once, a multiple of the chunk. Where a program
    cannot be captured it warns, and works as the proposal does.
    """

    def __init__(self, base: Proposal, tile: int) -> None:
        super().__init__(base.pair, base.chunk, base.uncovered)
        self.base, self.unconstrained, self.tile = base, base.unconstrained, tile
        self._graphs: list[Callable[..., list[Tensor]]] | None = None

    def prepare(self, rows: tuple, seed: int) -> dict[str, Tensor]:
        """As the base; the first time, compile."""
        about = self.base.prepare(rows, seed)
        if self._graphs is None:
            self._graphs = self._compile(rows)
        return about

    def draw(self, rows: tuple, particles: int) -> tuple[Values, Tensor]:
        """As the base, for a whole tile of particles."""
        if not self._graphs:
            return self.base.draw(rows, particles)
        *values, density = self._graphs[0](*rows)
        return self._named(values), density

    def score(
        self, rows: tuple, particles: int, values: Values, *, fused: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As the base; a graph is for whole chunks, so the last one is cut afterwards."""
        if not self._graphs:
            return self.base.score(rows, particles, values)
        parts = [
            self._graphs[1](*rows, *(v[start : start + self.chunk] for v in values.values()))
            for start in range(0, particles, self.chunk)
        ]
        prior, likelihood = (torch.cat(each)[:particles] for each in zip(*parts, strict=True))
        return prior, likelihood

    def density(self, own: Tensor, prior: Tensor) -> Tensor:
        """As the base."""
        return self.base.density(own, prior)

    def _compile(self, rows: tuple) -> list[Callable[..., list[Tensor]]]:
        """Graphs of a draw and of a score; none where that fails."""
        from pyrovae.compiling.graph import CaptureError, audited

        with seeded(0, rows[0].device):
            some = [value[: self.chunk].clone() for value in self._draw(*rows)[:-1]]
        try:
            return [
                audited(self._draw, rows, self.pair, repeat(("a draw", 0.0))),
                audited(self._score, (*rows, *some), self.pair, repeat(("a score", 0.0))),
            ]
        except CaptureError as error:
            warnings.warn(f"log p(x) runs eagerly, not compiled: {error}.", stacklevel=4)
            return []

    def _draw(self, *rows: Tensor) -> list[Tensor]:
        values, density = self.base.draw(rows, self.tile)
        return [*values.values(), density]

    def _score(self, *args: Tensor) -> list[Tensor]:
        count = len(args) - len(self.pair.known.latents)
        values = self._named(list(args[count:]))
        return list(self.base.score(args[:count], self.chunk, values, fused=True))

    def _named(self, values: list[Tensor]) -> Values:
        return dict(zip(self.pair.known.latents, values, strict=True))


def require_density(pair: Pair, rows: tuple) -> None:
    """Refuse a guide with auxiliary latents of its own, or with point masses."""
    _refuse_odd(*_odd_sites(pair, rows))


def require_scorable(pair: Pair, rows: tuple, mend: str) -> Tensor:
    """Refuse a guide that cannot score latents that it did not draw; ``mend`` says what to do.

    Returns the guide's log-densities of a few draws from the prior, ``[k, N]``.
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

    NaN where the guide can score nothing but its own draws; one without a density is refused.
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


def refuse_nan(guide: Values, model: Values, first_row: int) -> None:
    """Say which site's score ``[K, N]`` is NaN, and for which datum, counted from the first."""
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
