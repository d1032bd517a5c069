"""Runs side by side: never two means without the paired difference between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path
from shlex import quote

from pyrovae._tools import InputError, standard_error
from pyrovae._tools.files import plain_json
from pyrovae._tools.shown import number, plus_minus
from pyrovae.evidence.result import Comparison, Verdict, compare_log_likelihood
from pyrovae.runs import Run
from pyrovae.runs.config import Config
from pyrovae.runs.results import Finding, load_finding

HEAD = ("run", "model", "guide", "objective", "ELBO", "log p(x)", "k-hat > 0.7", "rate", "active")


@dataclass(frozen=True)
class Compared:
    """A run that is compared: what it is called, and what its evaluation found."""

    name: str
    run: Run
    config: Config
    finding: Finding

    @property
    def cells(self) -> list[str]:
        """Its row of the table."""
        found, ll = self.finding.results, self.finding.log_likelihood
        (active, units), share = found.active_units, found.heavy
        settings = [f"{name}={value}" for name, value in self.config.objective_settings.items()]
        return [
            self.name,
            self.config.model.name,
            self.config.guide.name,
            ", ".join([self.config.objective, *settings]),
            number(None if found.bound is None else found.bound.mean),
            "≥ " * found.is_bound + number(ll.mean) + plus_minus(ll.mean_standard_error),
            "unknown" if share is None else f"{share:.1%}",
            number(found.rate.mean),
            f"{active} of {units}" if units else "unknown",
        ]


@dataclass(frozen=True)
class RunComparison:
    """Several runs on the same data.

    ``differences`` and ``elbo_differences`` are what each run but the first has over the first, in
    log p(x) and in the ELBO: a mean with its standard error over data.
    """

    split: str
    runs: tuple[Compared, ...]
    differences: tuple[Comparison, ...]
    elbo_differences: tuple[tuple[float, float], ...]

    @property
    def num_data(self) -> int:
        """How many data they were evaluated on."""
        return len(self.runs[0].finding.elbo)

    @property
    def joined(self) -> bool:
        """Whether the runs differ in β, and not in their programs: they lie on one curve."""
        pairs = {(r.config.model.name, r.config.guide.name) for r in self.runs}
        betas = [_beta(r.config) for r in self.runs]
        return len(pairs) == 1 and None not in betas and len(set(betas)) == len(betas)

    @property
    def verdicts(self) -> list[Verdict]:
        """What each run but the first has over the first."""
        (first, *others), verdicts = self.runs, []
        pairs = zip(others, self.differences, self.elbo_differences, strict=True)
        for run, c, (elbo, error) in pairs:
            verdict = c.of(run.name, first.name, f"{run.name} and {first.name}")
            text = (
                f"{verdict} (log p(x) of {run.name} less that of {first.name}: "
                f"{c.difference:+.3f} ± {c.standard_error:.3f}; ELBO {elbo:+.3f} ± {error:.3f}.)"
            )
            verdicts.append(Verdict(verdict.kind, text))
        return verdicts

    def __str__(self) -> str:
        """The table, and the paired differences below it."""
        columns = zip(HEAD, *(run.cells for run in self.runs), strict=True)
        padded = []
        for i, cells in enumerate(columns):
            width = max(map(len, cells))
            padded.append([c.ljust(width) if i < 4 else c.rjust(width) for c in cells])
        lines = ["  ".join(row).rstrip() for row in zip(*padded, strict=True)]
        about = f"{self.split}, {self.num_data} data, nats per datum; ± is the Monte Carlo error"
        return "\n".join([about, *lines, "", *self.verdicts])


def compare_runs(paths: Sequence[str | Path], split: str = "test") -> RunComparison:
    """Compare runs, each with the first, by what evaluations found of each datum of a split.

    Raises:
        InputError: If a run was not evaluated on the split, on other data than the first, or with
            another number of samples, was trained further since, or has a density where the first
            has a probability.
    """
    if len(paths) < 2:
        raise InputError(f"Expected two runs or more to compare, got {len(paths)}.")
    names = _short([Path(path) for path in paths])
    runs = tuple(_load(path, name, split) for path, name in zip(paths, names, strict=True))
    first = runs[0]
    for other in runs[1:]:
        _require_same_data(first, other, split)
        _require_same_kind(first, other, split)
    one, *others = [run.finding for run in runs]
    found = [compare_log_likelihood(each.log_likelihood, one.log_likelihood) for each in others]
    paired = [each.elbo.double() - one.elbo.double() for each in others]
    bounds = [(each.mean().item(), standard_error(each).item()) for each in paired]
    return RunComparison(split, runs, tuple(found), tuple(bounds))


def _load(path: str | Path, name: str, split: str) -> Compared:
    run = Run.open(path)
    again = f"pyrovae evaluate {quote(str(run.path))} --split {split}"
    found = load_finding(run, split)
    if found is None:
        raise InputError(f"{run.path} was not evaluated on its {split} data yet; first: {again}")
    if found.results.weights != run.weights_checksum():
        raise InputError(f"{run.path} was trained further since it was evaluated; first: {again}")
    ll, told = found.log_likelihood, found.results.log_likelihood
    if (told and told.num_samples, found.results.data) != (ll.num_samples, ll.data):
        raise InputError(f"The evaluation in {run.path} was cut short; first: {again} --fresh")
    return Compared(name, run, run.config, found)


def _require_same_data(first: Compared, other: Compared, split: str) -> None:
    if first.finding.log_likelihood.data == other.finding.log_likelihood.data:
        return
    sizes = len(first.finding.elbo), len(other.finding.elbo)
    paths = [quote(str(each.run.path)) for each in (first, other)]
    data = [plain_json(each.config.data) for each in (first, other)]
    said = [
        f"{key} is {data[0].get(key)} and {data[1].get(key)}"
        for key in ("name", "binarize", "context", "shape", "sha256")
        if data[0].get(key) != data[1].get(key)
    ]
    if sizes[0] != sizes[1] and not said:
        fewer = paths[sizes.index(min(sizes))]
        raise InputError(
            f"{paths[0]} was evaluated on {sizes[0]} data and {paths[1]} on {sizes[1]}; evaluate "
            f"both on the same, such as: pyrovae evaluate {fewer} --split {split}"
        )
    raise InputError(
        f"{paths[0]} and {paths[1]} were evaluated on different data "
        f"({', '.join(said) or 'their numbers differ'}): log p(x) of one says nothing beside that "
        f"of the other. Train both on one data set, and then: pyrovae evaluate {paths[1]} "
        f"--split {split}"
    )


def _require_same_kind(first: Compared, other: Compared, split: str) -> None:
    """Refuse estimates that hide more of log p(x) than the others', and densities beside masses."""
    paths = [quote(str(each.run.path)) for each in (first, other)]
    (k, how), (other_k, other_how) = (
        (each.finding.log_likelihood.num_samples, each.finding.log_likelihood.method)
        for each in (first, other)
    )
    if (k, how) != (other_k, other_how):
        fewer = paths[0] if k < other_k else paths[1]
        mend = f"pyrovae evaluate {fewer} --split {split} --samples {max(k, other_k)}"
        if how != other_how:
            mend = "pyrovae evaluate with the same --samples, --refine and --defensive"
        raise InputError(
            f"{paths[0]} was evaluated by {how} with {k} samples and {paths[1]} by {other_how} "
            f"with {other_k}, and one hides more of log p(x) than the other: evaluate both alike, "
            f"such as: {mend}"
        )
    sites = [each.finding.results.densities for each in (first, other)]
    if None not in sites and bool(sites[0]) != bool(sites[1]):
        kinds = ["a density" if each else "a probability" for each in sites]
        raise InputError(
            f"log p(x) is the logarithm of {kinds[0]} in {paths[0]} and of {kinds[1]} in "
            f"{paths[1]}: neither says anything beside the other."
        )


def _short(paths: Sequence[Path]) -> list[str]:
    """Names as short as they can be told apart by."""
    names = [path.name for path in paths]
    if len(set(names)) == len(names) and all(names):
        return names
    whole = [path.absolute() for path in paths]
    if len(set(whole)) < len(whole):
        return [f"{path} ({i + 1})" for i, path in enumerate(paths)]
    above = commonpath(whole)
    return [str(path.relative_to(above)) for path in whole]


def _beta(config: Config) -> float | None:
    """The weight on the KL; 1 for an ELBO, None where an objective has no such."""
    if config.objective in (betas := {"beta_elbo": 4.0, "BetaELBO": 1.0}):
        return config.objective_settings.get("beta", betas[config.objective])
    elbos = ("trace_elbo", "trace_mean_field_elbo", "trace_enum_elbo")
    return 1.0 if config.objective in elbos else None
