"""pyrovae: variational autoencoders as Pyro programs, from the command line."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from pyrovae import _start, reporting
from pyrovae._tools import InputError, require_same
from pyrovae._tools.files import plain_json, require_file, write_atomic
from pyrovae._tools.shown import counted, number
from pyrovae._tools.source_lines import error_place
from pyrovae.checking import check
from pyrovae.data import DATASETS
from pyrovae.exporting import WHAT, export
from pyrovae.exporting.formats import FORMATS
from pyrovae.objectives import OBJECTIVES
from pyrovae.opening import OpenRun, programs_of, report, stranger
from pyrovae.reporting.figures import png
from pyrovae.reporting.text import summarize
from pyrovae.runs import Run, experiment
from pyrovae.runs.compare import compare_runs
from pyrovae.runs.config import (
    SPLITS,
    Config,
    EvaluationConfig,
    Options,
    PairConfig,
    RunConfig,
    option,
)
from pyrovae.runs.evaluate import evaluate
from pyrovae.runs.programs import KINDS, is_refusal, shipped
from pyrovae.tracking import trackers
from pyrovae.training.distributed import Diverged, ProcessLost, World, join
from pyrovae.training.monitor import Fit, NonFiniteLoss, OnEpoch

TRUST = "execute the programs of a run that you did not make on this machine"
# How arguments that are named in advice are spelled here.
ARGUMENTS = {
    "batch_size": "--batch-size",
    "binarize": "--binarize",
    "clip_norm": "--clip-norm",
    "defensive": "--defensive",
    "initial": "--initial",
    "num_chains": "--annealed",
    "num_samples": "--samples",
    "refine_steps": "--refine",
    "valid_samples": "--valid-samples",
}
STOPPED_EARLY = "stopped before the end of the first epoch; nothing was written."


class _Unbroken:
    """A stream whose reader may go away, as that of ``| head`` does: the command goes on."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self._kept():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._kept():
            self.stream.flush()

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # What is still in the buffer goes where nobody reads it, when Python ends as well.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0, or 1 if training or a check failed, or another process did; 2 for bad input, 130 after
        Ctrl-C. Any other error is a defect, and raised.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    _start.interrupt_as_usual()
    out, err = _Unbroken(sys.stdout), _Unbroken(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            return _main(given)
        finally:
            sys.stdout.flush()


def _main(given: list[str]) -> int:
    world, traced = World(), "--traceback" in given
    try:
        world = join()
        with world.as_one():
            return _run([each for each in given if each != "--traceback"], world)
    except (KeyboardInterrupt, ProcessLost) as error:
        world.say(f"pyrovae: {error or 'stopped.'}")
        return 1 if isinstance(error, ProcessLost) else 130
    except Exception as error:
        if traced:
            world.say(traceback.format_exc())
        place = error_place(error, shipped=False)
        failed = isinstance(error, NonFiniteLoss | Diverged)
        refused = isinstance(error, InputError | OSError) or is_refusal(error)
        if not (failed or place or refused):
            raise
        told = failed or not place or str(error).startswith(place)
        where = "" if told else f"{place}: {type(error).__name__}: "
        # Pyro lists the shapes of all sites after what went wrong: too much for a sentence.
        sentence, _, _ = f"{where}{_as_options(str(error))}".partition("Trace Shapes:")
        world.say(f"pyrovae: error: {' '.join(sentence.split())}")
        return 1 if failed else 2


def _as_options(text: str) -> str:
    """Advice for Python as it is written on the command line."""
    for argument, flag in ARGUMENTS.items():
        text = re.sub(rf"(?<![\w.]){argument}=('?)([\w.]+)\1", rf"{flag} \2", text)
        text = text.replace(f"({argument})", f"({flag})")
    return text.replace("annealed_log_likelihood", "--annealed 16")


def _run(arguments: list[str], world: World) -> int:
    parser = argparse.ArgumentParser(prog="pyrovae", description=__doc__)
    # main() takes it away before this parser sees it: it may stand anywhere.
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error came from, always"
    )
    parser.add_argument("--version", action="version", version=f"pyrovae {version('pyrovae')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, (options, _) in COMMANDS.items():
        text = options.__doc__
        options.add_to(commands.add_parser(name, help=text, description=text))
    given = vars(parser.parse_args(arguments))
    options, command = COMMANDS[given.pop("command")]
    if world.size > 1 and command not in (_train, _evaluate):
        raise InputError(
            "Several processes are for train and evaluate alone: start this without torchrun."
        )
    try:
        return command(options.of(given), shlex.join([*world.command, *arguments])) or 0
    except SystemExit as error:
        place = error_place(error) or "A program"
        raise InputError(
            f"{place}: SystemExit: {error}: a program must not end Python; leave that line out."
        ) from error


@dataclass(frozen=True, kw_only=True)
class _Train(RunConfig):
    """Train a model and its guide into a run directory."""

    out: str = option("the run directory", "", metavar="DIR", said="required")
    resume: bool = option("go on with the run in DIR", False)
    track: str = option(
        "record every epoch in tensorboard, csv, mlflow or wandb, or several: tensorboard,wandb",
        "",
        metavar="NAMES",
        said="csv",
    )
    tensorboard: bool = option("the same as --track tensorboard", False)
    trust: bool = option(TRUST, False)

    @classmethod
    def of(cls, given: Mapping[str, Any], stored: Config | None = None) -> Self:
        """What is asked for, where a run is resumed beside what it was made with."""
        run = Run(given["out"])
        if not (given.get("resume") and run.exists()):
            if given.get("resume") and not KINDS & given.keys():
                told = f"{run.path} holds no run to go on with"
                raise InputError(f"{told}: to begin one, say --model, --guide and --data as well.")
            return super().of(given, stored)
        for kind in KINDS & given.keys():
            experiment.require_same_program(run, kind, given[kind])
        before, asked = run.config.data.load, given.get("data")
        if before in DATASETS and asked in DATASETS:
            require_same({"data": before}, {"data": asked}, experiment.RESUMED)
        return super().of(given, run.config)


def _train(options: _Train, line: str) -> None:
    run, world = Run(options.out), join()
    resumed = options.resume and run.exists()
    begun = len(run.history()) if resumed else 0
    if resumed:
        _admit(run, options.trust)
    else:
        run.require_new()
    try:
        with world.in_turn():
            made = experiment.resolve(options, line, run if resumed else None)
        names = f"{options.track},tensorboard" if options.tensorboard else options.track
        calls: list[OnEpoch] = [partial(_tell, options.epochs)]
        calls += trackers(names, run, made.config)
        result = experiment.train(run, made, resume=options.resume, on_epoch=calls)
    except (KeyboardInterrupt, ProcessLost) as error:
        epochs = len(run.history())
        again = shlex.join([*world.command, "train", "--out", str(run.path), "--resume"])
        said = f"stopped after epoch {epochs}; go on with: {again}"
        raise type(error)(said if epochs else STOPPED_EARLY) from None
    except NonFiniteLoss as error:
        done = len(run.history())
        kept = f" What {counted(done, 'epoch')} came to before is kept." if done else ""
        raise NonFiniteLoss(f"{error}{kept}") from error
    if not world.first:
        return
    reporting.draw_run(run, made)
    last = result.history[-1]
    if resumed and begun == len(result.history):
        print(f"No epoch was added: {options.epochs} were asked for, of which none was left.")
    print(
        f"{counted(len(result.history), 'epoch')}: ELBO {number(last['train_elbo'])} (train), "
        f"{number(last['valid_elbo'])} (validation; best in epoch {result.best_epoch}), "
        f"nats per datum."
    )
    print(f"The run is in {run.path}; now: {shlex.join(['pyrovae', 'evaluate', str(run.path)])}")


def _tell(epochs: int, result: Fit) -> None:
    """A line for each epoch where output is no terminal, on which a bar says it."""
    row = result.history[-1]
    if not sys.stderr.isatty():
        print(
            f"epoch {row['epoch']}/{epochs}  ELBO {number(row['train_elbo'])} (train)  "
            f"{number(row['valid_elbo'])} (validation)  {row['seconds']:.1f} s",
            flush=True,
        )


@dataclass(frozen=True, kw_only=True)
class _Check(PairConfig):
    """Look for mistakes in a model and its guide, on some data."""

    particles: int = option("draws of each test", 64, metavar="K")


def _check(options: _Check, line: str) -> int:
    made = experiment.build(options)
    rows = made.data.split("train")
    found = check(made.model, made.guide, *rows, seed=options.seed, particles=options.particles)
    print(_as_options(str(found)))
    return 0 if found.passed else 1


@dataclass(frozen=True, kw_only=True)
class _OnRun(Options):
    """A command on a run that is there."""

    run: str = option("the run directory", metavar="DIR")
    device: str = option("auto, cpu or cuda", "auto")
    data_root: str | None = option("where the torchvision data are", None, said="as in training")
    trust: bool = option(TRUST, False)

    def open(self) -> Run:
        """The run, if its programs may be executed."""
        run = Run.open(self.run)
        _admit(run, self.trust)
        return run

    def load(self, run: Run) -> experiment.Experiment[Config]:
        """What the run was made of."""
        return experiment.load_experiment(run, self.device, self.data_root)


def _admit(run: Run, trusted: bool) -> None:
    """Say which files of a run are about to be executed, and ask first if it is not your own."""
    world = join()
    if not (trusted or world.share(run.is_own)):
        asked = stranger(run)
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise InputError(f"{asked} Add --trust if you trust whoever made it.")
        print(f"pyrovae: {asked}", file=sys.stderr)
        if input("Do you trust whoever made it? [y/N] ").strip().lower() not in ("y", "yes"):
            raise InputError("Nothing was executed.")
    for each in programs_of(run):
        print(f"pyrovae: executing {each}", file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class _Evaluate(EvaluationConfig, _OnRun):
    """The ELBO, log p(x) and diagnostics, in nats per datum."""

    json: bool = option("print the results as JSON", False)


def _evaluate(options: _Evaluate, line: str) -> None:
    run = options.open()
    try:
        with join().in_turn():
            made = options.load(run)
        found = evaluate(run, made, options)
    except (KeyboardInterrupt, ProcessLost, ConnectionError) as error:
        kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ProcessLost
        raise kind(f"stopped; what is finished is kept; go on with: {line}") from None
    if found is not None:
        if not run.file("figures/samples.png").exists():
            reporting.draw_run(run, made)
        text = json.dumps(plain_json(found), indent=2) if options.json else None
        print(text or _as_options(summarize(found, options.split)))


@dataclass(frozen=True, kw_only=True)
class _Compare(Options):
    """Compare runs datum by datum, each with the first."""

    runs: tuple[str, ...] = option("the run directories", metavar="DIR")
    split: str = option("which data", "test", choices=SPLITS)
    out: str = option("also write a page", "", metavar="FILE.html", said="none")


def _compare(options: _Compare, line: str) -> None:
    out = Path(options.out).expanduser()
    if options.out:
        if out.suffix.lower() not in (".html", ".htm") or (out.parent / "config.json").exists():
            raise InputError(f"Expected --out FILE.html outside of a run, got {options.out}.")
        require_file(out)
        out.parent.mkdir(parents=True, exist_ok=True)
    found = compare_runs(options.runs, options.split)
    print(found)
    if options.out:
        write_atomic(out, reporting.render_comparison(found).encode())
        print(f"The comparison is {options.out}")


@dataclass(frozen=True, kw_only=True)
class _Sample(_OnRun):
    """Draw samples into DIR/figures/samples.png."""

    n: int = option("how many", 64, metavar="N", flag="-n", least=1)
    seed: int | None = option("seeds the draws", None, said="another each time")


def _sample(options: _Sample, line: str) -> None:
    run = options.open()
    made = options.load(run)
    rows = made.data.split("test")
    figure = reporting.sample_picture(made.model, *rows, n=options.n, seed=options.seed)
    print(f"{counted(options.n, 'sample')}: {run.write('figures/samples.png', png(figure))}")


@dataclass(frozen=True, kw_only=True)
class _Export(_OnRun):
    """Write a program of the run's pair that runs without it, checked against the pair."""

    what: str = option("encoder, decoder or log_likelihood", "", choices=WHAT, said="required")
    format: str = option("pt2 (torch.export), or ONNX", "pt2", choices=tuple(FORMATS))
    out: str = option("the file", "", metavar="FILE", said="in DIR/exports")
    samples: int = option("draws of the estimate of log p(x)", 64, metavar="K", least=1)


def _export(options: _Export, line: str) -> None:
    run = options.open()
    opened = OpenRun(run, options.device, options.data_root, trust=True)
    path = export(
        opened,
        what=options.what,
        format=options.format,
        out=options.out or None,
        samples=options.samples,
    )
    print(f"The {options.what} is {path}")


@dataclass(frozen=True, kw_only=True)
class _Report(Options):
    """Write DIR/report.html and the figures of its numbers; nothing of the run is executed."""

    run: str = option("the run directory", metavar="DIR")


def _report(options: _Report, line: str) -> None:
    print(f"The report is {report(options.run)}")


@dataclass(frozen=True, kw_only=True)
class _List(Options):
    """List every shipped model, guide, objective and data set."""


def _list(options: _List, line: str) -> None:
    kinds = {"models": shipped("model"), "guides": shipped("guide")}
    kinds["objectives"] = {name: line for name, (_, line) in OBJECTIVES.items()}
    kinds["data"] = DATASETS
    for kind, names in kinds.items():
        print(kind)
        for name, line in names.items():
            print(f"  {name:<25} {line}")


COMMANDS: dict[str, tuple[type[Options], Callable[[Any, str], int | None]]] = {
    "train": (_Train, _train),
    "check": (_Check, _check),
    "evaluate": (_Evaluate, _evaluate),
    "compare": (_Compare, _compare),
    "sample": (_Sample, _sample),
    "export": (_Export, _export),
    "report": (_Report, _report),
    "list": (_List, _list),
}
