"""A run from its configuration: train it, load it, draw it."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyrovae._tools import InputError
from pyrovae._tools.seeding import seeded, subseed
from pyrovae.data import DATASETS, Dataset, load_data
from pyrovae.objectives import make_objective
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.pair import Pair
from pyrovae.runs import Run
from pyrovae.runs.config import PairConfig, RunConfig, require_same_data, require_same_run
from pyrovae.runs.programs import KINDS, Program, find_program
from pyrovae.training.distributed import join
from pyrovae.training.loop import Fit, fit

__all__ = [
    "Experiment",
    "build",
    "choose_device",
    "load_experiment",
    "resolve",
    "train",
]

PROGRAM_STREAM = 1_000_001


class Experiment(NamedTuple):
    """A configuration come to life."""

    config: dict[str, Any]
    model: Callable
    guide: Callable
    data: Dataset
    files: dict[str, bytes]


def build(options: PairConfig, run: Run | None = None) -> Experiment:
    """Build a pair and load its data, touching nothing on disk.

    Args:
        options: Which pair and which data.
        run: An existing run, whose copies of the user's files are used.

    Raises:
        InputError: If anything asked for does not exist or does not fit together.
    """
    device = join().place(choose_device(options.device))
    programs = _programs({k: getattr(options, k) for k in KINDS}, run, options.seed)
    settings = {k: p.settings(options.settings.get(k, {})) for k, p in programs.items()}
    load = options.data if options.data in DATASETS else _absolute(options.data)
    root = options.data_root and _absolute(options.data_root)
    data = load_data(options.data, root=root, **options.shown)
    model, guide = _build(programs, settings, data, options.seed)
    files = {f"{k}.py": p.source for k, p in programs.items() if p.source is not None}
    config = {
        **{k: _describe(programs[k], settings[k]) for k in KINDS},
        "data": {"load": load, "root": root} | data.provenance,
        "device": str(device),
        "seed": options.seed,
    }
    return Experiment(config, model, guide, data.to(device), {} if run else files)


def resolve(options: RunConfig, command: str, run: Run | None = None) -> Experiment:
    """Build what a run needs, touching nothing on disk.

    Args:
        options: What is asked for.
        command: The command that asks for it.
        run: An existing run to go on with, whose copies of the user's files are used.

    Raises:
        InputError: If anything asked for does not exist or does not fit together.
    """
    made = build(options, run)
    config = {
        "command": _command(command, run, options.epochs),
        **made.config,
        **options.stored(len(made.data.train)),
        "versions": _versions(),
    }
    _objective(config)
    return made._replace(config=config)


def train(
    run: Run,
    experiment: Experiment,
    *,
    resume: bool = False,
    on_epoch: Callable[[Fit], None] | None = None,
    progress: bool = True,
) -> Fit:
    """Train an experiment into a run directory, with a checkpoint after each epoch.

    Args:
        run: Where to; it is created when the first epoch is done.
        experiment: What.
        resume: Go on from the run's checkpoint.
        on_epoch: Called with the :class:`Fit` after each epoch, when the checkpoint is safe.
        progress: Show a bar if standard error is a terminal.

    Raises:
        ValueError: If the directory is in use, or the run in it was configured otherwise.
    """
    config, state = experiment.config, None
    if resume and run.exists():
        require_same_run(run.config, config)
        state = run.load_checkpoint()
    else:
        run.require_new()

    def after_epoch(result: Fit) -> None:
        if not run.exists() or run.config != config:
            run.create(config, experiment.files)
        run.save_checkpoint(result.state_dict())
        run.save_metrics(result.history)
        if on_epoch is not None:
            on_epoch(result)

    result = fit(
        experiment.model,
        experiment.guide,
        experiment.data,
        objective=_objective(config),
        **RunConfig.fit_arguments(config),
        state=state,
        on_epoch=after_epoch,
        progress=progress,
    )
    if result.world.first:
        run.save_metrics(result.history)
        run.save_weights(result.svi.pair.state_dict())
    return result


def load_experiment(run: Run, device: str = "auto", root: str | None = None) -> Experiment:
    """A run's trained pair and its data.

    Raises:
        ValueError: If weights, programs or data are not those that the run was made with.
    """
    config = run.config
    given = {"device": device} | ({"data_root": root} if root else {})
    made = build(PairConfig.of(given, config), run)
    require_same_data(config["data"], made.data.provenance)
    pair = Pair(made.model, made.guide)
    with seeded(0):
        inspect_pair(pair, *(tensor[:2].cpu() for tensor in made.data.split("test")))
    _fill(pair, run)
    pair.to(made.data.train.device)
    return made._replace(config=config, files={})


def _fill(pair: Pair, run: Run) -> None:
    weights = run.load_weights()
    try:
        pair.load_state_dict(weights)
    except InputError as error:
        raise InputError(
            f"{error} They are of other programs or settings than {run.path / 'config.json'} "
            f"says: put back the files of this run, or train into another --out."
        ) from error


def choose_device(name: str) -> torch.device:
    """``"auto"`` is CUDA where there is one.

    Raises:
        ValueError: If CUDA is asked for and there is none, or the name is no device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise InputError(f"Expected device 'auto', 'cpu' or 'cuda', got {name!r}.")
    if kind == "cuda" and int(index or 0) >= count:
        found = f"There are {count} CUDA devices" if count else "There is no CUDA device"
        raise InputError(f"{found} here: use --device cpu or --device auto.")
    return torch.device(name)


def _build(
    programs: dict[str, Program], settings: dict[str, dict], data: Dataset, seed: int
) -> tuple[Callable, Callable]:
    shape = tuple(data.shape)
    with seeded(subseed(seed, PROGRAM_STREAM)):
        if programs["model"].takes("guide"):
            guide = programs["guide"].build(shape, settings["guide"])
            return programs["model"].build(shape, settings["model"], guide=guide), guide
        model = programs["model"].build(shape, settings["model"])
        return model, programs["guide"].build(shape, settings["guide"])


def _describe(program: Program, settings: dict[str, Any]) -> dict[str, Any]:
    stored = None if program.source is None else f"programs/{program.kind}.py"
    return {"name": program.name, "file": stored, "settings": settings}


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def _command(command: str, run: Run | None, epochs: int) -> str:
    """What reproduces the run: going on with it takes a further command only for more epochs."""
    if run is None:
        return command
    before = run.config
    more = "" if before["epochs"] == epochs else f" && {command}"
    return before["command"] + more


def _programs(names: dict[str, str], run: Run | None, seed: int) -> dict[str, Program]:
    with seeded(subseed(seed, PROGRAM_STREAM, 0)):
        return {kind: _program(name, kind, run) for kind, name in names.items()}


def _program(name: str, kind: str, run: Run | None) -> Program:
    stored = None if run is None else run.config[kind]["file"]
    if run is None or stored is None:
        return find_program(name, kind)
    attribute = name.partition(":")[2]
    file = str(run.path / stored)
    return find_program(f"{file}:{attribute}" if attribute else file, kind)._replace(name=name)


def _objective(config: dict[str, Any]) -> Any:
    return make_objective(config["objective"], config["particles"], **config["objective_settings"])


def _versions() -> dict[str, str]:
    packages = ("pyrovae", "torch", "pyro-ppl", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
