"""Whether two programs belong together: their sites, their plates, their shapes."""

from __future__ import annotations

from itertools import dropwhile
from typing import Any

from pyro.distributions import Distribution
from torch import Size, Tensor
from torch.distributions import Independent

from pyrovae._tools import InputError
from pyrovae._tools.source_lines import error_place
from pyrovae.checking.case import Case, Row, failed, passed, skipped, warned
from pyrovae.pairs import contract
from pyrovae.pairs.traces import is_bookkeeping, is_factor


def programs_run(case: Case) -> Row:
    """Both programs run on a batch, each by itself."""
    contract.check_arguments(case.pair, *case.rows)
    for kind, error in case.errors.items():
        if contract.misfit(error):
            return skipped(needs="plates and events")
        text = f"{type(error).__name__}: {contract.mended(error, case.rows[0])}"
        return failed(f"The {kind} fails with {text}", error_place(error))
    return passed(f"on {len(case.rows[0])} data points")


def sites_match(case: Case) -> Row:
    """Both programs sample the same latents, and the model observes something."""
    model, summed = case.sites["model"], case.enumerated()
    hidden = [name for name, site in model.items() if not site["is_observed"]]
    latents = [name for name in hidden if name not in summed]
    contract.check_kinds(case.sites["guide"])
    contract.check_kinds(model)
    contract.check_order(case.sites["guide"], model)
    observed = [name for name, site in model.items() if site["is_observed"]]
    if not observed:
        return failed(
            f"The model observes nothing (it samples {hidden}): give the site of the data obs=x.",
            *case.where(*[n for n in hidden if n not in case.sites["guide"]] or hidden[-1:]),
        )
    contract.check_sites(latents, case.sites["guide"])
    if factors := [name for name, site in case.sites["guide"].items() if is_factor(site)]:
        return warned(
            f"The guide's factor {', '.join(factors)} is no density: training counts it as Pyro "
            f"does, as if it were one of q, and what is reported of the pair leaves it out.",
            *case.where(*factors),
        )
    rest = f"; summed over {', '.join(summed)}" if summed else ""
    return passed(f"latents {', '.join(latents) or 'none'}; observed {', '.join(observed)}{rest}")


def plates_and_events(case: Case) -> Row:
    """One plate holds the batch, and every dimension is a plate's or an event's."""
    if case.errors:
        unfit = [(error, contract.misfit(error)) for error in case.errors.values()]
        found = [_explain(case, error, site) for error, site in unfit if site]
        if not found:
            return skipped(needs="runs")
        where = dict.fromkeys(line for each in found for line in each.where)
        return failed(" ".join(each.message for each in found), *where)
    every = [item for kind in ("model", "guide") for item in case.sites[kind].items()]
    if not all(isinstance(site["fn"], Distribution) for _, site in every):
        return skipped(needs="sites")
    every = [(name, site) for name, site in every if not is_bookkeeping(site)]
    frame = contract.batch_frame(every, contract.batch_plates(every, len(case.rows[0]))[0])
    if wrong := _ranks(case):
        return wrong
    _check_latents(case)
    _check_observed(case)
    _check_replay(case)
    sites = {name: site for name, (site, _) in case.latents().items()} | case.observed()
    shapes = ", ".join(f"{name} {list(site['fn'].event_shape)}" for name, site in sites.items())
    return passed(f"plate {frame.name!r} at dim {frame.dim}; {shapes}")


def _explain(case: Case, error: Exception, site: dict) -> Row:
    name, fn, batch, n = site["name"], site["fn"], site["fn"].batch_shape, len(case.rows[0])
    plates, place = [*contract.plates(site).values()], error_place(error)
    if all(f.size != n for f in plates):
        sizes = ", ".join(f"{f.name!r} of size {f.size}" for f in plates)
        text = (
            f"Site {name!r} lies in the plate {sizes}, but the batch has {n} data points: open "
            f"pyro.plate({plates[0].name!r}, len(x))."
        )
        return failed(text, *case.where(plates[0].name), place)
    for extra in range(1, len(batch) + 1):
        rest = batch[: len(batch) - extra]
        if len(rest) <= max(-f.dim for f in plates) and contract.sizes_fit(rest, plates):
            return _too_many(name, fn, extra, plates, place)
    return failed(f"{error}: give site {name!r} the batch shape [{n}].", place)


def _too_many(name: str, fn: Any, extra: int, plates: list[Any], *where: str) -> Row:
    sizes = ", ".join(f"{f.name!r} of {f.size}" for f in plates)
    return failed(
        f"Site {name!r} has batch shape {list(fn.batch_shape)} in the plate {sizes}, so "
        f"{extra} of its dimensions {'belongs' if extra == 1 else 'belong'} to no plate: end its "
        f"distribution in .to_event({_written(fn) + extra}).",
        *where,
    )


def _ranks(case: Case) -> Row | None:
    """No site has more batch dimensions than plates."""
    for kind in ("model", "guide"):
        for name, site in case.sites[kind].items():
            plates = [*contract.plates(site).values()]
            batch = getattr(site["fn"], "batch_shape", Size())
            extra = len(batch) - max((-f.dim for f in plates), default=0)
            if extra > 0 and plates and not is_bookkeeping(site):
                return _too_many(name, site["fn"], extra, plates, case.places[kind].get(name, ""))
    return None


def _check_latents(case: Case) -> None:
    """Check that a latent has one event shape and one batch shape in both programs."""
    for name, (model_site, guide_site) in case.latents().items():
        ours, theirs = model_site["fn"], guide_site["fn"]
        try:
            contract.check_event(name, model_site, guide_site)
        except InputError as error:
            raise InputError(f"{error}{_event_to_write(ours, theirs)}") from None
        if _squeezed(ours.batch_shape) != _squeezed(theirs.batch_shape):
            raise InputError(
                f"Site {name!r} has batch shape {list(ours.batch_shape)} in the model and "
                f"{list(theirs.batch_shape)} in the guide: open the same plates in both."
            )


def _event_to_write(ours: Any, theirs: Any) -> str:
    if ours.event_dim == theirs.event_dim:
        return ""
    fewer, more = sorted((ours, theirs), key=lambda fn: fn.event_dim)
    kind = "model" if fewer is ours else "guide"
    number = _written(fewer) + more.event_dim - fewer.event_dim
    expand = "" if fewer.event_shape else f".expand({list(more.event_shape)})"
    return f" Here the {kind}'s lacks dimensions: {expand}.to_event({number})."


def _check_observed(case: Case) -> None:
    """Check that what is observed has the shape of what its distribution draws."""
    for name, site in case.observed().items():
        fn, value = site["fn"], site["value"]
        if not isinstance(value, Tensor) or value.shape in (fn.shape(), Size()):
            continue
        if value.shape == fn.event_shape and len(value) == 1:
            raise InputError(
                f"Site {name!r} observes one event {list(value.shape)} and no batch of them: give "
                f"the programs data [N, ...], such as x[None] for one datum."
            )
        extra = fn.event_dim - (value.dim() - max(-f.dim for f in contract.plates(site).values()))
        if 0 < extra <= _written(fn):
            fix = f"the event swallows the batch, end it in .to_event({_written(fn) - extra})."
        elif value.numel() == len(value) * fn.event_shape.numel():
            fix = "reshape the data or the network's output, so that both have one shape."
        else:
            fix = "let the network's output have the shape of what is observed."
        raise InputError(
            f"Site {name!r} observes {list(value.shape)}, but its distribution draws "
            f"{list(fn.shape())} (batch {list(fn.batch_shape)}, event {list(fn.event_shape)}): "
            f"{fix}"
        )


def _check_replay(case: Case) -> None:
    """Check that the model runs on the guide's latents."""
    try:
        with case.quietly():
            case.pair.trace(*case.rows)
    except Exception as error:
        raise InputError(
            f"The model runs on its own latents, and with the guide's it fails, "
            f"{contract.sentence(error)}: give both one shape and one dtype."
        ) from error


def _written(fn: Any) -> int:
    """The number that stands in a distribution's ``to_event``."""
    if isinstance(fn, Independent):
        return fn.reinterpreted_batch_ndims + _written(fn.base_dist)
    return 0


def _squeezed(shape: Size) -> list[int]:
    """A shape without its leading ones, which broadcast."""
    return list(dropwhile(lambda size: size == 1, shape))
