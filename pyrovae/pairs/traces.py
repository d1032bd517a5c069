"""Run the guide, replay the model, and read the scores: every other module stands on this one."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from math import prod
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import infer_discrete
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from pyrovae._tools import InputError
from pyrovae.pairs.enumeration import in_parallel, sum_out
from pyrovae.pairs.pair import Pair

__all__ = [
    "Layout",
    "common_scale",
    "is_bookkeeping",
    "reduce_to",
    "replay_model",
    "samples",
    "site_scale",
    "site_scores",
    "take_particles",
    "trace_guide",
    "trace_pair",
    "trace_posterior",
    "unscale",
]


class Layout(NamedTuple):
    """Which sites a pair has, and where the batch lies in their log-probabilities.

    ``dim`` is the batch's dimension and ``particle_dim`` the one left of every plate, both
    counted from the right; ``plate`` is the name of the plate over the batch. ``scaled`` says
    whether some site carries a scale beside that of the plate, ``plate_scale``. ``latents`` are
    those that both programs sample, ``enumerated`` those that the model alone has and sums over.
    """

    plate: str
    dim: int
    particle_dim: int
    latents: tuple[str, ...]
    observed: tuple[str, ...]
    plate_scale: float = 1.0
    scaled: bool = False
    enumerated: tuple[str, ...] = ()


def trace_pair(
    pair: Pair,
    x: Tensor,
    *context: Any,
    particles: int | None = None,
    layout: Layout | None = None,
) -> tuple[Trace, Trace]:
    """Trace the model replayed against its guide, optionally inside a plate of particles.

    Args:
        pair: The pair.
        x: A batch ``[N, ...]``, handed to both programs with ``context``.
        particles: The size K of a plate opened to the left of all others; None opens none.
        layout: Where that plate goes; needed with ``particles``, and to sum over the latents that
            the model enumerates, which are drawn from the model otherwise.

    Returns:
        The model's trace and the guide's, without the sites of subsampling plates.
    """
    at = {"particles": particles, "layout": layout}
    guide_trace = trace_guide(pair, x, *context, **at)
    model_trace = replay_model(pair, guide_trace, x, *context, **at)
    return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)


def trace_guide(
    pair: Pair,
    x: Tensor,
    *context: Any,
    particles: int | None = None,
    layout: Layout | None = None,
) -> Trace:
    """Trace the guide alone; arguments as in :func:`trace_pair`."""
    with _particle_plate(particles, layout):
        return poutine.trace(pair.run_guide).get_trace(x, *context)


def replay_model(
    pair: Pair,
    guide_trace: Trace,
    x: Tensor,
    *context: Any,
    particles: int | None = None,
    layout: Layout | None = None,
) -> Trace:
    """Trace the model with the latents of a guide's trace; arguments as in :func:`trace_pair`."""
    model, summed = pair.run_model, layout.enumerated if layout else ()
    if summed:
        model = in_parallel(model, left_of=layout.particle_dim)
    replayed = poutine.replay(model, trace=guide_trace)
    with _particle_plate(particles, layout):
        trace = poutine.trace(replayed).get_trace(x, *context)
    return sum_out(trace, summed) if summed else trace


def trace_posterior(pair: Pair, layout: Layout, x: Tensor, *context: Any) -> Trace:
    """Trace the model at one draw of every latent given x.

    The guide draws what it samples; what the model sums over is drawn from its exact posterior
    given the guide's draw. Arguments as in :func:`trace_pair`.
    """
    guide_trace = trace_guide(pair, x, *context)
    if not layout.enumerated:
        return replay_model(pair, guide_trace, x, *context)
    drawn = {name: guide_trace.nodes[name]["value"] for name in layout.latents}
    given = poutine.condition(pair.run_model, data=drawn)
    given = infer_discrete(given, first_available_dim=layout.particle_dim)
    return poutine.trace(given).get_trace(x, *context)


def _particle_plate(particles: int | None, layout: Layout | None) -> Any:
    if particles is None:
        return nullcontext()
    return pyro.plate("particles", particles, dim=layout.particle_dim)


def take_particles(guide_trace: Trace, part: slice) -> Trace:
    """The same trace with some of its particles; the plate of particles is leftmost."""
    taken = guide_trace.copy()
    for name, site in samples(guide_trace).items():
        if not site["is_observed"]:
            taken.nodes[name] = site | {"value": site["value"][part]}
    return taken


def site_scores(trace: Trace, layout: Layout, particles: int, num_data: int) -> dict[str, Tensor]:
    """Each sample site's log-probability, masked but not scaled.

    Args:
        trace: The trace of a program run with K particles.
        layout: What :func:`pyrovae.pairs.contract.inspect_pair` said of the pair.
        particles: K.
        num_data: N.

    Returns:
        ``[K, N]`` per site, in nats.
    """
    scores = {}
    for name, site in samples(trace).items():
        log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        masked = scale_and_mask(log_prob, mask=site["mask"])
        scores[name] = reduce_to(masked, layout, particles, num_data)
    return scores


def common_scale(traces: Iterable[Trace], layout: Layout) -> Tensor | float:
    """What :func:`pyro.poutine.scale` asks of each datum, beside its plate's subsampling.

    Returns:
        A number or ``[N]``, to be applied outside any log-sum-exp.

    Raises:
        ValueError: If sites carry different scales, so that no log p(x) is defined.
    """
    scales = {
        name: site_scale(site, layout)
        for trace in traces
        for name, site in samples(trace).items()
        if not is_bookkeeping(site)
    }
    (first, scale), *rest = scales.items()
    for name, other in rest:
        if not torch.equal(torch.as_tensor(scale) + 0.0, torch.as_tensor(other) + 0.0):
            raise InputError(
                f"Sites {first!r} and {name!r} carry different scales, so log p(x) is not "
                f"defined: evaluate the pair without poutine.scale or inner subsampling."
            )
    return scale


def reduce_to(log_prob: Tensor, layout: Layout, particles: int, num_data: int) -> Tensor:
    """Sum a site's log-probabilities over every plate but the particles' and the batch's.

    Returns:
        ``[K, N]``, in nats.
    """
    rank = -layout.particle_dim
    log_prob = log_prob.reshape((1,) * (rank - log_prob.dim()) + log_prob.shape)
    inner = [d for d in range(1, rank) if d != rank + layout.dim]
    total = log_prob.sum(inner) if inner else log_prob
    return total.expand(particles, num_data)


def unscale(trace: Trace, layout: Layout) -> None:
    """Take poutine.scale and the batch's subsampling off a trace; inner subsampling stays."""
    for site in samples(trace).values():
        site["scale"] = prod(
            f.full_size / f.size
            for f in site["cond_indep_stack"]
            if f.vectorized and f.full_size and f.name != layout.plate
        )


def samples(trace: Trace) -> dict[str, dict]:
    """The sample sites of a trace by name, without those of subsampling plates."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }


def is_bookkeeping(site: dict) -> bool:
    """Whether a site is a :func:`pyro.deterministic` or a :func:`pyro.factor`, and no data."""
    return bool(site["infer"].get("_deterministic")) or type(site["fn"]).__name__ == "Unit"


def site_scale(site: dict, layout: Layout) -> Tensor | float:
    """A site's scale beside the batch's subsampling, a number or ``[N]``."""
    plate = prod(
        f.full_size / f.size
        for f in site["cond_indep_stack"]
        if f.name == layout.plate and f.full_size is not None
    )
    scale = site["scale"] / plate
    if not isinstance(scale, Tensor) or scale.dim() == 0:
        return float(scale)
    rank = max(scale.dim(), -layout.dim)
    scale = scale.reshape((1,) * (rank - scale.dim()) + scale.shape)
    if scale.numel() != scale.shape[layout.dim]:
        raise InputError("Expected one scale per datum, got a scale that varies within a datum.")
    return scale.reshape(-1)
