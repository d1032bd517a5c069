"""The options of a run and of its evaluation, each in one place.

An option is a field of a dataclass: its name, its type, its default and what it means. The parser
of the command line, the arguments of :func:`pyrovae.fit`, ``config.json`` and ``docs/options.md``
come from it.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Self

from torch.optim.lr_scheduler import CosineAnnealingLR

from pyrovae._tools import InputError, require_same
from pyrovae._tools.options import Options, option
from pyrovae.data import BINARIZE, CONTEXTS
from pyrovae.runs.programs import KINDS, plain
from pyrovae.training.loop import fit
from pyrovae.training.optimizer import PRECISIONS

__all__ = [
    "SPLITS",
    "EvaluationConfig",
    "PairConfig",
    "RunConfig",
    "require_same_data",
    "require_same_run",
]

SPLITS = ("test", "valid", "train")
COMPILE: dict[str, bool | str] = {"auto": "auto", "on": True, "off": False}
SHOWN = ("binarize", "context", "labelled")
FIT = inspect.signature(fit).parameters


def _fitted(name: str, meaning: str, **more: Any) -> Any:
    """An option that is an argument of :func:`pyrovae.fit`, with its default."""
    return option(meaning, FIT[name].default, **more)


@dataclass(frozen=True, kw_only=True)
class PairConfig(Options):
    """A pair and the data that it is for."""

    model: str = option("p(z)p(x|z): a shipped name, FILE.py or FILE.py:CLASS", "", metavar="M")
    guide: str = option("q(z|x), likewise", "", metavar="G")
    data: str = option("a shipped name, or a .npy, .npz or .csv file", "", metavar="D")
    device: str = option("auto, cpu or cuda", "auto")
    seed: int = option("seeds every draw", 0)
    binarize: str = option(f"one of {', '.join(BINARIZE)}", "none")
    context: str = option(f"what the programs see beside x: {', '.join(CONTEXTS)}", "none")
    labelled: int | None = option("show N of the training labels", None, metavar="N", said="all")
    data_root: str | None = option("where the torchvision data are", None, said="$PYROVAE_DATA")
    settings: Mapping[str, dict[str, Any]] = option(
        "a setting: latent=5 (of both), model.scale=pixel, objective.beta=4",
        dict,
        metavar="NAME=VALUE",
        flag="--set",
        said="of the program",
    )

    @classmethod
    def of(cls, given: Mapping[str, Any], stored: Mapping[str, Any] | None = None) -> Self:
        """What is asked for: as given, or else as a run was made with, or else by default.

        Args:
            given: The options that were given, ``settings`` as ``["NAME=VALUE", ...]``.
            stored: The content of a run's ``config.json``.

        Raises:
            InputError: If there is no pair or no data, or a setting is misspelt.
        """
        known = {} if stored is None else cls._stored(stored)
        options = super().of(known | dict(given))
        if missing := [kind for kind in ("model", "guide", "data") if not getattr(options, kind)]:
            raise InputError(f"Expected --{', --'.join(missing)} as well: see pyrovae list.")
        pairs = given.get("settings", [])
        return replace(options, settings=_settings(pairs, known.get("settings", {})))

    @classmethod
    def _stored(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        data = config["data"]
        return {
            **{each.name: config[each.name] for each in fields(cls) if each.name in config},
            **{kind: config[kind]["name"] for kind in KINDS},
            **{name: data[name] for name in SHOWN if name in data},
            "data": data["load"],
            "data_root": data["root"],
            "settings": {kind: config[kind]["settings"] for kind in KINDS}
            | {"objective": config.get("objective_settings", {})},
        }

    @property
    def shown(self) -> dict[str, Any]:
        """How the programs see the data: arguments of :func:`pyrovae.load_data`."""
        return {name: getattr(self, name) for name in SHOWN}


@dataclass(frozen=True, kw_only=True)
class RunConfig(PairConfig):
    """What a run is asked to do."""

    objective: str = _fitted("objective", "what is maximized, see pyrovae list", metavar="O")
    epochs: int = _fitted("epochs", "passes over the training data", metavar="E")
    batch_size: int | None = option(
        "the size of a minibatch",
        None,
        metavar="M",
        said=f"{FIT['batch_size'].default}, or all if fewer",
    )
    particles: int | None = _fitted(
        "particles", "samples of each datum", metavar="L", said="of the objective"
    )
    lr: float = _fitted("lr", "learning rate of Adam")
    schedule: str = option("schedule of the learning rate", "none", choices=("none", "cosine"))
    clip_norm: float | None = _fitted("clip_norm", "the largest norm of a gradient", said="none")
    patience: int | None = _fitted(
        "patience", "stop after so many epochs without a better validation ELBO", said="never"
    )
    compile: str = _fitted(
        "compile", "compile the step; auto: where it pays", choices=tuple(COMPILE)
    )
    precision: str = _fitted("precision", f"precision of matrix products: {', '.join(PRECISIONS)}")

    def stored(self, num_data: int) -> dict[str, Any]:
        """The entries of ``config.json`` that say how to train.

        Args:
            num_data: The number of training data, which bounds the size of a minibatch.
        """
        found = {name: getattr(self, name) for name in _names(RunConfig, but=PairConfig)}
        if self.batch_size is None:
            found["batch_size"] = min(FIT["batch_size"].default, num_data)
        return found | {"objective_settings": self.settings.get("objective", {})}

    @staticmethod
    def fit_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of :func:`pyrovae.fit` that a run's ``config.json`` holds."""
        names = [name for name in _names(RunConfig, but=PairConfig) if name in FIT]
        found = {name: config[name] for name in names if name not in ("objective", "particles")}
        return found | {
            "compile": COMPILE[config["compile"]],
            "scheduler": _scheduler(config["schedule"], config["epochs"]),
            "device": config["device"],
            "seed": config["seed"],
        }


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Options):
    """What an evaluation of a run is asked to measure."""

    samples: int = option("samples of the guide for log p(x)", 1000, metavar="K")
    split: str = option("which data", "test", choices=SPLITS)
    images: int | None = option("the first N data alone", None, metavar="N", said="all")
    refine: int = option(
        "refine the guide for each datum first, by so many steps", 0, metavar="STEPS"
    )
    defensive: float = option("the share of the prior in the proposal", 0.0, metavar="ALPHA")
    annealed: int = option(
        "also anneal so many chains, on 100 data or those of --images", 0, metavar="CHAINS"
    )
    temperatures: int = option("temperatures of annealing", 500, metavar="T")
    no_diagnostics: bool = option(
        "leave out what the posterior does, and the draws for ArviZ", False
    )
    fresh: bool = option("do not go on with an evaluation that was stopped", False)

    def check(self) -> None:
        """Refuse numbers that are out of range."""
        least = {"samples": 1, "images": 1, "refine": 0, "annealed": 0, "temperatures": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise InputError(f"Expected --{name} >= {bound}, got {value}.")


def require_same_run(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a run under another configuration.

    Where the data lie, the device and the number of epochs may change; the last only if the
    learning rate does not depend on it.

    Args:
        before: The run's configuration.
        now: The configuration asked for.

    Raises:
        InputError: Naming the first entry that differs.
    """
    free = ["command", "device", "versions", "data.load", "data.root", "data.source"]
    require_same(
        before,
        now,
        "The run was made with {key} = {before}, and --resume was asked for {now}: leave the "
        "option out, or choose another --out.",
        free=free if now["schedule"] != "none" else [*free, "epochs"],
    )


def require_same_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse data that are not those of a run.

    Args:
        before: The provenance that the run recorded.
        now: The provenance of the data at hand.

    Raises:
        InputError: Naming the first entry that differs.
    """
    shared = before.keys() & now.keys()
    require_same(
        {key: before[key] for key in shared},
        {key: now[key] for key in shared},
        "The data are not those of the run: {key} was {before}, is now {now}. Put back the data "
        "that it was trained on, or train another run.",
        free=["source"],
    )


def _names(cls: type, *, but: type) -> list[str]:
    before = {each.name for each in fields(but)}
    return [each.name for each in fields(cls) if each.name not in before]


def _scheduler(name: str, epochs: int) -> Callable | None:
    return partial(CosineAnnealingLR, T_max=epochs) if name == "cosine" else None


def _settings(
    given: Sequence[str], stored: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    settings: dict[str, dict[str, Any]] = {
        k: dict(stored.get(k, {})) for k in (*KINDS, "objective")
    }
    for pair in given:
        name, equals, value = pair.partition("=")
        kind, dot, option = name.partition(".")
        if not equals or not value or (dot and kind not in settings):
            raise InputError(
                f"Expected --set model.NAME=VALUE, guide.NAME=VALUE, objective.NAME=VALUE or "
                f"NAME=VALUE for both programs, got {pair!r}."
            )
        for each in [kind] if dot else KINDS:
            settings[each][option if dot else name] = _literal(value)
    return settings


def _literal(value: str) -> Any:
    try:
        return plain(ast.literal_eval(value))
    except (ValueError, SyntaxError, TypeError):
        return value
