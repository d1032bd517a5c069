"""The record of results: what an evaluation of a run found on a split.

:class:`Results` are the means that ``results.json`` holds, :class:`Finding` has the values of each
datum as well. They are written here, and read here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from pyrovae._tools import standard_error
from pyrovae._tools.files import reading
from pyrovae.diagnostics import Diagnosis
from pyrovae.evidence.result import HEAVY, Curve, LogLikelihood, Verdict, compare_log_likelihood
from pyrovae.objectives.elbo import ElboResult
from pyrovae.runs import Run

# The estimator whose two parts are rate and distortion: its KL is exact where it can be.
BOUND = "trace_mean_field_elbo"
# The parts of results that are records if they are there, and of these parts the same.
PARTS = ("elbo", "log_likelihood", "amortization_gap", "annealed", "bidirectional", "diagnostics")
INNER = ("rate", "distortion", "sites", "curve", "over_importance_sampling")
# What is text in an estimate. All else that is no tensor is written as JSON.
TEXTS = ("method", "data")


def number(value: float | None) -> str:
    """Three decimals, or what stands for a number that is not known."""
    return "unknown" if value is None else f"{value:.3f}"


class Record(dict[str, Any]):
    """A JSON object whose entries are attributes as well; one that is missing is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)

    def __str__(self) -> str:
        """Of a mean over data: the mean, and its error if it is known."""
        error = self.standard_error
        return number(self.mean) + ("" if error is None else f" ± {number(error)}")


class Results(Record):
    """What an evaluation found on a split, in nats per datum.

    ``elbo`` has both estimators; ``kl`` and ``reconstruction`` are the parts of estimator B, the
    rate and the negative distortion. ``log_likelihood`` and ``annealed`` are estimates of log p(x)
    whose standard errors are Monte Carlo errors. ``weights`` are those of the run when it was
    evaluated. What was not asked for is missing.
    """

    @classmethod
    def of(
        cls,
        ll: LogLikelihood,
        bounds: Mapping[str, ElboResult],
        *,
        annealed: LogLikelihood | None = None,
        bidirectional: Mapping[str, Any] | None = None,
        diagnosis: Diagnosis | None = None,
        **about: Any,
    ) -> Self:
        """An estimate of log p(x), and the ELBO by the estimators' names, of the same data.

        ``about`` are entries that say of which data and weights.
        """
        gap, closed = ll.amortization_gap, bounds[BOUND]
        parts = {
            "amortization_gap": None if gap is None else _mean(gap),
            "annealed": None if annealed is None else _annealed(annealed, ll),
            "bidirectional": bidirectional,
            "diagnostics": None if diagnosis is None else _posterior(diagnosis, closed),
        }
        found = {
            "verdict": ll.verdict,
            "verdict_kind": ll.verdict.kind,
            "num_data": len(ll.log_prob),
            "units": "nats per datum",
            "data": ll.data,
            **about,
            "elbo": {name: _mean(bound.elbo) for name, bound in bounds.items()},
            "reconstruction": closed.reconstruction.double().mean().item(),
            "kl": closed.kl.double().mean().item(),
            "log_likelihood": _estimate(ll),
        }
        return cls.read(found | {name: part for name, part in parts.items() if part is not None})

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Self:
        """The results that ``results.json`` holds of a split, or that it is to hold."""
        results = cls(_record(found))
        results.setdefault("elbo", Record())
        parts = [results[name] for name in PARTS if name in results]
        inner = {n: each for part in parts for n, each in part.items() if n in INNER and each}
        records = (*results.elbo.values(), *inner.values(), *inner.get("sites", {}).values())
        if not all(isinstance(each, Record) for each in records):
            raise TypeError("a part of it is no JSON object")
        return results

    @property
    def verdict(self) -> Verdict:
        """Whether log p(x) can be trusted."""
        return Verdict(self.verdict_kind or "fair", self.get("verdict", ""))

    @property
    def bound(self) -> Record | None:
        """The ELBO by estimator B, or else by A."""
        return self.elbo.get(BOUND) or self.elbo.get("trace_elbo")

    @property
    def heavy(self) -> float | None:
        """The share of the data with a k-hat above 0.7, if it is known."""
        return (self.log_likelihood or {}).get("khat_over_0.7")

    @property
    def rate(self) -> Record:
        """The rate, with its error if it is known."""
        return (self.diagnostics or {}).get("rate") or Record(mean=self.kl)

    @property
    def distortion(self) -> Record:
        """The distortion, with its error if it is known."""
        lost = None if self.reconstruction is None else -self.reconstruction
        return (self.diagnostics or {}).get("distortion") or Record(mean=lost)

    @property
    def active_units(self) -> tuple[int, int]:
        """How many latent units depend on the data, of how many; of none if that is not known."""
        sites = ((self.diagnostics or {}).get("sites") or {}).values()
        return sum(site.active_units for site in sites), sum(site.units for site in sites)


class Finding(NamedTuple):
    """The means, the rows of the training, and what was found of each datum.

    ``elbo`` ``[N]`` is that of estimator B.
    """

    results: Results
    history: Sequence[Mapping[str, Any]]
    log_likelihood: LogLikelihood
    annealed: LogLikelihood | None
    elbo: Tensor


def load_results(run: Run) -> dict[str, Results]:
    """What evaluations of a run have found, by split."""
    with reading(run.path / "results.json"):
        return {split: Results.read(found) for split, found in run.results.items()}


def load_finding(run: Run, split: str | None = None) -> Finding | None:
    """What an evaluation found on a split, by default on the test data if on those; or None."""
    results = load_results(run)
    split = split or next((s for s in ("test", "valid", "train") if s in results), "")
    values = run.load_values(split) if split in results else None
    if values is None:
        return None
    with reading(run.path / "evaluation"):
        ll, annealed = from_tensors(*values), from_tensors(*values, "annealed.")
        elbo = values[0]["elbo"]
    return Finding(results[split], run.history(), ll, annealed, elbo) if ll else None


def save_finding(run: Run, split: str, found: Finding) -> None:
    """Write what an evaluation found: the values of each datum, and then the means."""
    tensors, about = {"elbo": found.elbo}, {"weights": found.results.weights or "", "units": "nats"}
    for prefix, ll in (("", found.log_likelihood), ("annealed.", found.annealed)):
        if ll is not None:
            values = {n: v for n, v in vars(ll).items() if isinstance(v, Tensor)}
            texts = {n: v for n, v in vars(ll).items() if n not in values and v is not None}
            if ll.curve is not None:
                texts["curve"], values["curve"] = ll.curve
            tensors |= {prefix + n: v for n, v in values.items()}
            about |= {prefix + n: v if n in TEXTS else json.dumps(v) for n, v in texts.items()}
    run.save_values(split, tensors, about)
    run.write_json("results.json", run.results | {split: found.results})


def from_tensors(
    tensors: dict[str, Tensor], about: dict[str, str], prefix: str = ""
) -> LogLikelihood | None:
    """The estimate that a run's values have under a prefix, if they have one."""
    if prefix + "log_prob" not in tensors:
        return None
    names = [each.name for each in fields(LogLikelihood)]
    texts = {name: about[prefix + name] for name in names if prefix + name in about}
    parts: dict[str, Any] = {n: t if n in TEXTS else json.loads(t) for n, t in texts.items()}
    points = tuple(parts.pop("curve", ()))
    parts |= {name: tensors[prefix + name] for name in names if prefix + name in tensors}
    if points:
        parts["curve"] = Curve(points, parts["curve"])
    return LogLikelihood(**parts)


def first_data(ll: LogLikelihood, n: int) -> LogLikelihood:
    """The estimate for the first n data alone, without their digest."""
    parts: dict[str, Any] = {k: v[:n] for k, v in vars(ll).items() if isinstance(v, Tensor)}
    curve = ll.curve and Curve(ll.curve.num_samples, ll.curve.log_prob[:, :n])
    return replace(ll, **parts, curve=curve, data="")


def _record(value: Any) -> Any:
    """A value as JSON has it: None for NaN and infinity, and records for mappings."""
    if isinstance(value, Mapping):
        return Record({str(name): _record(part) for name, part in value.items()})
    if isinstance(value, list | tuple):
        return [_record(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mean(each: Tensor) -> dict[str, float]:
    """The mean of values ``[N]`` with its error over data."""
    each = each.double()
    return {"mean": each.mean().item(), "standard_error": standard_error(each).item()}


def _estimate(ll: LogLikelihood) -> dict[str, Any]:
    """The means over data of an estimate of log p(x)."""
    heavy = (ll.khat > HEAVY).double().where(~ll.khat.isnan(), torch.nan)
    return {
        "mean": ll.mean,
        "standard_error": ll.mean_standard_error,
        "data_standard_error": ll.data_standard_error,
        "method": ll.method,
        "seed": ll.seed,
        "ess_median": ll.ess.median().item(),
        "num_samples": ll.num_samples,
        "khat_median": ll.khat.median().item(),
        "khat_over_0.7": heavy.mean().item(),
        "smoothed_mean": ll.smoothed_mean,
        "mean_bias": ll.mean_bias,
        "uncovered": ll.uncovered,
        "curve": {} if ll.curve is None else ll.curve.mean,
    }


def _annealed(ais: LogLikelihood, ll: LogLikelihood) -> dict[str, Any]:
    """The means over data of an annealed estimate, and what it has over another."""
    n = len(ais.log_prob)
    found = _estimate(ais) | {
        "verdict": ais.verdict,
        "num_data": n,
        "num_chains": ais.num_samples,
        "acceptance": None if ais.acceptance is None else ais.acceptance.mean().item(),
    }
    if n > 1:
        over = compare_log_likelihood(replace(ais, data=""), first_data(ll, n))
        error = over.monte_carlo_standard_error
        found["over_importance_sampling"] = {"mean": over.difference, "standard_error": error}
    return found


def _posterior(found: Diagnosis, bound: ElboResult) -> dict[str, Any]:
    """A diagnosis, whose rate and distortion are the two parts of the ELBO beside it."""
    bits = found.bits_per_dimension
    if bits is not None:
        bits *= (bound.elbo.double().mean() / found.elbo.double().mean()).item()
    rate, distortion = bound.kl, -bound.reconstruction
    found = replace(found, rate=rate, distortion=distortion, bits_per_dimension=bits)
    return found.summary()
