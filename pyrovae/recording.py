"""A training in Python as a run directory: what ``pyrovae train`` writes, of a pair at hand."""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pyrovae import reporting
from pyrovae._tools import InputError, require_same
from pyrovae._tools.files import plain_json
from pyrovae.data import Dataset
from pyrovae.objectives.base import Objective
from pyrovae.objectives.elbo import elbo
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.pair import Pair
from pyrovae.runs import Run
from pyrovae.runs.config import COMPILE, FIT, TRAINING, Config, ProgramRecord
from pyrovae.runs.experiment import (
    Experiment,
    build_pair,
    data_record,
    program_record,
    save_epoch,
    versions,
)
from pyrovae.runs.programs import KINDS, Program
from pyrovae.runs.recovered import recover
from pyrovae.training.distributed import join
from pyrovae.training.monitor import Fit, callbacks

__all__ = ["record", "save"]

# What a training may be told by an object, which no command line has.
OBJECTS = ("objective", "optimizer", "schedule")


def record(fit: Callable[..., Fit], asked: dict[str, Any]) -> Fit:
    """Train with these arguments of :func:`pyrovae.fit` into the directory ``out``.

    Raises:
        InputError: If the directory is in use, or holds another training than ``state`` is of.
    """
    run = Run(asked["out"])
    if run.exists() and asked["state"] is None:
        raise InputError(
            f"{run.path} holds a run: choose another out, or go on with it by "
            f"state=pyrovae.load({str(run.path)!r}).state."
        )
    if not run.exists():
        run.require_new()
    with run.training() if join().first else nullcontext():
        calls = callbacks(asked["on_epoch"])
        kept = _Checkpoints(run, twice=bool(calls))
        calls = [kept, *calls, *([kept.behind] if calls else [])]
        result = fit(**asked | {"out": None, "on_epoch": calls})
        if result.world.first and not run.exists():  # the state has all epochs already
            kept(result)
        if kept.made:
            _finish(run, kept.made, result)
    return result


class _Checkpoints(AbstractContextManager):
    """Writes a run after each epoch; ``twice`` where callbacks stand between this and behind.

    These may change the rate or the weights to go on with, also where the next of them raises.
    """

    def __init__(self, run: Run, twice: bool) -> None:
        self.run, self.twice = run, twice
        self.made: Experiment[Config] | None = None
        self.between: Fit | None = None

    def __call__(self, result: Fit) -> None:
        self.made = self.made or _experiment(result, self.run)
        save_epoch(self.run, self.made, result)
        self.between = result if self.twice else None

    def behind(self, result: Fit) -> None:
        assert self.made is not None
        save_epoch(self.run, self.made, result)
        self.between = None

    def __exit__(self, *raised: object) -> None:
        if self.between is not None:
            self.behind(self.between)


def save(result: Fit, path: str | Path) -> Path:
    """Write a training that is done, or as far as it has come, as a new run directory.

    Raises:
        InputError: If the directory is in use, or no epoch is done.
    """
    run = Run(path)
    run.require_new()
    if not result.history or "model" not in result.asked:
        raise InputError("Nothing to save yet: pyrovae.fit has not finished an epoch.")
    with run.training():
        made = _experiment(result, run)
        save_epoch(run, made, result)
        _finish(run, made, result)
    return run.path


def _finish(run: Run, made: Experiment[Config], result: Fit) -> None:
    run.save_metrics(result.history)
    run.save_weights(result.svi.pair.state_dict())
    reporting.draw_run(run, made)


def _experiment(result: Fit, run: Run) -> Experiment[Config]:
    """The configuration of a training, its pair and data, and the sources that could be had."""
    asked, data = result.asked, Dataset.of(result.asked["data"])
    programs, settings, reason = _recover(result, data)
    names = {kind: getattr(asked[kind], "__name__", type(asked[kind]).__name__) for kind in KINDS}
    records: dict[str, Any] = {
        kind: program_record(programs[kind], settings[kind])
        if programs
        else ProgramRecord(names[kind], None, {})
        for kind in KINDS
    }
    objects = {n: _called(asked[n]) for n in OBJECTS if not isinstance(asked[n], str | None)}
    plain = {name: asked[name] for name in TRAINING if name in asked and name not in objects}
    plain["compile"] = next(name for name, value in COMPILE.items() if value == plain["compile"])
    plain |= {"objective": objects.get("objective", asked["objective"])}
    plain |= {"schedule": "none"} if "schedule" in objects else {}
    config = Config(
        **plain,
        **records,
        data=data_record(data),
        device=str(result.svi.pair.device),
        seed=result.seed,
        objects=objects,
        objective_settings=_settings(asked["objective"]),
        unrecovered=reason,
        command=_command(asked, [*names.values(), data.name]),
        versions=versions(),
        identity=secrets.token_hex(16),
    )
    if run.exists():
        config = _continued(run.config, config)
    files = {name: source for p in programs.values() for name, source in p.files.items()}
    return Experiment(config, result.model, result.guide, data, files)


def _recover(
    result: Fit, data: Dataset
) -> tuple[dict[str, Program], dict[str, dict[str, Any]], str]:
    """Both programs and their settings, or neither and the reason: they are tried before."""
    asked, shape, found = result.asked, tuple(data.shape), {}
    for kind in KINDS:
        parts: dict[str, Any] = {"columns": data.columns, "guide": asked["guide"]}
        parts["context_columns"] = data.context_columns
        try:
            found[kind] = recover(kind, asked[kind], shape, parts)
        except InputError as error:
            return {}, {}, f"the {kind}: {error}"
    programs = {kind: program for kind, (program, _) in found.items()}
    settings = {kind: each for kind, (_, each) in found.items()}
    rows = tuple(tensor[:2].cpu() for tensor in data.split("train"))
    weights = result.svi.pair.state_dict()
    try:
        twins = build_pair(programs, settings, data, result.seed)
        pair = Pair(*twins)
        inspect_pair(pair, *rows)
        pair.load_state_dict(weights)
        place = result.svi.pair.device
        pair.to(place)
        rows = tuple(tensor.to(place) for tensor in rows)
        one = elbo(*twins, *rows, seed=0).elbo
        two = elbo(result.model, result.guide, *rows, seed=0).elbo
    except InputError as error:
        return {}, {}, f"programs made anew differ: {error}"
    if not torch.allclose(one, two):
        return {}, {}, "programs made anew give other numbers than those that were trained"
    return programs, settings, ""


def _continued(before: Config, now: Config) -> Config:
    """The configuration of a run that is trained further, if it is the same training."""
    kept = ("command", "versions", "identity", "resumed")
    now = replace(now, **{name: getattr(before, name) for name in kept})
    free = ["device", "sha256", "signature", *(["epochs"] if now.schedule == "none" else [])]
    free += [f"data.{name}" for name in before.data.free(now.data)]
    require_same(
        plain_json(before),
        plain_json(now),
        "The run was made with {key} = {before}, and this training has {now}: train it as it was "
        "begun, or into another out.",
        free=free,
    )
    return now


def _settings(objective: Any) -> dict[str, Any]:
    """What an objective was made with, as far as it keeps that under the same names or says so."""
    if not isinstance(objective, Objective):
        return {}
    known = inspect.signature(type(objective)).parameters
    kept = {name: vars(objective)[name] for name in known if name in vars(objective)}
    kept |= getattr(objective, "settings", {})
    plain = {n: v for n, v in kept.items() if isinstance(v, str | int | float)}
    return {n: v for n, v in plain.items() if v != known[n].default}


def _called(value: Any) -> str:
    return getattr(value, "__name__", type(value).__name__)


def _command(asked: dict[str, Any], names: list[str]) -> str:
    """The call that makes a run, of what differs from the defaults."""
    options = {n: v for n, v in asked.items() if n in FIT and v is not FIT[n].default}
    options = {n: v for n, v in options.items() if FIT[n].kind is inspect.Parameter.KEYWORD_ONLY}
    skipped = ("state", "on_epoch", "progress")
    shown = (
        f"{n}={v!r}" if isinstance(v, str | int | float | Path) else f"{n}={_called(v)}"
        for n, v in options.items()
        if n not in skipped and v != FIT[n].default
    )
    return f"pyrovae.fit({', '.join([*names, *shown])})"
