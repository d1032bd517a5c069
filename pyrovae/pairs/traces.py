"""Read a trace: its sample sites, their scores ``[K, N]`` and their scales."""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.nn.functional import softplus

from pyrovae.pairs.bernoulli import Bits
from pyrovae.pairs.support import within_bounds

Site = Any  # one of Pyro's messages: its TypedDict is wider than what a sample site holds
Values = dict[str, Tensor]
BERNOULLI = (dist.Bernoulli, torch.distributions.Bernoulli)


class Layout(NamedTuple):
    """Which sites a pair has, and where the batch lies in their log-probabilities.

    ``dim`` is the batch's dimension and ``particle_dim`` the one left of every plate, both
    counted from the right; ``plate`` is the name of the plate over the batch. ``scaled`` says
    whether some site carries a scale beside that of the plate, ``plate_scale``. ``latents`` are
    those that both programs sample, ``enumerated`` those that the model alone has and sums over.
    ``adrift`` are factors outside of the plate, which no datum has, ``partial`` the plates that
    subsample within a datum; ``masked`` are latents with a mask, ``bounded`` those with a support.
    ``auxiliary`` are sites of the guide that are no latents, ``points`` those of it that are put on
    a point, without a density.
    """

    plate: str
    dim: int
    particle_dim: int
    latents: tuple[str, ...]
    observed: tuple[str, ...]
    plate_scale: float = 1.0
    scaled: bool = False
    enumerated: tuple[str, ...] = ()
    adrift: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()
    masked: tuple[str, ...] = ()
    bounded: tuple[str, ...] = ()
    auxiliary: tuple[str, ...] = ()
    points: tuple[str, ...] = ()


def without_factors(trace: Trace) -> Trace:
    """A guide's trace without what :func:`pyro.factor` adds, which is no density and not of q."""
    found = trace.copy()
    for name in [name for name, site in samples(trace).items() if is_factor(site)]:
        found.remove_node(name)
    return found


def site_scores(
    trace: Trace, layout: Layout, particles: int | None, num_data: int, *, fused: bool = False
) -> Values:
    """Each site's log-probability ``[K, N]``, masked and not scaled; -inf outside of a support."""
    found = log_probs(trace, fused=fused)
    if layout.bounded:
        found = within_bounds(found, samples(trace), layout.bounded)
    return {name: reduce_to(each, layout, particles, num_data) for name, each in found.items()}


def log_probs(trace: Trace, *, fused: bool = False) -> Values:
    """Each sample site's log-probability with its plates, masked but not scaled, in nats."""
    return {
        name: scale_and_mask(site_log_prob(site, fused=fused), mask=site["mask"])
        for name, site in samples(trace).items()
    }


def site_log_prob(site: Site, *, fused: bool = False) -> Tensor:
    """A site's log-probability; of many Bernoullis in one pass where that is sure to be faster.

    ``fused`` says that a compiler is going to fuse what is asked for here; without it, gradients
    are those of the distribution's own.
    """
    base, events, value = site["fn"], 0, site["value"]
    while isinstance(base, torch.distributions.Independent):
        base, events = base.base_dist, events + base.reinterpreted_batch_ndims
    if isinstance(base, dist.MaskedDistribution) and base._mask is True:  # hides nothing
        base = base.base_dist
    if events == 0 or type(base) not in BERNOULLI or (torch.is_grad_enabled() and not fused):
        return site["fn"].log_prob(value, *site["args"], **site["kwargs"])
    logits, value = base.logits.flatten(-events), value.flatten(-events).to(base.logits.dtype)
    if not fused:
        return torch.linalg.vecdot(logits, value) - softplus(logits).sum(-1)
    return Bits.apply(*torch.broadcast_tensors(logits, value))


def reduce_to(log_prob: Tensor, layout: Layout, particles: int | None, num_data: int) -> Tensor:
    """Sum over every plate but the particles' and the batch's, to ``[K, N]``."""
    total = sum_plates(log_prob, layout, {layout.dim})
    return total.reshape(len(total), -1).expand(particles or 1, num_data)


def sum_plates(log_prob: Tensor, layout: Layout, kept: Collection[int]) -> Tensor:
    """Sum over every plate but the particles' and those ``kept``; all dimensions stay."""
    rank = -layout.particle_dim
    log_prob = log_prob[(None,) * (rank - log_prob.dim())]
    summed = [d for d in range(1, rank) if d - rank not in kept]
    return log_prob.sum(summed, keepdim=True) if summed else log_prob


def unscaled(layout: Layout, *traces: Trace) -> None:
    """Take scores, poutine.scale and the batch's subsampling off traces; inner plates' stay."""
    for trace in traces:
        for site in samples(trace).values():
            site["scale"] = prod(
                f.full_size / f.size
                for f in site["cond_indep_stack"]
                if f.full_size and f.name != layout.plate
            )
            for score in ("log_prob", "score_parts", "kl"):
                site.pop(score, None)


def samples(trace: Trace) -> dict[str, Site]:
    """The sample sites of a trace by name, without those of subsampling plates."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }


def drawn(trace: Trace) -> dict[str, Site]:
    """The sites of a trace whose values were drawn, and not observed."""
    return {name: site for name, site in samples(trace).items() if not site["is_observed"]}


def is_bookkeeping(site: Site) -> bool:
    """Whether a site is a deterministic, a factor, or a point in place of a latent (reparam)."""
    fn, infer = site["fn"], site["infer"]
    point = getattr(fn, "_mask", True) is False and isinstance(fn.base_dist, dist.Delta)
    return point or bool(infer.get("_deterministic")) or is_factor(site)


def is_factor(site: Site) -> bool:
    """Whether a site is a :func:`pyro.factor`."""
    return isinstance(site["fn"], dist.Unit)


def scored(*traces: Trace) -> list[tuple[str, Site]]:
    """The sample sites of traces that have a density, with their names: all but bookkeeping."""
    sites = [item for trace in traces for item in samples(trace).items()]
    return [(name, site) for name, site in sites if not is_bookkeeping(site)]
