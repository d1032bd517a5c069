"""What an evaluation found, in a few lines of text."""

from __future__ import annotations

import textwrap
from typing import Any

from pyrovae.objectives import ESTIMATORS
from pyrovae.runs.results import number

__all__ = ["summarize"]

NAMES = {"trace_elbo": "A (Trace_ELBO)", "trace_mean_field_elbo": "B (TraceMeanField_ELBO)"}


def summarize(found: dict[str, Any], split: str) -> str:
    """The lines that ``pyrovae evaluate`` prints of a split's results."""
    ll, n, of = found["log_likelihood"], found["num_data"], found["num_data_of_split"]
    some = "" if n == of else f"the first {n} of "
    bounds = [
        _row(f"ELBO, estimator {NAMES[name]}", found["elbo"][name]["mean"])
        + f" ± {number(found['elbo'][name]['standard_error'])} over data"
        for name in ESTIMATORS
    ]
    lines = [
        f"{split}, {some}{of} data, nats per datum (higher is better)",
        *bounds,
        _estimate(f"log p(x), K = {ll['num_samples']}", ll),
        f"  {_khat(ll['khat_over_0.7'])}; median effective sample size "
        f"{ll['ess_median'] or 0:.0f} of {ll['num_samples']}",
        _wrapped(found["verdict"]),
    ]
    lines += _gap(found) + _annealed(found) + _posterior(found)
    return "\n".join(lines)


def _gap(found: dict[str, Any]) -> list[str]:
    if not (gap := found.get("amortization_gap")):
        return []
    return [_row("amortization gap", gap["mean"]) + f" ± {number(gap['standard_error'])} over data"]


def _annealed(found: dict[str, Any]) -> list[str]:
    if not (ais := found.get("annealed")):
        return []
    lines = [_estimate(f"log p(x), {ais['num_chains']} chains, {ais['num_data']} data", ais)]
    if over := ais.get("over_importance_sampling"):
        lines.append(
            _row("  over importance sampling on these", over["mean"])
            + f" ± {number(over['standard_error'])} Monte Carlo"
        )
    return [*lines, _wrapped(f"{ais['verdict']} {found['bidirectional']['verdict']}")]


def _posterior(found: dict[str, Any]) -> list[str]:
    if not (seen := found.get("diagnostics")):
        return []
    parts = [
        _row(name, seen[key]["mean"]) + f" ± {number(seen[key]['standard_error'])} over data"
        for name, key in (("rate, KL(q(z|x) ‖ p(z))", "rate"), ("distortion", "distortion"))
    ]
    return [*parts, _wrapped(seen["verdict"])]


def _row(name: str, mean: float | None) -> str:
    return f"  {name:<39}  {number(mean)}"


def _estimate(name: str, found: dict[str, Any]) -> str:
    return (
        f"{_row(name, found['mean'])} ± {number(found['standard_error'])} Monte Carlo, "
        f"± {number(found['data_standard_error'])} over data"
    )


def _khat(share: float | None) -> str:
    if share is None:
        return "k-hat needs more samples"
    return f"k-hat > 0.7 for {share:.1%} of the data"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 98, initial_indent="  ", subsequent_indent="  ")
