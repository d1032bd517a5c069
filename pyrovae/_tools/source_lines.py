"""Lines of a user's own files: where a site is sampled, and where an error came from."""

from __future__ import annotations

import inspect
import linecache
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache, partial
from itertools import starmap, takewhile
from pathlib import Path
from traceback import walk_stack, walk_tb
from types import FrameType
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import nn

LIBRARIES = tuple(
    str(Path(path).resolve())
    for path in (*map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), *torch.__path__)
) + tuple(pyro.__path__)
PROGRAMS = (["pyrovae", "models"], ["pyrovae", "guides"])


class Places(Messenger):
    """Notes the line on which each sample statement and plate of a program stands.

    Attributes:
        found: ``file:line: source`` by the name of the site.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] not in self.found:
            steps = walk_stack(sys._getframe(1))
            inner = takewhile(lambda step: _module(step[0]) != "pyrovae.checking.case", steps)
            self.found[msg["name"]] = next(filter(None, starmap(_place, inner)), "")


def error_place(error: BaseException | None, *, shipped: bool = True) -> str:
    """The last line of a user's file that an error, or its cause, passed through, or nothing.

    ``shipped`` says whether a shipped program counts as a user's.
    """
    while error is not None:
        places = [
            place
            for frame, line in walk_tb(error.__traceback__)
            if (place := _place(frame, line)) and (shipped or not _is_shipped(_module(frame)))
        ]
        if places:
            return places[-1]
        error = error.__cause__
    return ""


def failed_message(error: BaseException) -> dict | None:
    """Pyro's message of the sample statement that an error came out of, if there is one."""
    messages = [frame.f_locals.get("msg") for frame, _ in walk_tb(error.__traceback__)]
    messages = [m for m in messages if isinstance(m, dict) and m.get("type") == "sample"]
    return messages[-1] if messages else None


def lines_with(programs: Iterable[Any], *words: str) -> list[str]:
    """The lines of a user's programs, modules or classes that contain one of some words."""
    found: dict[str, None] = {}
    seen: set[Any] = set()
    for source in (each for program in programs for each in _sources(program, seen)):
        try:
            lines, first = inspect.getsourcelines(source)
            file = inspect.getsourcefile(source) or ""
        except (OSError, TypeError):
            continue
        for number, line in enumerate(lines, max(first, 1)):
            code = line.partition("#")[0]
            if _is_users(file, source.__module__) and any(word in code for word in words):
                found[_spelled(file, number, line)] = None
    return list(found)


def _sources(program: Any, seen: set[Any]) -> Iterator[Any]:
    """The classes and functions that a program is written in, each once."""
    program = poutine.unwrap(program)
    if isinstance(program, nn.Module):
        yield from (s for m in program.modules() for s in _sources(type(m), seen))
    elif inspect.ismethod(program):
        yield from _sources(program.__func__, seen)
        yield from _sources(program.__self__, seen)
    elif isinstance(program, partial):
        yield from _sources(program.func, seen)
    elif (inspect.isfunction(program) or inspect.isclass(program)) and program not in seen:
        seen.add(program)
        yield program
        for value in _referred(program):
            yield from _sources(value, seen)


def _referred(program: Any) -> list[Any]:
    """The functions of its own file that a function refers to."""
    if not inspect.isfunction(program):
        return []
    closure, names, *_ = inspect.getclosurevars(program)
    found = [*closure.values(), *names.values()]
    return [v for v in found if inspect.isfunction(v) and v.__module__ == program.__module__]


def _place(frame: FrameType, line: int) -> str:
    """A line of a frame of a user's file; nothing for a library's."""
    file = frame.f_code.co_filename
    users = _is_users(file, _module(frame))
    return _spelled(file, line, linecache.getline(file, line)) if users else ""


def _module(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "")


def _is_shipped(module: str) -> bool:
    return module.split(".")[:2] in PROGRAMS


@cache
def _is_users(file: str, module: str) -> bool:
    """Whether a file is a program's and no library's."""
    if module.partition(".")[0] in ("pyrovae", "pyro", "torch"):
        return _is_shipped(module)
    # Cython names the file that it was compiled from, which nobody has: the module knows better.
    file = getattr(sys.modules.get(module), "__file__", None) or file
    path = Path(file).resolve()
    installed = {"site-packages", "dist-packages"} & {*path.parts}  # of whichever environment
    return not (installed or file.startswith("<frozen") or str(path).startswith(LIBRARIES))


def _spelled(file: Any, line: int, source: str) -> str:
    path = Path(file)
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return f"{path}:{line}: {source.strip()}".removesuffix(": ")
