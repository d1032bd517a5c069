"""The pictures of what evaluations found, of one run or of several side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyrovae.evidence.result import LogLikelihood
from pyrovae.report.evidence_figures import bound_curves, khat_curves
from pyrovae.report.pictures import png
from pyrovae.report.posterior_figures import calibration_curves, kl_by_dimension, rate_distortion
from pyrovae.runs.results import Finding

__all__ = ["FINDING_PICTURES", "draw_findings", "end_point"]

FINDING_PICTURES = ("bound_curve", "khat", "rate_distortion", "kl_by_dimension", "calibration")


def draw_findings(findings: Mapping[str, Finding], *, joined: bool = False) -> dict[str, bytes]:
    """Draw what there is to draw, as PNG by name.

    Args:
        findings: Evaluations on the same data by the runs' names; the KL by dimension is drawn
            for one alone, and an annealed estimate where there is one and it is of all data.
        joined: The runs lie on one curve over β.
    """
    estimates = {n: f.log_likelihood for n, f in findings.items() if f.log_likelihood is not None}
    points = {name: end for name, f in findings.items() if (end := end_point(f.results))}
    paths = {name: f.history for name, f in findings.items()}
    seen = {name: f.results.get("diagnostics") or {} for name, f in findings.items()}
    covered = {name: each["calibration"] for name, each in seen.items() if each.get("calibration")}
    drawn = {
        "bound_curve": lambda: bound_curves(estimates, _level(findings)),
        "khat": lambda: khat_curves(estimates),
        "rate_distortion": lambda: rate_distortion(points, paths, joined=joined),
        "calibration": lambda: calibration_curves(covered),
    }
    there = {"rate_distortion": points, "calibration": covered}
    if len(seen) == 1:
        sites = next(iter(seen.values())).get("sites") or {}
        drawn["kl_by_dimension"] = lambda: kl_by_dimension(sites)
        there["kl_by_dimension"] = {n: s for n, s in sites.items() if s.get("kl")}
    there["bound_curve"] = {n: e for n, e in estimates.items() if e.curve is not None}
    there["khat"] = {n: e for n, e in estimates.items() if bool(e.khat.isfinite().any())}
    return {name: png(draw()) for name, draw in drawn.items() if there[name]}


def end_point(results: Mapping[str, Any]) -> dict[str, dict[str, float | None]] | None:
    """Rate and distortion of an evaluation with their errors over data, if they are known."""
    seen = results.get("diagnostics") or {}
    if "rate" in seen and "distortion" in seen:
        found = {key: seen[key] for key in ("rate", "distortion")}
    else:
        lost = results.get("reconstruction")
        found = {
            "rate": {"mean": results.get("kl")},
            "distortion": {"mean": None if lost is None else -lost},
        }
    return None if None in (each["mean"] for each in found.values()) else found


def _level(findings: Mapping[str, Finding]) -> LogLikelihood | None:
    (first, *others) = findings.values()
    if others or first.annealed is None or first.log_likelihood is None:
        return None
    same = len(first.annealed.log_prob) == len(first.log_likelihood.log_prob)
    return first.annealed if same else None
