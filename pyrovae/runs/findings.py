"""What estimates say of a split, in numbers ready for JSON: nats per datum."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyrovae.evidence.result import LogLikelihood, compare_log_likelihood
from pyrovae.objectives import ElboResult
from pyrovae.runs.per_datum import first_data

__all__ = ["annealing_found", "estimates_found", "known"]


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
        found["amortization_gap"] = {"mean": gap.mean().item(), "standard_error": _error(gap)}
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


def _error(each: Tensor) -> float:
    return (each.std() / len(each) ** 0.5).item()
