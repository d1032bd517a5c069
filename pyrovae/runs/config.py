"""The options of a run and of its evaluation, each in one place.

An option is a field of a dataclass: its name, its type, its default and what it means. The parser
of the command line, the arguments of :func:`pyrovae.fit`, ``config.json`` (:class:`Config`) and its
validation, and ``docs/options.md`` come from it.
"""

from __future__ import annotations

import ast
import inspect
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from types import UnionType
from typing import Annotated, Any, NamedTuple, Self, get_args, get_type_hints

from msgspec import Meta, Struct, convert

from pyrovae._tools import InputError
from pyrovae._tools.precision import PRECISIONS
from pyrovae.data import BINARIZE, CONTEXTS
from pyrovae.data.files import MISSING as GAPS
from pyrovae.diagnostics.simulation import LEAST as FEWEST
from pyrovae.runs.programs import KINDS, plain
from pyrovae.training.loop import BATCH_SIZE, fit
from pyrovae.training.schedules import SCHEDULES

SPLITS = ("test", "valid", "train")
COMPILE: dict[str, bool | str] = {"auto": "auto", "on": True, "off": False}
# How the programs see the data: options that are arguments of load_data().
SHOWN = ("binarize", "context", "labelled", "missing", "columns", "memory", "shape")
FIT = inspect.signature(fit).parameters


def option(
    meaning: str,
    default: Any = MISSING,
    *,
    metavar: str | None = None,
    choices: Sequence[str] | None = None,
    flag: str | None = None,
    said: str | None = None,
    least: int | None = None,
) -> Any:
    """A field of :class:`Options`; one without a default is an argument without dashes.

    ``flag`` is its spelling, if that is not its name; ``said`` is what to say of a default that is
    worked out later, or ``"required"``; ``least`` is the least number that makes sense.
    """
    about: dict[str, Any] = {"help": meaning, "metavar": metavar, "choices": choices}
    about |= {"flag": flag, "said": said, "least": least}
    if default is dict:
        return field(default_factory=dict, metadata=about)
    return field(default=default, metadata=about)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a command.

    A field is an option of its type: ``int | None`` is an ``int``, ``bool`` takes no value, a
    ``Mapping`` may be given several times as ``NAME=VALUE``, and a tuple has one value or more.

    Raises:
        InputError: If a value is less than the least one, or none of the choices.
    """

    def __post_init__(self) -> None:
        for each in fields(self):
            least, choices = each.metadata.get("least"), each.metadata.get("choices")
            value = getattr(self, each.name)
            if least is not None and value is not None and value < least:
                raise InputError(f"Expected {_flag(each)} >= {least}, got {value}.")
            if choices and value not in choices:
                raise InputError(f"Expected {_flag(each)} of {', '.join(choices)}, got {value!r}.")

    @classmethod
    def add_to(cls, parser: ArgumentParser) -> None:
        """Add every option to a parser, which leaves out those that are not given."""
        for each in fields(cls):
            about, kind, default = each.metadata, _kind(cls, each), _default(each)
            how: dict[str, Any] = {"help": about["help"]}
            if _flag(each):
                how |= {"dest": each.name, "default": SUPPRESS}
                how |= {"required": True} if default == "required" else {}
                how["help"] += f", default {default}" if default not in ("", "required") else ""
            if kind is bool:
                how["action"] = "store_true"
            elif kind is Mapping:
                how |= {"action": "append", "metavar": about["metavar"]}
            elif kind is tuple:
                how |= {"nargs": "+", "metavar": about["metavar"]}
            else:
                how |= {"type": kind, "metavar": about["metavar"], "choices": about["choices"]}
            parser.add_argument(_flag(each) or each.name, **how)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """The options that were given, and the defaults of the others."""
        names = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in given.items() if name in names})

    @classmethod
    def table(cls) -> list[tuple[str, str, str]]:
        """Every option as it is written, its default, and what it means."""
        rows = []
        for each in fields(cls):
            about, kind = each.metadata, _kind(cls, each)
            value = about["metavar"] or "|".join(about["choices"] or [each.name.upper()])
            words = (_flag(each), "" if kind is bool else value, "..." if kind is tuple else "")
            rows.append((" ".join(filter(None, words)), _default(each), about["help"]))
        return rows


def _fitted(name: str, meaning: str, **more: Any) -> Any:
    """An option that is an argument of :func:`pyrovae.fit`, with its default."""
    return option(meaning, FIT[name].default, **more)


@dataclass(frozen=True, kw_only=True)
class PairConfig(Options):
    """A pair and the data that it is for."""

    model: str = option("p(z)p(x|z): a shipped name, FILE.py or FILE.py:CLASS", "", metavar="M")
    guide: str = option("q(z|x), likewise", "", metavar="G")
    data: str = option(
        "a shipped name, a .npy, .npz, .zarr, .csv, .arff, .parquet or .h5ad file, or a folder of "
        "images",
        "",
        metavar="D",
    )
    device: str = option("auto, cpu or cuda", "auto")
    seed: int = option("seeds every draw", 0)
    binarize: str = option(f"one of {', '.join(BINARIZE)}", "none")
    context: str = option(
        f"what the programs see beside x: {', '.join(CONTEXTS)}, or columns: age,site", "none"
    )
    labelled: int | None = option("show N of the training labels", None, metavar="N", said="all")
    missing: str = option(f"what NaN or an empty field is: {', '.join(GAPS)}", "refuse")
    columns: Mapping[str, str] = option(
        "the kind of a column: age=positive", dict, metavar="NAME=KIND", said="by its numbers"
    )
    memory: float | None = option(
        "keep data of more than so many GiB on disk (of a file of arrays, a .parquet or a .h5ad), "
        "and so many of them in memory at most",
        None,
        metavar="GIB",
        said="half of the machine's",
    )
    shape: str | None = option(
        "the shape of a datum: T,D of sequences, which are read as images else",
        None,
        metavar="T,D",
        said="as it is read",
    )
    data_root: str | None = option("where the torchvision data are", None, said="$PYROVAE_DATA")
    settings: Mapping[str, dict[str, Any]] = option(
        "a setting: latent=5 (of both), model.scale=pixel, objective.beta=4",
        dict,
        metavar="NAME=VALUE",
        flag="--set",
        said="of the program",
    )

    @classmethod
    def of(cls, given: Mapping[str, Any], stored: Config | None = None) -> Self:
        """What is asked for: as given, or else as a run was made with, or else by default.

        Args:
            given: The options that were given, ``settings`` as ``["NAME=VALUE", ...]``.
            stored: What a run was made with.
        """
        known = {} if stored is None else cls._stored(stored)
        options = super().of(known | dict(given))
        if missing := [kind for kind in ("model", "guide", "data") if not getattr(options, kind)]:
            raise InputError(f"Expected --{', --'.join(missing)} as well: see pyrovae list.")
        pairs = given.get("settings", [])
        kinds = [pair.rpartition("=")[::2] for pair in given.get("columns", [])]
        columns = {**known.get("columns", {}), **dict(kinds)}
        return replace(
            options, settings=_settings(pairs, known.get("settings", {})), columns=columns
        )

    @classmethod
    def _stored(cls, config: Config) -> dict[str, Any]:
        names = [each.name for each in fields(cls) if hasattr(config, each.name)]
        programs = {kind: getattr(config, kind) for kind in KINDS}
        return {
            **{name: getattr(config, name) for name in names},
            **{kind: program.name for kind, program in programs.items()},
            **{name: value for name in SHOWN if (value := getattr(config.data, name)) is not None},
            "data": config.data.load,
            "data_root": config.data.root,
            "settings": {kind: program.settings for kind, program in programs.items()}
            | {"objective": config.objective_settings},
        }


class Recipe(NamedTuple):
    """What --recipe stands for, where nothing else is given: options, and settings by program.

    A setting is for programs that have it and leave it open, with None for a default.
    """

    options: dict[str, Any]
    settings: dict[str, dict[str, Any]]

    def __str__(self) -> str:
        options = [f"{name}={value}" for name, value in self.options.items()]
        settings = [
            f"and {kind}.{name}={value} where the {kind} takes a {name}"
            for kind, values in self.settings.items()
            for name, value in values.items()
        ]
        return ", ".join([*options, *settings])


RECIPES = {
    "none": Recipe({}, {}),
    "long": Recipe(
        {"schedule": "cosine", "lr_warm_up": 1, "average": 0.999}, {"model": {"mean": "data"}}
    ),
}


@dataclass(frozen=True, kw_only=True)
class Training(Options):
    """How a pair is trained."""

    recipe: str = option(
        f"options for a long training: {RECIPES['long']}",
        "none",
        choices=tuple(RECIPES),
    )
    objective: str = _fitted("objective", "what is maximized, see pyrovae list", metavar="O")
    epochs: int = _fitted("epochs", "passes over the training data", metavar="E")
    batch_size: int | None = option(
        "the size of a minibatch",
        None,
        metavar="M",
        said=f"{BATCH_SIZE}, or all if fewer",
    )
    particles: int | None = _fitted(
        "particles", "samples of each datum", metavar="L", said="of the objective"
    )
    lr: float = _fitted("lr", "learning rate of Adam")
    schedule: str = _fitted("schedule", "schedule of the learning rate", choices=SCHEDULES)
    lr_warm_up: int = _fitted("lr_warm_up", "epochs in which the rate rises", metavar="E")
    clip_norm: float | None = _fitted("clip_norm", "the largest norm of a gradient", said="none")
    normalize_gradients: bool = _fitted(
        "normalize_gradients", "divide the gradient of each parameter by its norm"
    )
    average: float | None = _fitted(
        "average", "decay of a moving average of the weights, such as 0.999", said="none"
    )
    patience: int | None = _fitted(
        "patience", "stop after so many epochs without a better validation bound", said="never"
    )
    valid_samples: int = _fitted(
        "valid_samples", "samples of the validation bound; 1: the ELBO", metavar="K"
    )
    compile: str = _fitted(
        "compile", "compile the step; auto: where it pays", choices=tuple(COMPILE)
    )
    precision: str = _fitted("precision", f"precision of matrix products: {', '.join(PRECISIONS)}")

    def fit_arguments(self) -> dict[str, Any]:
        """The arguments of :func:`pyrovae.fit` among them."""
        names = [n for n in TRAINING if n in FIT and n not in ("objective", "particles")]
        found = {name: getattr(self, name) for name in names}
        return found | {"compile": COMPILE[self.compile]}


TRAINING = [each.name for each in fields(Training)]


@dataclass(frozen=True, kw_only=True)
class RunConfig(Training, PairConfig):
    """What a run is asked to do."""

    @classmethod
    def of(cls, given: Mapping[str, Any], stored: Config | None = None) -> Self:
        """What is asked for, with the options that a recipe stands for."""
        return super().of(RECIPES[given.get("recipe", "none")].options | dict(given), stored)

    def stored(self, num_data: int) -> dict[str, Any]:
        """The entries of ``config.json`` that say how to train on so many data."""
        found = {name: getattr(self, name) for name in TRAINING}
        if self.batch_size is None:
            found["batch_size"] = min(BATCH_SIZE, num_data)
        return found | {"objective_settings": self.settings.get("objective", {})}


class ProgramRecord(Struct, frozen=True):
    """A program of a run: its name, its copy in the run with the digest, its settings.

    ``modules`` are the digests of what it imports or names of its folder, by their paths there.
    """

    name: str
    file: str | None
    settings: dict[str, Any]
    sha256: str | None = None
    modules: dict[Annotated[str, Meta(pattern=r"^(\w[\w.-]*/)*\w[\w.-]*\Z")], str] = {}

    @property
    def copies(self) -> dict[str, str | None]:
        """The digest of each copy that is executed, by its path in the run, the program first."""
        if self.file is None:
            return {}
        folder = self.file.removesuffix(".py")
        inside = {f"{folder}/{path}": digest for path, digest in self.modules.items()}
        return {self.file: self.sha256, **inside}


class DataRecord(Struct, frozen=True, omit_defaults=True):
    """The data of a run: where from, and all that ``Dataset.provenance`` says of them."""

    load: str
    root: str | None
    binarize: str
    name: str = ""
    source: str | None = None
    sha256: str | None = None
    shape: tuple[int, ...] | None = None
    sizes: dict[str, int] | None = None
    split: str | None = None
    split_seed: int | None = None
    scaling: str | None = None
    binarize_seed: int | None = None
    classes: int | None = None
    class_names: list[str] | None = None
    context: str | None = None
    labelled: int | None = None
    label_seed: int | None = None
    context_categories: dict[str, list[str]] | None = None
    columns: dict[str, str] | None = None
    missing: str | None = None
    missing_share: float | None = None
    memory: float | None = None

    @classmethod
    def of(cls, load: str, root: str | None, provenance: Mapping[str, Any]) -> Self:
        """The record of data with a provenance, none of whose entries may be lost."""
        if unknown := provenance.keys() - set(cls.__struct_fields__):
            raise TypeError(f"DataRecord lacks {sorted(unknown)}: give it fields of these names.")
        return convert({"load": load, "root": root, **provenance}, cls)

    def free(self, other: Self) -> list[str]:
        """Fields that may differ: where the data lie, and their name where both have a digest."""
        return ["load", "root", "source", *(["name"] if self.sha256 and other.sha256 else [])]


class Session(Struct, frozen=True):
    """A training that went on with a run under other versions than before."""

    after_epoch: int
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class PairRecord(Options):
    """A pair and its data, resolved."""

    model: ProgramRecord
    guide: ProgramRecord
    data: DataRecord
    device: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Config(Training, PairRecord):
    """What a run was asked to do, as ``config.json`` holds it.

    ``objects`` are the arguments of a training from Python that no option can say, ``unrecovered``
    why its programs cannot be made anew.

    ``identity`` is the run's own, which its other parts carry; ``sha256`` and ``signature`` are of
    the configuration, when it is read. ``versions`` are those that it was begun with.
    """

    command: str
    epochs: int = field()
    schedule: str = field()
    objective_settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    resumed: tuple[Session, ...] = ()
    objects: dict[str, str] = field(default_factory=dict)
    unrecovered: str = ""
    identity: str = ""
    sha256: str = field(default="", compare=False)
    signature: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Options):
    """What an evaluation of a run is asked to measure."""

    samples: int = option("samples of the guide for log p(x)", 1000, metavar="K", least=1)
    split: str = option("which data", "test", choices=SPLITS)
    images: int | None = option("the first N data alone", None, metavar="N", said="all", least=1)
    refine: int = option(
        "refine the guide for each datum first, by so many steps", 0, metavar="STEPS", least=0
    )
    defensive: float = option("the share of the prior in the proposal", 0.0, metavar="ALPHA")
    precision: str = option(
        "precision of the products for log p(x)", "float32", choices=tuple(PRECISIONS)
    )
    annealed: int = option(
        "also anneal so many chains, on 100 data or those of --images",
        0,
        metavar="CHAINS",
        least=0,
    )
    temperatures: int = option("temperatures of annealing", 500, metavar="T", least=0)
    initial: str = option("what annealing starts from", "guide", choices=("guide", "prior"))
    calibrate: int = option(
        "also test the guide on so many data of the model's own, 50 at least",
        0,
        metavar="N",
        least=0,
    )
    no_diagnostics: bool = option(
        "leave out what the posterior does, and the draws for ArviZ", False
    )
    fresh: bool = option("do not go on with an evaluation that was stopped", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.calibrate < FEWEST:
            raise InputError(
                f"Expected --calibrate >= {FEWEST}, got {self.calibrate}: fewer simulated data "
                f"can tell nothing of the guide."
            )


def _settings(
    given: Sequence[str], stored: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    settings = {kind: dict(stored.get(kind, {})) for kind in (*KINDS, "objective")}
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


def _kind(cls: type, each: Field) -> type:
    """The type of an option's value: of ``int | None`` it is ``int``."""
    hint = get_type_hints(cls)[each.name]
    if isinstance(hint, UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    return getattr(hint, "__origin__", hint)


def _flag(each: Field) -> str:
    """How an option is written; nothing for an argument without dashes."""
    if each.default is MISSING and each.default_factory is MISSING:
        return ""
    return each.metadata["flag"] or f"--{each.name.replace('_', '-')}"


def _default(each: Field) -> str:
    said = each.metadata["said"]
    if said is not None:
        return said
    return "" if not _flag(each) or isinstance(each.default, bool) else f"{each.default}"
