"""pyrovae: variational autoencoders as Pyro programs, from the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from pyrovae.data import BINARIZE, CONTEXTS
from pyrovae.training.precision import PRECISIONS

__all__ = ["DEFAULTS", "SHOWN", "make_parser"]

SPLITS = ("test", "valid", "train")
SHOWN = ("binarize", "context", "labelled")
DEFAULTS = {
    "objective": "trace_elbo",
    "epochs": 50,
    "batch_size": None,
    "particles": None,
    "lr": 1e-3,
    "schedule": "none",
    "clip_norm": None,
    "patience": None,
    "compile": "auto",
    "precision": "float32",
    "device": "auto",
    "seed": 0,
    "binarize": "none",
    "context": "none",
    "labelled": None,
    "data_root": None,
}


def make_parser(functions: dict[str, Callable]) -> argparse.ArgumentParser:
    """The parser of the command line.

    Args:
        functions: What runs each command, by its name.
    """
    parser = argparse.ArgumentParser(prog="pyrovae", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run_command=functions[name])
        return made

    _add_train(command("train", "Train a model and its guide into a run directory."))
    check = command("check", "Look for mistakes in a model and its guide, on some data.")
    _add_pair(check)
    check.add_argument("--particles", type=int, default=64, metavar="K", help="default 64")
    evaluate = command("evaluate", "The ELBO, log p(x) and diagnostics, in nats per datum.")
    _add_evaluate(evaluate)
    compare = command("compare", "Compare runs datum by datum, each with the first.")
    compare.add_argument("runs", metavar="DIR", nargs="+")
    compare.add_argument("--split", choices=SPLITS, default="test")
    compare.add_argument("--out", metavar="FILE.html", help="also write a page")
    sample = command("sample", "Draw samples into DIR/figures/samples.png.")
    sample.add_argument("run", metavar="DIR")
    sample.add_argument("-n", type=int, default=64, metavar="N", help="default 64")
    sample.add_argument("--seed", type=int)
    report = command("report", "Write DIR/report.html and its figures.")
    report.add_argument("run", metavar="DIR")
    for made in (evaluate, sample, report):
        made.add_argument("--device", default="auto")
        made.add_argument("--data-root", help="where the torchvision data lie")
    command("list", "List every shipped model, guide, objective and data set.")
    return parser


def _add_evaluate(made: argparse.ArgumentParser) -> None:
    made.add_argument("run", metavar="DIR")
    made.add_argument("--samples", type=int, default=1000, metavar="K", help="default 1000")
    made.add_argument("--split", choices=SPLITS, default="test")
    made.add_argument("--json", action="store_true", help="print the results as JSON")
    made.add_argument("--images", type=int, metavar="N", help="the first N data alone")
    text = "refine the guide for each datum first, by so many steps"
    made.add_argument("--refine", type=int, default=0, metavar="STEPS", help=text)
    text = "the share of the prior in the proposal"
    made.add_argument("--defensive", type=float, default=0.0, metavar="ALPHA", help=text)
    text = "also anneal so many chains, on 100 data or those of --images"
    made.add_argument("--annealed", type=int, default=0, metavar="CHAINS", help=text)
    text = "of annealing, default 500"
    made.add_argument("--temperatures", type=int, default=500, metavar="T", help=text)
    text = "leave out what the posterior does, and the draws for ArviZ"
    made.add_argument("--no-diagnostics", action="store_true", help=text)
    text = "do not go on with an evaluation that was stopped"
    made.add_argument("--fresh", action="store_true", help=text)


def _add_pair(made: argparse.ArgumentParser) -> None:
    made.add_argument("--model", metavar="M", help="a shipped name, FILE.py or FILE.py:CLASS")
    made.add_argument("--guide", metavar="G", help="likewise")
    made.add_argument("--data", metavar="D", help="a shipped name, or a .npy, .npz or .csv file")
    made.add_argument("--device", help="auto, cpu or cuda")
    made.add_argument("--seed", type=int, help="seeds every draw, default 0")
    made.add_argument("--binarize", help=f"one of {', '.join(BINARIZE)}")
    made.add_argument("--context", help=f"what the programs see beside x: {', '.join(CONTEXTS)}")
    made.add_argument("--labelled", type=int, metavar="N", help="show N of the training labels")
    made.add_argument("--data-root", help="where the torchvision data lie (or PYROVAE_DATA)")
    text = "latent=5 (for both), model.scale=pixel, objective.beta=4"
    made.add_argument("--set", action="append", metavar="NAME=VALUE", help=text)


def _add_train(train: argparse.ArgumentParser) -> None:
    default = DEFAULTS
    _add_pair(train)
    train.add_argument("--out", metavar="DIR", required=True, help="the run directory")
    train.add_argument("--objective", metavar="O", help="see pyrovae list")
    train.add_argument("--epochs", type=int, metavar="E", help=f"default {default['epochs']}")
    train.add_argument("--batch-size", type=int, metavar="M", help="default 128, or all if fewer")
    train.add_argument("--particles", type=int, metavar="L", help="samples of the objective")
    train.add_argument("--lr", type=float, help=f"learning rate of Adam, default {default['lr']}")
    train.add_argument("--schedule", choices=("none", "cosine"), help="of the learning rate")
    train.add_argument("--clip-norm", type=float, help="the largest norm of a gradient")
    train.add_argument("--patience", type=int, help="epochs without a better validation ELBO")
    train.add_argument("--compile", choices=("auto", "on", "off"), help="auto: where it pays")
    train.add_argument("--precision", help=f"of matrix products: {', '.join(PRECISIONS)}")
    train.add_argument("--resume", action="store_true", help="go on with the run in DIR")
    train.add_argument("--tensorboard", action="store_true", help="also write DIR/tensorboard")
