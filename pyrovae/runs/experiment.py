"""A run from its configuration: train it, load it, draw it."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyrovae._tools import InputError, require_same
from pyrovae._tools.seeding import seeded, subseed
from pyrovae.data import DATASETS, Dataset, load_data
from pyrovae.objectives import make_objective
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.pair import Pair
from pyrovae.runs import Run
from pyrovae.runs.config import SHOWN, PairConfig, RunConfig
from pyrovae.runs.programs import KINDS, Program, find_program
from pyrovae.training.distributed import join
from pyrovae.training.loop import fit
from pyrovae.training.monitor import Fit

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
    """
    device = join().place(_choose_device(options.device))
    with seeded(subseed(options.seed, PROGRAM_STREAM, 0)):
        programs = {kind: _program(getattr(options, kind), kind, run) for kind in KINDS}
    settings = {k: p.settings(options.settings.get(k, {})) for k, p in programs.items()}
    load = options.data if options.data in DATASETS else _absolute(options.data)
    root = options.data_root and _absolute(options.data_root)
    shown = {name: getattr(options, name) for name in SHOWN}
    data = load_data(options.data, root=root, **shown)
    model, guide = build_pair(programs, settings, data, options.seed)
    files = {f"{k}.py": p.source for k, p in programs.items() if p.source is not None}
    config: dict[str, Any] = {
        kind: {
            "name": program.name,
            "file": None if program.source is None else f"programs/{kind}.py",
            "settings": settings[kind],
        }
        for kind, program in programs.items()
    }
    config["data"] = {"load": load, "root": root} | data.provenance
    config |= {"device": str(device), "seed": options.seed}
    return Experiment(config, model, guide, data.to(device), {} if run else files)


def resolve(options: RunConfig, command: str, run: Run | None = None) -> Experiment:
    """Build what a run needs, touching nothing on disk.

    Args:
        options: What is asked for.
        command: The command that asks for it.
        run: An existing run to go on with, whose copies of the user's files are used.
    """
    made = build(options, run)
    if run is not None:
        # Going on with a run takes a further command only for more epochs.
        before = run.config
        more = "" if before["epochs"] == options.epochs else f" && {command}"
        command = before["command"] + more
    versions = {"python": platform.python_version()}
    versions |= {name: version(name) for name in ("pyrovae", "torch", "pyro-ppl", "numpy")}
    config = {
        "command": command,
        **made.config,
        **options.stored(len(made.data.train)),
        "versions": versions,
    }
    _objective(config)
    return made._replace(config=config)


def train(
    run: Run,
    experiment: Experiment,
    *,
    resume: bool,
    on_epoch: Callable[[Fit], None],
) -> Fit:
    """Train an experiment into a run directory, with a checkpoint after each epoch.

    Args:
        run: Where to; it is created when the first epoch is done.
        experiment: What.
        resume: Go on from the run's checkpoint.
        on_epoch: Called with the :class:`Fit` after each epoch, when the checkpoint is safe.
    """
    config, state = experiment.config, None
    if resume and run.exists():
        # Where the data lie, the device and the number of epochs may change; the last only if the
        # learning rate does not depend on it. An older run lacks what is an option since.
        free = ["command", "device", "versions", "data.load", "data.root", "data.source"]
        free += config.keys() - run.config.keys()
        require_same(
            run.config,
            config,
            "The run was made with {key} = {before}, and --resume was asked for {now}: leave the "
            "option out, or choose another --out.",
            free=free if config["schedule"] in ("cosine", "iwae") else [*free, "epochs"],
        )
        state = run.load_checkpoint()
    else:
        run.require_new()

    def after_epoch(result: Fit) -> None:
        if not run.exists() or run.config != config:
            run.create(config, experiment.files)
        run.save_checkpoint(result.state_dict())
        run.save_metrics(result.history)
        on_epoch(result)

    result = fit(
        experiment.model,
        experiment.guide,
        experiment.data,
        objective=_objective(config),
        **RunConfig.fit_arguments(config),
        state=state,
        on_epoch=after_epoch,
    )
    if result.world.first:
        run.save_metrics(result.history)
        run.save_weights(result.svi.pair.state_dict())
    return result


def load_experiment(run: Run, device: str = "auto", root: str | None = None) -> Experiment:
    """A run's trained pair and its data, if they are those that the run was made with."""
    config = run.config
    given = {"device": device} | ({"data_root": root} if root else {})
    made = build(PairConfig.of(given, config), run)
    was, now = config["data"], made.data.provenance
    require_same(
        was,
        now,
        "The data are not those of the run: {key} was {before}, is now {now}. Put back the data "
        "that it was trained on, or train another run.",
        free=["source", *(was.keys() ^ now.keys())],
    )
    pair = Pair(made.model, made.guide)
    with seeded(0):
        inspect_pair(pair, *(tensor[:2].cpu() for tensor in made.data.split("test")))
    weights = run.load_weights()
    try:
        pair.load_state_dict(weights)
    except InputError as error:
        raise InputError(
            f"{error} They are of other programs or settings than {run.path / 'config.json'} "
            f"says: put back the files of this run, or train into another --out."
        ) from error
    pair.to(made.data.train.device)
    return made._replace(config=config, files={})


def _choose_device(name: str) -> torch.device:
    """``"auto"`` is CUDA where there is one."""
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


def build_pair(
    programs: dict[str, Program], settings: dict[str, dict], data: Dataset, seed: int
) -> tuple[Callable, Callable]:
    """Construct the model and the guide, each with its settings, for some data."""
    shape = tuple(data.shape)
    # Programs that ask for the columns of a table get them.
    columns: dict[str, dict[str, Any]] = {
        kind: {"columns": data.columns} if "columns" in program.arguments() else {}
        for kind, program in programs.items()
    }
    parts = columns["model"]
    if settings["model"].get("mean") == "data":
        parts["mean"] = data.train.mean(0)
    with seeded(subseed(seed, PROGRAM_STREAM)):
        if "guide" in programs["model"].arguments():
            guide = programs["guide"].build(shape, settings["guide"], **columns["guide"])
            return programs["model"].build(shape, settings["model"], guide=guide, **parts), guide
        model = programs["model"].build(shape, settings["model"], **parts)
        return model, programs["guide"].build(shape, settings["guide"], **columns["guide"])


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def _program(name: str, kind: str, run: Run | None) -> Program:
    stored = None if run is None else run.config[kind]["file"]
    if run is None or stored is None:
        return find_program(name, kind)
    _, colon, attribute = name.partition(":")
    return find_program(f"{run.path / stored}{colon}{attribute}", kind)._replace(name=name)


def _objective(config: dict[str, Any]) -> Any:
    return make_objective(config["objective"], config["particles"], **config["objective_settings"])
