"""Where importance samples come from: the guide, one refined for each datum, or a mixture."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from pyro.distributions import Normal
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyrovae._tools.seeding import seeded
from pyrovae.evidence import FIT_STREAM, GUIDE_STREAM
from pyrovae.evidence.density import FromGuide, joint_density
from pyrovae.evidence.unconstrained import Coordinates
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import Values

__all__ = [
    "Compiled",
    "Defensive",
    "Proposal",
    "Refined",
]

# Adam's rate in units of the guide's scale, the antithetic pairs of a step, and the draws that
# the fit starts from. 200 such steps come within a tenth of a nat of the best normal on MNIST.
RATE, PAIRS, MOMENT_DRAWS = 0.1, 4, 256


class Proposal(Protocol):
    """Where the particles of importance sampling come from.

    Attributes:
        unconstrained: Whether its values are points u of real coordinates (see
            :class:`pyrovae.evidence.density.Placed`) instead of latents.
        uncovered: The share of the prior's draws to which it gives no density; NaN where that
            cannot be told.
    """

    unconstrained: bool
    uncovered: float

    def prepare(self, rows: tuple, seed: int) -> dict[str, Tensor]:
        """Get ready for other data; what there is to report of them, ``[N]`` by name."""

    def draw(self, rows: tuple, particles: int) -> tuple[Values, Tensor]:
        """K values for each datum, and the log-density of each ``[K, N]`` that is cheap to have."""

    def score(
        self, rows: tuple, particles: int, values: Values, *, fused: bool = False
    ) -> tuple[Tensor, Tensor]:
        """ln p(z) and ln p(x | z) of the first K of drawn values, ``[K, N]`` in float64."""

    def density(self, own: Tensor, prior: Tensor) -> Tensor:
        """The log-density to weigh with, given what :meth:`draw` and :meth:`score` said."""


class Refined(FromGuide):
    r"""Draws from a normal of independent coordinates, fitted to each datum's posterior.

    .. math:: q^*_x(u) = \mathcal{N}(u; m, \mathrm{diag}\,s^2), \qquad
              (m, s) = \arg\max\, E[\ln p(x, T(u)) + \ln |\partial T / \partial u|]
              + \textstyle\sum_d \ln s_d

    u are real coordinates of the latents, z = T(u). The fit starts from the guide's moments, takes
    steps of Adam in units of the guide's scale, at a rate that falls to zero, and uses antithetic
    draws.

    Args:
        pair: The pair, inspected.
        rows: A few data.
        steps: The number of steps.
        chunk: How many particles are scored at once.

    Raises:
        ValueError: If a latent is discrete.

    References:
        Cremer et al., Inference Suboptimality in Variational Autoencoders (arXiv 1801.03558);
        Kim et al., Semi-Amortized Variational Autoencoders (arXiv 1802.02550).
    """

    unconstrained = True

    def __init__(self, pair: Pair, rows: tuple, steps: int, chunk: int) -> None:
        super().__init__(pair, chunk)
        self.coordinates, self.steps = Coordinates(pair, rows), steps
        self.loc = self.scale = rows[0].new_zeros(0)

    def prepare(self, rows: tuple, seed: int) -> dict[str, Tensor]:
        """Fit, and estimate the ELBO of the guide as it was, ``guide_elbo`` ``[N]``."""
        guide = FromGuide(self.pair, self.chunk)
        with seeded(seed, rows[0].device, 0, GUIDE_STREAM):
            drawn, density = guide.draw(rows, MOMENT_DRAWS)
        prior, likelihood = guide.score(rows, MOMENT_DRAWS, drawn)
        u = self.coordinates.of(rows, drawn, self.chunk)
        with seeded(seed, rows[0].device, 0, FIT_STREAM):
            self._set(*self._fit(rows, u.mean(0), u.std(0).clamp(min=1e-4)))
        return {"guide_elbo": (prior + likelihood - density).mean(0)}

    def draw(self, rows: tuple, particles: int) -> tuple[Values, Tensor]:
        """K points u for each datum, and their log-densities ``[K, N]`` in float64."""
        noise = torch.randn(
            particles, *self.loc.shape, dtype=self.loc.dtype, device=self.loc.device
        )
        u = self.loc + self.scale * noise
        return self.coordinates.split(u), self._density(u)

    def log_prob(self, rows: tuple, particles: int, values: Values) -> Tensor:
        """The log-densities of points drawn elsewhere, ``[K, N]`` in float64."""
        return self._density(self.coordinates.join(values))

    def prior(self, rows: tuple, particles: int) -> Values:
        """K draws from the model's prior for each datum, as points u."""
        return self.coordinates.points(rows, particles, super().prior(rows, particles))

    def _density(self, u: Tensor) -> Tensor:
        return Normal(self.loc, self.scale).log_prob(u).double().sum(-1)

    def _set(self, loc: Tensor, scale: Tensor) -> None:
        """Set both in place, where a compiled graph may read them."""
        if self.loc.shape != loc.shape:
            self.loc, self.scale = loc.clone(), scale.clone()
        self.loc.copy_(loc)
        self.scale.copy_(scale)

    def _fit(self, rows: tuple, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        shift = torch.zeros_like(loc, requires_grad=True)
        stretch = torch.zeros_like(loc, requires_grad=True)
        optimizer = Adam([shift, stretch], lr=RATE)
        schedule = CosineAnnealingLR(optimizer, self.steps)
        for _ in range(self.steps):
            noise = torch.randn(PAIRS, *loc.shape, dtype=loc.dtype, device=loc.device)
            with torch.enable_grad():
                wide = stretch.exp() * torch.cat([noise, -noise])
                points = self.coordinates.split(loc + scale * (shift + wide))
                found = joint_density(self.pair, rows, 2 * PAIRS, points, unconstrained=True)
                loss = -((found.prior + found.likelihood).mean(0).sum() + stretch.sum())
                shift.grad, stretch.grad = torch.autograd.grad(loss, (shift, stretch))
            optimizer.step()
            schedule.step()
        return loc + scale * shift.detach(), scale * stretch.detach().exp()


class Defensive:
    r"""Draws from a proposal, and for a share α of the particles from the prior.

    .. math:: m(z) = (1 - \alpha)\, q(z \mid x) + \alpha\, p(z), \qquad
              \frac{p(x, z)}{m(z)} \le \frac{p(x \mid z)}{\alpha}

    Whole traces are mixed, so that any structure of latents will do. The number of draws from
    each of the two is fixed, and their order random: α is that number's share.

    Args:
        base: The proposal.
        share: The share α of the prior, between 0 and 1.

    References:
        Hesterberg (1995), Weighted average importance sampling and defensive mixture
        distributions; Owen and Zhou (2000), Safe and effective importance sampling.
    """

    def __init__(self, base: FromGuide, share: float) -> None:
        self.base, self.unconstrained, self.uncovered = base, base.unconstrained, 0.0
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

    def score(
        self, rows: tuple, particles: int, values: Values, *, fused: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As the base."""
        return self.base.score(rows, particles, values, fused=fused)

    def density(self, own: Tensor, prior: Tensor) -> Tensor:
        """The log-density of the mixture."""
        return torch.logaddexp(own + math.log1p(-self.share), prior + math.log(self.share))


class Compiled:
    """A proposal whose draws and scores are compiled graphs, made for the first data it is given.

    Where a program cannot be captured it warns, and works as the proposal does.

    Args:
        base: The proposal.
        pair: The pair, inspected.
        tile: How many particles are drawn at once.
        chunk: How many are scored at once; it divides the tile.
    """

    def __init__(self, base: Proposal, pair: Pair, tile: int, chunk: int) -> None:
        self.base, self.unconstrained, self.uncovered = base, base.unconstrained, base.uncovered
        self.pair, self.tile, self.chunk = pair, tile, chunk
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
        from pyrovae.compiling.graph import CaptureError, Graph, compare

        def graph(what: str, function: Callable[..., list[Tensor]], args: tuple) -> Graph:
            made = Graph(function, args, self.pair)
            with seeded(0, args[0].device):
                expected = function(*args)
            with seeded(0, args[0].device):
                found = made(*args)
            for one, other in zip(found, expected, strict=True):
                compare(what, one, other)
            return made

        with seeded(0, rows[0].device):
            some = [value[: self.chunk].clone() for value in self._draw(*rows)[:-1]]
        try:
            return [
                graph("a draw", self._draw, rows),
                graph("a score", self._score, (*rows, *some)),
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
