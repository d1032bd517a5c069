"""The record of results: what an evaluation of a run found on a split.

:class:`Results` are the means that ``results.json`` holds, :class:`Finding` has the values of each
datum as well. They are written here, and read here: nothing else knows the files' keys.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, NamedTuple, Self, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from pyrovae._tools import standard_error
from pyrovae._tools.files import reading
from pyrovae.diagnostics import Diagnosis
from pyrovae.evidence.result import (
    HEAVY,
    HEAVY_SHARE,
    Curve,
    Kind,
    LogLikelihood,
    Verdict,
    compare_log_likelihood,
)
from pyrovae.objectives.elbo import ElboResult
from pyrovae.runs import Run

# What an estimate holds of each datum, and how the rest of it is read from text.
PER_DATUM = (
    "log_prob", "standard_error", "ess", "khat", "smoothed", "guide_elbo", "acceptance",
)  # fmt: skip
TEXTS: dict[str, Callable] = {
    "num_samples": int,
    "method": str,
    "seed": json.loads,
    "data": str,
    "uncovered": float,
}
# The estimator whose two parts are rate and distortion: its KL is exact where it can be.
BOUND = "trace_mean_field_elbo"


def number(value: float | None) -> str:
    """Three decimals, or what stands for a number that is not known."""
    return "unknown" if value is None else f"{value:.3f}"


@dataclass(frozen=True, kw_only=True)
class Record:
    """Numbers under names, as JSON holds them; one that is not known is None.

    ``more`` are entries of a file that no field is for, from an earlier or a later version.
    """

    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """NaN and infinity, which JSON does not know, become None."""
        for each in fields(self):
            object.__setattr__(self, each.name, _known(getattr(self, each.name)))

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Self:
        """The record that :meth:`write` made a dictionary of, by the types of its fields."""
        names, hints = {_key(each): each.name for each in fields(cls)}, get_type_hints(cls)
        values = {
            names[key]: _read(hints[names[key]], value)
            for key, value in found.items()
            if key in names and value is not None
        }
        more = {key: value for key, value in found.items() if key not in names}
        return cls(**values | {"more": more})

    def write(self) -> dict[str, Any]:
        """A dictionary ready for JSON, without the parts that are None."""
        found, hints = {}, get_type_hints(type(self))
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name != "more" and (value is not None or not _record_in(hints[each.name])):
                found[_key(each)] = _plain(value)
        return found | dict(self.more)


@dataclass(frozen=True, kw_only=True)
class Mean(Record):
    """A mean over data, in nats per datum, and its standard error."""

    mean: float | None = None
    standard_error: float | None = None

    @classmethod
    def over(cls, each: Tensor) -> Mean:
        """The mean of values ``[N]`` with its error over data."""
        each = each.double()
        return cls(mean=each.mean().item(), standard_error=standard_error(each).item())

    def __str__(self) -> str:
        """The mean, and its error if it is known."""
        error = self.standard_error
        return number(self.mean) + ("" if error is None else f" ± {number(error)}")


@dataclass(frozen=True, kw_only=True)
class Evidence(Mean):
    """An estimate of log p(x), whose standard error is the Monte Carlo error, and its diagnosis."""

    data_standard_error: float | None = None
    method: str | None = None
    seed: int | None = None
    ess_median: float | None = None
    num_samples: int | None = None
    khat_median: float | None = None
    heavy: float | None = field(default=None, metadata={"key": "khat_over_0.7"})
    smoothed_mean: float | None = None
    mean_bias: float | None = None
    uncovered: float | None = None
    curve: Mapping[int, float | None] = field(default_factory=dict)

    @classmethod
    def of(cls, ll: LogLikelihood, **more: Any) -> Self:
        """The means over data of an estimate; ``more`` are further fields."""
        heavy = (ll.khat > HEAVY).double().where(~ll.khat.isnan(), torch.nan)
        same = ("mean", "data_standard_error", "method", "seed", "num_samples", "smoothed_mean")
        return cls(
            **{name: getattr(ll, name) for name in (*same, "mean_bias", "uncovered")},
            standard_error=ll.mean_standard_error,
            ess_median=ll.ess.median().item(),
            khat_median=ll.khat.median().item(),
            heavy=heavy.mean().item(),
            curve={} if ll.curve is None else ll.curve.mean,
            **more,
        )


@dataclass(frozen=True, kw_only=True)
class Annealed(Evidence):
    """What annealing found, and by how much that is more than importance sampling found."""

    verdict: str = ""
    num_data: int | None = None
    num_chains: int | None = None
    acceptance: float | None = None
    over_importance_sampling: Mean | None = None

    @classmethod
    def over_samples(cls, ais: LogLikelihood, ll: LogLikelihood) -> Self:
        """The means over data of an annealed estimate, and what it has over another."""
        n, more = len(ais.log_prob), None
        if n > 1:
            both = compare_log_likelihood(replace(ais, data=""), first_data(ll, n))
            more = Mean(mean=both.difference, standard_error=both.monte_carlo_standard_error)
        return cls.of(
            ais,
            verdict=ais.verdict,
            num_data=n,
            num_chains=ais.num_samples,
            acceptance=None if ais.acceptance is None else ais.acceptance.mean().item(),
            over_importance_sampling=more,
        )


@dataclass(frozen=True, kw_only=True)
class Gap(Record):
    """How far annealing can be below log p(x), on data of the model's own."""

    verdict: str = ""
    num_data: int | None = None
    gap: Mean | None = None


@dataclass(frozen=True, kw_only=True)
class Site(Record):
    """What becomes of a latent site: its KL, and how many of its units depend on the data."""

    kl: Sequence[float | None] = ()
    kl_total: float | None = None
    active_units: int = 0
    units: int = 0
    posterior_mean_variance: Sequence[float | None] = ()
    factorized: bool = True


@dataclass(frozen=True, kw_only=True)
class Posterior(Record):
    """What the posterior does, as :func:`pyrovae.diagnose` found it."""

    num_data: int | None = None
    elbo: Mean | None = None
    rate: Mean | None = None
    distortion: Mean | None = None
    sites: Mapping[str, Site] = field(default_factory=dict)
    mutual_information: Mean | None = None
    marginal_kl: float | None = None
    remainder: float | None = None
    calibration: Mapping[str, Any] | None = None
    probe: Mapping[str, Mapping[str, Any]] | None = None
    bits_per_dimension: float | None = None
    verdict: str = ""

    @classmethod
    def of(cls, found: Diagnosis, bound: ElboResult) -> Posterior:
        """A diagnosis, whose rate and distortion are the two parts of the ELBO beside it."""
        bits = found.bits_per_dimension
        if bits is not None:
            bits *= (bound.elbo.double().mean() / found.elbo.double().mean()).item()
        rate, distortion = bound.kl, -bound.reconstruction
        found = replace(found, rate=rate, distortion=distortion, bits_per_dimension=bits)
        return cls.read(found.summary())

    @property
    def units(self) -> tuple[int, int]:
        """How many units depend on the data, of how many."""
        sites = self.sites.values()
        return sum(site.active_units for site in sites), sum(site.units for site in sites)


@dataclass(frozen=True, kw_only=True)
class Results(Record):
    """What an evaluation found on a split, in nats per datum.

    ``elbo`` has both estimators; ``kl`` and ``reconstruction`` are the parts of estimator B, the
    rate and the negative distortion. ``weights`` are those of the run when it was evaluated.
    """

    text: str = field(default="", metadata={"key": "verdict"})
    kind: Kind | None = field(default=None, metadata={"key": "verdict_kind"})
    num_data: int | None = None
    num_data_of_split: int | None = None
    units: str = "nats per datum"
    data: str | None = None
    binarize: str | None = None
    weights: str | None = None
    elbo: Mapping[str, Mean] = field(default_factory=dict)
    reconstruction: float | None = None
    kl: float | None = None
    log_likelihood: Evidence | None = None
    amortization_gap: Mean | None = None
    annealed: Annealed | None = None
    bidirectional: Gap | None = None
    diagnostics: Posterior | None = None

    @classmethod
    def of(cls, ll: LogLikelihood, bounds: Mapping[str, ElboResult], **more: Any) -> Results:
        """An estimate of log p(x), and the ELBO by the estimators' names, of the same data."""
        gap, closed = ll.amortization_gap, bounds[BOUND]
        return cls(
            text=ll.verdict,
            kind=ll.verdict.kind,
            num_data=len(ll.log_prob),
            data=ll.data,
            elbo={name: Mean.over(bound.elbo) for name, bound in bounds.items()},
            reconstruction=closed.reconstruction.double().mean().item(),
            kl=closed.kl.double().mean().item(),
            log_likelihood=Evidence.of(ll),
            amortization_gap=None if gap is None else Mean.over(gap),
            **more,
        )

    @property
    def verdict(self) -> Verdict:
        """Whether log p(x) can be trusted; files of earlier versions hold the text alone."""
        return Verdict(self.kind or self._kind(), self.text)

    def _kind(self) -> Kind:
        ll = self.log_likelihood or Evidence()
        biased = -(ll.mean_bias or 0.0) > (ll.standard_error or 0.0)
        if ll.mean is None or (ll.heavy or 0.0) > HEAVY_SHARE or ll.uncovered or biased:
            return "doubtful"
        return "good" if ll.heavy == 0 else "fair"

    @property
    def bound(self) -> Mean | None:
        """The ELBO by estimator B, or else by A."""
        return self.elbo.get(BOUND) or self.elbo.get("trace_elbo")

    @property
    def rate(self) -> Mean:
        """The rate, with its error if it is known."""
        seen = self.diagnostics
        return seen.rate if seen is not None and seen.rate is not None else Mean(mean=self.kl)

    @property
    def distortion(self) -> Mean:
        """The distortion, with its error if it is known."""
        seen, lost = self.diagnostics, self.reconstruction
        if seen is not None and seen.distortion is not None:
            return seen.distortion
        return Mean(mean=None if lost is None else -lost)


class Finding(NamedTuple):
    """The means, the rows of the training, and what was found of each datum.

    ``elbo`` ``[N]`` is that of estimator B; ``weights`` is the digest of the evaluated weights.
    """

    results: Results
    history: Sequence[Mapping[str, Any]] = ()
    log_likelihood: LogLikelihood | None = None
    annealed: LogLikelihood | None = None
    elbo: Tensor | None = None
    weights: str | None = None


def load_results(run: Run) -> dict[str, Results]:
    """What evaluations of a run have found, by split."""
    with reading(run.path / "results.json"):
        return {split: Results.read(found) for split, found in run.results.items()}


def load_finding(run: Run, split: str | None = None) -> Finding | None:
    """What an evaluation found on a split, by default on the test data if on those; or None."""
    results = load_results(run)
    split = split or next((s for s in ("test", "valid", "train") if s in results), None)
    if split is None or split not in results:
        return None
    tensors, about = run.load_values(split) or ({}, {})
    with reading(run.path / "evaluation"):
        estimates = from_tensors(tensors, about), from_tensors(tensors, about, "annealed.")
    elbo, weights = tensors.get("elbo"), about.get("weights")
    return Finding(results[split], run.history(), *estimates, elbo, weights)


def save_finding(run: Run, split: str, found: Finding) -> None:
    """Write what an evaluation found: the values of each datum, and then the means."""
    tensors: dict[str, Tensor] = {} if found.elbo is None else {"elbo": found.elbo}
    about = {} if found.weights is None else {"weights": found.weights}
    for prefix, ll in (("", found.log_likelihood), ("annealed.", found.annealed)):
        if ll is not None:
            more = _to_tensors(ll, prefix)
            tensors, about = tensors | more[0], about | more[1]
    run.save_values(split, tensors, about)
    run.write_json("results.json", run.results | {split: found.results.write()})


def _to_tensors(ll: LogLikelihood, prefix: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Everything that an estimate holds: tensors ``[..., N]`` and texts, by names with a prefix."""
    found = {name: getattr(ll, name) for name in PER_DATUM}
    points, found["curve"] = ((), None) if ll.curve is None else ll.curve
    texts = {name: getattr(ll, name) for name in TEXTS} | {"curve": points, "units": "nats"}
    return (
        {prefix + n: v for n, v in found.items() if v is not None},
        {prefix + n: v if isinstance(v, str) else json.dumps(v) for n, v in texts.items()},
    )


def from_tensors(
    tensors: dict[str, Tensor], about: dict[str, str], prefix: str = ""
) -> LogLikelihood | None:
    """The estimate that a run's values have under a prefix, if they have one."""
    if prefix + "log_prob" not in tensors:
        return None
    points = tuple(json.loads(about[prefix + "curve"]))
    parts: dict[str, Any] = {name: tensors.get(prefix + name) for name in PER_DATUM}
    parts |= {name: read(about[prefix + name]) for name, read in TEXTS.items()}
    return LogLikelihood(
        **parts, curve=Curve(points, tensors[prefix + "curve"]) if points else None
    )


def first_data(ll: LogLikelihood, n: int) -> LogLikelihood:
    """The estimate for the first n data alone, without their digest."""
    parts = {name: v[:n] for name in PER_DATUM if (v := getattr(ll, name)) is not None}
    curve = ll.curve and Curve(ll.curve.num_samples, ll.curve.log_prob[:, :n])
    return replace(ll, **parts, curve=curve, data="")


def _key(each: Field) -> str:
    return each.metadata.get("key", each.name)


def _record_in(hint: Any) -> type[Record] | None:
    """The kind of record that a field holds, if it holds one: ``Mean | None``."""
    parts = get_args(hint) or (hint,)
    return next((p for p in parts if isinstance(p, type) and issubclass(p, Record)), None)


def _read(hint: Any, value: Any) -> Any:
    record, parts = _record_in(hint), get_args(hint)
    if get_origin(hint) is Mapping:
        # JSON spells every key as a string.
        key = parts[0]
        return {key(name): record.read(each) if record else each for name, each in value.items()}
    return value if record is None else record.read(value)


def _known(value: Any) -> Any:
    """A value without NaN and infinity."""
    if isinstance(value, Mapping):
        return {name: _known(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_known(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Record):
        return value.write()
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    return str(value) if isinstance(value, str) else value
