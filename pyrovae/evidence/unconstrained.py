"""A pair's latents in real coordinates: a guide refined there, and moves towards the posterior."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
from pyro.distributions import Normal, StudentT
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
    guide_density,
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

# 0.65 is optimal for Hamiltonian moves in many dimensions (Beskos et al., arXiv 1001.4460); a
# little more costs little and is safer. The rate is that of a stochastic approximation, per move.
TARGET, RATE = 0.7, 0.3
# Step sizes that vary keep trajectories from closing on themselves (Neal 2011).
JITTER = 0.2
# Moves before the first temperature, as its step size starts from a guess; how much a new slope
# counts in the running mean; and the least curvature, for a coordinate that hardly matters.
WARM_UP, FORGET, FLAT = 12, 0.1, 1e-6
# At most so many sets of step sizes are kept: thousands of temperatures of [64, D] add up.
KEPT = 200


class Coordinates:
    """The latents of a pair as vectors u ``[K, N, D]`` of real numbers, z = T(u)."""

    def __init__(self, pair: Pair, rows: tuple) -> None:
        self.pair = pair
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
            far = StudentT(DEGREES, self.loc, self.scale).rsample((particles,))
            u = torch.where(self.coordinates.bent, far, u)
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
                loss = -(
                    (found.prior + found.likelihood).mean(0).sum() + (stretch * self.counted).sum()
                )
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


class State(NamedTuple):
    """Points u ``[K, N, D]`` with two log-densities ``[K, N]`` there, and their gradients.

    ``target`` is ln p(x, u), ``start`` ln q(u | x) or ln p(u).
    """

    u: Tensor
    target: Tensor
    start: Tensor
    target_slope: Tensor
    start_slope: Tensor

    def density(self, beta: float) -> Tensor:
        r"""The log-density :math:`(1 - \beta) \ln q + \beta \ln p` on the way, unnormalized."""
        return (1 - beta) * self.start + beta * self.target

    def slope(self, beta: float) -> Tensor:
        """Its gradient."""
        return (1 - beta) * self.start_slope + beta * self.target_slope


class GeometricPath:
    r"""What lies between the guide, or the prior, and the posterior of each datum.

    .. math:: f_\beta(u) = q(u \mid x)^{1 - \beta}\, p(x, u)^\beta
    """

    def __init__(self, coordinates: Coordinates, initial: str, max_rows: int) -> None:
        self.coordinates, self.pair = coordinates, coordinates.pair
        self.initial, self.max_rows = initial, max_rows
        self.graphs: dict[torch.Size, Callable[..., list[Tensor]]] = {}

    def __call__(self, rows: tuple, u: Tensor) -> State:
        """Both densities and their gradients at u."""
        # A graph takes what lies in memory as it did when it was captured.
        chunks = u.contiguous().split(self.chunk(rows))
        parts = [self.graphs.get(some.shape, self._eager)(some, *rows) for some in chunks]
        return State(u, *(torch.cat(part) for part in zip(*parts, strict=True)))

    def compile(self, rows: tuple, *particles: int) -> None:
        """Compile both for these numbers of particles of data of these shapes, or warn."""
        from pyrovae.compiling.graph import CaptureError, Graph

        size = len(rows[0]), sum(self.coordinates.sizes)
        try:
            for count in {min(each, self.chunk(rows)) for each in particles}:
                u = rows[0].new_zeros(count, *size, dtype=self.coordinates.dtype)
                self.graphs[u.shape] = Graph(self._eager, (u, *rows), self.pair)
        except CaptureError as error:
            self.graphs.clear()
            warnings.warn(f"Annealing runs eagerly, not compiled: {error}.", stacklevel=4)

    def chunk(self, rows: tuple) -> int:
        """How many particles of these data are scored at once."""
        return max(1, self.max_rows // len(rows[0]))

    def _eager(self, u: Tensor, *rows: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            points = self.coordinates.split(u)
            found = joint_density(self.pair, rows, len(u), points, unconstrained=True)
            start = found.prior
            if self.initial == "guide":
                start = guide_density(self.pair, rows, len(u), found.latents) + found.log_det
            densities = found.prior + found.likelihood, start
            slopes = [_slope(density, u) for density in densities]
        return [*(density.detach() for density in densities), *slopes]


def _slope(density: Tensor, u: Tensor) -> Tensor:
    if not density.requires_grad:
        return torch.zeros_like(u)
    return torch.autograd.grad(density.sum(), u, retain_graph=True, materialize_grads=True)[0]


Move = Callable[[State, float, Tensor], tuple[State, Tensor]]


def transition(
    path: GeometricPath, rows: tuple, num_steps: int, state: State, beta: float, stride: Tensor
) -> tuple[State, Tensor]:
    r"""One Hamiltonian move that leaves the density at β invariant.

    .. math:: r \sim \mathcal{N}(0, I), \qquad
              (u', r') = \mathrm{leapfrog}^L(u, r), \qquad
              \Pr(\text{accept}) = \min\{1, e^{H(u, r) - H(u', r')}\}

    The stride ``[N, D]`` is the step size, which each chain varies by up to a fifth. Returns where
    the chains are then, and the probabilities of acceptance ``[K, N]``.

    References:
        Neal (2011), MCMC using Hamiltonian dynamics (arXiv 1206.1901), section 3.
    """
    jitter = 1 + JITTER * (2 * torch.rand_like(state.target) - 1)
    stride = jitter[..., None].to(stride.dtype) * stride
    momentum = torch.randn_like(state.u)
    uniform = torch.rand_like(state.target)
    before = state.density(beta) - 0.5 * momentum.double().square().sum(-1)
    moved, sound = state, torch.ones_like(uniform, dtype=torch.bool)
    for _ in range(num_steps):
        momentum = momentum + 0.5 * stride * moved.slope(beta)
        u = moved.u + stride * momentum
        sound = sound & u.isfinite().all(-1)
        moved = path(rows, torch.where(sound[..., None], u, state.u))
        momentum = momentum + 0.5 * stride * moved.slope(beta)
    after = moved.density(beta) - 0.5 * momentum.double().square().sum(-1)
    gain = torch.where(sound, after - before, -torch.inf).nan_to_num(nan=-torch.inf)
    probability = gain.exp().clamp(max=1)
    accept = uniform < probability
    masks = [accept[..., None] if each.dim() == 3 else accept for each in state]
    return State(*map(torch.where, masks, moved, state)), probability


def adapt(move: Move, state: State, betas: list[float], tick: Callable[[], Any]) -> list[Tensor]:
    r"""Step sizes ``[N, D]`` for each temperature in rising order, found by a run of its own.

    .. math:: \epsilon_d = \epsilon \, \bigl(E[(\partial_d \ln f_\beta)^2]\bigr)^{-1/2}

    The run goes up the path as the one that it is for. A datum's ε is raised where its chains
    accept more than 70 % and lowered where less; the expectation, which for a normal density is
    the diagonal of its precision, is a running mean. What it finds does not depend on the chains
    that use it, so their estimate stays unbiased. A coordinate that the density ignores, as where
    a latent is masked, stays where it is.
    """
    step = torch.full_like(state.target[0], state.u.shape[-1] ** -0.25)
    curvature: Tensor | None = None
    found: list[Tensor] = []
    kept = -(-len(betas) // KEPT)
    for index, beta in enumerate(betas):
        for _ in range(1 + (WARM_UP if index == 0 else WARM_UP // len(betas))):
            seen = state.slope(beta).square().mean(0)
            curvature = seen if curvature is None else torch.lerp(curvature, seen, FORGET)
            scale = torch.where(curvature > 0, curvature.clamp(min=FLAT).rsqrt(), 0.0)
            stride = step[:, None].to(scale.dtype) * scale
            state, accepted = move(state, beta, stride)
            step = (step * (RATE * (accepted.mean(0) - TARGET)).exp()).clamp(1e-6, 10.0)
        found.append(found[-1] if index % kept else stride)
        tick()
    return found


def anneal(
    move: Move,
    state: State,
    betas: list[float],
    strides: list[Tensor],
    tick: Callable[[], Any],
    *,
    backward: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Anneal chains up the path, or down it, and sum the log-weights.

    .. math:: \ln w = \sum_{t=0}^{T} (\beta_{t+1} - \beta_t)\,
              \ln \frac{p(x, u_t)}{q(u_t \mid x)}, \qquad \beta_0 = 0, \quad \beta_{T+1} = 1

    where u_0 ~ q and u_t follows from u_{t-1} by a transition at β_t; or, backward, u_T is a draw
    from the posterior and u_{t-1} follows from u_t. Forward the mean of w is p(x), backward that
    of 1/w is 1/p(x). Strides are step sizes ``[N, D]`` for each of β_1, …, β_T. Returns ln w
    ``[K, N]``, and the mean probability of acceptance ``[N]``.

    References:
        Neal (2001), Annealed importance sampling; Grosse et al. (arXiv 1511.02543), section 3.
    """
    order = list(zip(betas, strides, strict=True))
    gaps = [after - before for before, after in pairwise([0.0, *betas, 1.0])]
    accepted = torch.zeros_like(state.target[0])
    if backward:
        order, gaps = order[::-1], gaps[::-1]
    log_weight = gaps[0] * (state.target - state.start)
    for (beta, stride), gap in zip(order, gaps[1:], strict=True):
        state, probability = move(state, beta, stride)
        log_weight = log_weight + gap * (state.target - state.start)
        accepted = accepted + probability.mean(0) / len(betas)
        tick()
    return log_weight, accepted
