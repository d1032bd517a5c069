"""What is measured of a trained run: the ELBO, log p(x), and what the posterior does."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae._tools import InputError
from pyrovae._tools.files import locked, remove_temporary, unpack_tensors
from pyrovae._tools.seeding import seeded, subseed
from pyrovae.diagnostics import calibrate, diagnose
from pyrovae.evidence.annealing import annealed_log_likelihood
from pyrovae.evidence.importance import log_likelihood
from pyrovae.evidence.result import LogLikelihood
from pyrovae.evidence.sandwich import bidirectional
from pyrovae.evidence.tiles import DATA_TILE, digest
from pyrovae.inference_data import save, to_inference_data
from pyrovae.objectives.elbo import ESTIMATORS, elbo
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.generation import element_of
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import scored
from pyrovae.runs import Run
from pyrovae.runs.config import Config, EvaluationConfig
from pyrovae.runs.experiment import Experiment
from pyrovae.runs.results import (
    BOUND,
    Finding,
    GuideCalibration,
    Mean,
    Results,
    Sandwich,
    first_data,
    save_finding,
)
from pyrovae.training.distributed import World, join

SEED = subseed(0, 1_000_003)
# How many data are annealed where nothing is said and how many are simulated at most; how many
# data, with as many draws of each, are kept for ArviZ.
ANNEALED, SIMULATED, KEPT = 100, 100, 100


class _Subject(NamedTuple):
    """What is measured: a pair, and data with the further arguments of both programs."""

    model: Any
    guide: Any
    rows: tuple[Tensor, ...]
    labels: Tensor | None

    def first(self, n: int | None) -> _Subject:
        """The same on the first n data alone."""
        labels = None if self.labels is None else self.labels[:n]
        return self._replace(rows=tuple(tensor[:n] for tensor in self.rows), labels=labels)

    @property
    def args(self) -> tuple:
        """The arguments that every function of a pair begins with."""
        return self.model, self.guide, *self.rows


def evaluate(run: Run, experiment: Experiment[Config], options: EvaluationConfig) -> Results | None:
    """Measure a run on a split, and write what is found into the run directory.

    ``results.json`` has the means with their errors, ``evaluation/<split>.safetensors`` what was
    found of each datum, and ``inference_<split>.nc`` draws of the posterior for ArviZ. What is
    finished is kept meanwhile: an evaluation that was stopped goes on when it is asked for again,
    and ends as if it had not been. The processes of a job share the data, and rank 0 writes.

    Args:
        run: The run directory.
        experiment: The run's pair and data.
        options: What to measure.

    Returns:
        What is found on the split; None on processes other than the first.
    """
    world, weights = join(), run.weights_checksum()
    every = _subject(experiment, options.split)
    subject = every.first(options.images)
    if not options.no_diagnostics and len(subject.rows[0]) < 2:
        raise InputError(
            f"Diagnostics need two data at least, and there is {len(subject.rows[0])}: ask for "
            f"more, or leave them out with --no-diagnostics."
        )
    part = subject.first(options.images or ANNEALED)
    files = _Unfinished(run, options, world, _fingerprint(subject, weights) | {"run": run.identity})
    common: dict[str, Any] = {"processes": world.size > 1, "seed": SEED, "progress": world.first}
    with files:
        annealed = None
        if options.annealed:
            annealed = annealed_log_likelihood(
                *part.args,
                num_chains=options.annealed,
                num_temperatures=options.temperatures,
                initial=options.initial,
                checkpoint=files.of("annealed", "temperatures", "initial"),
                **common,
            )
        ll = log_likelihood(
            *subject.args,
            num_samples=options.samples,
            refine_steps=options.refine,
            defensive=options.defensive,
            precision=options.precision,
            checkpoint=files.of("samples", "refine", "defensive", "precision"),
            **common,
        )
        if not world.first:
            return None
        bounds = {
            name: elbo(*subject.args, objective=name, particles=64, batch_size=128, seed=SEED)
            for name in ESTIMATORS
        }
        tight = None if annealed is None else _sandwich(part, options)
        found = None
        if not options.no_diagnostics:
            found = diagnose(*subject.args, labels=subject.labels, seed=SEED)
            about = {"split": options.split, "weights": weights, "run": run.identity}
            about["command"] = experiment.config.command
            _keep_draws(run.file(f"inference_{options.split}.nc"), subject, ll, about)
        results = Results.of(
            ll,
            bounds,
            annealed=annealed,
            bidirectional=tight,
            calibration=_calibration(subject, options) if options.calibrate else None,
            diagnosis=found,
            num_data_of_split=len(every.rows[0]),
            binarize=experiment.data.binarize,
            densities=_densities(subject.args),
            weights=weights,
            run=run.identity,
        )
        each = ll, annealed, bounds[BOUND].elbo
        save_finding(run, options.split, Finding(results, (), *each))
        files.remove()
    return results


def _densities(args: tuple) -> list[str]:
    """The observed sites whose score is that of a density, and not of a probability."""
    pair = Pair(*args[:2])
    rows = tuple(each[:DATA_TILE].to(pair.device) for each in args[2:])
    with torch.no_grad(), pair.mode(training=False), seeded(SEED, rows[0].device):
        inspect_pair(pair, *rows)
        seen = [(n, s) for n, s in scored(pair.trace(*rows)[0]) if s["is_observed"]]
    return [name for name, site in seen if not element_of(site["fn"]).support.is_discrete]


class _Unfinished:
    """The files in which an evaluation keeps its finished data, until its results are written.

    Their names tell one evaluation from another, so that those of other settings, of other
    weights or of other numbers of processes stay where they are. Used as a context, it leaves no
    empty folder.
    """

    def __init__(
        self, run: Run, options: EvaluationConfig, world: World, about: dict[str, Any]
    ) -> None:
        self.run, self.options, self.world = run, options, world
        self.about = about | {"processes": world.size}
        self.files: list[Path] = []
        self.held = ExitStack()

    def __enter__(self) -> _Unfinished:
        folder, split = self.run.file("evaluation/x").parent, self.options.split
        folder.mkdir(exist_ok=True)
        self.held.callback(_remove_empty, folder)
        if self.world.first:
            held = f"The {split} data of {self.run.path} are being evaluated by another process."
            self.held.enter_context(locked(folder / f".{split}.lock", held))
            remove_temporary(folder, split)
        return self

    def __exit__(self, *_: object) -> None:
        self.held.close()

    def of(self, *names: str) -> Path:
        """The file of an estimate with these options; one that cannot be read is put aside."""
        settings = {name: getattr(self.options, name) for name in names}
        key = json.dumps(self.about | settings, sort_keys=True).encode()
        name = f"{self.options.split}-{hashlib.sha256(key).hexdigest()[:12]}.checkpoint"
        path = self.run.file(f"evaluation/{name}")
        self.files.append(path)
        # Numbers that somebody has put there are no damage, and their checksum may be right.
        own = path if self.world.size == 1 else path.with_name(f"{name}.{self.world.rank}")
        if self.options.fresh:
            own.unlink(missing_ok=True)
        elif own.exists():
            try:
                unpack_tensors(own, signed=self.run.is_own)
            except InputError as error:
                own.replace(own.with_name(f"{own.name}.damaged"))
                self.world.say(f"pyrovae: {error} It was put aside, and its data are done again.")
        return path

    def remove(self) -> None:
        """Remove the files of the estimates that were asked for: all results are written."""
        for path in self.files:
            for each in (path, *path.parent.glob(f"{path.name}.[0-9]*")):
                each.unlink(missing_ok=True)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _subject(experiment: Experiment[Config], split: str) -> _Subject:
    rows, labels = experiment.data.split(split), experiment.data.labels
    if not rows or len(rows[0]) == 0:
        raise InputError(f"The data have no {split} split: choose another.")
    labels = None if labels is None else getattr(labels, split)
    return _Subject(experiment.model, experiment.guide, rows, labels)


def _fingerprint(subject: _Subject, weights: str) -> dict[str, Any]:
    """What tells one pair with its data from another: its program is known by a number of it."""
    return {
        "weights": weights,
        "data": digest(*subject.rows),
        "device": subject.rows[0].device.type,
        "a bound": f"{elbo(*subject.first(8).args, seed=SEED).mean:.3e}",
    }


def _sandwich(subject: _Subject, options: EvaluationConfig) -> Sandwich:
    """How far annealing can be too low, on data of the model's own."""
    x, *context = subject.rows
    n = min(len(x), SIMULATED)
    try:
        both = bidirectional(
            subject.model,
            subject.guide,
            *context,
            like=x,
            n=n,
            num_chains=options.annealed,
            num_temperatures=options.temperatures,
            initial=options.initial,
            seed=SEED,
        )
    except InputError as error:
        return Sandwich(verdict=f"There is no upper bound: {error}")
    gap = Mean(mean=both.mean_gap, standard_error=both.mean_gap_standard_error)
    return Sandwich(verdict=str(both.verdict), num_data=n, gap=gap)


def _calibration(subject: _Subject, options: EvaluationConfig) -> GuideCalibration:
    """Whether the guide is the posterior, on data of the model's own."""
    try:
        found = calibrate(*subject.args, n=options.calibrate, seed=SEED)
    except InputError as error:
        return GuideCalibration(verdict=f"Whether the guide is calibrated was not tested: {error}")
    return GuideCalibration(**found.summary())


def _keep_draws(path: Path, subject: _Subject, ll: LogLikelihood, about: dict[str, str]) -> None:
    part = subject.first(KEPT)
    found = to_inference_data(
        *part.args,
        num_samples=KEPT,
        labels=part.labels,
        log_likelihood=first_data(ll, KEPT),
        seed=SEED,
        attrs=about,
    )
    save(found, path)
