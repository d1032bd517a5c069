"""Whether two programs belong together: their sites, their plates, their shapes."""

from __future__ import annotations

from typing import Any

from torch import Size, Tensor
from torch.distributions import Independent

from pyrovae._tools.source_lines import error_place, failed_message
from pyrovae.checking.case import Case, Finding, failed, passed, sentence, skipped
from pyrovae.pairs.contract import batch_frame, batch_plates, check_event, check_sites, mended
from pyrovae.pairs.traces import is_bookkeeping

__all__ = ["plates_and_events", "programs_run", "sites_match"]


def programs_run(case: Case) -> Finding:
    """Both programs run on a batch, each by itself."""
    for kind, outcome in case.alone.items():
        if isinstance(outcome, Exception):
            if _misfit(outcome) is not None:
                return skipped("needs plates and events")
            error = f"{type(outcome).__name__}: {mended(sentence(outcome), case.rows[0])}"
            return failed(f"The {kind} fails with {error}", error_place(outcome))
    return passed(f"on {len(case.rows[0])} data")


def sites_match(case: Case) -> Finding:
    """Both programs sample the same latents, and the model observes something."""
    model, guide = case.sites("model"), case.sites("guide")
    hidden = [name for name, site in model.items() if not site["is_observed"]]
    summed = case.enumerated()
    latents = [name for name in hidden if name not in summed]
    check_sites(latents, guide)
    observed = [name for name, site in model.items() if site["is_observed"]]
    if not observed:
        return failed(
            f"The model observes nothing (it samples {hidden}): give the site of the data obs=x.",
            *case.where(*hidden[-1:]),
        )
    rest = f"; summed over {', '.join(summed)}" if summed else ""
    return passed(f"latents {', '.join(latents) or 'none'}; observed {', '.join(observed)}{rest}")


def plates_and_events(case: Case) -> Finding:
    """One plate holds the batch, and every dimension is a plate's or an event's."""
    misfits = [_misfit(o) for o in case.alone.values() if isinstance(o, Exception)]
    if misfits:
        found = [_explain(case, *misfit) for misfit in misfits if misfit]
        if not found:
            return skipped("needs runs")
        return failed(" ".join(f.message for f in found), *(w for f in found for w in f.where))
    n = len(case.rows[0])
    every = [(name, site) for k in ("model", "guide") for name, site in case.sites(k).items()]
    plate = batch_plates(every, n)[0]
    frame = batch_frame(every, plate)
    for check in (_ranks, _events, _values, _replays):
        found = check(case)
        if found is not None:
            return found
    return passed(f"plate {frame.name!r} at dim {frame.dim}; {_shapes(case)}")


def _misfit(error: Exception) -> tuple[Exception, dict] | None:
    """The sample statement that did not fit into its plates, if that is what went wrong."""
    message = failed_message(error)
    if message is None or "Shape mismatch inside plate" not in str(error):
        return None
    return error, message


def _explain(case: Case, error: Exception, message: dict) -> Finding:
    name, fn, n = message["name"], message["fn"], len(case.rows[0])
    plates = [f for f in message["cond_indep_stack"] if f.vectorized]
    if all(f.size != n for f in plates):
        sizes = ", ".join(f"{f.name!r} of size {f.size}" for f in plates)
        text = (
            f"Site {name!r} lies in the plate {sizes}, but the batch has {n} data: open "
            f"pyro.plate({plates[0].name!r}, len(x))."
        )
        return failed(text, *_unique(case.where(plates[0].name), error_place(error)))
    batch = fn.batch_shape
    fitting = [e for e in range(1, len(batch) + 1) if _fits(batch[: len(batch) - e], plates)]
    if not fitting:
        return failed(f"{error}: give site {name!r} the batch shape [{n}].", error_place(error))
    return _too_many(name, fn, fitting[0], plates, error_place(error))


def _fits(batch: Size, plates: list[Any]) -> bool:
    if len(batch) > max(-f.dim for f in plates):
        return False
    return all(len(batch) < -f.dim or batch[f.dim] in (1, f.size) for f in plates)


def _too_many(name: str, fn: Any, extra: int, plates: list[Any], *where: str) -> Finding:
    number = _written(fn) + extra
    sizes = ", ".join(f"{f.name!r} of {f.size}" for f in plates)
    return failed(
        f"Site {name!r} has batch shape {list(fn.batch_shape)} in the plate {sizes}, so "
        f"{extra} of its dimensions {'belongs' if extra == 1 else 'belong'} to no plate: end its "
        f"distribution in .to_event({number}).",
        *where,
    )


def _ranks(case: Case) -> Finding | None:
    for kind in ("model", "guide"):
        for name, site in case.sites(kind).items():
            plates = [f for f in site["cond_indep_stack"] if f.vectorized]
            extra = len(getattr(site["fn"], "batch_shape", ())) - max(
                (-f.dim for f in plates), default=0
            )
            if extra > 0 and plates and not is_bookkeeping(site):
                return _too_many(name, site["fn"], extra, plates, case.places[kind].get(name, ""))
    return None


def _events(case: Case) -> Finding | None:
    for name, (model_site, guide_site) in case.latents().items():
        ours, theirs = model_site["fn"], guide_site["fn"]
        try:
            check_event(name, model_site, guide_site)
        except ValueError as error:
            return failed(f"{error}{_number(ours, theirs)}", *case.where(name))
        if _squeezed(ours.batch_shape) != _squeezed(theirs.batch_shape):
            text = (
                f"Site {name!r} has batch shape {list(ours.batch_shape)} in the model and "
                f"{list(theirs.batch_shape)} in the guide: open the same plates in both."
            )
            return failed(text, *case.where(name))
    return None


def _number(ours: Any, theirs: Any) -> str:
    if ours.event_dim == theirs.event_dim:
        return ""
    kind, fewer, more = (
        ("model", ours, theirs) if ours.event_dim < theirs.event_dim else ("guide", theirs, ours)
    )
    number = _written(fewer) + more.event_dim - fewer.event_dim
    expand = "" if fewer.event_shape else f".expand({list(more.event_shape)})"
    return f" Here the {kind}'s lacks dimensions: {expand}.to_event({number})."


def _values(case: Case) -> Finding | None:
    for name, site in case.observed().items():
        fn, value = site["fn"], site["value"]
        if not isinstance(value, Tensor) or value.shape in (fn.shape(), Size()):
            continue
        rank = max(-f.dim for f in site["cond_indep_stack"] if f.vectorized)
        extra = fn.event_dim - (value.dim() - rank)
        drawn = f"Site {name!r} observes {list(value.shape)}, but its distribution draws "
        drawn += f"{list(fn.shape())} (batch {list(fn.batch_shape)}, event {list(fn.event_shape)})"
        if 0 < extra <= _written(fn):
            mend = f"the event swallows the batch, end it in .to_event({_written(fn) - extra})."
        elif value.numel() == len(value) * fn.event_shape.numel():
            mend = "reshape the data or the network's output, so that both have one shape."
        else:
            mend = "let the network's output have the shape of what is observed."
        return failed(f"{drawn}: {mend}", case.places["model"].get(name, ""))
    return None


def _replays(case: Case) -> Finding | None:
    with case.quietly():
        try:
            case.pair.replay_model(case.alone["guide"], *case.rows)
        except Exception as error:
            return failed(
                f"The model runs on its own latents, and with the guide's it fails, "
                f"{sentence(error)}: give both one shape and one dtype.",
                error_place(error),
            )
    return None


def _written(fn: Any) -> int:
    """The number that stands in a distribution's ``to_event``."""
    number = 0
    while isinstance(fn, Independent):
        number += fn.reinterpreted_batch_ndims
        fn = fn.base_dist
    return number


def _shapes(case: Case) -> str:
    sites = {name: site for name, (site, _) in case.latents().items()} | case.observed()
    return ", ".join(f"{name} {list(site['fn'].event_shape)}" for name, site in sites.items())


def _squeezed(shape: Size) -> tuple[int, ...]:
    kept = list(shape)
    while kept and kept[0] == 1:
        kept.pop(0)
    return tuple(kept)


def _unique(*found: Any) -> list[str]:
    flat = [w for item in found for w in ([item] if isinstance(item, str) else item)]
    return list(dict.fromkeys(filter(None, flat)))
