"""Find a model or a guide by name, by file, or by a class in a file, and build it."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from traceback import walk_tb
from types import ModuleType
from typing import Any, NamedTuple

from pyro.nn import PyroModule
from torch import nn

from pyrovae._tools import InputError, did_you_mean, warn
from pyrovae.runs.beside import Sources

KINDS = {"model": "pyrovae.models", "guide": "pyrovae.guides"}


class Program(NamedTuple):
    """Where a program comes from: its spelling, its source (None if shipped), what makes it.

    ``modules`` are the sources of what it imports of its folder, by their paths there.
    """

    kind: str
    name: str
    source: bytes | None
    make: Callable
    modules: Mapping[str, bytes] = {}

    @property
    def files(self) -> dict[str, bytes]:
        """Its sources by the names of their copies in ``programs/`` of a run."""
        own = {} if self.source is None else {f"{self.kind}.py": self.source}
        return own | {f"{self.kind}/{path}": source for path, source in self.modules.items()}

    def settings(self, given: dict[str, Any]) -> dict[str, Any]:
        """The constructor's keyword arguments, the given ones over those defaults JSON can hold."""
        known, options = self.arguments(), {}
        for name in given:
            if name not in known:
                raise InputError(
                    f"The {self.kind} {self.name!r} takes no setting {name!r}"
                    f"{did_you_mean(name, known)}; it takes {', '.join(known) or 'none'}."
                )
        for name, parameter in known.items():
            with suppress(TypeError, ValueError):
                options[name] = plain(parameter.default)
        return options | given

    def arguments(self) -> dict[str, inspect.Parameter]:
        """What its constructor takes beside the shape."""
        return {p.name: p for p in _parameters(self.make)[self._takes_shape() :]}

    def build(self, shape: tuple[int, ...], settings: dict[str, Any], **parts: Any) -> Callable:
        """Construct the program for data of an event shape.

        ``parts`` are further arguments, such as the guide of a model whose prior is made of it.
        What the constructor refuses is an InputError with the constructor's message.
        """
        if not inspect.isclass(self.make):
            return self.make
        positional = [shape] if self._takes_shape() else []
        try:
            make: Callable = self.make
            built: Callable = make(*positional, **self.settings(settings) | parts)
        except Exception as error:
            # Shipped programs say in a ValueError what is wrong; others may raise anything.
            known = isinstance(error, ValueError | TypeError)
            reason = f"{error}" if known else f"{type(error).__name__}: {error}"
            told = ", ".join(f"{n}={v!r}" for n, v in settings.items())
            told = f"cannot be built{f' with {told}' if told else ''}: {reason}"
            raise InputError(f"The {self.kind} {self.name!r} {told}") from error
        return built

    def _takes_shape(self) -> bool:
        first = next(iter(_parameters(self.make)), None)
        return first is not None and (first.name == "shape" or first.default is first.empty)


def find_program(spec: str, kind: str, copies: Sources | None = None) -> Program:
    """Find a program by a shipped name, ``file.py``, or ``file.py:Class``.

    A file's program is the class called ``Model`` (``Guide``) or the function called ``model``
    (``guide``), or else its only PyroModule, or else its only module class. A run's ``copies`` are
    executed in place of the file and of the modules beside it.
    """
    path, attribute = split_spec(spec)
    if path is not None:
        sources = copies or Sources.read(path.expanduser(), kind)
        made = _pick(sources.load(kind), kind, attribute, spec)
        return Program(kind, spec, sources.source, made, sources.modules)
    names = shipped(kind)
    if spec not in names:
        raise InputError(
            f"No {kind} {spec!r}{did_you_mean(spec, names)}; shipped are {sorted(names)}, "
            f"and a file is given as my_{kind}.py or my_{kind}.py:Class."
        )
    module = importlib.import_module(f"{KINDS[kind]}.{spec}")
    return Program(kind, spec, None, _pick(module, kind, "", spec))


def warn_of_uncopied(sources: Sources, kind: str) -> None:
    """Say what of a program a run has no copy of, if there is such."""
    if found := sources.uncopied:
        warn(
            f"The run has no copy of {'; nor of '.join(found)}: the {kind} needs that where it is. "
            f"Import modules by their names, and keep numbers in a buffer or a parameter."
        )


def split_spec(spec: str) -> tuple[Path | None, str]:
    """The file that a program is in, None if it is shipped, and the name asked for there."""
    path, dot, attribute = spec.rpartition(".py:")
    if dot:
        return Path(f"{path}.py"), attribute
    return (Path(spec) if spec.endswith(".py") else None), ""


def shipped(kind: str) -> dict[str, str]:
    """Every shipped model or guide with the first line of its file."""
    (folder,) = importlib.import_module(KINDS[kind]).__path__
    files = {path.stem: path for path in sorted(Path(folder).glob("[!_]*.py"))}
    parsed = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in files.items()}
    return {name: (ast.get_docstring(m) or "").partition("\n")[0] for name, m in parsed.items()}


def is_refusal(error: BaseException) -> bool:
    """Whether a shipped program raised a ValueError: it knows no error class of this package."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    module = frames[-1].f_globals.get("__name__", "") if frames else ""
    return isinstance(error, ValueError) and module.startswith(tuple(KINDS.values()))


def plain(value: Any) -> Any:
    """A value as JSON gives it back; TypeError or ValueError if JSON has no such value."""
    return json.loads(json.dumps(value, allow_nan=False))


def _parameters(make: Callable) -> list[inspect.Parameter]:
    """What a class is constructed from; a function is a program as it is."""
    if not inspect.isclass(make):
        return []
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p for p in inspect.signature(make).parameters.values() if p.kind not in kinds]


def _pick(module: ModuleType, kind: str, attribute: str, spec: str) -> Any:
    own = {n: v for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__}
    classes = {n: v for n, v in own.items() if inspect.isclass(v) and issubclass(v, nn.Module)}
    programs = classes | {n: v for n, v in own.items() if inspect.isfunction(v)}
    if attribute and attribute not in programs:
        hint = did_you_mean(attribute, sorted(programs))
        raise InputError(f"{spec}: the file has no {attribute!r}{hint}.")
    if attribute:
        return programs[attribute]
    named = [programs[name] for name in (kind.capitalize(), kind) if name in programs]
    pyro_modules = [c for c in classes.values() if issubclass(c, PyroModule)]
    for choice in (named, pyro_modules, list(classes.values())):
        if len(choice) == 1:
            return choice[0]
        if choice:
            names = sorted(c.__name__ for c in choice)
            raise InputError(f"{spec} holds several programs, {names}: say {spec}:{names[0]}.")
    raise InputError(
        f"{spec} holds no {kind}: define a module class, or a function called {kind!r}."
    )
