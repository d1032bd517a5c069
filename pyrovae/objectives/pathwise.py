r"""The part of a gradient that reaches the guide through its latents alone.

With :math:`z = g_\phi(\varepsilon)` and any function f,

.. math:: \frac{d}{d\phi} f(z, \phi) = \partial_z f \, \frac{dz}{d\phi} + \partial_\phi f

For :math:`f = \ln q_\phi(z | x)` the second part, the score, has expectation zero. It is the
gradient of ln q at latents that are held still, so it is taken off again: with the same
distributions, or with a second run of the guide if its distributions depend on its own latents.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from pyrovae._tools import InputError
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import log_probs, samples

__all__ = ["Still", "Through", "check_density", "held_still", "is_hierarchical", "scored_latents"]


class Still(Messenger):
    """Holds every value that a program samples still: no gradient passes through it.

    Args:
        leaves: Let each be a leaf of its own, whose gradient may be asked for.
    """

    def __init__(self, leaves: bool = False) -> None:
        super().__init__()
        self.leaves = leaves

    def _pyro_post_sample(self, msg: dict) -> None:
        if not msg["is_observed"] and isinstance(msg["value"], Tensor):
            value = msg["value"].detach()
            floating = value.is_floating_point()
            msg["value"] = value.requires_grad_() if self.leaves and floating else value


class Through:
    """A guide's trace as the model sees it, where gradients that come back are multiplied.

    Args:
        guide_trace: The guide's trace, subsampling sites included.

    ``trace`` holds views of the latents. Set ``factor``, ``[K, *cells]``, before the backward pass.
    """

    def __init__(self, guide_trace: Trace) -> None:
        self.factor: Tensor | None = None
        self.trace = guide_trace.copy()
        for name, site in samples(guide_trace).items():
            value = site["value"]
            if not site["is_observed"] and value.requires_grad:
                value = value.view_as(value)
                value.register_hook(self._multiplied(site["fn"].event_dim))
            self.trace.nodes[name] = site | {"value": value}

    def _multiplied(self, event_dim: int) -> Any:
        def hook(gradient: Tensor) -> Tensor:
            batch = self.factor.shape[self.factor.dim() - gradient.dim() + event_dim :]
            return gradient * self.factor.reshape(batch + (1,) * event_dim)

        return hook


def held_still(
    pair: Pair,
    guide_trace: Trace,
    args: tuple,
    particles: int | None,
    hierarchical: bool,
) -> dict[str, Tensor]:
    """The guide's log-probabilities at its own latents, which are held still, by site.

    Args:
        pair: The pair.
        guide_trace: The guide's trace, subsampling sites included.
        args: What it was run on.
        particles: The size of its plate of particles, or None.
        hierarchical: Whether the guide's distributions depend on its latents.
    """
    still = guide_trace.copy()
    for name, site in samples(guide_trace).items():
        if not site["is_observed"]:
            still.nodes[name] = site | {"value": site["value"].detach()}
    if hierarchical:
        with poutine.replay(trace=still):
            still = pair.trace_guide(*args, particles=particles)
    latents = {name for name, site in samples(still).items() if not site["is_observed"]}
    return {n: log_prob for n, log_prob in log_probs(still).items() if n in latents}


def is_hierarchical(pair: Pair, args: tuple) -> bool:
    """Whether some site of the guide has a distribution that depends on another's latent."""
    with torch.enable_grad(), Still(leaves=True):
        trace = prune_subsample_sites(pair.trace_guide(*args))
    sites = {n: s for n, s in samples(trace).items() if not s["is_observed"]}
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
    """Check that the guide's density can be evaluated at latents that it did not just draw.

    Raises:
        ValueError: If a flow has no inverse or an inexact one, or noise of the guide's networks
            would be drawn anew in a second run.
    """
    noisy = (module for module in pair.modules if _is_noise(module))
    if hierarchical and next(noisy, None) is not None:
        raise InputError(
            "The guide's latents depend on each other, so it is run twice, and dropout would draw "
            "other noise each time: set p=0, or train with an objective that takes plain gradients."
        )
    trace = prune_subsample_sites(pair.trace_guide(*args))
    for name, site in samples(trace).items():
        if site["is_observed"]:
            continue
        drawn = _log_prob(site, site["value"])
        again = _log_prob(site, site["value"].detach().clone())
        if not torch.allclose(drawn, again, rtol=1e-2, atol=1e-2):
            raise InputError(
                f"ln q at site {name!r} changes by {(drawn - again).abs().max():.3g} nats when it "
                f"is evaluated again: the inverse of its flow is not exact. Train in float64, or "
                f"with an objective that takes plain gradients."
            )


def _log_prob(site: dict, value: Tensor) -> Tensor:
    try:
        return site["fn"].log_prob(value, *site["args"], **site["kwargs"])
    except (NotImplementedError, KeyError) as error:
        raise InputError(
            f"ln q at site {site['name']!r} is known at its own draws alone: its flow has no "
            f"inverse. Choose a flow that has one, or an objective that takes plain gradients."
        ) from error


def _is_noise(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0


def scored_latents(pair: Pair, args: tuple) -> dict[str, str]:
    """The guide's latents that need a score-function term, with the names of their families."""
    trace = prune_subsample_sites(pair.trace_guide(*args))
    return {
        name: type(site["fn"]).__name__
        for name, site in samples(trace).items()
        if not site["is_observed"]
        and not is_identically_zero(site["fn"].score_parts(site["value"]).score_function)
    }
