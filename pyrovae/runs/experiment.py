"""A run from its configuration: train it, load it, draw it."""

from __future__ import annotations

import hashlib
import platform
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from pyrovae._tools import InputError, require_same, warn
from pyrovae._tools.files import plain_json
from pyrovae._tools.seeding import seeded, subseed
from pyrovae.data import DATASETS, Dataset, Splits, load_data
from pyrovae.evidence.tiles import digest
from pyrovae.objectives import make_objective
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.pair import Pair
from pyrovae.runs import Run
from pyrovae.runs.beside import Sources
from pyrovae.runs.config import (
    RECIPES,
    SHOWN,
    Config,
    DataRecord,
    PairConfig,
    PairRecord,
    ProgramRecord,
    RunConfig,
    Session,
)
from pyrovae.runs.programs import (
    KINDS,
    Program,
    find_program,
    shipped,
    split_spec,
    warn_of_uncopied,
)
from pyrovae.training.distributed import join
from pyrovae.training.loop import fit
from pyrovae.training.monitor import Fit, OnEpoch, callbacks

PROGRAM_STREAM = 1_000_001
IN_MEMORY = "data in memory"
RESUMED = (
    "The run was made with {key} = {before}, and --resume was asked for {now}: leave the option "
    "out, or choose another --out."
)
C = TypeVar("C", bound=PairRecord)


class Experiment(NamedTuple, Generic[C]):
    """A configuration come to life."""

    config: C
    model: Callable
    guide: Callable
    data: Dataset
    files: dict[str, bytes]


def build(
    options: PairConfig, run: Run | None = None, given: Mapping[str, Any] | None = None
) -> Experiment[PairRecord]:
    """Build a pair and load its data, touching nothing on disk.

    Args:
        options: Which pair and which data.
        run: An existing run, whose copies of the user's files are used. What it holds is executed:
            ask :attr:`Run.is_own` before.
        given: The ``model``, ``guide`` or ``data`` of that run, to be taken in place of its own.
    """
    given = given or {}
    device = join().place(_choose_device(options.device))
    with seeded(subseed(options.seed, PROGRAM_STREAM, 0)):
        wanted = [kind for kind in KINDS if kind not in given]
        programs = {kind: _program(getattr(options, kind), kind, run) for kind in wanted}
    settings = {k: p.settings(_given(options, p, run)) for k, p in programs.items()}
    if "data" in given:
        data = Dataset.of(given["data"])
    elif options.data == IN_MEMORY:
        raise InputError(
            f"The data of {run.path if run else 'a run'} were in memory when it was trained: give "
            f"them, as pyrovae.load(DIR, data=...) does."
        )
    else:
        shown = {name: getattr(options, name) for name in SHOWN}
        drawn = 0 if run is None else run.config.data.binarize_seed or 0
        data = load_data(options.data, root=options.data_root, seed=drawn, **shown)
    model, guide = build_pair(programs, settings, data, options.seed, given)
    files = {name: source for p in programs.values() for name, source in p.files.items()}
    records = {kind: program_record(program, settings[kind]) for kind, program in programs.items()}
    records |= {k: getattr(run.config, k) for k in KINDS if run is not None and k in given}
    told = data_record(data, just_loaded="data" not in given)
    config = PairRecord(**records, data=told, device=str(device), seed=options.seed)
    return Experiment(config, model, guide, data.to(device), {} if run else files)


def data_record(data: Dataset, just_loaded: bool = False) -> DataRecord:
    """What a run keeps of its data: where to load them from, or a digest of what was in memory."""
    if data.loaded is not None and (just_loaded or _is_as_loaded(data)):
        load, root = data.loaded
        load = load if load in DATASETS else _absolute(load)
        return DataRecord.of(load, root and _absolute(root), data.provenance)
    tensors = [tensor for name in Splits._fields for tensor in data.split(name)]
    about = {
        "name": data.name,
        "shape": list(data.shape),
        "sizes": {name: len(rows[0]) for name in Splits._fields if (rows := data.split(name))},
        "binarize": data.binarize,
        "sha256": digest(*tensors, *([] if data.intensities is None else [data.intensities])),
    }
    return DataRecord.of(IN_MEMORY, None, about)


def _is_as_loaded(data: Dataset) -> bool:
    """Whether nobody has replaced a part of the data since they were loaded."""
    load, root = data.loaded or ("", None)
    told = {name: data.provenance[name] for name in SHOWN if name in data.provenance}
    seed = data.provenance.get("binarize_seed") or 0
    same = load_data(load, root=root, seed=seed, **told)
    return all(
        digest(*one.split(name)) == digest(*two.split(name))
        for one, two in [(same, data)]
        for name in Splits._fields
    )


def resolve(options: RunConfig, command: str, run: Run | None = None) -> Experiment[Config]:
    """Build what a run needs, touching nothing on disk.

    Args:
        options: What is asked for.
        command: The command that asks for it.
        run: An existing run to go on with, whose copies of the user's files are used.
    """
    made = build(options, run)
    about: dict[str, Any] = {"command": command, "versions": versions()}
    about["identity"] = secrets.token_hex(16)
    if run is not None:
        before = run.config
        if before.objects:
            told = ", ".join(f"{name}={value}" for name, value in before.objects.items())
            raise InputError(
                f"{run.path} was trained from Python with {told}, which no option can say: go on "
                f"with pyrovae.fit(..., state=pyrovae.load({str(run.path)!r}).state)."
            )
        about = {name: getattr(before, name) for name in (*about, "resumed")}
        # Going on with a run takes a further command only for more epochs.
        if before.epochs != options.epochs:
            about["command"] += f" && {command}"
        if [before.versions, *(each.versions for each in before.resumed)][-1] != versions():
            session = Session(len(run.history()), versions())
            about["resumed"] = (*before.resumed, session)
    config = Config(**vars(made.config), **options.stored(len(made.data.train)), **about)
    _objective(config)
    return Experiment(config, *made[1:])


def versions() -> dict[str, str]:
    """The versions of Python and of what numbers depend on."""
    found = {name: version(name) for name in ("pyrovae", "torch", "pyro-ppl", "numpy")}
    return {"python": platform.python_version()} | found


def train(
    run: Run,
    experiment: Experiment[Config],
    *,
    resume: bool,
    on_epoch: OnEpoch | Sequence[OnEpoch],
) -> Fit:
    """Train an experiment into a run directory, with a checkpoint after each epoch.

    Args:
        run: Where to; it is created when the first epoch is done.
        experiment: What.
        resume: Go on from the run's checkpoint.
        on_epoch: As for :func:`pyrovae.fit`, called when the epoch's checkpoint is safe.

    Raises:
        InputError: If the run is another one, or is being trained by another process.
    """
    with run.training() if join().first else nullcontext():
        return _train(run, experiment, resume, on_epoch)


def _train(
    run: Run,
    experiment: Experiment[Config],
    resume: bool,
    on_epoch: OnEpoch | Sequence[OnEpoch],
) -> Fit:
    config, state = experiment.config, None
    if resume and run.exists():
        # Where the data lie, the device and the number of epochs may change; the last only if the
        # learning rate does not depend on it.
        free = ["command", "device", "resumed", "sha256", "signature"]
        free += [f"data.{name}" for name in run.config.data.free(config.data)]
        require_same(
            plain_json(run.config),
            plain_json(config),
            RESUMED,
            free=free if config.schedule in ("cosine", "iwae") else [*free, "epochs"],
        )
        state = run.load_checkpoint()
    else:
        run.require_new()
        for kind in KINDS:
            file, _ = split_spec(getattr(config, kind).name)
            if file is not None:
                warn_of_uncopied(Sources.read(file.expanduser(), kind), kind)

    result = fit(
        experiment.model,
        experiment.guide,
        experiment.data,
        objective=_objective(config),
        **config.fit_arguments(),
        device=config.device,
        seed=config.seed,
        state=state,
        on_epoch=[partial(save_epoch, run, experiment), *callbacks(on_epoch)],
    )
    if result.world.first:
        run.save_metrics(result.history)
        run.save_weights(result.svi.pair.state_dict())
    return result


def save_epoch(run: Run, made: Experiment[Config], result: Fit) -> None:
    """Write a training as far as it has come."""
    if not run.exists() or run.config != made.config:
        run.create(made.config, made.files)
    run.save_checkpoint(result.state_dict())
    run.save_metrics(result.history)


def load_experiment(
    run: Run,
    device: str = "auto",
    root: str | None = None,
    given: Mapping[str, Any] | None = None,
) -> Experiment[Config]:
    """A run's trained pair and its data, if they are those that the run was made with.

    What is ``given`` of ``model``, ``guide`` and ``data`` is taken in place of the run's own.
    This executes what ``programs/`` of the run holds by its configuration, and reads or downloads
    the data that it names: :attr:`Run.is_own` says whether they are your own.
    """
    config = run.config
    options = {"device": device} | ({"data_root": root} if root else {})
    made = build(PairConfig.of(options, config), run, given)
    require_same(
        plain_json(config.data),
        plain_json(made.config.data),
        "The data are not those of the run: {key} was {before}, is now {now}. Put back the data "
        "that it was trained on (arrays become float32, tensors stay as they are), or train "
        "another run.",
        free=config.data.free(made.config.data),
    )
    pair = Pair(made.model, made.guide)
    with seeded(0):
        split = next(name for name in ("test", "train") if made.data.split(name))
        pair.to(torch.device("cpu"))
        inspect_pair(pair, *(tensor[:2].cpu() for tensor in made.data.split(split)))
    weights = run.load_weights()
    try:
        pair.load_state_dict(weights)
    except InputError as error:
        raise InputError(
            f"{error} They are of other programs or settings than {run.path / 'config.json'} "
            f"says, or of a frame's columns, which no array has: put back the files and the data "
            f"of this run, or train into another --out."
        ) from error
    pair.to(made.data.device)
    return Experiment(config, *made[1:4], {})


def require_same_program(run: Run, kind: str, spec: str) -> None:
    """Refuse to go on with a run with another program, or files other than its copies of them."""
    record, (path, _) = getattr(run.config, kind), split_spec(spec)
    if path is None or record.file is None:
        require_same({kind: record.name}, {kind: spec}, RESUMED)
        return
    given, before = Sources.read(path.expanduser(), kind), run.sources(kind)
    pairs = [(given.file, run.file(record.file), given.source == before.source)]
    for name in sorted({*given.modules, *before.modules}):
        same = given.modules.get(name) == before.modules.get(name)
        pairs.append((given.folder / name, before.folder / name, same))
    for file, stored, same in pairs:
        if not same:
            raise InputError(
                f"{file} is not what the run was made with, {stored}: leave --{kind} out to go "
                f"on with that copy, or train the edited file into another --out."
            )


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
    programs: dict[str, Program],
    settings: dict[str, dict],
    data: Dataset,
    seed: int,
    given: Mapping[str, Any] | None = None,
) -> tuple[Callable, Callable]:
    """Construct the model and the guide, or what is not given of them, for some data."""
    shape, given = tuple(data.shape), given or {}
    # Programs that ask for the columns of a table get them.
    known = {"columns": data.columns, "context_columns": data.context_columns}
    columns: dict[str, dict[str, Any]] = {
        kind: {name: value for name, value in known.items() if name in program.arguments()}
        for kind, program in programs.items()
    }
    parts = columns.get("model", {})
    words = [each.name for each in data.columns or () if len(each.categories) > 2]
    if words and "model" in programs and "model" not in given and "columns" not in parts:
        warn(
            f"The model takes the codes of {', '.join(map(repr, words[:3]))} for numbers, though "
            f"they are of categories: take 'table' for model and guide, or leave the columns out."
        )
    if settings.get("model", {}).get("mean") == "data":
        parts["mean"] = data.train.mean(0)
    made = {kind: given[kind] for kind in KINDS if kind in given}
    first = "model" in programs and "guide" in programs["model"].arguments()
    with seeded(subseed(seed, PROGRAM_STREAM)):
        for kind in ("guide", "model") if first else ("model", "guide"):
            if kind in programs:
                more = {"guide": made["guide"]} if first and kind == "model" else {}
                more |= parts if kind == "model" else columns["guide"]
                made[kind] = programs[kind].build(shape, settings[kind], **more)
    return made["model"], made["guide"]


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def _given(options: PairConfig, program: Program, run: Run | None) -> dict[str, Any]:
    """The settings that are given for a program, and those that a recipe adds."""
    recipe, arguments = RECIPES[getattr(options, "recipe", "none")], program.arguments()
    added = recipe.settings.get(program.kind, {})
    added = {n: v for n, v in added.items() if n in arguments and arguments[n].default is None}
    if run is not None and added:
        # A run of before the recipe had a setting goes on as it was made.
        made = getattr(run.config, program.kind).settings
        added = {name: value for name, value in added.items() if made.get(name) == value}
    return added | options.settings.get(program.kind, {})


def _program(name: str, kind: str, run: Run | None) -> Program:
    record = None if run is None else getattr(run.config, kind)
    if run is None or record is None:
        return find_program(name, kind)
    if record.file is not None:
        return find_program(name, kind, run.sources(kind))
    if name == record.name and name not in shipped(kind):
        raise InputError(
            f"{run.path / 'config.json'} names the {kind} {name!r}, which is none of "
            f"{sorted(shipped(kind))}, and the run holds no copy of it"
            f"{run.config.unrecovered and f' ({run.config.unrecovered})'}: give both programs, as "
            f"pyrovae.load(DIR, model=..., guide=...)."
        )
    return find_program(name, kind)


def program_record(program: Program, settings: dict[str, Any]) -> ProgramRecord:
    """What a run keeps of a program."""
    if program.source is None:
        return ProgramRecord(program.name, None, settings)
    digest = hashlib.sha256(program.source).hexdigest()
    modules = {path: hashlib.sha256(each).hexdigest() for path, each in program.modules.items()}
    return ProgramRecord(program.name, f"programs/{program.kind}.py", settings, digest, modules)


def _objective(config: Config) -> Any:
    return make_objective(config.objective, config.particles, **config.objective_settings)
