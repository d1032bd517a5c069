"""What the numbers of a split say in words, with what gives cause for doubt marked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from pyrovae.report.html import cell

__all__ = ["Statement", "headline", "statements", "verdict"]

HEAVY_SHARE, STEEP, ACTIVE_SHARE = 0.05, 0.1, 0.5
MARKS = {"good": "✓", "bad": "!", "": "·"}
MORE = "pyrovae evaluate with --samples 10000, --refine 200 or --annealed 16"


class Statement(NamedTuple):
    """A sentence or two in HTML, and whether they are ``"good"``, ``"bad"`` or neither."""

    kind: str
    text: str


def verdict(title: str, found: Mapping[str, Any], more: Sequence[Statement] = ()) -> str:
    """The numbers of a split in words, under a heading."""
    said = [*statements(found), *more]
    items = [
        f'<li class="{kind or "plain"}"><span class="mark" aria-hidden="true">{MARKS[kind]}</span>'
        f"{'<strong>Doubt: </strong>' if kind == 'bad' else ''}{text}</li>"
        for kind, text in sorted(said, key=lambda each: each.kind != "bad")
    ]
    head = [f'<section class="verdict"><h2>{escape(title)}</h2>', headline(found)]
    return "\n".join([*head, *(["<ul>", *items, "</ul>"] if items else []), "</section>"])


def headline(found: Mapping[str, Any]) -> str:
    """log p(x) with its error."""
    ll = found.get("log_likelihood") or {}
    if ll.get("mean") is None:
        return ""
    error = ll.get("standard_error")
    text = f"log p(x) = {cell(ll['mean'])}" + ("" if error is None else f" ± {cell(error)}")
    return f'<p class="headline">{text} nats per datum.</p>'


def statements(found: Mapping[str, Any]) -> Iterator[Statement]:
    """What a reader should know of a split's numbers."""
    ll = found.get("log_likelihood") or {}
    if ll:
        yield from _trust(found, ll)
        yield from _rise(ll.get("curve") or {})
        yield from _gap(found, ll)
    yield from _annealed(found)
    yield from _posterior(found)


def _trust(found: Mapping[str, Any], ll: Mapping[str, Any]) -> Iterator[Statement]:
    share, missed = ll.get("khat_over_0.7"), ll.get("uncovered") or 0.0
    bias, error = ll.get("mean_bias") or 0.0, ll.get("standard_error") or 0.0
    heavy = share is not None and share > HEAVY_SHARE
    doubtful = heavy or missed > 0 or -bias > error or ll.get("mean") is None
    if text := found.get("verdict"):
        said = escape(text) + (f" From the command line: {MORE}." if heavy else "")
        yield Statement("bad" if doubtful else "" if share is None or share else "good", said)
    if heavy:
        yield Statement(
            "bad",
            f"For {share:.1%} of the data the Pareto k-hat of the importance weights is above 0.7: "
            f"log p(x) of these data is a lower bound in expectation; raise --samples.",
        )


def _rise(curve: Mapping[str, float]) -> Iterator[Statement]:
    points = sorted((int(k), bound) for k, bound in curve.items() if bound is not None)
    if len(points) < 3:
        return
    (few, low), (many, high) = points[-2:]
    rise = f"From {few:,} to {many:,} samples the bound rises by {cell(high - low)} nats: "
    if high - low > STEEP:
        yield Statement("bad", f"{rise}more samples will raise log p(x) further.")
    else:
        yield Statement("good", f"{rise}more samples will hardly change log p(x).")


def _gap(found: Mapping[str, Any], ll: Mapping[str, Any]) -> Iterator[Statement]:
    """The comparison of log p(x) with the ELBO of the smaller variance."""
    bounds = found.get("elbo") or {}
    bound = bounds.get("trace_mean_field_elbo") or bounds.get("trace_elbo") or {}
    if bound.get("mean") is None or ll.get("mean") is None:
        return
    gap = ll["mean"] - bound["mean"]
    which = "B" if "trace_mean_field_elbo" in bounds else "A"
    text = f"The gap log p(x) − ELBO ({which}) is {cell(gap)} nats: the looseness of the bound, "
    text += "an estimate of the mean KL(q(z|x) ‖ p(z|x)), at least this where k-hat is above 0.7"
    text += "." if gap > 0 else ", never negative: here sampling error outweighs it."
    yield Statement("", text)
    if won := found.get("amortization_gap"):
        yield Statement(
            "",
            f"Refining the guide for each datum won {_pm(won)} nats of ELBO: the amortization gap.",
        )


def _annealed(found: Mapping[str, Any]) -> Iterator[Statement]:
    ais = found.get("annealed") or {}
    if over := ais.get("over_importance_sampling"):
        more, error = over.get("mean") or 0.0, over.get("standard_error") or 0.0
        text = (
            f"Annealed importance sampling of {ais['num_data']} data, less importance sampling of "
            f"the same: {_pm(over)} nats, "
        )
        if more > max(2 * error, 0.05):
            yield Statement("bad", f"{text}by which log p(x) above is too low there.")
        else:
            yield Statement("good", f"{text}so that the two agree.")
    elif ais.get("verdict"):
        yield Statement("", escape(ais["verdict"]))
    if text := (found.get("bidirectional") or {}).get("verdict"):
        yield Statement("", escape(text))


def _posterior(found: Mapping[str, Any]) -> Iterator[Statement]:
    seen = found.get("diagnostics") or {}
    if text := seen.get("verdict"):
        sites = (seen.get("sites") or {}).values()
        units = sum(site.get("units") or 0 for site in sites)
        active = sum(site.get("active_units") or 0 for site in sites)
        dead = any(site.get("units") and not site.get("active_units") for site in sites)
        yield Statement("bad" if dead or active < ACTIVE_SHARE * units else "good", escape(text))


def _pm(estimate: Mapping[str, float | None]) -> str:
    mean, error = estimate["mean"], estimate.get("standard_error")
    return cell(mean) if None in (mean, error) else f"{mean:.3f} ± {error:.3f}"
