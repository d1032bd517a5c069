"""A run directory from Python: its pair and data, what was found of it, evaluation and report."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from pyrovae import reporting
from pyrovae._tools import InputError, InputTypeError, did_you_mean
from pyrovae._tools.files import plain_json
from pyrovae._tools.shown import counted
from pyrovae.data import Dataset
from pyrovae.runs import Run
from pyrovae.runs import evaluate as evaluation
from pyrovae.runs.config import Config, EvaluationConfig
from pyrovae.runs.experiment import Experiment, load_experiment
from pyrovae.runs.programs import KINDS
from pyrovae.runs.results import Results, load_finding, load_results

__all__ = ["OpenRun", "evaluate", "load", "programs_of", "report", "stranger"]


class OpenRun:
    """A run directory, each part of which is read when it is asked for.

    ``model``, ``guide`` and ``data`` execute the run's programs and read its data; everything else
    executes nothing.

    Args:
        run: The run directory.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        data_root: Where the torchvision data are; None is as in training.
        trust: Execute the programs of a run that this user did not make on this machine.
        given: A ``model``, ``guide`` or ``data`` to take in place of the run's own.
    """

    def __init__(
        self,
        run: Run,
        device: str = "auto",
        data_root: str | None = None,
        trust: bool = False,
        given: Mapping[str, Any] | None = None,
    ) -> None:
        self.run, self.device, self.data_root, self.trust = run, device, data_root, trust
        self.given = dict(given or {})

    def __repr__(self) -> str:
        config, rows = self.config, self.history
        splits = ", ".join(f"{n} {r.headline}" for n, r in self.results.items()) or "none yet"
        return (
            f"OpenRun({str(self.path)!r}): {config.model.name} x {config.guide.name} on "
            f"{config.data.load}, {len(rows)} of {counted(config.epochs, 'epoch')}\n"
            f"log p(x): {splits}"
        )

    @property
    def path(self) -> Path:
        """The directory."""
        return self.run.path

    @property
    def config(self) -> Config:
        """What the run was asked to do, resolved."""
        return self.run.config

    @property
    def results(self) -> dict[str, Results]:
        """What evaluations have found so far, by split."""
        return load_results(self.run)

    @property
    def history(self) -> list[dict[str, Any]]:
        """One row an epoch, as :attr:`pyrovae.Fit.history` has them."""
        return self.run.history()

    @property
    def state(self) -> dict[str, Any]:
        """What training goes on from: ``pyrovae.fit(..., state=run.state, out=run.path)``.

        Raises:
            InputError: If the run has no checkpoint.
        """
        if (found := self.run.load_checkpoint()) is None:
            raise InputError(f"{self.path} has no checkpoint to go on from.")
        return found

    @property
    def model(self) -> Callable:
        """The trained model."""
        return self.experiment.model

    @property
    def guide(self) -> Callable:
        """The trained guide."""
        return self.experiment.guide

    @property
    def data(self) -> Dataset:
        """The data that it was trained on, with their splits."""
        return self.experiment.data

    @cached_property
    def experiment(self) -> Experiment[Config]:
        """The pair with its weights and its data, built once.

        Raises:
            InputError: If the run is not this user's own and is not trusted, or is damaged, or the
                data are no longer those of the training.
        """
        own = self.trust or self.run.is_own or self.given.keys() >= {*KINDS, "data"}
        if not own:
            raise InputError(f"{stranger(self.run)} Use trust=True if you trust whoever made it.")
        return load_experiment(self.run, self.device, self.data_root, self.given)

    def report(self) -> Path:
        """Write ``report.html`` and the figures of its numbers, as :func:`pyrovae.report` does."""
        return report(self)


def load(
    path: str | Path,
    *,
    device: str = "auto",
    data_root: str | None = None,
    trust: bool = False,
    model: Callable | None = None,
    guide: Callable | None = None,
    data: Dataset | Tensor | None = None,
) -> OpenRun:
    """Open a run directory that ``pyrovae train``, ``pyrovae.fit(out=)`` or ``Fit.save`` wrote.

    Nothing of it is executed before its model, guide or data are asked for.

    Args:
        path: The directory.
        device: Where the pair and the data go: ``"auto"`` (CUDA where there is one), ``"cpu"`` or
            ``"cuda"``.
        data_root: Where the torchvision data are; None is as in training.
        trust: Execute the programs of a run that this user did not make on this machine.
        model, guide: Programs to load the weights into, where the run has no source of them.
        data: The data, where they were in memory.

    Raises:
        InputError: If there is no run, or its configuration is damaged.
    """
    run = Run.open(path)
    _ = run.config  # one that is damaged is refused here
    parts = {"model": model, "guide": guide, "data": data}
    given = {name: part for name, part in parts.items() if part is not None}
    return OpenRun(run, device, data_root, trust, given)


def evaluate(run: OpenRun | str | Path, **options: Any) -> Results:
    """Measure a run as ``pyrovae evaluate`` does, and write what is found into its directory.

    Args:
        run: A run of :func:`load`, or its directory.
        options: Those of the command, with underscores: ``split="test"``, ``samples=1000``,
            ``images``, ``refine``, ``defensive``, ``precision``, ``annealed``,
            ``temperatures``, ``initial``, ``calibrate``, ``no_diagnostics``, ``fresh``.

    Returns:
        What is found on the split, in nats per datum: ``.log_likelihood``, ``.elbo``, ``.verdict``.

    Raises:
        InputError: If an option is unknown or out of range, or the run cannot be loaded.
    """
    opened = run if isinstance(run, OpenRun) else load(run)
    known = [each.name for each in fields(EvaluationConfig)]
    for name in options.keys() - {*known}:
        raise InputTypeError(
            f"An evaluation takes no option {name!r}{did_you_mean(name, known)}; it takes "
            f"{', '.join(known)}."
        )
    found = evaluation.evaluate(opened.run, opened.experiment, EvaluationConfig(**options))
    if found is None:
        raise InputError("One process of several has the results: use pyrovae evaluate for that.")
    if not opened.run.file("figures/samples.png").exists():
        reporting.draw_run(opened.run, opened.experiment)
    return found


def report(run: OpenRun | str | Path) -> Path:
    """Write ``report.html`` and the figures of its numbers; nothing of the run is executed.

    Args:
        run: A run of :func:`load`, or its directory.

    Returns:
        Where the page is.

    Raises:
        InputError: If there is no run, or it has not been evaluated.
    """
    folder = (run if isinstance(run, OpenRun) else load(run)).run
    if not (results := load_results(folder)):
        again = shlex.join(["pyrovae", "evaluate", str(folder.path)])
        raise InputError(f"Nothing to report yet; first: {again}")
    reporting.draw_found(folder)
    config, weights = plain_json(folder.config), folder.weights_checksum()
    finding = load_finding(folder, "test") if "test" in results else None
    page = reporting.render_report(
        config,
        results,
        folder.history(),
        folder.figures(),
        weights=weights,
        explored=reporting.explorer.summary(folder, config, finding),
    )
    return folder.write("report.html", page.encode())


def programs_of(run: Run) -> list[str]:
    """The files that loading a run executes, with their digests."""
    config = run.config
    paths = [run.file(name) for each in (config.model, config.guide) for name in each.copies]
    return [f"{path} (sha256 {hashlib.sha256(path.read_bytes()).hexdigest()})" for path in paths]


def stranger(run: Run) -> str:
    """What going on with a run of unknown make does, as a sentence."""
    data, files = run.config.data, " and ".join(programs_of(run)) or "no file of it"
    root = f" in {data.root}" if data.root else ""
    return (
        f"{run.path} was not made here by you: going on executes {files}, and reads the data "
        f"{data.load}{root}."
    )
