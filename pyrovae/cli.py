"""The command line: train, check, evaluate, compare, sample, report, list."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pyrovae._evaluate_command import evaluate_command
from pyrovae._parser import make_parser
from pyrovae._tools import InputError
from pyrovae._tools.source_lines import error_place
from pyrovae._train_command import train_command, with_defaults
from pyrovae.data import DATASETS
from pyrovae.objectives import OBJECTIVES
from pyrovae.runs import Run
from pyrovae.runs.programs import shipped
from pyrovae.training.distributed import Diverged, ProcessLost, World, join
from pyrovae.training.loop import NonFiniteLoss

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0, or 1 if training or a check failed, or another process did; 2 for bad input, 130 after
        Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    world = World()
    try:
        world = join()
        with world.as_one():
            return _run(arguments, world)
    except (NonFiniteLoss, Diverged) as error:
        return _fail(str(error), 1, world)
    except (KeyboardInterrupt, ProcessLost) as error:
        world.say(f"pyrovae: {error or 'stopped.'}")
        return 1 if isinstance(error, ProcessLost) else 130
    except Exception as error:
        where = error_place(error, shipped=False)
        if where or isinstance(error, ValueError | TypeError | OSError | NotImplementedError):
            text = f"{where}: {type(error).__name__}: {error}" if where else str(error)
            return _fail(text, 2, world)
        raise


def _run(arguments: list[str], world: World) -> int:
    options = make_parser(COMMANDS).parse_args(arguments)
    if world.size > 1 and options.run_command not in SHARED:
        raise InputError(
            "Several processes are for train and evaluate alone: start this without torchrun."
        )
    options.command_line = shlex.join([*world.command, *arguments])
    options.world = world
    return options.run_command(options) or 0


def _fail(message: str, code: int, world: World) -> int:
    sentence, _, _ = message.partition("Trace Shapes:")
    world.say(f"pyrovae: error: {' '.join(sentence.split())}")
    return code


def _check(options: argparse.Namespace) -> int:
    from pyrovae.checking import check
    from pyrovae.runs import experiment

    given = {k: v for k, v in vars(options).items() if v is not None}
    particles = given.pop("particles")
    made = experiment.resolve(with_defaults(given, None), options.command_line)
    rows = made.data.split("train")
    report = check(made.model, made.guide, *rows, seed=made.config["seed"], particles=particles)
    print(report)
    return 0 if report.passed else 1


def _sample(options: argparse.Namespace) -> None:
    from pyrovae.report import sample_picture
    from pyrovae.report.figures import png
    from pyrovae.runs import experiment

    run = Run.open(options.run)
    if options.n < 1:
        raise InputError(f"Expected -n >= 1, got {options.n}.")
    made = experiment.load_experiment(run, options.device, options.data_root)
    figure = sample_picture(made.model, *made.data.split("test"), n=options.n, seed=options.seed)
    print(f"{options.n} samples: {run.save_figure('samples', png(figure))}")


def _report(options: argparse.Namespace) -> None:
    from pyrovae.report import draw_run, render_report
    from pyrovae.runs import experiment, write_atomic

    run = Run.open(options.run)
    if not run.results:
        raise InputError(f"Nothing to report yet; first: pyrovae evaluate {run.path}")
    made = experiment.load_experiment(run, options.device, options.data_root)
    draw_run(run, made)
    weights = run.weights_checksum()
    page = render_report(run.config, run.results, run.history(), run.figures(), weights=weights)
    write_atomic(run.path / "report.html", page.encode())
    print(f"The report is {run.path / 'report.html'}")


def _compare(options: argparse.Namespace) -> None:
    from pyrovae.report import render_comparison
    from pyrovae.runs import write_atomic
    from pyrovae.runs.compare import compare_runs

    found = compare_runs(options.runs, options.split)
    print(found)
    if options.out:
        write_atomic(Path(options.out), render_comparison(found).encode())
        print(f"The comparison is {options.out}")


def _list(options: argparse.Namespace) -> None:
    kinds = {
        "models": shipped("model"),
        "guides": shipped("guide"),
        "objectives": {name: line for name, (_, line) in OBJECTIVES.items()},
        "data": DATASETS,
    }
    for kind, names in kinds.items():
        print(kind)
        for name, line in names.items():
            print(f"  {name:<24}{line}")


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "train": train_command,
    "check": _check,
    "evaluate": evaluate_command,
    "compare": _compare,
    "sample": _sample,
    "report": _report,
    "list": _list,
}
SHARED = (train_command, evaluate_command)
