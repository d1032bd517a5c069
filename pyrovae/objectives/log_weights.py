r"""Log-weights ln p(x, z) − ln q(z|x) in the cells of a batch, and gradients through z alone.

.. math:: \frac{d}{d\phi} \ln q_\phi(z | x) = \partial_z \ln q \, \frac{dz}{d\phi}
          + \partial_\phi \ln q

The second part, the score, has expectation zero. It is the gradient at latents that are held still,
so it is taken off again, with a second run of the guide if its distributions depend on its latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrovae._tools import InputError
from pyrovae._tools.seeding import seeded, undone
from pyrovae.objectives.elbo import total
from pyrovae.pairs.contract import cell_scale, check_factors, check_scales, plates, subsampling
from pyrovae.pairs.pair import Given, Pair
from pyrovae.pairs.traces import (
    Layout,
    Site,
    drawn,
    log_probs,
    scored,
    sum_plates,
)

MODEL_AGAIN = (
    "With backward=R the model runs twice in a step, on all samples and on R of them, and ln p of "
    "the same samples differs by {:.3g} nats: leave out its dropout, batch normalization or noise "
    "of its own, or backward."
)
GUIDE_AGAIN = (
    "The guide's latents depend on each other, so it is run twice, and ln q of the same samples "
    "differs by {:.3g} nats then, as with dropout, noise of its own, or batch normalization over "
    "samples: leave that out, or train with an objective that takes plain gradients."
)


class Cells(NamedTuple):
    """Where the cells of a batch lie in a log-probability, and what multiplies them.

    A cell is one index of every plate that holds all sites: a datum, or a part of one that is
    independent of its other parts. Other plates are summed inside a log-sum-exp, cells outside.
    ``kept`` are the dimensions of the cells, counted from the right; ``scale`` multiplies a cell's
    bound, a number or ``[*cells]``; ``inner`` is the part of it that subsampling within a datum
    makes up.
    """

    layout: Layout
    kept: frozenset[int]
    scale: Tensor | float
    inner: float

    def fold(self, log_prob: Tensor) -> Tensor:
        """Sum a site's log-probabilities to the cells, ``[K, *cells]`` with every dimension."""
        return sum_plates(log_prob, self.layout, self.kept)

    def by_datum(self, bound: Tensor) -> Tensor:
        """Sum a bound ``[*cells]`` to the data, ``[N]``, before the scales of training."""
        others = [d for d in range(-bound.dim(), 0) if d != self.layout.dim]
        return (bound.sum(others) if others else bound) * self.inner

    def log_p(self, pair: Pair, seen: Trace, args: tuple, particles: int | None) -> Tensor:
        """ln p(x, z) of the model run on a guide's latents, ``[K, *cells]``."""
        trace = pair.replay_model(seen, *args, particles=particles, sums=True)
        return total(self.fold(log_prob) for log_prob in log_probs(trace).values())

    def loss(self, bound: Tensor) -> Tensor:
        """Minus the sum over cells, each times its scale, in nats."""
        return -(bound * self.scale).sum()


def cells(traces: Iterable[Trace], layout: Layout) -> Cells:
    """Find the cells in the traces of a model and its guide."""
    every = [site for _, site in scored(*traces)]
    first, *others = [plates(site) for site in every]
    common = [f for name, f in first.items() if all(name in stack for stack in others)]
    kept = frozenset(f.dim for f in common if f.dim != layout.particle_dim)
    inner = prod(subsampling(f) for f in common if f.name != layout.plate)
    return Cells(layout, kept, cell_scale(every[0]["scale"], layout, kept), inner)


class Scores(NamedTuple):
    """What a batch's particles score, by site, ``[T, *cells]`` each, in nats."""

    where: Cells
    model: dict[str, Tensor]
    guide: dict[str, Tensor]

    @property
    def log_p(self) -> Tensor:
        """ln p(x, z)."""
        return total(self.model.values())

    @property
    def log_weights(self) -> Tensor:
        """ln p(x, z) − ln q(z | x)."""
        return self.log_p - total(self.guide.values())

    def paths(self, still: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """ln q of the latents less what it is at ``still`` ones, and ln q of the other sites."""
        path = total(self.guide[name] - self.where.fold(still[name]) for name in still)
        others = [log_q for name, log_q in self.guide.items() if name not in still]
        return path, total(others) if others else torch.zeros_like(path)

    @property
    def terms(self) -> dict[str, Tensor]:
        """The ELBO at β = 1 by site, scaled and summed over the batch."""
        found = dict(self.model)
        for name, log_q in self.guide.items():
            found[name] = found[name] - log_q if name in found else -log_q
        return {n: -self.where.loss(term.detach().mean(0)) for n, term in found.items()}


class Few(NamedTuple):
    """Some of the samples of each cell: whether the r-th is the k-th, ``[R, T, *cells]``."""

    chosen: Tensor

    @classmethod
    def in_proportion(cls, weights: Tensor, number: int) -> Few:
        """Draw from weights ``[T, *cells]``, one in each of as many equal parts of their sum."""
        edges, rank = weights.cumsum(0), weights.dim()
        parts = torch.arange(number, device=weights.device).reshape(-1, *(1,) * (rank - 1))
        at = (parts + torch.rand_like(weights[:1].expand(number, *weights.shape[1:]))) / number
        index = (edges <= (at * edges[-1]).unsqueeze(1)).sum(1, keepdim=True)
        every = torch.arange(len(weights), device=weights.device).reshape(-1, *(1,) * (rank - 1))
        return cls(index.clamp(max=len(weights) - 1) == every)

    def of(self, each: Tensor, event_dim: int = 0) -> Tensor:
        """What the chosen have of ``each`` sample's, ``[R, ..., *event]`` of ``[T, ..., *event]``.

        The gradient is a sum, which adds up in the same order on every device, unlike a scatter.
        """
        missing = self.chosen.dim() - 1 + event_dim - each.dim()
        each = each.reshape(*(1,) * missing, *each.shape)
        chosen = self.chosen.reshape(*self.chosen.shape, *(1,) * event_dim)
        return torch.where(chosen, each, torch.zeros_like(each)).sum(1)

    def guide(self, found: Scores) -> Scores:
        """What the chosen score in the guide alone, whose gradient stays."""
        return Scores(found.where, {}, {name: self.of(v) for name, v in found.guide.items()})

    def trace(self, pair: Pair, trace: Trace) -> Trace:
        """A guide's trace with the chosen latents."""
        few = with_values(trace, lambda site: self.of(site["value"], site["fn"].event_dim))
        plate: Site = few.nodes.get(pair.known.plate)
        if pair.folds and plate is not None:
            # Its rows are those of every sample in turn.
            rows = plate["value"].unflatten(0, (self.chosen.shape[1], -1))
            few.nodes[pair.known.plate] = plate | {"value": rows[: len(self.chosen)].flatten()}
        return few


def weigh(
    pair: Pair,
    guide_trace: Trace,
    args: tuple,
    particles: int | None,
    seen: Trace | None = None,
    *,
    forward: bool = False,
) -> Scores:
    """Score a guide's particles and the model on them, or on what it has ``seen`` of them.

    With ``forward`` the model has no gradient.
    """
    # Before the model runs: gradients add up in the order of the graph, another rounds otherwise.
    log_q = log_probs(guide_trace)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not forward):
        model_trace = pair.replay_model(seen or guide_trace, *args, particles=particles, sums=True)
        log_p = log_probs(model_trace)
    where = cells((model_trace, guide_trace), pair.known)
    model, guide = ({n: where.fold(v) for n, v in each.items()} for each in (log_p, log_q))
    return Scores(where, model, guide)


def check_cells(traces: Sequence[Trace], layout: Layout) -> None:
    """Refuse sites that do not share one scale, or lie in no datum, comparing values."""
    cells(traces, layout)
    check_factors(layout)
    check_scales(traces)


def with_values(trace: Trace, value: Callable[[Site], Tensor]) -> Trace:
    """The same trace with another value at every site that was drawn."""
    changed = trace.copy()
    for name, site in drawn(trace).items():
        changed.nodes[name] = site | {"value": value(site)}
    return changed


class Still(Messenger):
    """Holds sampled values still: no gradient passes through; or makes ``leaves`` of them."""

    def __init__(self, leaves: bool = False) -> None:
        super().__init__()
        self.leaves = leaves

    def _pyro_post_sample(self, msg: dict) -> None:
        if not msg["is_observed"] and isinstance(msg["value"], Tensor):
            value = msg["value"].detach()
            floating = value.is_floating_point()
            msg["value"] = value.requires_grad_() if self.leaves and floating else value


class Through:
    """A ``trace`` for the model to see, whose latents multiply gradients by ``factor``.

    It is ``[K, *cells]``, and set before the backward pass.
    """

    factor: Tensor

    def __init__(self, guide_trace: Trace) -> None:
        self.trace = with_values(guide_trace, self._hooked)

    def _hooked(self, site: Site) -> Tensor:
        value = site["value"].view_as(site["value"])
        if value.requires_grad:
            value.register_hook(partial(self._multiplied, event_dim=site["fn"].event_dim))
        return value

    def _multiplied(self, gradient: Tensor, event_dim: int) -> Tensor:
        batch = self.factor.shape[self.factor.dim() - gradient.dim() + event_dim :]
        return gradient * self.factor.reshape(batch + (1,) * event_dim)


def held_still(
    pair: Pair, guide_trace: Trace, args: tuple, particles: int | None, hierarchical: bool
) -> dict[str, Tensor]:
    """The guide's log-probabilities at its own latents, which are held still, by site.

    A ``hierarchical`` guide, whose distributions depend on its own latents, is run again.
    """
    still = with_values(guide_trace, lambda site: site["value"].detach())
    if hierarchical:
        given = Given({name: site["value"] for name, site in drawn(still).items()})
        still = pair.trace_given(pair.run_guide, args, particles, given)
    found = log_probs(still)
    return {name: found[name] for name in drawn(still)}


def is_hierarchical(pair: Pair, args: tuple) -> bool:
    """Whether some site of the guide has a distribution that depends on another's latent."""
    with torch.enable_grad(), Still(leaves=True):
        sites = drawn(pair.trace_guide(*args)).values()
        leaves = [site["value"] for site in sites if site["value"].requires_grad]
        log_q = total(_log_prob(site, site["value"].detach()).sum() for site in sites)
    if not leaves or not log_q.requires_grad:
        return False
    return any(g is not None for g in torch.autograd.grad(log_q, leaves, allow_unused=True))


def check_density(pair: Pair, args: tuple) -> None:
    """Check that the guide's density can be evaluated at latents that it did not just draw."""
    for name, site in drawn(pair.trace_guide(*args)).items():
        first = _log_prob(site, site["value"])
        again = _log_prob(site, site["value"].detach().clone())
        if not torch.allclose(first, again, rtol=1e-2, atol=1e-2):
            raise InputError(
                f"ln q at site {name!r} changes by {(first - again).abs().max():.3g} nats when it "
                f"is evaluated again: the inverse of its flow is not exact. Train in float64, or "
                f"with an objective that takes plain gradients."
            )


def check_few(
    pair: Pair, args: tuple, particles: int | None, number: int | None, twice: bool
) -> None:
    """Check that some samples score what they do among all, in training mode.

    ``number`` of them are what the model is run again on, None that it is not; ``twice`` says
    that the guide is.
    """
    if len(args[0]) == 1:
        # Batch normalization takes no single row in training.
        args = tuple(torch.cat([each, each]) for each in args)
    again = partial(undone, pair.modules, args[0].device)
    with pair.mode(training=True), torch.no_grad():
        with again():
            guide_trace = pair.trace_guide(*args, particles=particles)
            found = weigh(pair, guide_trace, args, particles)
        seen, size, few = guide_trace, particles, None
        if particles is not None:
            size = number or 1
            few = Few.in_proportion(torch.ones_like(found.log_p), size)
            seen = few.trace(pair, guide_trace)
        pick = few.of if few else (lambda each: each)
        if number is not None:
            with again(), seeded(1, args[0].device):
                log_p = found.where.log_p(pair, seen, args, size)
            _check_same(pick(found.log_p), log_p, MODEL_AGAIN)
        if twice:
            with again(), seeded(2, args[0].device):
                still = held_still(pair, seen, args, size, twice)
            for name, log_q in still.items():
                _check_same(pick(found.guide[name]), found.where.fold(log_q), GUIDE_AGAIN)


def _check_same(first: Tensor, other: Tensor, about: str) -> None:
    if not torch.allclose(first, other, rtol=1e-3, atol=1e-2, equal_nan=True):
        raise InputError(about.format((first - other).abs().max()))


def _log_prob(site: Site, value: Tensor) -> Tensor:
    try:
        return site["fn"].log_prob(value, *site["args"], **site["kwargs"])
    except (NotImplementedError, KeyError) as error:
        raise InputError(
            f"ln q at site {site['name']!r} is known at its own draws alone: its flow has no "
            f"inverse. Choose a flow that has one, or an objective that takes plain gradients."
        ) from error
