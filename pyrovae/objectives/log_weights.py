r"""Log-weights ln p(x, z) − ln q(z|x) in the cells of a batch, and gradients through z alone.

.. math:: \frac{d}{d\phi} \ln q_\phi(z | x) = \partial_z \ln q \, \frac{dz}{d\phi}
          + \partial_\phi \ln q

The second part, the score, has expectation zero. It is the gradient at latents that are held still,
so it is taken off again, with a second run of the guide if its distributions depend on its latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyrovae._tools import InputError
from pyrovae.pairs.contract import cell_scale, check_scales
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import Layout, Site, log_probs, samples, scored


class Cells(NamedTuple):
    """Where the cells of a batch lie in a log-probability, and what multiplies them.

    A cell is one index of every plate that holds all sites: a datum, or a part of one that is
    independent of its other parts. Other plates are summed inside a log-sum-exp, cells outside.
    ``rank`` is the number of dimensions with that of the particles, which is the first; ``kept``
    are those of the cells, counted from the right; ``scale`` multiplies a cell's bound, a number
    or ``[*cells]``; ``inner`` is the part of it that subsampling within a datum makes up.
    """

    layout: Layout
    rank: int
    kept: frozenset[int]
    scale: Tensor | float
    inner: float

    def fold(self, log_prob: Tensor) -> Tensor:
        """Sum a site's log-probabilities to the cells, ``[K, *cells]`` with every dimension."""
        log_prob = log_prob.reshape((1,) * (self.rank - log_prob.dim()) + log_prob.shape)
        summed = [d for d in range(1, self.rank) if d - self.rank not in self.kept]
        return log_prob.sum(summed, keepdim=True) if summed else log_prob

    def by_datum(self, bound: Tensor) -> Tensor:
        """Sum a bound ``[*cells]`` to the data, ``[N]``, before the scales of training."""
        batch = self.rank - 1 + self.layout.dim
        others = [d for d in range(self.rank - 1) if d != batch]
        return (bound.sum(others) if others else bound) * self.inner

    def loss(self, bound: Tensor) -> Tensor:
        """Minus the sum over cells, each times its scale, in nats."""
        return -(bound * self.scale).sum()


def cells(traces: Iterable[Trace], layout: Layout) -> Cells:
    """Find the cells in the traces of a model and its guide."""
    every = [site for _, site in scored(*traces)]
    stacks = [{f.name: f for f in site["cond_indep_stack"] if f.vectorized} for site in every]
    common = [
        frame
        for name, frame in stacks[0].items()
        if frame.dim != layout.particle_dim and all(name in stack for stack in stacks)
    ]
    kept = frozenset(frame.dim for frame in common)
    inner = [f.full_size / f.size for f in common if f.full_size and f.name != layout.plate]
    scale = cell_scale(every[0]["scale"], layout, kept)
    return Cells(layout, -layout.particle_dim, kept, scale, prod(inner))


def check_cells(traces: Sequence[Trace], layout: Layout) -> None:
    """Refuse sites that do not share one scale, or lie in no datum, comparing values."""
    cells(traces, layout)
    for name, site in (item for trace in traces for item in samples(trace).items()):
        plates = [frame.name for frame in site["cond_indep_stack"]]
        if type(site["fn"]).__name__ == "Unit" and layout.plate not in plates:
            raise InputError(
                f"The factor {name!r} lies outside the plate {layout.plate!r}, so it belongs to no "
                f"datum: move it inside, or train with an ELBO."
            )
    check_scales(traces)


def drawn(trace: Trace) -> dict[str, Site]:
    """The latent sites of a guide's trace."""
    return {name: site for name, site in samples(trace).items() if not site["is_observed"]}


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

    def __init__(self, guide_trace: Trace) -> None:
        self.factor: Tensor | None = None
        self.trace = guide_trace.copy()
        for name, site in drawn(guide_trace).items():
            if site["value"].requires_grad:
                value = site["value"].view_as(site["value"])
                value.register_hook(self._multiplied(site["fn"].event_dim))
                self.trace.nodes[name] = site | {"value": value}

    def _multiplied(self, event_dim: int) -> Any:
        def hook(gradient: Tensor) -> Tensor:
            factor = self.factor
            if factor is None:
                raise RuntimeError("Through.factor has to be set before the backward pass.")
            batch = factor.shape[factor.dim() - gradient.dim() + event_dim :]
            return gradient * factor.reshape(batch + (1,) * event_dim)

        return hook


def held_still(
    pair: Pair, guide_trace: Trace, args: tuple, particles: int | None, hierarchical: bool
) -> dict[str, Tensor]:
    """The guide's log-probabilities at its own latents, which are held still, by site.

    A ``hierarchical`` guide, whose distributions depend on its own latents, is run again.
    """
    still = guide_trace.copy()
    for name, site in drawn(guide_trace).items():
        still.nodes[name] = site | {"value": site["value"].detach()}
    if hierarchical:
        with poutine.replay(trace=still):
            still = pair.trace_guide(*args, particles=particles)
    found = log_probs(still)
    return {name: found[name] for name in drawn(still)}


def is_hierarchical(pair: Pair, args: tuple) -> bool:
    """Whether some site of the guide has a distribution that depends on another's latent."""
    with torch.enable_grad(), Still(leaves=True):
        sites = drawn(pair.trace_guide(*args))
    leaves = [s["value"] for s in sites.values() if s["value"].requires_grad]
    with torch.enable_grad():
        for site in sites.values():
            log_prob = _log_prob(site, site["value"].detach())
            if leaves and log_prob.requires_grad:
                found = torch.autograd.grad(log_prob.sum(), leaves, allow_unused=True)
                if any(gradient is not None for gradient in found):
                    return True
    return False


def check_density(pair: Pair, args: tuple, hierarchical: bool) -> None:
    """Check that the guide's density can be evaluated at latents that it did not just draw."""
    dropouts = (m for m in pair.modules if isinstance(m, nn.modules.dropout._DropoutNd))
    if hierarchical and any(module.p > 0 for module in dropouts):
        raise InputError(
            "The guide's latents depend on each other, so it is run twice, and dropout would draw "
            "other noise each time: set p=0, or train with an objective that takes plain gradients."
        )
    for name, site in drawn(pair.trace_guide(*args)).items():
        first = _log_prob(site, site["value"])
        again = _log_prob(site, site["value"].detach().clone())
        if not torch.allclose(first, again, rtol=1e-2, atol=1e-2):
            raise InputError(
                f"ln q at site {name!r} changes by {(first - again).abs().max():.3g} nats when it "
                f"is evaluated again: the inverse of its flow is not exact. Train in float64, or "
                f"with an objective that takes plain gradients."
            )


def _log_prob(site: Site, value: Tensor) -> Tensor:
    try:
        return site["fn"].log_prob(value, *site["args"], **site["kwargs"])
    except (NotImplementedError, KeyError) as error:
        raise InputError(
            f"ln q at site {site['name']!r} is known at its own draws alone: its flow has no "
            f"inverse. Choose a flow that has one, or an objective that takes plain gradients."
        ) from error


def scored_latents(guide_trace: Trace) -> dict[str, str]:
    """The latents that need a score-function term, with the names of their families."""
    return {
        name: type(site["fn"]).__name__
        for name, site in drawn(guide_trace).items()
        if not is_identically_zero(site["fn"].score_parts(site["value"]).score_function)
    }
