"""The command line: train, check, evaluate, sample, report, list."""

from __future__ import annotations

import argparse
import ast
import json
import shlex
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from pyrovae.data import DATASETS
from pyrovae.distributed import Diverged, World, join
from pyrovae.ending import Ending
from pyrovae.objectives import ESTIMATORS, OBJECTIVES
from pyrovae.parser import DEFAULTS, SHOWN, make_parser
from pyrovae.programs import place, plain, shipped
from pyrovae.runs import Run
from pyrovae.train import Fit, NonFiniteLoss

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0, or 1 if training or a check failed, 2 for bad input, 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    ending = Ending(World())
    try:
        ending = Ending(join())
        with ending.hushed():
            return _run(arguments, ending)
    except (NonFiniteLoss, Diverged) as error:
        return _fail(str(error), 1, ending)
    except KeyboardInterrupt as error:
        return ending.end(f"pyrovae: {error or 'stopped.'}", 130)
    except Exception as error:
        where = place(error)
        if where or isinstance(error, ValueError | TypeError | OSError | NotImplementedError):
            text = f"{where}: {type(error).__name__}: {error}" if where else str(error)
            return _fail(text, 2, ending)
        if ending.world.size == 1:
            raise
        return ending.end(traceback.format_exc(), 1)


def _run(arguments: list[str], ending: Ending) -> int:
    options = ending.parse(make_parser(COMMANDS), arguments)
    if ending.world.size > 1 and options.run_command is not _train:
        raise ValueError("Several processes are for train alone: start this without torchrun.")
    options.command_line = shlex.join([*ending.world.command, *arguments])
    options.ending = ending
    return options.run_command(options) or 0


def _fail(message: str, code: int, ending: Ending) -> int:
    sentence, _, _ = message.partition("Trace Shapes:")
    return ending.end(f"pyrovae: error: {' '.join(sentence.split())}", code)


def _train(options: argparse.Namespace) -> None:
    run = Run(options.out)
    with options.ending.parting(lambda: _stopped(run, options.ending.world)):
        _train_into(run, options)


def _train_into(run: Run, options: argparse.Namespace) -> None:
    from pyrovae import experiment

    world = options.ending.world
    given = {k: v for k, v in vars(options).items() if v is not None}
    resumed = options.resume and run.exists()
    settings = _with_defaults(given, run.config if resumed else None)
    if not resumed:
        run.require_new()
    with world.in_turn():
        made = experiment.resolve(settings, options.command_line, run if resumed else None)
    report = _Log(run, options.tensorboard, made.config["epochs"])
    try:
        result = experiment.train(run, made, resume=options.resume, on_epoch=report)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_stopped(run, world)) from None
    except NonFiniteLoss as error:
        kept = f" Its {len(done)} epochs before are kept." if (done := run.history()) else ""
        raise NonFiniteLoss(f"{error}{kept}") from error
    if not world.first:
        return
    experiment.draw(run, made)
    last = result.history[-1]
    print(
        f"{len(result.history)} epochs: ELBO {_number(last['train_elbo'])} (train), "
        f"{_number(last['valid_elbo'])} (validation; best in epoch {result.best_epoch}), "
        f"nats per datum."
    )
    print(f"The run is in {run.path}; now: pyrovae evaluate {run.path}")


def _check(options: argparse.Namespace) -> int:
    from pyrovae import experiment
    from pyrovae.check import check

    given = {k: v for k, v in vars(options).items() if v is not None}
    particles = given.pop("particles")
    made = experiment.resolve(_with_defaults(given, None), options.command_line)
    rows = made.data.split("train")
    report = check(made.model, made.guide, *rows, seed=made.config["seed"], particles=particles)
    print(report)
    return 0 if report.passed else 1


def _stopped(run: Run, world: World) -> str:
    if not run.history():
        return "stopped before the end of the first epoch; nothing was written."
    again = shlex.join([*world.command, "train", "--out", str(run.path), "--resume"])
    return f"stopped after epoch {len(run.history())}; go on with: {again}"


def _with_defaults(given: dict[str, Any], config: dict[str, Any] | None) -> dict[str, Any]:
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
        raise ValueError(f"Expected --{', --'.join(missing)} as well: see pyrovae list.")
    given = given | {"settings": _settings(given.get("set", []), stored.get("settings", {}))}
    wanted = (*DEFAULTS, "model", "guide", "data", "settings")
    return {k: v for k, v in (DEFAULTS | stored | given).items() if k in wanted}


def _settings(pairs: list[str], stored: dict[str, dict]) -> dict[str, dict]:
    settings = {kind: dict(stored.get(kind, {})) for kind in ("model", "guide", "objective")}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        kind, dot, option = name.partition(".")
        if not equals or not value or (dot and kind not in settings):
            raise ValueError(
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
                f"epoch {row['epoch']}/{self.epochs}  ELBO {_number(row['train_elbo'])} (train)  "
                f"{_number(row['valid_elbo'])} (validation)  {row['seconds']:.1f} s",
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
            raise ValueError("--tensorboard needs: pip install tensorboard") from error
        return SummaryWriter


def _evaluate(options: argparse.Namespace) -> None:
    from pyrovae import experiment

    run = Run.open(options.run)
    if options.samples < 1:
        raise ValueError(f"Expected --samples >= 1, got {options.samples}.")
    made = experiment.load_experiment(run, options.device, options.data_root)
    found = experiment.evaluate(run, made, split=options.split, num_samples=options.samples)
    print(json.dumps(found, indent=2) if options.json else _summary(found, options.split))


def _summary(found: dict[str, Any], split: str) -> str:
    a, b = (found["elbo"][name] for name in ESTIMATORS)
    ll = found["log_likelihood"]
    return "\n".join(
        [
            f"{split}, {found['num_data']} data, nats per datum (higher is better)",
            f"  ELBO, estimator A (Trace_ELBO)           {_number(a['mean'])} ± "
            f"{_number(a['standard_error'])} over data",
            f"  ELBO, estimator B (TraceMeanField_ELBO)  {_number(b['mean'])} ± "
            f"{_number(b['standard_error'])} over data",
            f"  log p(x), K = {ll['num_samples']:<26} {_number(ll['mean'])} ± "
            f"{_number(ll['standard_error'])} Monte Carlo, ± "
            f"{_number(ll['data_standard_error'])} over data",
            f"  {_khat(ll['khat_over_0.7'])}; median effective sample size "
            f"{ll['ess_median'] or 0:.0f} of {ll['num_samples']}",
            textwrap.fill(found["verdict"], 98, initial_indent="  ", subsequent_indent="  "),
        ]
    )


def _khat(share: float | None) -> str:
    if share is None:
        return "k-hat needs more samples"
    return f"k-hat > 0.7 for {share:.1%} of the data"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _sample(options: argparse.Namespace) -> None:
    from pyrovae import experiment
    from pyrovae.pictures import png, sample_picture

    run = Run.open(options.run)
    if options.n < 1:
        raise ValueError(f"Expected -n >= 1, got {options.n}.")
    made = experiment.load_experiment(run, options.device, options.data_root)
    figure = sample_picture(made.model, *made.data.split("test"), n=options.n, seed=options.seed)
    print(f"{options.n} samples: {run.save_figure('samples', png(figure))}")


def _report(options: argparse.Namespace) -> None:
    from pyrovae import experiment
    from pyrovae.report import render_report
    from pyrovae.runs import write_atomic

    run = Run.open(options.run)
    if not run.results:
        raise ValueError(f"Nothing to report yet; first: pyrovae evaluate {run.path}")
    made = experiment.load_experiment(run, options.device, options.data_root)
    experiment.draw(run, made)
    page = render_report(run.config, run.results, run.history(), run.figures())
    write_atomic(run.path / "report.html", page.encode())
    print(f"The report is {run.path / 'report.html'}")


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
    "train": _train,
    "check": _check,
    "evaluate": _evaluate,
    "sample": _sample,
    "report": _report,
    "list": _list,
}
