"""What is measured of a trained run: the ELBO, log p(x), and what the posterior does."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from pyrovae._tools import InputError
from pyrovae._tools.seeding import subseed
from pyrovae.diagnostics import diagnose
from pyrovae.evidence.annealing import annealed_log_likelihood
from pyrovae.evidence.importance import log_likelihood
from pyrovae.evidence.result import LogLikelihood
from pyrovae.evidence.sandwich import bidirectional
from pyrovae.evidence.tiles import digest
from pyrovae.inference_data import save, to_inference_data
from pyrovae.objectives import ESTIMATORS, ElboResult, elbo
from pyrovae.runs import Run
from pyrovae.runs.experiment import Experiment
from pyrovae.runs.results import (
    annealing_found,
    estimates_found,
    first_data,
    known,
    to_tensors,
)
from pyrovae.runs.unfinished import Unfinished
from pyrovae.training.distributed import join

__all__ = ["evaluate"]

SEED = subseed(0, 1_000_003)
ANNEALED, SIMULATED = 100, 100
KEPT_DATA, KEPT_DRAWS = 100, 100


class _Subject(NamedTuple):
    """What is measured: a pair, and data with the further arguments of both programs."""

    model: Any
    guide: Any
    rows: tuple[Tensor, ...]
    labels: Tensor | None

    def first(self, n: int) -> _Subject:
        """The same on the first n data alone."""
        labels = None if self.labels is None else self.labels[:n]
        return self._replace(rows=tuple(tensor[:n] for tensor in self.rows), labels=labels)

    @property
    def args(self) -> tuple:
        """The arguments that every function of a pair begins with."""
        return self.model, self.guide, *self.rows


def evaluate(
    run: Run,
    experiment: Experiment,
    *,
    split: str = "test",
    num_samples: int = 1000,
    images: int | None = None,
    refine_steps: int = 0,
    defensive: float = 0.0,
    num_chains: int = 0,
    num_temperatures: int = 500,
    diagnostics: bool = True,
    fresh: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a run on a split, and write what is found into the run directory.

    ``results.json`` has the means with their errors, ``evaluation/<split>.safetensors`` what was
    found of each datum, and ``inference_<split>.nc`` draws of the posterior for ArviZ. What is
    finished is kept meanwhile: an evaluation that was stopped goes on when it is asked for again,
    and ends as if it had not been. The processes of a job share the data, and rank 0 writes.

    Args:
        run: The run directory.
        experiment: The run's pair and data.
        split: ``"train"``, ``"valid"`` or ``"test"``.
        num_samples: The number of samples K for log p(x).
        images: Measure the first so many data alone; None takes all of them.
        refine_steps: As in :func:`pyrovae.log_likelihood`, as is ``defensive``.
        num_chains: Also anneal so many chains for each of the first ``images`` data, 100 if that
            is None, and as many, 100 at most, that are simulated from the model.
        num_temperatures: Of annealing.
        diagnostics: Also say what the posterior does, and keep draws of it.
        fresh: Begin anew, whatever an evaluation that was stopped has left.
        progress: Show a bar if standard error is a terminal.

    Returns:
        The split's results, ready for JSON, in nats per datum, None where K is too small to tell;
        nothing on processes other than the first.

    Raises:
        ValueError: If there are no such data, or as :func:`pyrovae.log_likelihood` raises it.
    """
    world, every = join(), _subject(experiment, split)
    subject, weights = every.first(images or len(every.rows[0])), run.weights_checksum()
    if diagnostics and len(subject.rows[0]) < 2:
        raise InputError("Diagnostics need two data at least: ask for more, or leave them out.")
    sampled = {
        "num_samples": num_samples,
        "refine_steps": refine_steps,
        "defensive": defensive,
    }
    chains = {"num_chains": num_chains, "num_temperatures": num_temperatures}
    part = subject.first(images or ANNEALED)
    shared = {"seed": SEED, "processes": world.size > 1, "progress": progress and world.first}
    about = {"weights": weights, **_fingerprint(subject)}
    with Unfinished(run, split, world, about, fresh=fresh) as unfinished:
        annealed = None
        if num_chains:
            shared["checkpoint"] = unfinished.file(**chains)
            annealed = annealed_log_likelihood(*part.args, **chains, **shared)
        shared["checkpoint"] = unfinished.file(**sampled)
        ll = log_likelihood(*subject.args, **sampled, **shared)
        if not world.first:
            return {}
        bounds = {name: _bound(subject, name) for name in ESTIMATORS}
        found = estimates_found(ll, bounds) | {"binarize": experiment.data.binarize}
        found |= {"num_data_of_split": len(every.rows[0]), "weights": weights}
        if annealed is not None:
            found["annealed"] = annealing_found(annealed, ll)
            found["bidirectional"] = _sandwich(part, chains, progress)
        if diagnostics:
            found["diagnostics"] = _diagnose(subject, progress)
            _keep_draws(run, experiment, split, subject, ll, weights)
        _write(run, split, found, ll, annealed, bounds["trace_mean_field_elbo"], weights)
        unfinished.remove()
    return found


def _subject(experiment: Experiment, split: str) -> _Subject:
    rows, labels = experiment.data.split(split), experiment.data.labels
    if not rows or len(rows[0]) == 0:
        raise InputError(f"The data have no {split} split: choose another.")
    labels = None if labels is None else getattr(labels, split)
    return _Subject(experiment.model, experiment.guide, rows, labels)


def _fingerprint(subject: _Subject) -> dict[str, Any]:
    """What tells one pair with its data from another."""
    probe = elbo(*subject.first(8).args, seed=SEED)
    x = subject.rows[0]
    return {
        "data": digest(*subject.rows),
        "device": x.device.type,
        "a bound": f"{probe.mean:.3e}",
    }


def _bound(subject: _Subject, name: str) -> ElboResult:
    return elbo(*subject.args, objective=name, particles=64, batch_size=128, seed=SEED)


def _sandwich(subject: _Subject, chains: dict[str, int], progress: bool) -> dict[str, Any]:
    """How far annealing can be too low, on data of the model's own."""
    x, *context = subject.rows
    pair, n = (subject.model, subject.guide), min(len(x), SIMULATED)
    options = chains | {"n": n, "seed": SEED, "progress": progress}
    try:
        both = bidirectional(*pair, *context, like=x, **options)
    except ValueError as error:
        return {"verdict": f"There is no upper bound: {error}"}
    gap = {"mean": both.mean_gap, "standard_error": both.mean_gap_standard_error}
    return known({"verdict": both.verdict, "num_data": n, "gap": gap})


def _diagnose(subject: _Subject, progress: bool) -> dict[str, Any]:
    found = diagnose(*subject.args, labels=subject.labels, seed=SEED, progress=progress)
    return known(found.summary())


def _keep_draws(
    run: Run,
    experiment: Experiment,
    split: str,
    subject: _Subject,
    ll: LogLikelihood,
    weights: str,
) -> None:
    part = subject.first(KEPT_DATA)
    found = to_inference_data(
        *part.args,
        num_samples=KEPT_DRAWS,
        labels=part.labels,
        log_likelihood=first_data(ll, KEPT_DATA),
        seed=SEED,
        attrs={"split": split, "weights": weights, "command": experiment.config["command"]},
    )
    save(found, run.path / f"inference_{split}.nc")


def _write(
    run: Run,
    split: str,
    found: dict[str, Any],
    ll: LogLikelihood,
    annealed: LogLikelihood | None,
    bound: ElboResult,
    weights: str,
) -> None:
    values, about = to_tensors(ll)
    if annealed is not None:
        more = to_tensors(annealed, "annealed.")
        values, about = values | more[0], about | more[1]
    run.save_values(split, values | {"elbo": bound.elbo}, about | {"weights": weights})
    run.write_json("results.json", run.results | {split: found})
