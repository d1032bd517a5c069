"""Hamiltonian transitions along a path of densities, with a step size for each datum."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from pyrovae.evidence.unconstrained import GeometricPath, State

__all__ = ["adapt", "anneal", "transition"]

TARGET, RATE, JITTER = 0.7, 0.3, 0.2
WARM_UP, FORGET, FLAT, KEPT = 12, 0.1, 1e-6, 200


def transition(
    path: GeometricPath,
    rows: tuple,
    state: State,
    beta: float,
    stride: Tensor,
    num_steps: int,
) -> tuple[State, Tensor]:
    r"""One Hamiltonian move that leaves the density at β invariant.

    .. math:: r \sim \mathcal{N}(0, I), \qquad
              (u', r') = \mathrm{leapfrog}^L(u, r), \qquad
              \Pr(\text{accept}) = \min\{1, e^{H(u, r) - H(u', r')}\}

    Args:
        path: The densities.
        rows: The data.
        state: Where the chains are.
        beta: Where on the path.
        stride: The step size in each coordinate of each datum, ``[N, D]``; each chain varies it
            by up to a fifth.
        num_steps: The number L of leapfrog steps.

    Returns:
        Where the chains are then, and the probabilities of acceptance ``[K, N]``.

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
    return moved.where(uniform < probability, state), probability


def adapt(
    path: GeometricPath,
    rows: tuple,
    state: State,
    betas: list[float],
    num_steps: int,
    tick: Callable[[], None],
) -> list[Tensor]:
    r"""Step sizes for each temperature, datum and coordinate, found by a run of its own.

    .. math:: \epsilon_d = \epsilon \, \bigl(E[(\partial_d \ln f_\beta)^2]\bigr)^{-1/2}

    The run goes up the path as the one that it is for. A datum's ε is raised where its chains
    accept more than 70 % and lowered where less; the expectation, which for a normal density is
    the diagonal of its precision, is a running mean. What it finds does not depend on the chains
    that use it, so their estimate stays unbiased.

    Args:
        path: The densities.
        rows: The data.
        state: Where the chains start.
        betas: The temperatures, in rising order.
        num_steps: The number of leapfrog steps.
        tick: Called after each temperature.

    Returns:
        ``[N, D]`` for each temperature.
    """
    step = torch.full_like(state.target[0], state.u.shape[-1] ** -0.25)
    curvature, found, kept = None, [], -(-len(betas) // KEPT)
    for index, beta in enumerate(betas):
        for _ in range(1 + (WARM_UP if index == 0 else WARM_UP // len(betas))):
            seen = state.slope(beta).square().mean(0)
            curvature = seen if curvature is None else torch.lerp(curvature, seen, FORGET)
            scale = curvature.clamp(min=FLAT).rsqrt()
            stride = step[:, None].to(scale.dtype) * scale
            state, accepted = transition(path, rows, state, beta, stride, num_steps)
            step = (step * (RATE * (accepted.mean(0) - TARGET)).exp()).clamp(1e-6, 10.0)
        found.append(found[-1] if index % kept else stride)
        tick()
    return found


def anneal(
    path: GeometricPath,
    rows: tuple,
    state: State,
    betas: list[float],
    strides: list[Tensor],
    num_steps: int,
    tick: Callable[[], None],
    *,
    backward: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Anneal chains up the path, or down it, and sum the log-weights.

    .. math:: \ln w = \sum_{t=0}^{T} (\beta_{t+1} - \beta_t)\,
              \ln \frac{p(x, u_t)}{q(u_t \mid x)}, \qquad \beta_0 = 0, \quad \beta_{T+1} = 1

    where u_0 ~ q and u_t follows from u_{t-1} by a transition at β_t; or, backward, u_T is a draw
    from the posterior and u_{t-1} follows from u_t. Forward the mean of w is p(x), backward that
    of 1/w is 1/p(x).

    Args:
        path: The densities.
        rows: The data.
        state: Where the chains start.
        betas: β_1, …, β_T, in rising order.
        strides: Step sizes ``[N, D]`` for each of them.
        num_steps: The number of leapfrog steps.
        tick: Called after each temperature.
        backward: Go down the path.

    Returns:
        ln w, ``[K, N]``, and the mean probability of acceptance, ``[N]``.

    References:
        Neal (2001), Annealed importance sampling; Grosse et al. (arXiv 1511.02543), section 3.
    """
    knots = [0.0, *betas, 1.0]
    order = range(len(betas))
    gaps = [after - before for before, after in pairwise(knots)]
    accepted = torch.zeros_like(state.target[0])
    if backward:
        order, gaps = reversed(order), gaps[::-1]
    log_weight = gaps[0] * (state.target - state.start)
    for index, gap in zip(order, gaps[1:], strict=True):
        at = betas[index], strides[index], num_steps
        state, probability = transition(path, rows, state, *at)
        log_weight = log_weight + gap * (state.target - state.start)
        accepted = accepted + probability.mean(0) / len(betas)
        tick()
    return log_weight, accepted
