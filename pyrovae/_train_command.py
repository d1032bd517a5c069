"""The command ``train``: what it is asked for, what it does, and what it says meanwhile."""

from __future__ import annotations

import argparse
import ast
import shlex
import sys
from typing import Any

from pyrovae._parser import DEFAULTS, SHOWN
from pyrovae._tools import InputError
from pyrovae.runs import Run
from pyrovae.runs.programs import plain
from pyrovae.runs.results import number
from pyrovae.training.distributed import ProcessLost, World
from pyrovae.training.loop import Fit, NonFiniteLoss

__all__ = ["train_command", "with_defaults"]


def train_command(options: argparse.Namespace) -> None:
    """Train into a run directory, or go on with the one there."""
    from pyrovae.report import draw_run
    from pyrovae.runs import experiment

    run, world = Run(options.out), options.world
    given = {k: v for k, v in vars(options).items() if v is not None}
    resumed = options.resume and run.exists()
    settings = with_defaults(given, run.config if resumed else None)
    if not resumed:
        run.require_new()
    try:
        with world.in_turn():
            made = experiment.resolve(settings, options.command_line, run if resumed else None)
        report = _Log(run, options.tensorboard, made.config["epochs"])
        result = experiment.train(run, made, resume=options.resume, on_epoch=report)
    except (KeyboardInterrupt, ProcessLost) as error:
        raise type(error)(_stopped(run, world)) from None
    except NonFiniteLoss as error:
        kept = f" Its {len(done)} epochs before are kept." if (done := run.history()) else ""
        raise NonFiniteLoss(f"{error}{kept}") from error
    if not world.first:
        return
    draw_run(run, made)
    last = result.history[-1]
    print(
        f"{len(result.history)} epochs: ELBO {number(last['train_elbo'])} (train), "
        f"{number(last['valid_elbo'])} (validation; best in epoch {result.best_epoch}), "
        f"nats per datum."
    )
    print(f"The run is in {run.path}; now: pyrovae evaluate {run.path}")


def _stopped(run: Run, world: World) -> str:
    if not run.history():
        return "stopped before the end of the first epoch; nothing was written."
    again = shlex.join([*world.command, "train", "--out", str(run.path), "--resume"])
    return f"stopped after epoch {len(run.history())}; go on with: {again}"


def with_defaults(given: dict[str, Any], config: dict[str, Any] | None) -> dict[str, Any]:
    """What is asked for: as given, or else as a run was made with, or else by default.

    Raises:
        ValueError: If there is no pair or no data, or a setting is misspelt.
    """
    stored: dict[str, Any] = {}
    if config is not None:
        stored = {k: config[k] for k in DEFAULTS if k in config} | {
            "model": config["model"]["name"],
            "guide": config["guide"]["name"],
            "data": config["data"]["load"],
            **{k: config["data"][k] for k in SHOWN if k in config["data"]},
            "data_root": config["data"]["root"],
            "settings": {k: config[k]["settings"] for k in ("model", "guide")}
            | {"objective": config["objective_settings"]},
        }
    missing = [k for k in ("model", "guide", "data") if k not in stored | given]
    if missing:
        raise InputError(f"Expected --{', --'.join(missing)} as well: see pyrovae list.")
    given = given | {"settings": _settings(given.get("set", []), stored.get("settings", {}))}
    wanted = (*DEFAULTS, "model", "guide", "data", "settings")
    return {k: v for k, v in (DEFAULTS | stored | given).items() if k in wanted}


def _settings(pairs: list[str], stored: dict[str, dict]) -> dict[str, dict]:
    settings = {kind: dict(stored.get(kind, {})) for kind in ("model", "guide", "objective")}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        kind, dot, option = name.partition(".")
        if not equals or not value or (dot and kind not in settings):
            raise InputError(
                f"Expected --set model.NAME=VALUE, guide.NAME=VALUE, objective.NAME=VALUE or "
                f"NAME=VALUE for both programs, got {pair!r}."
            )
        for each in [kind] if dot else ("model", "guide"):
            settings[each][option if dot else name] = _literal(value)
    return settings


def _literal(value: str) -> Any:
    try:
        return plain(ast.literal_eval(value))
    except (ValueError, SyntaxError, TypeError):
        return value


class _Log:
    """Tells of each epoch: a line where output is no terminal, and TensorBoard if asked."""

    def __init__(self, run: Run, tensorboard: bool, epochs: int) -> None:
        self.run, self.epochs, self.writer = run, epochs, None
        self.tensorboard = tensorboard
        if tensorboard:
            self._writer_class()

    def __call__(self, result: Fit) -> None:
        row = result.history[-1]
        if not sys.stderr.isatty():
            print(
                f"epoch {row['epoch']}/{self.epochs}  ELBO {number(row['train_elbo'])} (train)  "
                f"{number(row['valid_elbo'])} (validation)  {row['seconds']:.1f} s",
                flush=True,
            )
        if self.tensorboard:
            self.writer = self.writer or self._writer_class()(self.run.path / "tensorboard")
            for name, value in row.items():
                if value is not None and name != "epoch":
                    self.writer.add_scalar(name.replace("_", "/", 1), value, row["epoch"])
            self.writer.flush()

    def _writer_class(self) -> type:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError("--tensorboard needs: pip install tensorboard") from error
        return SummaryWriter
