"""A pair's latents in real coordinates, and a guide that is refined there for each datum."""

from __future__ import annotations

import math
from math import prod

import torch
from pyro.distributions import Gamma, Normal, StudentT
from torch import Tensor
from torch.distributions import IndependentTransform, Transform, identity_transform
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyrovae._tools import InputError
from pyrovae._tools.seeding import seeded
from pyrovae.evidence import FIT_STREAM, GUIDE_STREAM
from pyrovae.evidence.proposals import (
    Proposal,
    Sampler,
    chunked,
    counted_within,
    joint_density,
    to_support,
)
from pyrovae.pairs.pair import Given, Pair
from pyrovae.pairs.support import Turn, element, support_of, wrapped
from pyrovae.pairs.traces import Values

# Adam's rate in units of the guide's scale, the antithetic pairs of a step, and the draws that
# the fit starts from. 200 such steps come within a tenth of a nat of the best normal on MNIST.
FIT_RATE, PAIRS, MOMENT_DRAWS = 0.1, 4, 256
# Towards the edge of a support the density of u falls like an exponential, and a normal's faster:
# weights there have no variance, which k-hat of a thousand draws doesn't always see. A t falls
# slower; with eight degrees it costs 2 % of the draws a coordinate where the posterior is normal.
DEGREES = 8.0
# Turns of a circle that a normal of up to π radians reaches; that one is uniform up to a percent.
TURNS = range(-4, 5)


class Coordinates:
    """The latents of a pair as vectors u ``[K, N, D]`` of real numbers, z = T(u)."""

    def __init__(self, pair: Pair, rows: tuple) -> None:
        self.pair = pair
        if not pair.known.latents:
            raise InputError(
                "The pair has no latents of its guide, so there is nothing to refine, and nothing "
                "to anneal: log_likelihood as it is has log p(x)."
            )
        sites = pair.trace_given(pair.run_model, rows, 1, Given({})).nodes
        fns = {name: sites[name]["fn"] for name in pair.known.latents}
        # Where the batch lies in each u, counted from the right: a simplex has an event of its own.
        self.axes = {
            n: pair.known.dim - to_support(n, fn).domain.event_dim for n, fn in fns.items()
        }
        example = self.points(rows, 1, pair.draw_prior(rows, 1))
        self.dtype = self.join(example).dtype
        moved = {n: v.movedim(self.axes[n], 1) for n, v in example.items()}
        self.shapes = {name: value.shape[2:] for name, value in moved.items()}
        self.sizes = [prod(shape) for shape in self.shapes.values()]
        angles = {n: isinstance(element(support_of(fn)), Turn) for n, fn in fns.items()}
        turns = {n: torch.full_like(u, angles[n], dtype=torch.bool) for n, u in example.items()}
        self.angles = self.join(turns)[0] if any(angles.values()) else None
        bent = {n: not angles[n] and _is_bent(to_support(n, fn)) for n, fn in fns.items()}
        edged = {n: torch.full_like(u, bent[n], dtype=torch.bool) for n, u in example.items()}
        self.bent = self.join(edged)[0] if any(bent.values()) else None

    def join(self, points: Values) -> Tensor:
        """u of its parts by site."""
        moved = (points[name].movedim(axis, 1) for name, axis in self.axes.items())
        return torch.cat([value.reshape(*value.shape[:2], -1) for value in moved], -1)

    def split(self, u: Tensor) -> Values:
        """The parts of u by site."""
        parts = zip(self.shapes.items(), u.split(self.sizes, -1), strict=True)
        return {
            name: part.reshape(*u.shape[:2], *shape).movedim(1, self.axes[name])
            for (name, shape), part in parts
        }

    def of(self, rows: tuple, latents: Values, chunk: int | None = None) -> Tensor:
        """u of latents z, for so many particles at once."""
        particles = len(next(iter(latents.values())))
        parts = chunked(latents, particles, chunk or particles)
        return torch.cat([self.join(self.points(rows, *part)) for part in parts])

    def points(self, rows: tuple, particles: int, latents: Values) -> Values:
        """The parts of u by site, of K latents z for each datum; zero where z is masked."""
        found, masks = self._points(rows, particles, latents)
        return {n: u if n not in masks else torch.where(masks[n], u, 0.0) for n, u in found.items()}

    def counted(self, rows: tuple) -> Tensor:
        """Where u counts, and is not masked, for each datum, ``[N, D]``."""
        found, masks = self._points(rows, 2, self.pair.draw_prior(rows, 2))
        always = torch.ones((), dtype=torch.bool, device=rows[0].device)
        first, second = self.join(
            {n: masks.get(n, always).expand_as(u) for n, u in found.items()}
        ).unbind()
        if not torch.equal(first, second):
            raise InputError(
                f"Whether latents count ({sorted(masks)} are masked) depends on latents, so that "
                f"no normal can be fitted to them: leave out refine_steps."
            )
        return first

    def _points(self, rows: tuple, particles: int, latents: Values) -> tuple[Values, Values]:
        sites = self.pair.trace_given(self.pair.run_model, rows, particles, Given(latents)).nodes
        found, masks = {}, {}
        for name, value in latents.items():
            site, transform = sites[name], to_support(name, sites[name]["fn"])
            found[name] = transform.inv(value)
            mask = counted_within(site, transform.domain.event_dim)
            if mask is not None:
                masks[name] = mask
        return found, masks


def _is_bent(transform: Transform) -> bool:
    """Whether latents have an edge: their support is not the whole line."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform != identity_transform


class Refined(Proposal):
    r"""Draws from independent normal coordinates, fitted to each datum's posterior.

    .. math:: q^*_x(u) = \mathcal{N}(u; m, \mathrm{diag}\,s^2), \qquad
              (m, s) = \arg\max\, E[\ln p(x, T(u)) + \ln |\partial T / \partial u|]
              + \textstyle\sum_d \ln s_d

    u are real coordinates of the latents, z = T(u); where their support has an edge, the draws are
    those of a t with the same m and s. The fit starts from the guide's moments, takes
    steps of Adam in units of the guide's scale, at a rate that falls to zero, and uses antithetic
    draws.

    References:
        Cremer et al., Inference Suboptimality in Variational Autoencoders (arXiv 1801.03558);
        Kim et al., Semi-Amortized Variational Autoencoders (arXiv 1802.02550).
    """

    unconstrained = True

    def __init__(self, pair: Pair, rows: tuple, steps: int, chunk: int) -> None:
        super().__init__(pair)
        self.coordinates, self.steps = Coordinates(pair, rows), steps
        self.guide = Sampler(pair, MOMENT_DRAWS, chunk)
        size = len(rows[0]), sum(self.coordinates.sizes)
        # Set in place from tile to tile, as a compiled graph reads them.
        self.loc = rows[0].new_zeros(size, dtype=self.coordinates.dtype)
        self.scale = torch.ones_like(self.loc)
        self.counted = torch.ones_like(self.loc, dtype=torch.bool)

    def prepare(self, rows: tuple, seed: int) -> Values:
        """Fit, and estimate the ELBO of the guide as it was, ``guide_elbo`` ``[N]``."""
        with seeded(seed, rows[0].device, 0, GUIDE_STREAM):
            drawn, density = self.guide.draw(rows)
        prior, likelihood = self.guide.score(rows, MOMENT_DRAWS, drawn)
        u = self._near(self.coordinates.of(rows, drawn, self.guide.chunk))
        self.counted.copy_(self.coordinates.counted(rows))
        with seeded(seed, rows[0].device, 0, FIT_STREAM):
            loc, scale = self._fit(rows, *_moments(u, prior != -torch.inf))
        self.loc.copy_(loc)
        self.scale.copy_(scale)
        return {"guide_elbo": (prior + likelihood - density).mean(0)}

    def draw(self, rows: tuple, particles: int) -> tuple[Values, Tensor]:
        """K points u for each datum, and their log-densities ``[K, N]`` in float64."""
        u = Normal(self.loc, self.scale).rsample((particles,))
        if self.coordinates.bent is not None:
            # The t is that normal draw over the root of a gamma.
            root = Gamma(half := torch.full_like(u, DEGREES / 2), half).sample().sqrt()
            u = torch.where(self.coordinates.bent, self.loc + (u - self.loc) / root, u)
        return self.coordinates.split(u), self._density(u)

    def log_prob(self, rows: tuple, particles: int, values: Values) -> Tensor:
        """The log-densities of points drawn elsewhere, ``[K, N]`` in float64."""
        return self._density(self.coordinates.join(values))

    def prior(self, rows: tuple, particles: int) -> Values:
        """K draws from the model's prior for each datum, as points u."""
        return self.coordinates.points(rows, particles, super().prior(rows, particles))

    def _density(self, u: Tensor) -> Tensor:
        density = Normal(self.loc, self.scale).log_prob(u).double()
        if self.coordinates.bent is not None:
            far = StudentT(DEGREES, self.loc, self.scale).log_prob(u).double()
            density = torch.where(self.coordinates.bent, far, density)
        if self.coordinates.angles is not None:
            angle = torch.stack([wrapped(u - self.loc) + 2 * math.pi * turn for turn in TURNS])
            around = Normal(0.0, self.scale).log_prob(angle).double().logsumexp(0)
            density = torch.where(self.coordinates.angles, around, density)
        return torch.where(self.counted, density, 0.0).sum(-1)

    def _near(self, u: Tensor) -> Tensor:
        """The same points, with angles within half a turn of their mean direction."""
        if self.coordinates.angles is None:
            return u
        mean = torch.atan2(u.sin().mean(0), u.cos().mean(0))
        return torch.where(self.coordinates.angles, mean + wrapped(u - mean), u)

    def _fit(self, rows: tuple, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        moments = loc.new_zeros(2, *loc.shape).requires_grad_()
        optimizer = Adam([moments], lr=FIT_RATE)
        schedule = CosineAnnealingLR(optimizer, self.steps)
        for _ in range(self.steps):
            noise = torch.randn(PAIRS, *loc.shape, dtype=loc.dtype, device=loc.device)
            with torch.enable_grad():
                shift, stretch = moments
                wide = stretch.exp() * torch.cat([noise, -noise])
                points = self.coordinates.split(loc + scale * (shift + wide))
                found = joint_density(self.pair, rows, 2 * PAIRS, points, unconstrained=True)
                entropy = (stretch * self.counted).sum()
                loss = -((found.prior + found.likelihood).mean(0).sum() + entropy)
                (moments.grad,) = torch.autograd.grad(loss, moments)
            optimizer.step()
            schedule.step()
        shift, stretch = moments.detach()
        width = scale * stretch.exp()
        if self.coordinates.angles is not None:
            width = torch.where(self.coordinates.angles, width.clamp(max=math.pi), width)
        return loc + scale * shift, width


def _moments(u: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Means and standard deviations ``[N, D]`` over those of ``[K, N, D]`` that are inside."""
    inside = inside[..., None]
    count = inside.sum(0)
    mean = torch.where(inside, u, 0.0).sum(0) / count.clamp(min=1)
    square = torch.where(inside, u - mean, 0.0).square().sum(0)
    # A datum with less than two draws inside starts from a standard normal.
    scale = torch.where(count > 1, (square / (count - 1).clamp(min=1)).sqrt(), 1.0)
    return mean, scale.clamp(min=1e-4)
