"""Whether scores belong to their data and their particles, and reach every parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyrovae._tools.source_lines import error_place, lines_with
from pyrovae.checking.case import Case, Finding, failed, passed, sentence, skipped, take
from pyrovae.objectives import estimate
from pyrovae.pairs.contract import check_reach
from pyrovae.pairs.traces import is_bookkeeping, samples, take_particles

__all__ = ["gradients", "independent_data", "particles_broadcast", "suspects"]

PARTICLES = 3
LOOSE, NUDGE = 1e-5, 1e-6
REDUCTIONS = (".mean()", ".mean(0)", ".sum()", ".sum(0)", ".std(", ".var(", "dim=0", "BatchNorm")
STOPS = (".detach()", "no_grad", ".data", ".item()", "inference_mode")
Scores = dict[tuple[str, str], Tensor]


class _Batch(NamedTuple):
    """Another batch that shares rows with the first: which, and where they lie in either."""

    rows: tuple
    latents: Trace
    here: slice
    there: slice


def independent_data(case: Case, training: bool = True, sizes: bool = True) -> Finding:
    """A datum's log-probabilities stay when the data beside it change, or are left out.

    Args:
        case: The pair.
        training: Look in train mode as well.
        sizes: Look at batches of other sizes as well.
    """
    if len(case.rows[0]) < 2:
        return skipped("one datum only")
    for mode in (False, True)[: 1 + training]:
        with case.quietly(training=mode):
            latents = case.guide_trace(case.rows)
        whole = _scores(case, latents, case.rows, mode)
        slack = _slack(whole, _scores(case, _nudged(latents), case.rows, mode))
        for batch in _other_batches(case, latents, sizes and not mode):
            try:
                found = _scores(case, batch.latents, batch.rows, mode)
            except Exception as error:
                return failed(
                    f"The pair fails on a batch of {len(batch.rows[0])}, {sentence(error)}: take "
                    f"the size from len(x), and give squeeze() a dimension. Batches are of any "
                    f"size.",
                    error_place(error),
                )
            for key, score in whole.items():
                there = batch.there
                change = _change(found[key][:, batch.here], score[:, there], slack[key][:, there])
                if change:
                    return _depends(case, *key, change, mode)
    return passed("beside other data, and alone")


def _other_batches(case: Case, latents: Trace, sizes: bool) -> Iterator[_Batch]:
    n = len(case.rows[0])
    half = n // 2
    mixed = torch.cat([torch.arange(half), torch.arange(n - half) % half])
    yield _Batch(take(case.rows, mixed), latents, slice(half), slice(half))
    if sizes:
        for part in (slice(1), slice(half, n)):
            some = _latents_of(case, latents, part)
            yield _Batch(take(case.rows, part), some, slice(None), part)


def _scores(case: Case, latents: Trace, rows: tuple, training: bool) -> Scores:
    with case.quietly(training=training):
        return case.scores(latents, rows)


def _latents_of(case: Case, trace: Trace, part: slice) -> Trace:
    """The same trace with the latents of some of its data."""
    taken = trace.copy()
    for name, site in samples(trace).items():
        value = site["value"]
        dim = value.dim() - getattr(site["fn"], "event_dim", 0) + case.layout.dim
        if not site["is_observed"] and dim >= 0 and value.shape[dim] == len(case.rows[0]):
            index = torch.arange(value.shape[dim], device=value.device)[part]
            taken.nodes[name] = site | {"value": value.index_select(dim, index)}
    return taken


def _nudged(trace: Trace) -> Trace:
    """The same trace with its latents changed by a little more than rounding."""
    nudged = trace.copy()
    for name, site in samples(trace).items():
        if not site["is_observed"] and site["value"].is_floating_point():
            nudged.nodes[name] = site | {"value": site["value"] * (1 + NUDGE)}
    return nudged


def _slack(scores: Scores, nudged: Scores) -> Scores:
    """What rounding may change in scores: more, where they are steep in the latents."""
    steep = {key: (nudged[key] - score).abs().nan_to_num(0.0) for key, score in scores.items()}
    return {key: LOOSE * (1 + score.abs()) + 10 * steep[key] for key, score in scores.items()}


def _change(found: Tensor, expected: Tensor, slack: Tensor) -> float:
    """The largest difference of two scores, or 0 where rounding explains it."""
    known = expected.isfinite() & found.isfinite()
    difference = (found - expected)[known].abs()
    return difference.max().item() if bool((difference > slack[known]).any()) else 0.0


def _depends(case: Case, kind: str, name: str, change: float, training: bool) -> Finding:
    norms = [n for n, m in _modules(case) if isinstance(m, _BatchNorm)]
    mode = " in train mode" if training else ""
    text = (
        f"The log-probability of a datum at site {name!r} of the {kind} changes by {change:.3g} "
        f"nats with the other data of its batch{mode}: "
    )
    mend = "take no mean, sum or norm over the batch, and count every log-probability per datum."
    if training and norms:
        mend = f"{_list(norms)} normalizes over the batch, take LayerNorm or GroupNorm instead."
    return failed(text + mend, *case.where(name), *suspects(case, REDUCTIONS))


def particles_broadcast(case: Case) -> Finding:
    """Scores of K particles at once are those of a loop over them."""
    try:
        with case.quietly():
            together = case.guide_trace(case.rows, PARTICLES)
            whole = case.scores(together, case.rows, PARTICLES)
            slack = _slack(whole, case.scores(_nudged(together), case.rows, PARTICLES))
    except Exception as error:
        return failed(
            f"With a plate of {PARTICLES} particles to the left of the batch the pair fails, "
            f"{sentence(error)}: let leading dimensions through, as z.reshape(*z.shape[:-1], ...) "
            f"does and z.reshape(len(x), ...) does not.",
            error_place(error),
        )
    for k in range(PARTICLES):
        one = take_particles(together, slice(k, k + 1))
        with case.quietly():
            alone = case.scores(one, case.rows, 1)
        for (kind, name), score in whole.items():
            change = _change(alone[kind, name][0], score[k], slack[kind, name][k])
            if change:
                return failed(
                    f"Site {name!r} of the {kind} scores {change:.3g} nats otherwise among "
                    f"{PARTICLES} particles than alone: keep the particles' dimension, leftmost, "
                    f"apart from the others.",
                    *case.where(name),
                )
    return passed(f"[K, N] = [{PARTICLES}, {len(case.rows[0])}] as a loop")


def gradients(case: Case) -> Finding:
    """The objective reaches every parameter, with a number, and every latent reaches a score."""
    loose = list(_unregistered(case))
    if loose:
        names, lines = zip(*loose, strict=True)
        return failed(
            f"{_list(names)} holds parameters that no module owns, so they are not trained: make a "
            f"list an nn.ModuleList, a tensor an nn.Parameter.",
            *(line for found in lines for line in found),
        )
    with case.quietly(training=True, gradients=True):
        objective = case.objective(PARTICLES)
        surrogate = estimate(objective, case.pair, *case.rows).surrogate
        check_reach(case.pair, surrogate, case.rows)
        named = case.pair.named()
        if not named:
            return skipped("the pair has no parameters")
        found = [None] * len(named)
        if surrogate.requires_grad:
            found = torch.autograd.grad(surrogate, list(named.values()), allow_unused=True)
    missing = [name for name, g in zip(named, found, strict=True) if g is None]
    if missing:
        return failed(
            f"No gradient reaches {_list(missing)}: use it in the program, take it out, or freeze "
            f"it with requires_grad_(False).",
            *suspects(case, STOPS),
        )
    broken = [n for n, g in zip(named, found, strict=True) if not bool(g.isfinite().all())]
    if broken:
        return failed(
            f"The gradient is NaN or infinite for {_list(broken)}: look for a root, a norm or a "
            f"where() at a point without a slope."
        )
    unused = _unused_latents(case)
    if unused:
        return failed(
            f"No other site of the model depends on latent {_list(unused)}: hand it on, without "
            f"detach.",
            *case.where(*unused),
            *suspects(case, STOPS),
        )
    return passed(f"parameters: {len(named)}, latents: {len(case.latents())}")


def _unused_latents(case: Case) -> list[str]:
    """The reparameterized latents that no other site's log-probability depends on."""
    with case.quietly(gradients=True):
        guide_trace = case.pair.trace_guide(*case.rows)
        latents = {}
        for name, (site, guide_site) in case.latents().items():
            if guide_site["fn"].has_rsample and not is_bookkeeping(site):
                node = guide_trace.nodes[name]
                latents[name] = node["value"] = node["value"].detach().requires_grad_()
        trace = case.pair.replay_model(guide_trace, *case.rows)
        trace.compute_log_prob()
        unused = []
        for name, value in latents.items():
            others = sum(s["log_prob"].sum() for n, s in samples(trace).items() if n != name)
            reached = (
                getattr(others, "requires_grad", False)
                and torch.autograd.grad(others, value, retain_graph=True, allow_unused=True)[0]
            )
            if reached is None or reached is False:
                unused.append(name)
    return unused


def _unregistered(case: Case) -> Iterator[tuple[str, list[str]]]:
    """The attributes of modules that hold parameters which no module owns, and their lines."""
    owned = {id(p) for root in case.pair.roots.values() for p in root.parameters()}
    for path, module in _modules(case):
        for name, value in vars(module).items():
            if any(id(p) not in owned for p in _held(value)):
                yield f"{path}.{name}", lines_with([type(module)], f"self.{name} =")


def _held(value: Any) -> Iterator[Tensor]:
    """The trainable leaves that a list, a tuple, a dictionary or a tensor holds."""
    if isinstance(value, Tensor) and value.requires_grad and value.is_leaf:
        yield value
    elif isinstance(value, nn.Module):
        yield from (p for p in value.parameters() if p.requires_grad)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _held(item)
    elif isinstance(value, dict) and type(value) is dict:
        for item in value.values():
            yield from _held(item)


def _modules(case: Case) -> Iterator[tuple[str, nn.Module]]:
    for prefix, root in case.pair.roots.items():
        for name, module in root.named_modules():
            yield f"{prefix}.{name}".rstrip("."), module


def suspects(case: Case, words: Iterable[str]) -> list[str]:
    """The lines of both programs, and of their modules' classes, with one of some words."""
    return lines_with([case.model, case.guide, *case.pair.roots.values()], *words)


def _list(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
