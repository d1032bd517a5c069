"""log p(x) of sequences by particle filters, for latents that are a chain."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, Transform

from pyrovae._tools import InputError, at_least
from pyrovae._tools.seeding import seeded, subseed
from pyrovae.data.given import takes_data
from pyrovae.distributions import MarkovNormal
from pyrovae.evidence import PROBE_STREAM
from pyrovae.evidence.pareto import systematic
from pyrovae.evidence.result import LogLikelihood
from pyrovae.evidence.tiles import Evaluation
from pyrovae.evidence.weights import Sums, curve_points
from pyrovae.pairs.pair import Pair

# Particles are drawn anew where fewer than this share of them count.
ENOUGH = 0.5
# (Particle, sequence) pairs of one step; further filters come after, with a stream of their own.
AT_ONCE = 65_536
CHAINS = (
    "A filter goes along one latent that is a chain, pyrovae.distributions.MarkovNormal, in both "
    "programs (pyrovae.log_likelihood takes any)"
)


@takes_data
def filtered_log_likelihood(
    model: Callable,
    guide: Callable,
    x: Tensor,
    *context: Tensor,
    num_filters: int = 100,
    num_particles: int = 64,
    seed: int | None = None,
    progress: bool = False,
) -> LogLikelihood:
    r"""Estimate log p(x) of each sequence by particle filters that propose as its guide does.

    .. math:: \ln \hat p(x) = \ln \frac1F \sum_{f=1}^F \prod_{t=1}^T \sum_{p=1}^P W_{t-1}^{f,p}
              \frac{p(z_t^{f,p} \mid z_{t-1}^{f,p})\, p(x_t \mid z_t^{f,p})}
              {q(z_t^{f,p} \mid z_{t-1}^{f,p}, x)}

    W are the particles' weights, of sum one. Where fewer than half of the P particles count, they
    are drawn anew by their weights, so that the error grows with the length of a sequence, and not
    exponentially as that of importance sampling may; a guide close to the posterior needs none of
    this. Each filter's estimate has mean p(x), and F of them have a standard error.

    Args:
        model: The model program: its one latent is a :class:`~pyrovae.distributions.MarkovNormal`,
            and x_t depends on z_t alone.
        guide: The guide program, whose latent is such a chain too.
        x: Sequences ``[N, T, ...]``; ``context`` are further arguments of both programs, those
            ``[N, T, ...]`` step by step.
        num_filters: The number of filters F of each sequence.
        num_particles: The number of particles P of a filter.
        seed: Seeds the draws; None draws a seed from torch's global stream.
        progress: Show a bar with an estimate of the time left.

    Returns:
        As :func:`pyrovae.log_likelihood`, with filters for samples.

    Raises:
        ValueError: If a number is not positive, the pair breaks the contract, or its latents are
            no such chain.

    References:
        Gordon, Salmond and Smith (1993), Novel approach to nonlinear/non-Gaussian Bayesian state
        estimation; Maddison et al., Filtering Variational Objectives (arXiv 1705.09279).
    """
    at_least({"num_filters": 1, "num_particles": 1}, num_filters, num_particles)
    points = curve_points(num_filters)
    task = Evaluation(model, guide, (x, *context), seed)
    with task.opened():
        for index, rows in task.tiles(num_filters, progress):
            sums, stream = Sums(num_filters, points, rows[0]), subseed(task.seed, index)
            with seeded(stream, task.device, 0, PROBE_STREAM):
                chains = _Filter(task.pair, rows)
            together = min(max(1, AT_ONCE // (num_particles * len(rows[0]))), num_filters)
            for first in range(0, num_filters, together):
                filters = min(together, num_filters - first)
                with seeded(stream, task.device, first):
                    found = chains.estimates(filters, num_particles)
                if bool(found.isnan().any()):
                    raise InputError("A particle's weight is NaN: pyrovae.check says which site's.")
                sums.add(found)
                task.tick(filters)
            task.keep(index, sums.result())
        return task.estimate(points, f"particle filters of {num_particles} particles", 0.0)


class _Chain(NamedTuple):
    """A program's chain, what bends each of its steps, and which steps count ``[N, T]``."""

    steps: MarkovNormal
    bends: tuple[Transform, ...]
    counted: Tensor

    @classmethod
    def within(cls, fn: Any, x: Tensor) -> _Chain:
        """The chain in a latent's distribution."""
        bends, counted = (), x.new_ones(x.shape[:2], dtype=torch.bool)
        while not isinstance(fn, MarkovNormal):
            if isinstance(fn, dist.MaskedDistribution):
                counted = counted & fn._mask
            elif isinstance(fn, dist.TransformedDistribution):
                bends = (*fn.transforms, *bends)
            elif not isinstance(fn, Independent):
                raise InputError(f"{CHAINS}, got {type(fn).__name__}.")
            fn = fn.base_dist
        return cls(fn, bends, counted)

    def given(self, before: Tensor, t: int) -> Normal:
        """The distribution of step t given the one before ``[P, N, L]``."""
        parts = (part[..., t, :] for part in self.steps.given)
        loc, scale = self.steps.network(before, *parts)
        return Normal(loc, scale, validate_args=False)


class _Filter:
    """Filters a tile of sequences with the guide's steps for proposals."""

    def __init__(self, pair: Pair, rows: tuple) -> None:
        self.pair, self.rows, latents = pair, rows, pair.known.latents
        if len(latents) != 1:
            raise InputError(f"{CHAINS}, got latents {list(latents)}.")
        (self.name,) = latents
        guide = pair.trace_guide(*rows)
        model = pair.replay_model(guide, *rows)
        self.guide, self.model = (
            _Chain.within(trace.nodes[self.name]["fn"], rows[0]) for trace in (guide, model)
        )
        if self.model.bends:
            raise InputError(f"{CHAINS}; the model's is transformed.")
        self.require_steps()

    def require_steps(self) -> None:
        """Refuse a model in which x_t depends on more than z_t: its steps score otherwise."""
        values, _ = self.pair.draw(self.rows, 1)
        whole = self._observed(self.rows, 1, values)
        steps = values[self.name].unbind(-2)
        parts = torch.stack([self.likelihood(z, t) for t, z in enumerate(steps)]).sum(0)
        if not torch.allclose(whole, parts, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise InputError(
                f"Expected x_t to depend on z_t alone, got {whole[0, 0]:.4g} nats for a sequence "
                f"as a whole and {parts[0, 0]:.4g} step by step: use pyrovae.log_likelihood."
            )

    def likelihood(self, z: Tensor, t: int) -> Tensor:
        """ln p(x_t | z_t) ``[P, N]`` of ``[P, N, L]``."""
        shape = self.rows[0].shape[:2]
        rows = tuple(r[:, t : t + 1] if r.shape[:2] == shape else r for r in self.rows)
        return self._observed(rows, len(z), {self.name: z.unsqueeze(-2)})

    def _observed(self, rows: tuple, particles: int, values: dict[str, Tensor]) -> Tensor:
        scores, _ = self.pair.score_model(rows, particles, values)
        return torch.stack([scores[name] for name in self.pair.known.observed]).sum(0)

    def estimates(self, filters: int, particles: int) -> Tensor:
        """Each filter's ln p(x) ``[F, N]``, of mean p(x)."""
        n, steps = self.rows[0].shape[:2]
        starts = (c.steps.start for c in (self.guide, self.model))
        u, z = (start.expand(filters * particles, n, -1) for start in starts)
        log_weight = z.new_zeros(filters, particles, n, dtype=torch.float64)
        found = log_weight.new_zeros(filters, n)
        places = torch.arange(max(filters, particles), device=z.device)
        for t in range(steps):
            prior, proposal = self.model.given(z, t), self.guide.given(u, t)
            z = u = proposal.sample()
            log_q = proposal.log_prob(u).sum(-1)
            for bend in self.guide.bends:
                bent = bend(z)
                log_q, z = log_q - bend.log_abs_det_jacobian(z, bent), bent
            # A product with the mask would be NaN where a step that does not count is impossible.
            log_p = prior.log_prob(z).sum(-1).where(self.model.counted[:, t], 0.0)
            gain = log_p + self.likelihood(z, t) - log_q.where(self.guide.counted[:, t], 0.0)
            log_weight = log_weight + gain.unflatten(0, (filters, particles))
            weight = log_weight.softmax(1)
            few = weight.square().sum(1, keepdim=True) * particles > 1 / ENOUGH
            found = found + torch.where(few, _log_mean(log_weight), 0.0)[:, 0]
            log_weight = log_weight.where(~few, 0.0)
            kept = torch.where(
                few,
                systematic(weight.transpose(0, 1), particles).transpose(0, 1),
                places[:particles, None],
            )
            kept = kept + particles * places[:filters, None, None]
            kept = kept.flatten(0, 1)[..., None]
            u, z = (each.gather(0, kept.expand_as(each)) for each in (u, z))
        return found + _log_mean(log_weight)[:, 0]


def _log_mean(log_weight: Tensor) -> Tensor:
    return log_weight.logsumexp(1, keepdim=True) - math.log(log_weight.shape[1])
