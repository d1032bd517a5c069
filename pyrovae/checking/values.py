"""Whether values lie where distributions have mass, and log-probabilities are numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions.constraints import is_dependent

from pyrovae._tools import InputError
from pyrovae.checking.case import Case, Row, failed, passed, take, warned
from pyrovae.pairs.contract import base_of, check_support, into, kind_of
from pyrovae.pairs.support import element, possible
from pyrovae.pairs.traces import Site, samples

DRAWS = 16
# How many of their ranges beyond the data's edges are tried.
FAR = 3.0
SEARCH = "look for a log of 0, a division by 0 or an overflow in what makes it"
# Data of this size make the first outputs of a network so large that training may not start.
LARGE = 100
# Values beside draws at which two supports are compared: of either sign, near zero and far from
# it, and off every grid, so that bounded, positive, unit-interval and real supports all differ.
REALS, INTEGERS = (-987.6, -1.37, 0.41, 1.63, 987.6), (-1.0, 0.0, 1.0, 2.0, 3.0, 9.0, 999.0)


def data_support(case: Case) -> Row:
    """Every data point lies in the support of the distributions that observe it."""
    try:
        with case.quietly():
            check_support(case.pair, *case.every)
    except InputError as error:
        return failed(str(error), *case.where(*case.observed()))
    kinds = [f"{name}: {_support(site['fn'])}" for name, site in case.observed().items()]
    told = f"{len(case.every[0])} data points; {', '.join(kinds) or 'no site but factors'}"
    return _missing(case, told) if mask_of(case.rows) is not None else passed(told)


def mask_of(rows: tuple) -> Tensor | None:
    """The last argument of the programs, if it says which entries of x are observed."""
    x, mask = rows[0], rows[-1]
    fits = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == x.shape
    return mask if fits else None


def _missing(case: Case, told: str) -> Row:
    """Whether what stands at missing entries changes the model's score or the guide's draws."""
    x, *context = case.rows
    mask = context[-1]
    # What other rows have there lies within the support, whatever that is.
    mixed = torch.where(mask, x, x.roll(1, 0)), *context
    with case.quietly():
        model, guide = case.inspected.trace(*case.rows)
    with case.quietly():
        other = samples(case.pair.trace_guide(*mixed))
        replayed = samples(case.pair.replay_model(guide, *mixed))
    for name, site in samples(model).items():
        if not torch.equal(*(s["fn"].log_prob(s["value"]) for s in (site, replayed[name]))):
            return failed(
                f"Site {name!r} depends on what stands where x is missing, so that log p(x) is not "
                f"that of the observed entries: score those alone, as in "
                f"dist.Normal(loc, scale).mask(mask).to_event(1).",
                *case.where(name),
            )
    for name, site in samples(guide).items():
        if not torch.equal(site["value"], other[name]["value"]):
            return warned(
                f"The guide takes missing entries for numbers: {name!r} changes with what stands "
                f"there. log p(x) stays right, but give the network the mask, as in "
                f"self.encoder(x, mask), so that 0 is not taken for a value.",
                *case.where(name),
            )
    share = 1 - mask.float().mean().item()
    return passed(f"{told}; {share:.0%} are missing, and neither program sees them")


def latent_support(case: Case, covering: bool = True) -> Row:
    """The guide proposes every value that the prior allows (if asked), and no other."""
    for name, (model_site, guide_site) in case.latents().items():
        prior, guide = model_site["fn"], guide_site["fn"]
        kinds = f"{_support(guide)} in the guide and {_support(prior)} under the prior"
        with case.quietly():
            outside = _only_in(guide, prior)
            missed = _only_in(prior, guide) if covering else None
        if outside is not None:
            raise InputError(
                f"The support of {name!r} is {kinds}: the guide can draw {outside:.4g}, where "
                f"the prior has no mass and the ELBO is minus infinity. Draw it from a "
                f"distribution with the prior's support."
            )
        if missed is not None:
            raise InputError(
                f"The support of {name!r} is {kinds}: the guide never draws {missed:.4g}, which "
                f"the prior allows, so log p(x) leaves that part out. Widen the guide's support."
            )
    return passed("guide and prior agree")


def _only_in(here: Any, there: Any) -> float | None:
    """A value in the support of one distribution and outside that of another."""
    many = here.expand((DRAWS, *here.batch_shape))
    try:
        like = many.rsample() if many.has_rsample else many.sample()
        discrete = here.support.is_discrete or there.support.is_discrete
        others = [torch.full_like(like[0], c) for c in (INTEGERS if discrete else REALS)]
        values = torch.cat([like, torch.stack(others)])
        found = here.support.check(values) & ~there.support.check(values)
        if not discrete:
            # A point, or what a transform makes of a bounded base, is real by its support alone.
            held = found.reshape(*found.shape, *[1] * here.event_dim)
            value = torch.where(held, values, like[:1])
            likely, inside = here.log_prob(value) > -torch.inf, possible(here, value)
            likely = likely if inside is None else likely & inside
            found[DRAWS:] &= likely[DRAWS:]
    except NotImplementedError:
        return None
    if not bool(found.any()):
        return None
    value = values[tuple(found.nonzero()[0])].reshape(-1)
    outside = ~base_of(there).support.check(value)
    return (value[outside] if outside.shape == value.shape and outside.any() else value)[0].item()


def finite(case: Case, edges: bool = True) -> Row:
    """No parameter of a distribution, and no log-probability, is NaN or infinite.

    On the batch as it is, and (if asked) on data at and beyond the edges of what was given.
    """
    with case.quietly():
        if bad := _first_bad(case.pair.trace(*case.rows), ()):
            return failed(f"With these weights {bad.text}{_of_the_data(case)}", bad.place(case))
    if not edges:
        return passed("on the batch")
    names, extreme = zip(*_extremes(case), strict=True)
    n, each = len(case.rows[0]), torch.arange(max(len(names), len(case.rows[0])))
    _, *context = take(case.rows, each % n)
    try:
        with case.quietly():
            x = torch.stack(extreme)[each % len(names)]
            bad = _first_bad(case.pair.trace(x, *context), names)
    except Exception as error:
        kind = type(error).__name__
        raise InputError(f"The pair fails on data {', '.join(names)}: {kind}: {error}") from error
    if bad:
        return failed(f"On data {bad.text}{_of_the_data(case)}", bad.place(case))
    return passed(f"on the batch, and on data {', '.join(names)}")


def _of_the_data(case: Case) -> str:
    """What to do about data whose size alone may be the cause; nothing for others."""
    x = case.every[0]
    if len(bad := (~x.isfinite()).reshape(len(x), -1).any(1).nonzero()):
        return f" {len(bad)} of the data hold NaN or infinity, first in row {bad[0].item()}."
    if not len(x) or x.abs().max() <= LARGE:
        return ""
    low, high = f"{x.min():.4g}", f"{x.max():.4g}"
    counts = any(site["fn"].support.is_discrete for site in case.observed().values())
    if counts and x.min() >= 0 and bool((x == x.round()).all()):
        return (
            f" The data are counts up to {high}: let the network see x.log1p(), as the guide "
            f"counts does (pyrovae.guides.counts, --guide counts)."
        )
    return f" The data run from {low} to {high}: scale them to about [-1, 1]."


def _extremes(case: Case) -> Iterator[tuple[str, Tensor]]:
    """Data with every feature at its least or greatest, and far beyond, within the support."""
    x, mask = case.every[0], mask_of(case.every)
    if mask is not None:
        # What stands at missing entries is no value: another one of the feature does instead.
        low = torch.where(mask, x, x.amax(0)).amin(0)
        x = torch.where(mask, x, low)
    low, high, span = x.amin(0), x.amax(0), FAR * (x.max() - x.min())
    yield "all at their minimum", low
    yield "all at their maximum", high
    for side, value in (("below", x.min() - span), ("above", x.max() + span)):
        value = (value.round() if bool((x == x.round()).all()) else value).item()
        if _allows(case, value):
            yield f"far {side} their range", torch.full_like(low, value)


def _allows(case: Case, value: float) -> bool:
    """Whether every observed site may have a value; False where that is not known."""
    with suppress(NotImplementedError):
        sites = case.observed().values()
        found = [s["fn"].support.check(torch.full_like(s["value"], value)) for s in sites]
        return bool(found) and all(bool(inside.all()) for inside in found)
    return False


class _Bad(NamedTuple):
    """A site with something that is no number, or not where it is allowed."""

    program: str
    site: str
    text: str

    def place(self, case: Case) -> str:
        return case.places[self.program].get(self.site, "")


def _first_bad(traces: tuple[Trace, Trace], names: tuple[str, ...]) -> _Bad | None:
    """What is wrong at the first site that is no number, with the name of the row."""
    for kind, trace in zip(("guide", "model"), reversed(traces), strict=True):
        for name, site in samples(trace).items():
            for what, value, inside, constraint in _numbers(name, site, kind):
                if not bool(inside.all()):
                    index = tuple((~inside).nonzero()[0].tolist())
                    named = names and index and len(value) >= len(names)
                    row = f"{names[index[0] % len(names)]}, " if named else ""
                    shown = f"{value[index].reshape(-1)[0].item():.4g}"
                    fix = None if constraint is None or shown == "nan" else into(constraint)
                    asked = "" if constraint is None else f", not {_spell(constraint)}"
                    return _Bad(kind, name, f"{row}{what} is {shown}{asked}: {fix or SEARCH}.")
    return None


def _numbers(name: str, site: Site, kind: str) -> Iterator[tuple[str, Tensor, Tensor, Any]]:
    """A site's parameters and log-probability: words, value, where it is allowed, what is asked."""
    fn = site["fn"]
    while fn is not None and not isinstance(fn, Unit):
        for parameter, constraint in fn.arg_constraints.items():
            value = vars(fn).get(parameter)
            if isinstance(value, Tensor) and not is_dependent(constraint):
                what = f"{parameter} at site {name!r} of the {kind}"
                yield what, value, constraint.check(value), constraint
        fn = getattr(fn, "_component_distribution", None) or getattr(fn, "base_dist", None)
    log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
    what = f"the log-probability of site {name!r} in the {kind}"
    yield what, log_prob, log_prob.isfinite(), None


def _support(fn: Any) -> str:
    try:
        return f"{_spell(fn.support)} ({kind_of(fn)})"
    except NotImplementedError:
        return kind_of(fn)


def _spell(constraint: Any) -> str:
    """A constraint in few words; bounds that differ by datum are left out."""
    constraint = element(constraint)
    kind = type(constraint).__name__.strip("_")
    bounds = [getattr(constraint, name, None) for name in ("lower_bound", "upper_bound")]
    low, high = (f"{b:g}" if isinstance(b, int | float) else "…" for b in bounds)
    return {
        "Real": "a real number",
        "Boolean": "0 or 1",
        "GreaterThan": f"> {low}",
        "GreaterThanEq": f">= {low}",
        "LessThan": f"< {high}",
        "Interval": f"between {low} and {high}",
        "HalfOpenInterval": f"between {low} and {high}",
        "IntegerInterval": f"an integer from {low} to {high}",
        "IntegerGreaterThan": f"an integer from {low}",
    }.get(kind, re.sub(r"(?<!^)(?=[A-Z])", " ", kind).lower())
