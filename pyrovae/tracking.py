"""Follow a training in TensorBoard, a CSV file, MLflow or Weights & Biases.

Each is given to ``pyrovae.fit(..., on_epoch=)``, alone or in a list, and records the configuration
once and every epoch once, also where a training goes on that was followed before.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from pyrovae._tools import InputError, did_you_mean, flat, require_package
from pyrovae._tools.files import plain_json, table_bytes, write_atomic
from pyrovae.runs import Run
from pyrovae.runs.config import Config
from pyrovae.training.monitor import Fit

__all__ = ["CSV", "MLflow", "TensorBoard", "Tracker", "WandB", "trackers"]


class Tracker:
    """Records a training: called after each epoch, entered before the first, left at the end.

    A tracker of your own says how to begin, to record an epoch and to end in ``_begin``, ``_epoch``
    and ``_end``.

    Args:
        config: What to record as the configuration; None takes the arguments of the training.
        id: By which a training is known that goes on later: it is recorded as one with what was
            recorded under the same id before.
    """

    # The module that it needs beside this package.
    needs: str | None = None

    def __init__(self, config: Mapping[str, Any] | None = None, id: str | None = None) -> None:
        self.config, self.id = config, id
        self.recorded: int | None = None
        if self.needs is not None:
            require_package(self.needs, type(self).__name__, "tracking")

    def __enter__(self) -> Self:
        self.recorded = None
        self._reach()
        return self

    def __call__(self, fit: Fit) -> None:
        done = len(fit.history)
        if self.recorded is None:
            self.recorded = self._begin(self._settings(fit), done - 1)
        # An epoch that is repeated after it was recorded comes to the same, and is passed over.
        for row in fit.history[self.recorded :]:
            self._epoch(_numbers(row), row["epoch"])
        self.recorded = max(self.recorded, done)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.recorded is not None:
            self._end(kind)

    def _settings(self, fit: Fit) -> dict[str, Any]:
        """The configuration, one entry a setting."""
        if self.config is not None:
            return flat(self.config)
        asked = {n: v for n, v in fit.asked.items() if n not in ("state", "on_epoch", "progress")}
        return {n: _plain(v) for n, v in asked.items()} | {"seed": fit.seed}

    def _reach(self) -> None:
        """Find out before the training whether what is recorded into is there."""

    def _begin(self, settings: dict[str, Any], before: int) -> int:
        """Open what is recorded into; the number of epochs that it has of this training.

        ``before`` are those that were done before this session.
        """
        raise NotImplementedError

    def _epoch(self, numbers: dict[str, float], epoch: int) -> None:
        """Record an epoch."""
        raise NotImplementedError

    def _end(self, kind: type[BaseException] | None) -> None:
        """Close it; ``kind`` is of the error that ended the training, if one did."""


class TensorBoard(Tracker):
    """Event files for TensorBoard.

    Args:
        folder: Where they go. A training that goes on into it replaces what is there of the epochs
            that it does anew.
        config: As for :class:`Tracker`.
    """

    needs = "tensorboard"

    def __init__(self, folder: str | Path, config: Mapping[str, Any] | None = None) -> None:
        super().__init__(config)
        self.folder = Path(folder).expanduser()

    def _begin(self, settings: dict[str, Any], before: int) -> int:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter

        known = 0
        if before and self.folder.is_dir():
            found = EventAccumulator(str(self.folder), {"scalars": 0})
            found.Reload()
            scalars = (found.Scalars(tag)[-1:] for tag in found.Tags()["scalars"])
            known = max((event.step for last in scalars for event in last), default=0)
        known = min(known, before)
        self.writer = SummaryWriter(str(self.folder), purge_step=known + 1)
        if not known:
            text = json.dumps(settings, indent=2, default=str)
            self.writer.add_text("config", f"```json\n{text}\n```", 0)
        return known

    def _epoch(self, numbers: dict[str, float], epoch: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def _end(self, kind: type[BaseException] | None) -> None:
        self.writer.close()


class CSV(Tracker):
    """A CSV file with one row an epoch, and the configuration as JSON beside it.

    Args:
        path: The file; it holds the whole history after each epoch.
        config: As for :class:`Tracker`.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any] | None = None) -> None:
        super().__init__(config)
        self.path = Path(path).expanduser()

    def __call__(self, fit: Fit) -> None:
        if self.recorded is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self._settings(fit), indent=2, default=str)
            write_atomic(self.path.with_suffix(".json"), f"{text}\n".encode())
        write_atomic(self.path, table_bytes(fit.history))
        self.recorded = len(fit.history)


class MLflow(Tracker):
    """A run of MLflow.

    Args:
        experiment: The experiment that it is of, which is made if there is none.
        name: What to call it; None leaves that to MLflow.
        uri: The store, ``"sqlite:///mlflow.db"`` or a server; None is that of MLflow's own
            settings, ``MLFLOW_TRACKING_URI`` or else ``mlflow.db`` in the working folder.
        config, id: As for :class:`Tracker`.
    """

    needs = "mlflow"

    def __init__(
        self,
        experiment: str = "pyrovae",
        name: str | None = None,
        uri: str | None = None,
        config: Mapping[str, Any] | None = None,
        id: str | None = None,
    ) -> None:
        super().__init__(config, id)
        self.experiment, self.name, self.uri = experiment, name, uri

    def _reach(self) -> None:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        try:
            self.client = client = MlflowClient(tracking_uri=self.uri)
            home = client.get_experiment_by_name(self.experiment)
            self.home = home.experiment_id if home else client.create_experiment(self.experiment)
        except MlflowException as error:
            raise InputError(f"MLflow refuses: {str(error).splitlines()[0]}") from error

    def _begin(self, settings: dict[str, Any], before: int) -> int:
        from mlflow.entities import Param

        client, asked = self.client, f"tags.`{MLFLOW_ID}` = '{self.id}'"
        if found := client.search_runs([self.home], asked, max_results=1) if self.id else []:
            self.run = found[0].info.run_id
            client.update_run(self.run, status="RUNNING")
            steps = [each.step for each in client.get_metric_history(self.run, LOSS)]
            return max(steps, default=0)
        tags = {MLFLOW_ID: self.id} if self.id else None
        self.run = client.create_run(self.home, run_name=self.name, tags=tags).info.run_id
        items = [Param(name, str(value)[:MLFLOW_TEXT]) for name, value in settings.items()]
        for start in range(0, len(items), MLFLOW_BATCH):
            client.log_batch(self.run, params=items[start : start + MLFLOW_BATCH])
        return 0

    def _epoch(self, numbers: dict[str, float], epoch: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, epoch) for name, value in numbers.items()]
        self.client.log_batch(self.run, metrics=metrics)

    def _end(self, kind: type[BaseException] | None) -> None:
        failed = "FAILED" if kind is not None and issubclass(kind, Exception) else "KILLED"
        self.client.set_terminated(self.run, "FINISHED" if kind is None else failed)


# The tag by which a run is found again, and MLflow's limits of a batch and of a parameter's text.
MLFLOW_ID, MLFLOW_BATCH, MLFLOW_TEXT = "pyrovae.id", 100, 6000
LOSS = "train/loss"


class WandB(Tracker):
    """A run of Weights & Biases.

    Args:
        project: The project that it is of.
        name: What to call it; None leaves that to Weights & Biases.
        folder: Where it writes; None is the working folder.
        mode: ``"online"``, ``"offline"`` or ``"disabled"``; None is ``WANDB_MODE``.
        config, id: As for :class:`Tracker`.
    """

    needs = "wandb"

    def __init__(
        self,
        project: str = "pyrovae",
        name: str | None = None,
        folder: str | Path | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
        config: Mapping[str, Any] | None = None,
        id: str | None = None,
    ) -> None:
        super().__init__(config, id)
        self.project, self.name, self.mode = project, name, mode
        self.folder = Path(folder or ".").expanduser()

    def _begin(self, settings: dict[str, Any], before: int) -> int:
        import wandb

        # What is offline cannot be asked which epochs it has.
        self.mark = self.folder / "wandb" / f"{self.id}.epochs"
        self.mark.parent.mkdir(parents=True, exist_ok=True)
        known = self.mark.read_text() if self.id and self.mark.is_file() else ""
        if known:
            # Sessions that begin in one second would write into one file (wandb 0.31).
            time.sleep(max(0.0, 1.0 - (time.time() - self.mark.stat().st_mtime)))
        how: dict[str, Any] = {"id": self.id, "resume": "allow"} if self.id else {}
        quiet = wandb.Settings(silent=True, console="off")
        try:
            self.run = wandb.init(
                project=self.project, name=self.name, dir=str(self.folder), mode=self.mode,
                config=settings, reinit="create_new", settings=quiet, **how,
            )  # fmt: skip
        except wandb.errors.Error as error:
            raise InputError(
                f"Weights & Biases refuses: {str(error).splitlines()[0]}; WANDB_MODE=offline "
                f"records without it."
            ) from error
        self.run.define_metric("*", step_metric="epoch")
        return max(int(known) if known.isdecimal() else 0, self.run.step - 1)

    def _epoch(self, numbers: dict[str, float], epoch: int) -> None:
        self.run.log(numbers | {"epoch": epoch}, step=epoch)
        if self.id:
            write_atomic(self.mark, str(epoch).encode())

    def _end(self, kind: type[BaseException] | None) -> None:
        self.run.finish(exit_code=int(kind is not None))


def trackers(names: str, run: Run, config: Config) -> list[Tracker]:
    """The trackers of a run directory.

    Args:
        names: Some of ``tensorboard``, ``csv``, ``mlflow`` and ``wandb``, with commas between them;
            ``csv`` is the ``metrics.csv`` that every run has.
        run: The directory.
        config: Its configuration.

    Raises:
        InputError: If a name is another, or its package is missing.
    """
    told: dict[str, Any] = {"config": plain_json(config)}
    known = told | {"name": run.path.name, "id": config.identity}
    made: dict[str, Callable[[], list[Tracker]]] = {
        "tensorboard": lambda: [TensorBoard(run.file("tensorboard/x").parent, **told)],
        "csv": list,
        "mlflow": lambda: [MLflow(**known)],
        "wandb": lambda: [WandB(folder=run.file("wandb/x").parents[1], **known)],
    }
    found: list[Tracker] = []
    for name in dict.fromkeys(filter(None, names.split(","))):
        if name not in made:
            raise InputError(
                f"Expected trackers of {', '.join(made)}, got {name!r}{did_you_mean(name, made)}."
            )
        found += made[name]()
    return found


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """An epoch's numbers, ``train/elbo`` and so on."""
    known = {n: v for n, v in row.items() if v is not None and n != "epoch"}
    return {name.replace("_", "/", 1): float(value) for name, value in known.items()}


def _plain(value: Any) -> Any:
    """An argument as a number or as words."""
    if value is None or isinstance(value, str | int | float):
        return value
    named = getattr(value, "name", None) or getattr(value, "__name__", None)
    return named if isinstance(named, str) else type(value).__name__
