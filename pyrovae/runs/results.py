"""What an evaluation of a run found: means ready for JSON, and values of each datum."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae._tools import InputError, standard_error
from pyrovae.evidence.result import Curve, LogLikelihood, compare_log_likelihood
from pyrovae.objectives import ElboResult
from pyrovae.runs import Run

__all__ = [
    "Finding",
    "annealing_found",
    "estimates_found",
    "first_data",
    "from_tensors",
    "known",
    "load_finding",
    "number",
    "to_tensors",
]

ALWAYS = ("log_prob", "standard_error", "ess", "khat")
SOMETIMES = ("smoothed", "guide_elbo", "acceptance")


class Finding(NamedTuple):
    """A run's evaluation: its results, what it found of each datum, and the training before."""

    results: Mapping[str, Any]
    log_likelihood: LogLikelihood | None
    annealed: LogLikelihood | None
    history: Sequence[Mapping[str, Any]]


def load_finding(run: Run, split: str | None = None) -> Finding | None:
    """What an evaluation found; None if there is none.

    Args:
        run: The run.
        split: The split; None is the test data, or else the first there is of the others.
    """
    results = run.results
    split = split or next((s for s in ("test", "valid", "train") if s in results), None)
    if split not in results:
        return None
    values = run.load_values(split)
    estimates = [values and from_tensors(*values, prefix) for prefix in ("", "annealed.")]
    return Finding(results[split], *estimates, run.history())


def number(value: float | None) -> str:
    """Three decimals, or what stands for a number that is not known."""
    return "unknown" if value is None else f"{value:.3f}"


def to_tensors(ll: LogLikelihood, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Everything that an estimate holds: tensors ``[..., N]`` by name, and texts by name.

    Args:
        ll: The estimate.
        prefix: What all names begin with, so that several estimates can share a file.
    """
    found = {n: v for n in (*ALWAYS, *SOMETIMES) if (v := getattr(ll, n)) is not None}
    points: tuple[int, ...] = ()
    if ll.curve is not None:
        points, found["curve"] = ll.curve
    about = {
        "data": ll.data,
        "seed": json.dumps(ll.seed),
        "num_samples": str(ll.num_samples),
        "method": ll.method,
        "curve": json.dumps(list(points)),
        "uncovered": str(ll.uncovered),
        "units": "nats",
    }
    return {prefix + n: v for n, v in found.items()}, {prefix + n: v for n, v in about.items()}


def from_tensors(
    tensors: dict[str, Tensor], about: dict[str, str], prefix: str = ""
) -> LogLikelihood | None:
    """The estimate that :func:`to_tensors` took apart; None if there is none of that prefix.

    Raises:
        ValueError: If a part of it is missing.
    """
    if prefix + "log_prob" not in tensors:
        return None
    try:
        points = tuple(json.loads(about[prefix + "curve"]))
        return LogLikelihood(
            **{name: tensors[prefix + name] for name in ALWAYS},
            **{name: tensors.get(prefix + name) for name in SOMETIMES},
            num_samples=int(about[prefix + "num_samples"]),
            curve=Curve(points, tensors[prefix + "curve"]) if points else None,
            method=about[prefix + "method"],
            seed=json.loads(about[prefix + "seed"]),
            data=about[prefix + "data"],
            uncovered=float(about[prefix + "uncovered"]),
        )
    except KeyError as error:
        raise InputError(f"Expected an estimate of log p(x), found none of its {error}.") from error


def first_data(ll: LogLikelihood, n: int) -> LogLikelihood:
    """The estimate for the first n data alone, without their digest."""
    parts = {k: v[:n] for k in (*ALWAYS, *SOMETIMES) if (v := getattr(ll, k)) is not None}
    curve = ll.curve and Curve(ll.curve.num_samples, ll.curve.log_prob[:, :n])
    return replace(ll, **parts, curve=curve, data="")


def estimates_found(ll: LogLikelihood, bounds: dict[str, ElboResult]) -> dict[str, Any]:
    """An estimate of log p(x), and the bounds by both estimators, of the same data."""
    closed = bounds["trace_mean_field_elbo"]
    found = {
        "verdict": ll.verdict,
        "num_data": len(ll.log_prob),
        "units": "nats per datum",
        "data": ll.data,
        "elbo": {
            name: {"mean": bound.mean, "standard_error": bound.standard_error}
            for name, bound in bounds.items()
        },
        "reconstruction": closed.reconstruction.double().mean().item(),
        "kl": closed.kl.double().mean().item(),
        "log_likelihood": _numbers(ll)
        | {
            "num_samples": ll.num_samples,
            "khat_median": ll.khat.median().item(),
            "khat_over_0.7": _share(ll.khat, 0.7),
            "smoothed_mean": ll.smoothed_mean,
            "mean_bias": ll.mean_bias,
            "uncovered": ll.uncovered,
            "curve": {str(k): mean for k, mean in ll.curve.mean.items()},
        },
    }
    if ll.amortization_gap is not None:
        gap = ll.amortization_gap.double()
        found["amortization_gap"] = {
            "mean": gap.mean().item(),
            "standard_error": standard_error(gap).item(),
        }
    return known(found)


def _numbers(ll: LogLikelihood) -> dict[str, Any]:
    return {
        "mean": ll.mean,
        "standard_error": ll.mean_standard_error,
        "data_standard_error": ll.data_standard_error,
        "method": ll.method,
        "seed": ll.seed,
        "ess_median": ll.ess.median().item(),
    }


def annealing_found(ais: LogLikelihood, ll: LogLikelihood) -> dict[str, Any]:
    """The annealed estimate, and what it has over importance sampling on the same data."""
    n = len(ais.log_prob)
    found = _numbers(ais) | {"verdict": ais.verdict, "num_data": n, "num_chains": ais.num_samples}
    found["acceptance"] = ais.acceptance.mean().item()
    if n > 1:
        over = compare_log_likelihood(replace(ais, data=""), first_data(ll, n))
        error = over.monte_carlo_standard_error
        found["over_importance_sampling"] = {"mean": over.difference, "standard_error": error}
    return known(found)


def known(value: Any) -> Any:
    """A value as JSON knows it: no NaN and no infinity, but None."""
    if isinstance(value, dict):
        return {name: known(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [known(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _share(khat: Tensor, bound: float) -> float:
    nan = torch.tensor(math.nan, dtype=torch.float64, device=khat.device)
    return khat.gt(bound).double().where(~khat.isnan(), nan).mean().item()
