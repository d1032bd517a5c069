"""Densities of latents, and where importance samples come from: the guide, or a mixture."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import IndependentTransform, Transform, biject_to

from pyrovae._tools import InputError, warn
from pyrovae._tools.seeding import seeded
from pyrovae.pairs.pair import Given, Pair
from pyrovae.pairs.support import counted, support_of
from pyrovae.pairs.traces import Layout, Values, reduce_to

if TYPE_CHECKING:
    from pyrovae.compiling.graph import Graph

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
        transform, events = to_support(msg["name"], msg["fn"]), 0
        image = transform(value)
        # Masks may be within an event, so that its coordinates are added last.
        while isinstance(transform, IndependentTransform):
            events += transform.reinterpreted_batch_ndims
            transform = transform.base_transform
        log_det = transform.log_abs_det_jacobian(value, image)
        mask = counted_within(msg | {"value": value}, events)
        log_det = log_det if mask is None else torch.where(mask, log_det, 0.0)
        log_det = log_det.sum([*range(-events, 0)]) if events else log_det
        self.log_det[msg["name"]] = msg["fold"].split(log_det, 0) if "fold" in msg else log_det
        return image


def counted_within(site: Any, events: int) -> Tensor | None:
    """Where a site counts, over its batch and so many of its event's dimensions."""
    mask = counted(site)
    # The others are those of a single event, which is masked as a whole.
    left = events - site["fn"].event_dim
    return mask if mask is None or left >= 0 else mask.flatten(left)[..., 0]


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
    jacobians = placed.log_det.values() if placed else ()
    log_det = total((reduce_to(each, layout, *zero.shape) for each in jacobians), zero)
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
    try:
        return biject_to(support_of(fn))
    except NotImplementedError as error:
        raise InputError(
            f"Latent {name!r} lives on {fn.support}, to which no bijection from real numbers is "
            f"known: use pyrovae.log_likelihood, or register one with torch's biject_to."
        ) from error


class Proposal:
    """Where importance samples of each datum come from: here, from the guide.

    ``unconstrained`` says that its values are points u of real coordinates instead of latents.
    """

    unconstrained = False

    def __init__(self, pair: Pair) -> None:
        self.pair = pair

    def prepare(self, rows: tuple, seed: int) -> Values:
        """Get ready for other data; what there is to report of them, ``[N]`` by name."""
        return {}

    def draw(self, rows: tuple, particles: int) -> tuple[Values, Tensor]:
        """K values for each datum, and their log-densities ``[K, N]`` in float64."""
        values, scores = self.pair.draw(rows, particles)
        return values, total(scores.values(), _zero(rows, particles))

    def log_prob(self, rows: tuple, particles: int, values: Values) -> Tensor:
        """The log-densities of values drawn elsewhere, ``[K, N]`` in float64."""
        return guide_density(self.pair, rows, particles, values)

    def prior(self, rows: tuple, particles: int) -> Values:
        """K draws from the model's prior for each datum, as values."""
        return self.pair.draw_prior(rows, particles)


class Sampler:
    r"""Draws from the guide or another proposal, for a share α from the prior, and weighs it all.

    .. math:: m(z) = (1 - \alpha)\, q(z \mid x) + \alpha\, p(z), \qquad
              \frac{p(x, z)}{m(z)} \le \frac{p(x \mid z)}{\alpha}

    Whole traces are mixed, so that any structure of latents will do. The number of draws from
    each of the two is fixed, and their order random: α is that number's share. ``tile`` particles
    are drawn at once, and scored in chunks of a number that divides it.

    References:
        Hesterberg (1995), Weighted average importance sampling and defensive mixture
        distributions; Owen and Zhou (2000), Safe and effective importance sampling.
    """

    def __init__(
        self,
        pair: Pair,
        tile: int,
        chunk: int,
        proposal: Proposal | None = None,
        share: float = 0.0,
        compiled: bool = False,
    ) -> None:
        self.pair, self.tile, self.chunk = pair, tile, chunk
        self.proposal = proposal or Proposal(pair)
        # At least one draw of each: without the prior's nothing bounds the weights, and without
        # the proposal's its log-share is minus infinity.
        self.from_prior = min(max(round(share * tile), 1), tile - 1) if share else 0
        self.compiled = compiled
        self._graphs: list[Graph] = []
        self.apart = False

    def prepare(self, rows: tuple, seed: int) -> Values:
        """Prepare the proposal; the first time, compile draws and scores of these shapes."""
        about = self.proposal.prepare(rows, seed)
        if self.compiled:
            self.compiled, self._graphs = False, self._compile(rows)
        return about

    def ready(self, rows: tuple) -> bool:
        """Compile; whether threads may weigh side by side, as they draw in no other's stream."""
        if type(self.proposal) is not Proposal:  # made for one tile of data at a time
            return False
        self.prepare(rows, 0)
        self.apart = bool(self._graphs) and not self._graphs[1].draws
        return self.apart

    def weigh(
        self, rows: tuple, particles: int, stream: AbstractContextManager | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ln p(z), ln p(x | z) and ln m(z) of the first K of a tile's draws, ``[K, N]``."""
        with ExitStack() as drawing:
            drawing.enter_context(stream or nullcontext())
            values, own = self.draw(rows)
            if self.apart:
                drawing.close()
            prior, likelihood = self.score(rows, particles, values)
        own = own[:particles]
        if self.from_prior:
            share = self.from_prior / self.tile
            own = torch.logaddexp(own + math.log1p(-share), prior + math.log(share))
        return prior, likelihood, own

    def draw(self, rows: tuple) -> tuple[Values, Tensor]:
        """A tile of values for each datum, and their log-densities under the proposal."""
        draw = self._graphs[0] if self._graphs else self._draw
        *values, density = draw(*rows)
        return dict(zip(self.pair.layout.latents, values, strict=True)), density

    def score(self, rows: tuple, particles: int, values: Values) -> tuple[Tensor, Tensor]:
        """ln p(z) and ln p(x | z) of the first K of drawn values, ``[K, N]`` in float64."""
        # A graph is for whole chunks, so the last one is cut afterwards.
        count = -(-particles // self.chunk) * self.chunk if self._graphs else particles
        parts = [self._score(rows, *some) for some in chunked(values, count, self.chunk)]
        prior, likelihood = (torch.cat(each)[:particles] for each in zip(*parts, strict=True))
        return prior, likelihood

    def refuse_nan(self, rows: tuple, seed: int, first_row: int) -> None:
        """Say which site's log-probability is NaN in a tile's draws, and for which datum."""
        with seeded(seed, rows[0].device):
            _, guide = self.pair.draw(rows, self.tile)
        with seeded(seed, rows[0].device):
            values, _ = self.draw(rows)
            space = self.proposal.unconstrained
            found = joint_density(self.pair, rows, self.tile, values, unconstrained=space)
        refuse_nan(guide, found.sites, first_row)

    def _draw(self, *rows: Tensor) -> list[Tensor]:
        count = self.from_prior
        values, density = self.proposal.draw(rows, self.tile - count)
        if count:
            prior = self.proposal.prior(rows, count)
            order = torch.randperm(self.tile, device=density.device)
            values = {name: torch.cat([values[name], prior[name]])[order] for name in values}
            density = torch.cat([density, self.proposal.log_prob(rows, count, prior)])[order]
        return [*values.values(), density]

    def _score(
        self, rows: tuple, particles: int, values: Values, *, fused: bool = False
    ) -> list[Tensor]:
        if self._graphs:
            return self._graphs[1](*rows, *values.values())
        space = self.proposal.unconstrained
        found = joint_density(self.pair, rows, particles, values, unconstrained=space, fused=fused)
        return [found.prior, found.likelihood]

    def _compile(self, rows: tuple) -> list[Graph]:
        """Graphs of a draw and of a score; none, and a warning, where that fails."""
        from pyrovae.compiling.graph import CaptureError, audited

        def score(*args: Tensor) -> list[Tensor]:
            values = dict(zip(self.pair.layout.latents, args[len(rows) :], strict=True))
            return self._score(args[: len(rows)], self.chunk, values, fused=True)

        with seeded(0, rows[0].device):
            some = [value[: self.chunk].clone() for value in self._draw(*rows)[:-1]]
        try:
            return [
                audited(self._draw, rows, self.pair, repeat(("a draw", 0.0))),
                audited(score, (*rows, *some), self.pair, repeat(("a score", 0.0))),
            ]
        except CaptureError as error:
            warn(f"log p(x) runs eagerly, not compiled: {error}.")
            return []


def require_density(layout: Layout) -> bool:
    """Refuse a guide with auxiliary latents of its own or with point masses, unless it has both.

    Both together are how Pyro's AutoContinuous guides are written (1.9.2): auxiliary draws, and
    points that are functions of them and carry the Jacobian as their log-density. Returns whether
    it has neither.
    """
    auxiliary, points = list(layout.auxiliary), list(layout.points)
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
    return not auxiliary


def require_scorable(pair: Pair, rows: tuple, mend: str) -> None:
    """Refuse a guide that cannot score latents that it did not draw; ``mend`` says what to do."""
    if odd := sorted({*pair.layout.auxiliary, *pair.layout.points}):
        raise InputError(
            f"The guide cannot score latents that it did not draw, because of its sites {odd}: "
            f"{mend}."
        )
    try:
        _at_prior_draws(pair, rows)
    except (NotImplementedError, KeyError) as error:
        raise InputError(
            f"The guide cannot score latents that it did not draw ({error}): {mend}."
        ) from error


def uncovered_share(pair: Pair, rows: tuple) -> float:
    """The share of a few draws from the prior to which the guide gives no density.

    NaN where the guide can score nothing but its own draws; one without a density is refused.
    """
    if not require_density(pair.layout):
        return math.nan
    try:
        found = _at_prior_draws(pair, rows)
    except (NotImplementedError, KeyError, ValueError):
        return math.nan
    return (found == -math.inf).double().mean().item()


def _at_prior_draws(pair: Pair, rows: tuple) -> Tensor:
    particles = max(1, PRIOR_ROWS // len(rows[0]))
    return guide_density(pair, rows, particles, pair.draw_prior(rows, particles))


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
