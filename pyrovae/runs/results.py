"""The record of results: what an evaluation of a run found on a split.

:class:`Results` are the means that ``results.json`` holds, :class:`Finding` has the values of each
datum as well. They are written here, and read here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple, Self

import msgspec
import torch
from msgspec import Struct
from torch import Tensor

from pyrovae._tools import standard_error
from pyrovae._tools.files import locked, plain_json, reading, sealed, typed
from pyrovae._tools.shown import number, plus_minus
from pyrovae.diagnostics import Diagnosis
from pyrovae.evidence.result import (
    FEW,
    HEAVY,
    HEAVY_SHARE,
    Curve,
    Kind,
    LogLikelihood,
    Verdict,
    headline,
)
from pyrovae.evidence.result import compare_log_likelihood as compare
from pyrovae.objectives.elbo import ElboResult
from pyrovae.runs import Run
from pyrovae.runs.config import SPLITS

# The estimator whose two parts are rate and distortion: its KL is exact where it can be.
BOUND = "trace_mean_field_elbo"
# A rise of the curve at its end that counts: a tenth of a nat is what papers print.
STEEP = 0.1
# What is text in an estimate. All else that is no tensor is written as JSON.
TEXTS = ("method", "data")


class Mean(Struct, kw_only=True, frozen=True):
    """A mean over data, nats per datum, and its standard error; None where it is not known."""

    mean: float | None = None
    standard_error: float | None = None

    def __str__(self) -> str:
        """The mean, and its error if it is known."""
        return number(self.mean) + plus_minus(self.standard_error)


class Evidence(Mean, kw_only=True, frozen=True):
    """An estimate of log p(x), whose ``standard_error`` is its Monte Carlo error.

    ``heavy`` is the share of the data with a k-hat above 0.7, ``curve`` the bound by number of
    samples. The others are means or medians of what :class:`LogLikelihood` has of each datum.
    """

    data_standard_error: float | None = None
    method: str = ""
    seed: int | None = None
    ess_median: float | None = None
    num_samples: int = 0
    khat_median: float | None = None
    heavy: float | None = msgspec.field(default=None, name="khat_over_0.7")
    smoothed_mean: float | None = None
    mean_bias: float | None = None
    uncovered: float | None = None
    curve: dict[int, float | None] = {}  # msgspec gives each record a dictionary of its own

    @property
    def last_rise(self) -> tuple[int, int, float] | None:
        """The last two numbers of samples of a curve of three or more, and its rise between."""
        known = sorted((k, bound) for k, bound in self.curve.items() if bound is not None)
        if len(known) < 3:
            return None
        (few, low), (many, high) = known[-2:]
        return few, many, high - low

    @property
    def is_bound(self) -> bool:
        """Whether k-hat, the curve or the effective samples say no more than a lower bound.

        So it is where the samples are too few for a k-hat.
        """
        few = (self.ess_median or 0.0) < min(FEW, self.num_samples / 2)
        heavy = self.heavy is None or self.heavy > HEAVY_SHARE
        return few or heavy or bool(self.last_rise and self.last_rise[2] > STEEP)


class Annealed(Evidence, kw_only=True, frozen=True):
    """An annealed estimate of the first data, and what it has over importance sampling of them."""

    verdict: str = ""
    verdict_kind: Kind = "fair"
    num_data: int = 0
    num_chains: int = 0
    acceptance: float | None = None
    over_importance_sampling: Mean | None = None

    @property
    def is_bound(self) -> bool:
        """Whether few chains make up the sum, or the mean has a bias beyond its error."""
        return self.verdict_kind == "doubtful"

    @property
    def finds_more(self) -> bool:
        """Whether it is above importance sampling of the same data by what matters."""
        over = self.over_importance_sampling or Mean()
        # Below 0.05 nats a difference hides in what papers print, however sure it is.
        return (over.mean or 0.0) > max(2 * (over.standard_error or 0.0), 0.05)


class Sandwich(Struct, kw_only=True, frozen=True):
    """How far annealing can be too low, on data of the model's own."""

    verdict: str = ""
    num_data: int | None = None
    gap: Mean | None = None


class GuideCalibration(Struct, kw_only=True, frozen=True):
    """What :meth:`pyrovae.diagnostics.PosteriorCalibration.summary` has."""

    verdict: str = ""
    verdict_kind: Kind = "fair"
    num_data: int = 0
    num_samples: int = 0
    seed: int | None = None
    shape: str = ""
    corrected_shape: str | None = None
    tests: dict[str, list[dict[str, Any]]] = {}
    reliability_error: dict[str, float | None] = {}
    curves: dict[str, dict[str, list[float]]] = {}


class Site(Struct, kw_only=True, frozen=True):
    """The posterior of a latent site, as :class:`~pyrovae.diagnostics.result.SiteDiagnosis`."""

    kl: list[float | None] = []
    kl_total: float | None = None
    active_units: int = 0
    units: int = 0
    posterior_mean_variance: list[float | None] = []
    factorized: bool = False


class Coverage(Struct, kw_only=True, frozen=True):
    """The coverage of the likelihood's central intervals, by their level."""

    levels: list[float]
    coverage: list[float | None]
    standard_error: list[float | None]


class Posterior(Struct, kw_only=True, frozen=True):
    """What the posterior does, as :meth:`Diagnosis.summary` has it; a rate is None if unknown."""

    num_data: int | None = None
    elbo: Mean = Mean()
    rate: Mean | None = None
    distortion: Mean | None = None
    sites: dict[str, Site] = {}
    mutual_information: Mean = Mean()
    marginal_kl: float | None = None
    remainder: float | None = None
    calibration: Coverage | None = None
    probe: dict[str, dict[str, float | None]] | None = None
    bits_per_dimension: float | None = None
    verdict: str = ""
    verdict_kind: Kind = "fair"


class Results(Struct, kw_only=True, frozen=True):
    """What an evaluation found on a split, in nats per datum.

    ``elbo`` has both estimators; ``kl`` and ``reconstruction`` are the parts of estimator B, the
    rate and the negative distortion. ``log_likelihood`` and ``annealed`` are estimates of log p(x).
    ``weights`` are those of the run when it was evaluated, ``run`` is its identity. ``densities``
    are the observed sites whose values are no whole numbers: log p(x) of these is a density's. What
    was not asked for is None.
    """

    words: str = msgspec.field(default="", name="verdict")
    verdict_kind: Kind = "fair"
    num_data: int | None = None
    densities: list[str] | None = None
    num_data_of_split: int | None = None
    units: str = "nats per datum"
    data: str = ""
    binarize: str | None = None
    weights: str | None = None
    run: str = ""
    elbo: dict[str, Mean] = {}
    reconstruction: float | None = None
    kl: float | None = None
    log_likelihood: Evidence | None = None
    amortization_gap: Mean | None = None
    annealed: Annealed | None = None
    bidirectional: Sandwich | None = None
    calibration: GuideCalibration | None = None
    diagnostics: Posterior | None = None
    sha256: str = ""

    @classmethod
    def of(
        cls,
        ll: LogLikelihood,
        bounds: Mapping[str, ElboResult],
        *,
        annealed: LogLikelihood | None = None,
        bidirectional: Sandwich | None = None,
        calibration: GuideCalibration | None = None,
        diagnosis: Diagnosis | None = None,
        **about: Any,
    ) -> Self:
        """An estimate of log p(x), and the ELBO by the estimators' names, of the same data.

        ``about`` are entries that say of which data and weights.
        """
        gap, closed = ll.amortization_gap, bounds[BOUND]
        found = cls(
            words=str(ll.verdict),
            verdict_kind=ll.verdict.kind,
            num_data=len(ll.log_prob),
            data=ll.data,
            elbo={name: _mean(bound.elbo) for name, bound in bounds.items()},
            reconstruction=closed.reconstruction.double().mean().item(),
            kl=closed.kl.double().mean().item(),
            log_likelihood=Evidence(**_estimate(ll)),
            amortization_gap=None if gap is None else _mean(gap),
            annealed=None if annealed is None else _annealed(annealed, ll),
            bidirectional=bidirectional,
            calibration=calibration,
            diagnostics=None if diagnosis is None else _posterior(diagnosis, closed),
            **about,
        )
        return cls.read(sealed(plain_json(found)))

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Self:
        """The results that ``results.json`` holds of a split; ValueError if they are none."""
        return typed(found, cls)

    @property
    def verdict(self) -> Verdict:
        """Whether log p(x) can be trusted."""
        return Verdict(self.verdict_kind, self.words)

    @property
    def is_bound(self) -> bool:
        """Whether the mean log p(x) is, for all that is known, but a lower bound."""
        ll, ais = self.log_likelihood, self.annealed
        doubted = self.verdict_kind == "doubtful" or bool(ais and ais.finds_more)
        return doubted or ll is None or ll.is_bound

    @property
    def headline(self) -> str:
        """The mean log p(x) with both of its errors, or ≥ it, in nats per datum."""
        ll = self.log_likelihood or Evidence()
        return headline(ll.mean, ll.standard_error, ll.data_standard_error, bound=self.is_bound)

    @property
    def bound(self) -> Mean | None:
        """The ELBO by estimator B, or else by A."""
        return self.elbo.get(BOUND) or self.elbo.get("trace_elbo")

    @property
    def heavy(self) -> float | None:
        """The share of the data with a k-hat above 0.7, if it is known."""
        return self.log_likelihood.heavy if self.log_likelihood else None

    @property
    def rate(self) -> Mean:
        """The rate, with its error if it is known."""
        return (self.diagnostics and self.diagnostics.rate) or Mean(mean=self.kl)

    @property
    def distortion(self) -> Mean:
        """The distortion, with its error if it is known."""
        lost = None if self.reconstruction is None else -self.reconstruction
        return (self.diagnostics and self.diagnostics.distortion) or Mean(mean=lost)

    @property
    def active_units(self) -> tuple[int, int]:
        """How many latent units depend on the data, of how many; of none if that is not known."""
        sites = self.diagnostics.sites.values() if self.diagnostics else ()
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
    """What evaluations of a run have found, by split.

    A split that ``results.json`` lacks was being written when its process was killed: its values
    of each datum hold the means as well.
    """
    results = _read_results(run)
    for split in set(SPLITS) - results.keys():
        told = (run.load_values(split) or ({}, {}))[1].get("results")
        if told is not None:
            path = run.file(f"evaluation/{split}.safetensors")
            with reading(path):
                results[split] = found = Results.read(msgspec.json.decode(told))
            run.require_own(path, found.run, found.sha256)
    return results


def _read_results(run: Run) -> dict[str, Results]:
    path = run.file("results.json")
    if not path.exists():
        return {}
    with reading(path):
        results = {split: Results.read(found) for split, found in run.read_json(path.name).items()}
    for found in results.values():
        run.require_own(path, found.run, found.sha256)
    return results


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
        if ll is not None and len(elbo) != len(ll.log_prob):
            raise ValueError(f"it has {len(elbo)} values of the ELBO and {len(ll.log_prob)} others")
    return Finding(results[split], run.history(), ll, annealed, elbo) if ll else None


def save_finding(run: Run, split: str, found: Finding) -> None:
    """Write what an evaluation found: the values of each datum with the means, then those alone.

    The means of an earlier evaluation go first, so that they never stand beside other values.
    """
    tensors, about = {"elbo": found.elbo}, {"weights": found.results.weights or "", "units": "nats"}
    means = plain_json(found.results)
    about["results"] = json.dumps(means)
    for prefix, ll in (("", found.log_likelihood), ("annealed.", found.annealed)):
        if ll is not None:
            values = {n: v for n, v in vars(ll).items() if isinstance(v, Tensor)}
            texts = {n: v for n, v in vars(ll).items() if n not in values and v is not None}
            if ll.curve is not None:
                texts["curve"], values["curve"] = ll.curve
            tensors |= {prefix + n: v for n, v in values.items()}
            about |= {prefix + n: v if n in TEXTS else json.dumps(v) for n, v in texts.items()}
    held = f"{run.path} is being written by another process."
    with locked(run.file(".results.lock"), held, wait=True):
        others = run.read_json("results.json") if _read_results(run) else {}
        if others.pop(split, None) is not None:
            run.write_json("results.json", others)
        run.save_values(split, tensors, about)
        run.write_json("results.json", others | {split: means})


def from_tensors(
    tensors: dict[str, Tensor], about: dict[str, str], prefix: str = ""
) -> LogLikelihood | None:
    """The estimate that a run's values have under a prefix, if they have one."""
    if prefix + "log_prob" not in tensors:
        return None
    names = [each.name for each in fields(LogLikelihood)]
    texts = {name: about[prefix + name] for name in names if prefix + name in about}
    parts: dict[str, Any] = {n: t if n in TEXTS else json.loads(t) for n, t in texts.items()}
    points = parts.pop("curve", None)
    values = {name: tensors[prefix + name] for name in names if prefix + name in tensors}
    n = len(values["log_prob"])
    expected = {name: [n] for name in values} | ({"curve": [len(points), n]} if points else {})
    if (shapes := {name: list(part.shape) for name, part in values.items()}) != expected:
        raise ValueError(f"Expected values of shapes {expected}, got {shapes}")
    if points:
        parts["curve"] = points, values.pop("curve")
    return msgspec.convert(parts | values, LogLikelihood)


def first_data(ll: LogLikelihood, n: int) -> LogLikelihood:
    """The estimate for the first n data alone, without their digest."""
    parts: dict[str, Any] = {k: v[:n] for k, v in vars(ll).items() if isinstance(v, Tensor)}
    curve = ll.curve and Curve(ll.curve.num_samples, ll.curve.log_prob[:, :n])
    return replace(ll, **parts, curve=curve, data="")


def _mean(each: Tensor) -> Mean:
    """The mean of values ``[N]`` with its error over data."""
    each = each.double()
    return Mean(mean=each.mean().item(), standard_error=standard_error(each).item())


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
        "heavy": heavy.mean().item(),
        "smoothed_mean": ll.smoothed_mean,
        "mean_bias": ll.mean_bias,
        "uncovered": ll.uncovered,
        "curve": {} if ll.curve is None else ll.curve.mean,
    }


def _annealed(ais: LogLikelihood, ll: LogLikelihood) -> Annealed:
    """The means over data of an annealed estimate, and what it has over another."""
    n, over = len(ais.log_prob), None
    if n > 1:
        found = compare(replace(ais, data=""), first_data(ll, n))
        over = Mean(mean=found.difference, standard_error=found.monte_carlo_standard_error)
    return Annealed(
        **_estimate(ais),
        verdict=str(ais.verdict),
        verdict_kind=ais.verdict.kind,
        num_data=n,
        num_chains=ais.num_samples,
        acceptance=None if ais.acceptance is None else ais.acceptance.mean().item(),
        over_importance_sampling=over,
    )


def _posterior(found: Diagnosis, bound: ElboResult) -> Posterior:
    """A diagnosis, whose rate and distortion are the two parts of the ELBO beside it."""
    bits = found.bits_per_dimension
    if bits is not None:
        bits *= (bound.elbo.double().mean() / found.elbo.double().mean()).item()
    rate, distortion = bound.kl, -bound.reconstruction
    found = replace(found, rate=rate, distortion=distortion, bits_per_dimension=bits)
    return msgspec.convert(found.summary(), Posterior)
