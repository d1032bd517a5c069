"""Run the guide, replay the model, and read the scores: every other module stands on this one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from math import prod
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from pyrovae.params import Parameters

__all__ = [
    "Layout",
    "check_support",
    "common_scale",
    "inspect_pair",
    "reduce_to",
    "replay_model",
    "samples",
    "site_scores",
    "take_particles",
    "trace_guide",
    "trace_pair",
]


class Layout(NamedTuple):
    """Which sites a pair has, and where the batch lies in their log-probabilities.

    ``dim`` is the batch's dimension and ``particle_dim`` the one left of every plate, both
    counted from the right; ``plate`` is the name of the plate over the batch.
    """

    plate: str
    dim: int
    particle_dim: int
    latents: tuple[str, ...]
    observed: tuple[str, ...]


def trace_pair(
    parameters: Parameters,
    x: Tensor,
    *context: Any,
    particles: int | None = None,
    layout: Layout | None = None,
) -> tuple[Trace, Trace]:
    """Trace the model replayed against its guide, optionally inside a plate of particles.

    Args:
        parameters: The pair.
        x: A batch ``[N, ...]``, handed to both programs with ``context``.
        particles: The size K of a plate opened to the left of all others; None opens none.
        layout: Where that plate goes; needed with ``particles``.

    Returns:
        The model's trace and the guide's, without the sites of subsampling plates.
    """
    at = {"particles": particles, "layout": layout}
    guide_trace = trace_guide(parameters, x, *context, **at)
    model_trace = replay_model(parameters, guide_trace, x, *context, **at)
    return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)


def trace_guide(
    parameters: Parameters,
    x: Tensor,
    *context: Any,
    particles: int | None = None,
    layout: Layout | None = None,
) -> Trace:
    """Trace the guide alone; arguments as in :func:`trace_pair`."""
    with _particle_plate(particles, layout):
        return poutine.trace(parameters.run_guide).get_trace(x, *context)


def replay_model(
    parameters: Parameters,
    guide_trace: Trace,
    x: Tensor,
    *context: Any,
    particles: int | None = None,
    layout: Layout | None = None,
) -> Trace:
    """Trace the model with the latents of a guide's trace; arguments as in :func:`trace_pair`."""
    replayed = poutine.replay(parameters.run_model, trace=guide_trace)
    with _particle_plate(particles, layout):
        return poutine.trace(replayed).get_trace(x, *context)


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


def inspect_pair(parameters: Parameters, x: Tensor, *context: Any) -> Layout:
    """Run a pair once and check that its programs belong together.

    Args:
        parameters: The pair.
        x: A batch ``[N, ...]``, with further arguments of the programs in ``context``.

    Returns:
        The pair's layout.

    Raises:
        ValueError: If a latent is in one program only, no plate holds the batch, a site lies
            outside that plate, event dimensions disagree, or x is outside a site's support.
    """
    with torch.no_grad(), _blames_data(x):
        guide_trace = trace_guide(parameters, x, *context)
        model_trace = _try_replay(parameters, guide_trace, x, *context)
    model_sites, guide_sites = samples(model_trace), samples(guide_trace)
    observed = {n: s for n, s in model_sites.items() if s["is_observed"]}
    latents = {n: s for n, s in model_sites.items() if not s["is_observed"]}
    _check_sites(latents, guide_sites)
    for name in latents:
        _check_event(name, latents[name], guide_sites[name])
    every = [*model_sites.items(), *guide_sites.items()]
    frame = _batch_frame(every, len(x))
    for name, site in observed.items():
        _check_observed(name, site)
    dims = [f.dim for _, site in every for f in site["cond_indep_stack"] if f.vectorized]
    seen = tuple(n for n, s in observed.items() if not _is_bookkeeping(s))
    return Layout(frame.name, frame.dim, min(dims) - 1, tuple(latents), seen)


def site_scores(trace: Trace, layout: Layout, particles: int, num_data: int) -> dict[str, Tensor]:
    """Each sample site's log-probability, masked but not scaled.

    Args:
        trace: The trace of a program run with K particles.
        layout: What :func:`inspect_pair` said of the pair.
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
        name: _site_scale(site, layout)
        for trace in traces
        for name, site in samples(trace).items()
        if not _is_bookkeeping(site)
    }
    (first, scale), *rest = scales.items()
    for name, other in rest:
        if not torch.equal(torch.as_tensor(scale) + 0.0, torch.as_tensor(other) + 0.0):
            raise ValueError(
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


def check_support(parameters: Parameters, x: Tensor, *context: Any, batch_size: int = 512) -> None:
    """Check a whole data set against the supports of the sites that observe it.

    Args:
        parameters: The pair.
        x: The data ``[N, ...]``.
        batch_size: How many rows are run at a time.

    Raises:
        ValueError: Naming the site, its support and a value outside it.
    """
    with torch.no_grad(), _blames_data(x):
        head = x[:batch_size]
        model_trace, _ = trace_pair(parameters, head, *(c[:batch_size] for c in context))
        for name, site in samples(model_trace).items():
            value = site["value"]
            if not site["is_observed"] or value.numel() != head.numel():
                continue
            if not torch.equal(value.reshape(-1), head.reshape(-1)):
                continue
            for rows in x.split(len(head)):
                if len(rows) == len(head):
                    _check_observed(name, site | {"value": rows.reshape(value.shape)})
            _check_observed(name, site | {"value": x[-len(head) :].reshape(value.shape)})


def samples(trace: Trace) -> dict[str, dict]:
    """The sample sites of a trace by name, without those of subsampling plates."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }


def _is_bookkeeping(site: dict) -> bool:
    return bool(site["infer"].get("_deterministic")) or type(site["fn"]).__name__ == "Unit"


def _try_replay(parameters: Parameters, guide_trace: Trace, x: Tensor, *context: Any) -> Trace:
    try:
        return replay_model(parameters, guide_trace, x, *context)
    except (ValueError, RuntimeError):
        guide_sites = samples(guide_trace)
        free = samples(poutine.trace(parameters.run_model).get_trace(x, *context))
        for name, site in free.items():
            if name in guide_sites and not site["is_observed"]:
                _check_event(name, site, guide_sites[name])
        raise


@contextmanager
def _blames_data(x: Tensor) -> Iterator[None]:
    """Where a program fails on data that are not finite, say that of the data."""
    try:
        yield
    except ValueError as error:
        bad = (~x.isfinite()).reshape(len(x), -1).any(-1).nonzero()
        if not len(bad):
            raise
        raise ValueError(
            f"{len(bad)} of {len(x)} data hold NaN or infinity, first in row {bad[0].item()}: "
            f"clean them, or let the programs mask them."
        ) from error


def _check_sites(latents: Iterable[str], guide_sites: dict[str, dict]) -> None:
    proposed = {n for n, s in guide_sites.items() if not s["infer"].get("is_auxiliary")}
    for name in latents:
        if name not in guide_sites:
            raise ValueError(
                f"The model's latent site {name!r} is missing in the guide, which samples "
                f"{sorted(guide_sites)}{_near(name, guide_sites)}: sample every latent there."
            )
    for name in sorted(proposed - set(latents)):
        raise ValueError(
            f"The guide samples {name!r}, which is no latent site of the model (its latents are "
            f"{sorted(latents)}{_near(name, latents)}): remove it, or mark it with "
            f"infer={{'is_auxiliary': True}}."
        )


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]!r}" if near else ""


def _check_event(name: str, model_site: dict, guide_site: dict) -> None:
    ours, theirs = model_site["fn"], guide_site["fn"]
    if ours.event_dim != theirs.event_dim:
        raise ValueError(
            f"Site {name!r} has {ours.event_dim} event dimensions in the model and "
            f"{theirs.event_dim} in the guide: end both distributions in the same .to_event(n)."
        )
    if ours.event_shape != theirs.event_shape:
        raise ValueError(
            f"Site {name!r} has event shape {list(ours.event_shape)} in the model and "
            f"{list(theirs.event_shape)} in the guide: give both the same latent size."
        )


def _batch_frame(sites: list[tuple[str, dict]], num_data: int) -> Any:
    sites = [(n, s) for n, s in sites if not _is_bookkeeping(s)]
    stacks = {n: [f for f in s["cond_indep_stack"] if f.vectorized] for n, s in sites}
    holding = [f for stack in stacks.values() for f in stack if f.size == num_data]
    if not holding:
        raise ValueError(
            f"Expected a plate over the batch of {num_data}, got plates "
            f"{sorted({(f.name, f.size) for stack in stacks.values() for f in stack})}: open "
            f"`with pyro.plate('data', len(x))` in the model and in the guide."
        )
    names = {f.name for f in holding}
    common = [n for n in names if all(n in {f.name for f in stack} for stack in stacks.values())]
    plate = "data" if "data" in (common or names) else sorted(common or names)[0]
    for name, stack in stacks.items():
        if plate not in {f.name for f in stack}:
            raise ValueError(
                f"Site {name!r} lies outside the plate {plate!r} that holds the batch, so its "
                f"log-probability belongs to no datum: sample it inside that plate."
            )
    return next(f for f in holding if f.name == plate)


def _check_observed(name: str, site: dict) -> None:
    if _is_bookkeeping(site):
        return
    fn, value = site["fn"], site["value"]
    batch = value.shape[: value.dim() - fn.event_dim]
    if value.shape[value.dim() - fn.event_dim :] != fn.event_shape:
        raise ValueError(
            f"Site {name!r} observes events of shape {list(value.shape[1:])}, but its distribution "
            f"has events {list(fn.event_shape)} and batch {list(fn.batch_shape)}: check the "
            f"model's data shape, and declare event dimensions with .to_event(n)."
        )
    inside = fn.support.check(value)
    mask = site["mask"]
    if isinstance(mask, Tensor):
        inside = inside | ~mask.expand(batch)
    if mask is not False and not bool(inside.all()):
        row = tuple((~inside).nonzero()[0].tolist())
        raise ValueError(_outside(name, fn, value[row]))


def _outside(name: str, fn: Any, value: Tensor) -> str:
    base = fn
    while hasattr(base, "base_dist") and not hasattr(base, "transforms"):
        base = base.base_dist
    kind = type(base).__name__
    bad = value[~base.support.check(value)] if base.event_dim == 0 else value.reshape(-1)
    shown = f"{bad.reshape(-1)[0].item():.6g}" if bad.numel() else "a value"
    mend = "choose a likelihood whose support holds the data"
    if kind in ("Bernoulli", "RelaxedBernoulli"):
        mend = (
            "a Bernoulli scores only 0 and 1, so binarize the data (binarize='threshold', "
            "'static' or 'dynamic'), or choose a likelihood for grey values (continuous "
            "Bernoulli, Gaussian)"
        )
    return f"Site {name!r} observes {shown}, outside the support of {kind}: {mend}."


def _site_scale(site: dict, layout: Layout) -> Tensor | float:
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
        raise ValueError("Expected one scale per datum, got a scale that varies within a datum.")
    return scale.reshape(-1)
