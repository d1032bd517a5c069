"""What results say in words: the lines that ``evaluate`` prints, and the sentences of a page."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pyrovae._tools.shown import counted, number
from pyrovae.evidence.result import HEAVY_SHARE, Verdict
from pyrovae.objectives.elbo import ESTIMATORS
from pyrovae.runs.results import BOUND, STEEP, Evidence, Mean, Results

NAMES = {"trace_elbo": "A (Trace_ELBO)", "trace_mean_field_elbo": "B (TraceMeanField_ELBO)"}
LONGER = (
    "The validation ELBO was best in the last epoch: longer training (pyrovae train --resume "
    "--epochs) may raise it."
)
EARLIER = (
    "These numbers are of earlier weights: the run was trained further since. Evaluate it again."
)
MORE = "pyrovae evaluate with --samples 10000, --refine 200 or --annealed 16"


def summarize(found: Results, split: str) -> str:
    """The lines that ``pyrovae evaluate`` prints of a split's results."""
    n, of = found.num_data, found.num_data_of_split
    some = "" if n == of else f"the first {n} of "
    lines = [f"{split}, {some}{of} data, nats per datum (higher is better)"]
    lines += [_over_data(f"ELBO, estimator {NAMES[name]}", found.elbo[name]) for name in ESTIMATORS]
    if ll := found.log_likelihood:
        refined = ", refined guide" * ("refined" in ll.method)
        lines.append(_estimate(f"log p(x), K = {ll.num_samples}{refined}", ll, found.is_bound))
        size = f"median effective sample size {ll.ess_median or 0:.0f} of {ll.num_samples}"
        few = "k-hat needs more samples"
        heavy = few if found.heavy is None else f"k-hat > 0.7 for {found.heavy:.1%} of the data"
        lines += [f"  {heavy}; {size}", _wrapped(found.verdict)]
    if found.amortization_gap:
        lines.append(_over_data("amortization gap", found.amortization_gap))
    if ais := found.annealed:
        name = f"log p(x), {counted(ais.num_chains, 'chain')}, {ais.num_data} data"
        lines.append(_estimate(name, ais, ais.is_bound))
        if over := ais.over_importance_sampling:
            lines.append(_row("  over importance sampling on these", over) + " Monte Carlo")
        tight = found.bidirectional.verdict if found.bidirectional else ""
        lines.append(_wrapped(f"{ais.verdict} {tight}"))
    if seen := found.diagnostics:
        lines.append(_over_data("rate, KL(q(z|x) ‖ p(z))", found.rate))
        lines += [_over_data("distortion", found.distortion), _wrapped(seen.verdict)]
    if found.calibration:
        lines.append(_wrapped(found.calibration.verdict or ""))
    return "\n".join(lines)


def statements(
    found: Results,
    *,
    history: Sequence[Mapping[str, Any]] = (),
    weights: str | None = None,
) -> list[Verdict]:
    """What a reader should know of a split's numbers and of its training, doubts first.

    ``weights`` is the digest of the run's weights as they are now, if it is known.
    """
    said = [*_evidence(found), *_gap(found), *_annealed(found), *_posterior(found)]
    bounds = [row.get("valid_elbo") for row in history]
    known = [each for each in bounds if each is not None]
    if len(bounds) > 1 and known and bounds[-1] == max(known):
        said.append(Verdict("fair", LONGER))
    if weights is not None and found.weights not in (None, weights):
        said.append(Verdict("doubtful", EARLIER))
    return sorted(said, key=lambda each: each.kind != "doubtful")


def _evidence(found: Results) -> Iterator[Verdict]:
    if not (ll := found.log_likelihood):
        return
    share = found.heavy or 0.0
    if found.verdict:
        advice = f" From the command line: {MORE}." if share > HEAVY_SHARE else ""
        yield Verdict(found.verdict.kind, found.verdict + advice)
    if share > HEAVY_SHARE:
        yield Verdict(
            "doubtful",
            f"For {share:.1%} of the data the Pareto k-hat of the importance weights is above "
            f"0.7: log p(x) of these data is a lower bound in expectation; raise --samples.",
        )
    if ll.last_rise:
        few, many, rise = ll.last_rise
        steep = rise > STEEP
        told = "raise log p(x) further" if steep else "hardly change log p(x)"
        # A curve is flat where the draws that it lacks have not come yet as well.
        unsure = found.is_bound and not steep
        told += ", unless by weights that have not come yet" if unsure else ""
        yield Verdict(
            "doubtful" if steep else "fair" if unsure else "good",
            f"From {few:,} to {many:,} samples the bound rises by {number(rise)} nats: more "
            f"samples will {told}.",
        )


def _gap(found: Results) -> Iterator[Verdict]:
    """The comparison of log p(x) with the ELBO of the smaller variance."""
    which = BOUND if BOUND in found.elbo else "trace_elbo"
    mean, bound = (each.mean if each else None for each in (found.log_likelihood, found.bound))
    if bound is None or mean is None:
        return
    sign = "." if mean > bound else ", never negative: here sampling error outweighs it."
    yield Verdict(
        "fair",
        f"The gap log p(x) − ELBO ({NAMES[which][0]}) is {number(mean - bound)} nats: the "
        f"looseness of the bound, an estimate of the mean KL(q(z|x) ‖ p(z|x)), at least this where "
        f"k-hat is above 0.7{sign}",
    )
    if won := found.amortization_gap:
        text = f"Refining the guide for each datum won {won} nats of ELBO: the amortization gap."
        if (won.mean or 0.0) < -2 * (won.standard_error or 0.0):
            text = (
                f"A normal of independent coordinates fitted to each datum has an ELBO {won} nats "
                f"from the guide's: the guide is richer, and what amortization costs is unknown."
            )
        yield Verdict("fair", text)


def _annealed(found: Results) -> Iterator[Verdict]:
    ais = found.annealed
    if ais and (over := ais.over_importance_sampling):
        short, unsure = ais.finds_more, ais.is_bound or found.is_bound
        end = "by which log p(x) above is too low there" if short else "so that the two agree"
        yield Verdict(
            "doubtful" if short else "fair" if unsure else "good",
            f"Annealed importance sampling of {ais.num_data} data, less importance sampling of "
            f"the same: {over} nats, {end}.",
        )
    elif ais and ais.verdict:
        yield Verdict("fair", ais.verdict)
    if found.bidirectional is not None:
        yield Verdict("fair", found.bidirectional.verdict)


def _posterior(found: Results) -> Iterator[Verdict]:
    if (seen := found.diagnostics) and seen.verdict:
        yield Verdict(seen.verdict_kind, seen.verdict)
    if found.calibration and found.calibration.verdict:
        yield Verdict(found.calibration.verdict_kind or "fair", found.calibration.verdict)


def _row(name: str, found: Mean, bound: bool = False) -> str:
    sign = "≥" if bound else " "
    return f"  {name:<39} {sign} {number(found.mean)} ± {number(found.standard_error)}"


def _over_data(name: str, found: Mean) -> str:
    return f"{_row(name, found)} over data"


def _estimate(name: str, found: Evidence, bound: bool) -> str:
    told = _row(name, found, bound)
    return f"{told} Monte Carlo, ± {number(found.data_standard_error)} over data"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 98, initial_indent="  ", subsequent_indent="  ")
