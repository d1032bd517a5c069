"""From the guide, or the prior, to the posterior: densities on the way, and moves between them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pyrovae._tools import warn
from pyrovae._tools.seeding import seeded, turn
from pyrovae.evidence.proposals import guide_density, joint_density
from pyrovae.evidence.unconstrained import Coordinates

if TYPE_CHECKING:
    from pyrovae.compiling.hoist import Hoisted

# Moves that are refused turn their chain round, and those that go on through several temperatures
# lose more by it than fresh ones, for which 0.65 is optimal (Beskos et al., arXiv 1001.4460).
TARGET = 0.85
# How fast step sizes follow the rate of acceptance, per move (a stochastic approximation).
RATE = 0.3
# Step sizes that vary keep trajectories from closing on themselves (Neal 2011).
JITTER = 0.2
# What a leapfrog step leaves of the momentum. Between 0.8 and 0.9 the log-weights of chains of one
# to five steps on MNIST vary least; with 0 it takes twice the gradients.
PERSISTENCE = 0.8
# Moves before the first temperature, as its step size starts from a guess; how much a new slope
# counts in the running mean; and the least curvature, for a coordinate that hardly matters.
WARM_UP, FORGET, FLAT = 12, 0.1, 1e-6
# Energies are sums in the type of u, which differ by so many of its units from one order of adding
# to another.
ORDERS = 16
# A share of the temperatures is spread evenly, whatever a few chains say of where they are needed.
EVEN = 0.2


class State(NamedTuple):
    """Points u ``[K, N, D]`` with two log-densities ``[K, N]`` there, and their gradients.

    ``target`` is ln p(x, u), ``start`` ln q(u | x) or ln p(u).
    """

    u: Tensor
    target: Tensor
    start: Tensor
    target_slope: Tensor
    start_slope: Tensor

    def density(self, beta: Tensor) -> Tensor:
        r"""The log-density :math:`(1 - \beta) \ln q + \beta \ln p` on the way, unnormalized."""
        return (1 - beta) * self.start + beta * self.target

    def slope(self, beta: Tensor) -> Tensor:
        """Its gradient."""
        return torch.lerp(self.start_slope, self.target_slope, beta[:, None].to(self.u.dtype))

    @property
    def gain(self) -> Tensor:
        """ln p(x, u) − ln q(u | x): how much the log-density rises along the path."""
        return self.target - self.start


class GeometricPath:
    r"""What lies between the guide, or the prior, and the posterior of each datum.

    .. math:: f_\beta(u) = q(u \mid x)^{1 - \beta}\, p(x, u)^\beta
    """

    def __init__(self, coordinates: Coordinates, initial: str, max_rows: int) -> None:
        self.coordinates, self.pair = coordinates, coordinates.pair
        self.initial, self.max_rows = initial, max_rows

    def __call__(self, rows: tuple, u: Tensor) -> State:
        """Both densities and their gradients at u, for so many particles at once as fit."""
        parts = [self.at(rows, some) for some in u.split(self.chunk(rows))]
        return parts[0] if len(parts) == 1 else State(*map(torch.cat, zip(*parts, strict=True)))

    def at(self, rows: tuple, u: Tensor, *, fused: bool = False) -> State:
        """Both densities and their gradients at u, at once; ``fused`` by a compiler."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            points = self.coordinates.split(u)
            found = joint_density(self.pair, rows, len(u), points, unconstrained=True, fused=fused)
            start = found.prior
            if self.initial == "guide":
                start = guide_density(self.pair, rows, len(u), found.latents) + found.log_det
            densities = found.prior + found.likelihood, start
            slopes = [_slope(density, u) for density in densities]
        return State(u.detach(), *(density.detach() for density in densities), *slopes)

    def chunk(self, rows: tuple) -> int:
        """How many particles of these data are scored at once."""
        return max(1, self.max_rows // len(rows[0]))


def _slope(density: Tensor, u: Tensor) -> Tensor:
    if not density.requires_grad:
        return torch.zeros_like(u)
    return torch.autograd.grad(density.sum(), u, retain_graph=True, materialize_grads=True)[0]


class Chance(NamedTuple):
    """What a move draws: a momentum ``[K, N, D]``, and numbers in (0, 1) ``[K, N]``."""

    momentum: Tensor
    jitter: Tensor
    threshold: Tensor


Chains = tuple[State, Tensor]


class Moves:
    r"""Hamiltonian moves of chains, u with a momentum r, that leave a density on a path invariant.

    .. math:: r' = \alpha^L r + \sqrt{1 - \alpha^{2 L}}\, \xi, \quad \xi \sim \mathcal{N}(0, I),
              \qquad (u'', r'') = \mathrm{leapfrog}^L(u, r'), \qquad
              \Pr(\text{accept}) = \min\{1, e^{H(u, r') - H(u'', r'')}\}

    Chains that are refused stay at u and turn round, to −r'. As the momentum persists, a chain
    goes on in its direction from one temperature to the next.

    References:
        Horowitz (1991), A generalized guided Monte Carlo algorithm; Sohl-Dickstein and Culpepper
        (2012), Hamiltonian annealed importance sampling (arXiv 1205.1925); Neal (2011), MCMC using
        Hamiltonian dynamics (arXiv 1206.1901), sections 3 and 5.3.
    """

    def __init__(
        self, path: GeometricPath, num_steps: int, persistence: float = PERSISTENCE
    ) -> None:
        self.path, self.num_steps, self.kept = path, num_steps, persistence**num_steps
        self.graphs: dict[torch.Size, Hoisted] = {}

    def start(self, rows: tuple, u: Tensor) -> Chains:
        """Chains at u, with a momentum of their own."""
        return self.path(rows, u), torch.randn_like(u)

    def __call__(
        self,
        rows: tuple,
        chains: Chains,
        beta: Tensor,
        stride: Tensor,
        stream: Callable[[], AbstractContextManager] = nullcontext,
    ) -> tuple[Chains, Tensor]:
        """Where chains are after a move at β ``[N]``, and how probably it was accepted ``[K, N]``.

        The stride ``[N, D]`` is the step size, which each chain varies by up to a fifth. All that
        is drawn is drawn in the ``stream``.
        """
        state, momentum = chains
        # Drawn for all chains at once, so that no draw depends on how many are moved at once.
        with stream():
            chance = torch.randn_like(momentum), *(torch.rand_like(state.target) for _ in range(2))
        each = zip(
            *(tensor.split(self.path.chunk(rows)) for tensor in (*state, momentum, *chance)),
            strict=True,
        )
        found = [
            self.graphs.get(some[0].shape, self._eager)(beta, stride, *some, *rows) for some in each
        ]
        whole = (
            found[0] if len(found) == 1 else [torch.cat(part) for part in zip(*found, strict=True)]
        )
        return (State(*whole[:5]), whole[5]), whole[6]

    def compile(self, rows: tuple, *particles: int) -> bool:
        """Compile a whole move for these numbers of chains of data of these shapes, or warn.

        Says whether moves of several threads may go side by side, as they draw nothing else.
        """
        from pyrovae.compiling.graph import CaptureError, compare
        from pyrovae.compiling.hoist import Hoisted

        coordinates, like = self.path.coordinates, rows[0].new_zeros
        try:
            for count in {min(each, self.path.chunk(rows)) for each in particles}:
                u = like(count, len(rows[0]), sum(coordinates.sizes), dtype=coordinates.dtype)
                one = like(u.shape[:2], dtype=torch.float64)
                with seeded(0, u.device):
                    u, *more = [torch.rand_like(t) for t in (u, u, u, one, one, one)]
                # Short steps are taken, and so compared; rounding may decide whether one is.
                args = more[-1][0], 0.01 * u[0], *self.path.at(rows, u), *more[:-1]
                graph = Hoisted(self._fused, args, rows, self.path.pair)
                found, eager = graph(*args, *rows), self._eager(*args, *rows)
                energy = eager[1].abs() + eager[2].abs()
                # Sums are in float64, of numbers of the type of u; the last is a probability, exp
                # of a difference of energies.
                slacks: list[Any] = [0.0] * 6
                slacks.append(ORDERS * torch.finfo(u.dtype).eps * energy.nan_to_num())
                for each, other, slack in zip(found, eager, slacks, strict=True):
                    compare("a move", each.to(u.dtype), other.to(u.dtype), slack, share=0.1)
                self.graphs[u.shape] = graph
        except CaptureError as error:
            self.graphs.clear()
            warn(f"Annealing runs eagerly, not compiled: {error}.")
        return bool(self.graphs) and not any(graph.draws for graph in self.graphs.values())

    def _eager(self, *tensors: Tensor) -> list[Tensor]:
        with turn():
            return self._hop(self.path.at, *tensors)

    def _fused(self, *tensors: Tensor) -> list[Tensor]:
        return self._hop(partial(self.path.at, fused=True), *tensors)

    def _hop(
        self, at: Callable[..., State], beta: Tensor, stride: Tensor, *tensors: Tensor
    ) -> list[Tensor]:
        state, momentum = State(*tensors[:5]), tensors[5]
        chance, rows = Chance(*tensors[6:9]), tensors[9:]
        momentum = self.kept * momentum + (1 - self.kept**2) ** 0.5 * chance.momentum
        stride = (1 + JITTER * (2 * chance.jitter - 1))[..., None].to(stride.dtype) * stride
        moved, along, sound = state, momentum, torch.ones_like(state.target, dtype=torch.bool)
        for _ in range(self.num_steps):
            along = along + 0.5 * stride * moved.slope(beta)
            u = moved.u + stride * along
            sound = sound & u.isfinite().all(-1)
            moved = at(rows, torch.where(sound[..., None], u, state.u))
            along = along + 0.5 * stride * moved.slope(beta)
        gain = _energy(moved, along, beta) - _energy(state, momentum, beta)
        probability = torch.where(sound, gain, -torch.inf).nan_to_num(nan=-torch.inf).exp()
        accept = chance.threshold < probability
        after, before = (*moved, along), (*state, -momentum)
        masks = [accept[..., None] if each.dim() == 3 else accept for each in after]
        return [*map(torch.where, masks, after, before), probability.clamp(max=1)]


def _energy(state: State, momentum: Tensor, beta: Tensor) -> Tensor:
    """The log-density of u and r together, ``[K, N]``."""
    return state.density(beta) - 0.5 * momentum.double().square().sum(-1)


class Schedule(NamedTuple):
    """Temperatures of each datum, and the step sizes of moves at them.

    ``betas`` are β_1 < … < β_T ``[T, N]``; ``strides`` ``[P, N, D]`` are those at ``knots``
    ``[P]``, and between them by linear interpolation.
    """

    betas: Tensor
    knots: Tensor
    strides: Tensor

    def stride(self, index: int) -> Tensor:
        """Step sizes ``[N, D]`` at the temperatures of this number."""
        if len(self.knots) == 1:
            return self.strides[0]
        beta = self.betas[index]
        each = torch.arange(self.strides.shape[1], device=beta.device)
        after = torch.searchsorted(self.knots, beta).clamp(1, len(self.knots) - 1)
        low, high = self.knots[after - 1], self.knots[after]
        weight = ((beta - low) / (high - low)).clamp(0, 1)[:, None].to(self.strides.dtype)
        return torch.lerp(self.strides[after - 1, each], self.strides[after, each], weight)


def adapt(
    move: Callable[[Chains, Tensor, Tensor], tuple[Chains, Tensor]],
    chains: Chains,
    knots: Tensor,
    number: int,
    tick: Callable[[], Any],
) -> Schedule:
    r"""Find T temperatures and their step sizes by a run of its own at a few, the knots ``[P]``.

    .. math:: \epsilon_d = \epsilon \, \bigl(E[(\partial_d \ln f_\beta)^2]\bigr)^{-1/2}, \qquad
              \int_{\beta_t}^{\beta_{t+1}} \mathrm{sd}_{f_\beta}
              \Bigl[\ln \frac{p(x, u)}{q(u \mid x)}\Bigr] d\beta = \text{const}

    Temperatures are at equal distances in the length of the path, for each datum, which makes the
    log-weights vary least where chains forget as fast everywhere. A datum's ε is raised where its
    chains accept more than 85 % and lowered where less; the expectation, which for a normal
    density is the diagonal of its precision, is a running mean. What is found does not depend on
    the chains that use it, so that their estimate stays unbiased, and forward and backward chains
    use the same. A coordinate that the density ignores, as where a latent is masked, stays where
    it is.

    References:
        Gelman and Meng (1998), Simulating normalizing constants, section 4.3; Grosse, Maddison and
        Salakhutdinov (2013), Annealing between distributions by averaging moments.
    """
    state = chains[0]
    step = torch.full_like(state.target[0], state.u.shape[-1] ** -0.25)
    curvature: Tensor | None = None
    strides, spread = [], [_spread(state)]
    for index, knot in enumerate(knots):
        beta = knot.expand_as(step)
        for _ in range(1 + (WARM_UP if index == 0 else WARM_UP // len(knots))):
            seen = chains[0].slope(beta).square().mean(0)
            curvature = seen if curvature is None else torch.lerp(curvature, seen, FORGET)
            scale = torch.where(curvature > 0, curvature.clamp(min=FLAT).rsqrt(), 0.0)
            stride = step[:, None].to(scale.dtype) * scale
            chains, accepted = move(chains, beta, stride)
            step = (step * (RATE * (accepted.mean(0) - TARGET)).exp()).clamp(1e-6, 10.0)
        strides.append(stride)
        spread.append(_spread(chains[0]))
        tick()
    return Schedule(spaced(knots, torch.stack(spread), number), knots, torch.stack(strides))


def _spread(state: State) -> Tensor:
    """The standard deviation over chains of ln p − ln q, ``[N]``."""
    return state.gain.std(0).nan_to_num(0.0, 0.0, 0.0)


def spaced(knots: Tensor, spread: Tensor, number: int) -> Tensor:
    """T temperatures ``[T, N]`` between which the integral of the spread is the same.

    The spread ``[P + 1, N]`` is that at zero and at the knots ``[P]``.
    """
    at = torch.cat([knots.new_zeros(1), knots, knots.new_ones(1)])
    rough = torch.cat([spread, spread[-1:]])
    height = rough.clone()
    height[1:-1] = (rough[:-2] + 2 * rough[1:-1] + rough[2:]) / 4
    mean = height.mean(0)
    height = torch.where(mean > 0, height + EVEN * mean, 1.0)
    areas = at.diff()[:, None] * (height[1:] + height[:-1]) / 2
    length = torch.cat([torch.zeros_like(areas[:1]), areas.cumsum(0)]).T.contiguous()
    share = torch.arange(1, number + 1, dtype=at.dtype, device=at.device) / (number + 1)
    asked = share * length[:, -1:]
    after = torch.searchsorted(length, asked).clamp(1, len(at) - 1)
    low, high = length.gather(1, after - 1), length.gather(1, after)
    return torch.lerp(at[after - 1], at[after], (asked - low) / (high - low)).T.contiguous()


def anneal(
    move: Callable[[Chains, Tensor, Tensor], tuple[Chains, Tensor]],
    chains: Chains,
    schedule: Schedule,
    tick: Callable[[], Any],
    *,
    backward: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Anneal chains up the path, or down it, and sum the log-weights.

    .. math:: \ln w = \sum_{t=0}^{T} (\beta_{t+1} - \beta_t)\,
              \ln \frac{p(x, u_t)}{q(u_t \mid x)}, \qquad \beta_0 = 0, \quad \beta_{T+1} = 1

    where u_0 ~ q and u_t follows from u_{t-1} by a move at β_t; or, backward, u_T is a draw
    from the posterior and u_{t-1} follows from u_t. Forward the mean of w is p(x), backward that
    of 1/w is 1/p(x). Returns ln w ``[K, N]``, and the mean probability of acceptance ``[N]``.

    References:
        Neal (2001), Annealed importance sampling; Grosse et al. (arXiv 1511.02543), section 3.
    """
    betas = schedule.betas
    order, ends = (
        list(range(len(betas))),
        betas.new_tensor([[0.0], [1.0]]).expand(2, betas.shape[1]),
    )
    gaps = torch.cat([ends[:1], betas, ends[1:]]).diff(dim=0)
    accepted = torch.zeros_like(chains[0].target[0])
    if backward:
        order, gaps = order[::-1], gaps.flip(0)
    log_weight = gaps[0] * chains[0].gain
    for index, gap in zip(order, gaps[1:], strict=True):
        chains, probability = move(chains, betas[index], schedule.stride(index))
        log_weight = log_weight + gap * chains[0].gain
        accepted = accepted + probability.mean(0) / len(betas)
        tick()
    return log_weight, accepted
