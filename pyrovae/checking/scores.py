"""Whether scores belong to their data and their particles, and reach every parameter."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import chain, islice
from typing import Any

import torch
from numpy import s_
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyrovae._tools import InputError
from pyrovae._tools.source_lines import lines_with
from pyrovae.checking import outputs
from pyrovae.checking.case import Case, Row, Scores, failed, passed, skipped, take, warned
from pyrovae.checking.outputs import Cut
from pyrovae.pairs.contract import check_reach, leaves_behind, sentence
from pyrovae.pairs.traces import Values, log_probs

PARTICLES = 3
# Two batches may round a float32 score differently by 1e-5 of it. A score that is steep in its
# latents may differ by more, as much as ten times what moving these by 1e-6 changes.
ROUNDING, NUDGE, STEEP = 1e-5, 1e-6, 10
# Scores, each with what rounding may change in it.
Bounded = dict[tuple[str, str], tuple[Tensor, Tensor]]
# Words of source lines that may be to blame, shown beside the finding.
REDUCTIONS = (".mean()", ".mean(0)", ".sum()", ".sum(0)", ".std(", ".var(", "dim=0", "BatchNorm")
STOPS = (".detach()", "no_grad", ".data", ".item()", "inference_mode", "numpy", "np.")

UNUSED = "use it in the program, take it out, or freeze it with requires_grad_(False)."
MEANT = " If this is meant, freeze with requires_grad_(False) what is not to be trained."


def independent_data(case: Case, training: bool = True, sizes: bool = True) -> Row:
    """A datum's log-probabilities do not depend on its batch, in either mode and of any size."""
    n = len(case.rows[0])
    if n < 2:
        return skipped("only one data point was given")
    half = n // 2
    mixed = torch.cat([torch.arange(half), torch.arange(n - half) % half])
    for mode in (False, True)[: 1 + training]:
        latents, whole = _reference(case, training=mode)
        parts = (slice(1), slice(half, n)) if sizes and not mode else ()
        others = [(take(case.rows, part), _part(case, latents, part), part) for part in parts]
        for rows, values, part in [(take(case.rows, mixed), latents, slice(half)), *others]:
            try:
                found = case.scores(values, rows, training=mode)
            except Exception as error:
                raise InputError(
                    f"The pair fails on a batch of {len(rows[0])}, {sentence(error)}: take the "
                    f"size from len(x), and give squeeze() a dimension. Batches are of any size."
                ) from error
            if change := _change(found, whole, s_[:, part]):
                return _depends(case, *change, mode)
    return passed("beside other data, and alone")


def _part(case: Case, latents: Values, part: slice) -> Values:
    """The latents of some of the data."""
    taken, n = dict(latents), len(case.rows[0])
    for name, value in latents.items():
        dim = case.inspected.known.dim - getattr(case.sites["guide"][name]["fn"], "event_dim", 0)
        if value.dim() >= -dim and value.shape[dim] == n:
            taken[name] = value.index_select(dim, torch.arange(n, device=value.device)[part])
    return taken


def _reference(
    case: Case, particles: int | None = None, training: bool = False
) -> tuple[Values, Bounded]:
    """Latents of the batch, their scores, and what rounding may change in these."""
    latents = case.draw(particles, training=training)
    nudged = {n: v * (1 + NUDGE) if v.is_floating_point() else v for n, v in latents.items()}
    scores = case.scores(latents, case.rows, particles, training=training)
    moved = case.scores(nudged, case.rows, particles, training=training)
    whole = {}
    for key, score in scores.items():
        steep = (moved[key] - score).abs().nan_to_num(0.0)
        whole[key] = score, ROUNDING * (1 + score.abs()) + STEEP * steep
    return latents, whole


def _change(found: Scores, whole: Bounded, part: Any) -> tuple[str, str, float] | None:
    """The first scores that a part has otherwise: program, site, and the nats, beyond rounding."""
    for (kind, name), (score, slack) in whole.items():
        expected = score[part]
        # A site that a part lacks counts nothing there.
        alone = found.get((kind, name), torch.zeros_like(expected))[:, : expected.shape[1]]
        known = expected.isfinite() & alone.isfinite()
        difference = (alone - expected)[known].abs()
        if bool((difference > slack[part][known]).any()):
            return kind, name, difference.max().item()
    return None


def _depends(case: Case, kind: str, name: str, change: float, training: bool) -> Row:
    norms = [n for n, m in _modules(case) if isinstance(m, _BatchNorm)]
    fix = "take no mean, sum or norm over the batch, and count every log-probability per datum."
    if training and norms:
        fix = f"{_list(norms)} normalizes over the batch, use LayerNorm or GroupNorm instead."
    return failed(
        f"The log-probability of a data point at site {name!r} of the {kind} changes by "
        f"{change:.3g} nats with the rest of its batch{' in train mode' if training else ''}: "
        f"{fix}",
        *case.where(name),
        *case.suspects(REDUCTIONS),
    )


def particles_broadcast(case: Case) -> Row:
    """Scores of K particles at once are those of a loop over them without a plate."""
    pair, n = case.inspected, len(case.rows[0])
    try:
        together, whole = _reference(case, PARTICLES)
        for k in range(PARTICLES):
            values = {name: value[k] for name, value in together.items()}
            alone = case.scores(values, case.rows)
            if change := _change(alone, whole, slice(k, k + 1)):
                kind, name, nats = change
                raise InputError(
                    f"The log-probability at site {name!r} of the {kind} differs by {nats:.3g} "
                    f"nats between {PARTICLES} particles at once and each alone: keep the "
                    f"particles' dimension, leftmost, apart from the others."
                )
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"With {PARTICLES} particles, as a plate to the left of the batch or as further rows, "
            f"the pair fails, {sentence(error)}: take the size of the batch from the arguments, "
            f"len(x), and let leading dimensions through, as z.reshape(*z.shape[:-1], ...) does."
        ) from error
    if pair.folds:
        return passed(f"as {PARTICLES} * {n} rows of one batch: with a plate they score otherwise")
    return passed(f"[K, N] = [{PARTICLES}, {n}] as a loop")


def gradients(case: Case, training: bool = True) -> Row:
    """The objective reaches every parameter, with a number, and every latent reaches a score.

    Without ``training`` only what stops gradients inside the programs is looked for.
    """
    if loose := dict(_unregistered(case)):
        return failed(
            f"{_list(loose)} holds parameters that no module owns, so they are not trained: make a "
            f"list an nn.ModuleList, a tensor an nn.Parameter.",
            *chain.from_iterable(loose.values()),
        )
    found, lost = outputs.cuts(case)
    if dead := [cut for cut in found if cut.dead]:
        return failed(_stopped(dead), *_places(case, dead))
    if unused := _unused_latents(case):
        return failed(
            f"No other site of the model depends on latent {_list(unused)}: use it there, without "
            f"detach.",
            *case.where(*unused),
            *case.suspects(STOPS),
        )
    known = {name for cut in found for name in cut.sources} | _baselines(case)
    if training and (wrong := _slopes_are_wrong(case, known)):
        return wrong
    if outside := [cut for cut in found if not training and {*cut.sources} & {*lost}]:
        return failed(_stopped(outside) + MEANT, *_places(case, outside))
    if unreached := [name for name in lost if not training and name not in known]:
        return failed(f"No gradient reaches {_list(unreached)}: {UNUSED}")
    if found:
        return warned(_stopped(found) + MEANT, *_places(case, found))
    return passed(f"parameters: {len(case.pair.named())}, latents: {len(case.latents())}")


def _baselines(case: Case) -> set[str]:
    """The parameters of what predicts a loss for TraceGraph_ELBO, which trains them by itself."""
    sites = [site for each in case.sites.values() for site in each.values()]
    given = [site["infer"].get("baseline", {}) for site in sites]
    nets = [each.get("nn_baseline") for each in given]
    leaves: list[Tensor] = []
    for net in nets:
        leaves += net.parameters() if isinstance(net, nn.Module) else ()
    for each in given:
        if isinstance(value := each.get("baseline_value"), Tensor):
            leaves += leaves_behind(value, set())
    owned = {id(leaf) for leaf in leaves}
    return {name for name, leaf in case.pair.named().items() if id(leaf) in owned}


def _slopes_are_wrong(case: Case, outside: Collection[str]) -> Row | None:
    """A parameter whose gradient is missing, if it is not known to be left out, or no number."""
    with case.quietly(training=True, gradients=True):
        _, surrogate = case.estimate(*case.rows, particles=PARTICLES)
        check_reach(case.pair, surrogate, case.rows)
        named = case.pair.named()
        if not named:
            return skipped("the pair has no parameters")
        found = dict(zip(named, _slopes(surrogate, list(named.values())), strict=True))
    if missing := [name for name, g in found.items() if g is None and name not in outside]:
        return failed(
            f"No gradient reaches {_list(missing)}: {UNUSED}",
            *case.suspects(STOPS),
        )
    if broken := [n for n, g in found.items() if g is not None and not bool(g.isfinite().all())]:
        return failed(
            f"The gradient is NaN or infinite for {_list(broken)}: look for a root, a norm or a "
            f"where() at a point without a slope."
        )
    return None


def _stopped(found: list[Cut]) -> str:
    """What some arguments depend on without a gradient."""
    arguments = [f"{c.argument} at site {c.site!r} of the {c.program}" for c in found]
    sources = dict.fromkeys(name for cut in found for name in cut.sources)
    return (
        f"No gradient goes from {_list(arguments)} back to {_list(sources)}, though "
        f"{'they depend' if len(found) > 1 else 'it depends'} on it: take out the detach(), "
        f"no_grad(), .data, .item() or NumPy in between."
    )


def _places(case: Case, found: list[Cut]) -> list[str]:
    return [*case.suspects(STOPS), *case.where(*dict.fromkeys(cut.site for cut in found))]


def _slopes(value: Any, leaves: list[Tensor]) -> list[Tensor | None]:
    """The gradient of a scalar for each leaf; None for those that it does not depend on."""
    if not getattr(value, "requires_grad", False):
        return [None] * len(leaves)
    return list(torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True))


def _unused_latents(case: Case) -> list[str]:
    """The reparameterized latents that no other site's log-probability depends on."""
    with case.quietly(gradients=True):
        guide_trace = case.pair.trace_guide(*case.rows)
        latents = {}
        for name, (_, guide_site) in case.latents().items():
            if guide_site["fn"].has_rsample:
                node: Any = guide_trace.nodes[name]
                latents[name] = node["value"] = node["value"].detach().requires_grad_()
        scores = log_probs(case.pair.replay_model(guide_trace, *case.rows))
        return [
            name
            for name, value in latents.items()
            # Pyro's obs_mask makes a latent of what is not observed, beside the site that is.
            if f"{name.removesuffix('_unobserved')}_observed" not in scores
            and _slopes(sum(s.sum() for n, s in scores.items() if n != name), [value]) == [None]
        ]


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
    elif isinstance(value, list | tuple) or type(value) is dict:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _held(item)


def _modules(case: Case) -> Iterator[tuple[str, nn.Module]]:
    for prefix, root in case.pair.roots.items():
        for name, module in root.named_modules():
            yield f"{prefix}.{name}".rstrip("."), module


def _list(names: Collection[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(islice(names, most)) + more
