"""The source and the settings of a program that is at hand, so that a run of it can be loaded."""

from __future__ import annotations

import ast
import builtins
import inspect
import linecache
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import product
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from pyrovae._tools import InputError
from pyrovae._tools.seeding import seeded
from pyrovae.runs.beside import INSTALLED, PREFIX, Sources, imported
from pyrovae.runs.programs import KINDS, Program, plain, shipped, warn_of_uncopied

HEAD = '"""Definitions of a {kind}, taken from where it was trained."""\n'
TRIED = 2000  # constructions at most, in search of the settings


def recover(
    kind: str, program: Callable, shape: tuple[int, ...], parts: Mapping[str, Any]
) -> tuple[Program, dict[str, Any]]:
    """What makes a program like one at hand, and the settings to make it with.

    A shipped program is known by its name. Of others the definitions are collected, wherever they
    stand: in a script, in the cells of a notebook, or in several files. What a constructor was
    given is not kept by Python: settings are searched that make modules of the same structure.

    Args:
        kind: ``"model"`` or ``"guide"``.
        program: The program: a module, or a function.
        shape: The event shape of its data.
        parts: What its constructor takes beside settings, if it does: columns, or a guide.

    Raises:
        InputError: If the source or the settings cannot be had, with the reason.
    """
    made = type(program) if isinstance(program, nn.Module) else program
    if not (inspect.isclass(made) or inspect.isfunction(made)):
        raise InputError(f"it is a {type(program).__name__}, and neither a module nor a function")
    folder, _, name = made.__module__.rpartition(".")
    if folder == KINDS[kind] and name in shipped(kind):
        found = Program(kind, name, None, made)
    else:
        text, modules = definitions(made)
        source, place = (HEAD.format(kind=kind) + text).encode(), Path(_file(made)).resolve().parent
        spec, file = f"{kind}.py:{made.__name__}", Path(f"{kind}.py")
        sources = Sources(source, file, modules, place).with_data()
        factory = vars(sources.load(kind))[made.__name__]
        found = Program(kind, spec, source, factory, sources.modules)
        warn_of_uncopied(sources, kind)
    if not isinstance(program, nn.Module):
        return found, {}
    taken = {name: part for name, part in parts.items() if name in found.arguments()}
    return found, _settings(found, program, shape, taken)


def definitions(made: Any) -> tuple[str, dict[str, bytes]]:
    """The source of a class or function with all that it uses of files that are not installed.

    Modules that it uses as such come beside it, by their paths.
    """
    imports: dict[str, None] = {}
    modules: dict[str, bytes] = {}
    constants: dict[str, str] = {}
    parts: dict[Any, str] = {}

    def collect(part: Any) -> None:
        if part in parts:
            return
        parts[part] = ""  # one that uses itself is not collected twice
        text, node = _definition(part)
        for name in _names(node):
            if name == "__file__" and Path(_file(part)).parent != Path(_file(made)).parent:
                raise InputError(f"{part.__name__} asks for the folder of another file")
            if name in _globals(part) and name != "__file__":
                use(part, name, _globals(part)[name])
        parts[part] = parts.pop(part) or text  # behind what it uses

    def use(part: Any, name: str, value: Any) -> None:
        whole = isinstance(value, ModuleType) and value.__name__ != "__main__"
        if whole and not value.__name__.startswith(PREFIX):
            line = f"import {value.__name__} as {name}"
            imports[line] = None
            if _is_local(value.__name__):
                modules.update(imported(line.encode(), _folder(value)))
        elif isinstance(value, type | FunctionType) and _is_local(value.__module__):
            if value.__name__ != name:
                raise InputError(f"{part.__name__} uses {value.__qualname__} by the name {name}")
            collect(value)
        elif (found := _importable(value)) is not None:
            imports[f"from {found[0]} import {found[1]} as {name}"] = None
        else:
            with suppress(TypeError, ValueError):
                if plain(value) == value or isinstance(value, tuple):
                    constants[name] = repr(value)
                    return
            raise InputError(f"{part.__name__} uses {name}, a {type(value).__name__}")

    collect(made)
    lines = [f"{name} = {value}" for name, value in constants.items()]
    header = "\n".join(["from __future__ import annotations", "", *sorted(imports), "", *lines])
    return "\n\n\n".join([header, *parts.values()]) + "\n", modules


def _folder(module: ModuleType) -> Path:
    """The folder that a module's name begins in."""
    file = Path(str(module.__file__)).resolve()
    return file.parents[module.__name__.count(".") + (file.name == "__init__.py")]


def _definition(part: Any) -> tuple[str, ast.AST]:
    """The text of a class or function, decorators included, and its syntax tree."""
    if "<locals>" in part.__qualname__ or "." in part.__qualname__:
        raise InputError(f"{part.__qualname__} is defined inside of another function or class")
    linecache.checkcache(_file(part))  # the file may have been edited, and its module reloaded
    text = "".join(linecache.getlines(_file(part)))
    wanted = ast.ClassDef if inspect.isclass(part) else ast.FunctionDef
    nodes = [n for n in _parsed(text) if isinstance(n, wanted) and n.name == part.__name__]
    if not nodes:
        raise InputError(f"no source of {part.__name__} is known")
    node = nodes[-1]  # of several the last one counts, as in Python
    first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
    return "\n".join(text.splitlines()[first - 1 : node.end_lineno]), node


def _parsed(text: str) -> list[ast.stmt]:
    with suppress(SyntaxError):
        return ast.parse(text).body
    # A cell of a notebook may have magic commands, which are no Python.
    kept = ("" if line.lstrip()[:1] in ("%", "!") else line for line in text.splitlines())
    with suppress(SyntaxError):
        return ast.parse("\n".join(kept)).body
    return []


def _file(part: Any) -> str:
    """Where a definition stands. A class in a notebook is found by the code of its functions."""
    if inspect.isfunction(part):
        return inspect.unwrap(part).__code__.co_filename
    for value in vars(part).values():
        if inspect.isfunction(value):
            return value.__code__.co_filename
    return getattr(sys.modules.get(part.__module__), "__file__", "") or ""


def _globals(part: Any) -> dict[str, Any]:
    if inspect.isfunction(part):
        return inspect.unwrap(part).__globals__
    functions = (v for v in vars(part).values() if inspect.isfunction(v))
    found = next((f.__globals__ for f in functions), None)
    return vars(sys.modules[part.__module__]) if found is None else found


def _names(node: ast.AST) -> Iterator[str]:
    """The names that a definition refers to, of globals and not of builtins."""
    for each in ast.walk(node):
        if isinstance(each, ast.Name) and not hasattr(builtins, each.id):
            yield each.id


def _is_local(module: str) -> bool:
    """Whether a module is a user's own file, a notebook or a script."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if module == "__main__" or module.startswith(PREFIX):
        return True
    if module.partition(".")[0] in ("pyrovae", "builtins") or file is None:
        return False
    path = Path(file).resolve()
    return not (INSTALLED & {*path.parts} or path.is_relative_to(sysconfig.get_path("stdlib")))


def _importable(value: Any) -> tuple[str, str] | None:
    """The module and the name that a value can be imported by."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    found = getattr(sys.modules.get(module or ""), name or "", None)
    return (module, name) if module and name and found is value else None


def _settings(
    found: Program, program: nn.Module, shape: tuple[int, ...], parts: Mapping[str, Any]
) -> dict[str, Any]:
    """Settings with which the program's class makes a module of the same structure.

    From the defaults on, one setting after the other takes the value that brings the structure
    nearest, of those that the module shows somewhere: its sizes, widths and attributes.
    """
    wanted, tried = _structure(program), iter(range(TRIED))

    def distance(settings: dict[str, Any]) -> float:
        try:
            with seeded(0):
                return _differences(wanted, _structure(found.build(shape, settings, **parts)))
        except InputError:
            return float("inf")

    settings, names = found.settings({}), [n for n in found.arguments() if n not in parts]
    best, before = distance(settings), float("inf")
    while 0 < best < before:
        before = best
        for name in names:
            for value in _candidates(program, name, settings.get(name)):
                if best and next(tried, None) is not None:
                    near = distance(settings | {name: value})
                    if near < best:
                        best, settings = near, settings | {name: value}
    if best:
        name = type(program).__name__
        raise InputError(f"what {name}(...) was constructed with cannot be told")
    return settings


def _structure(module: Any) -> dict[str, Any]:
    """What two modules made with the same settings have in common, by name."""
    found: dict[str, Any] = {}
    for path, each in module.named_modules():
        told = re.findall(r"[\w.]+", each.extra_repr())
        words = (int(word) if word.isdecimal() else word for word in told)
        found[f"{path} is"] = type(each).__name__, *words
        tensors = [*each.named_parameters(recurse=False), *each.named_buffers(recurse=False)]
        found |= {f"{path}.{name}": tuple(tensor.shape) for name, tensor in tensors}
        for name, value in vars(each).items():
            if not name.startswith("_") and name != "training":
                with suppress(TypeError, ValueError):
                    known = plain(value)
                    found[f"{path}.{name}"] = tuple(known) if isinstance(known, list) else known
    return found


def _differences(wanted: dict[str, Any], found: dict[str, Any]) -> float:
    """How far apart two structures are: sizes are told apart one by one."""
    total = float(len(wanted.keys() ^ found.keys()))
    for name in wanted.keys() & found.keys():
        one, two = wanted[name], found[name]
        if one != two:
            sized = isinstance(one, tuple) and isinstance(two, tuple) and len(one) == len(two)
            total += sum(a != b for a, b in zip(one, two, strict=True)) if sized else 1
    return total


def _candidates(program: nn.Module, name: str, default: Any) -> Iterable[Any]:
    """Values that a setting may have had, by what the module shows."""
    if hasattr(program, name):
        value = getattr(program, name)
        with suppress(TypeError, ValueError):
            yield value.item() if isinstance(value, torch.Tensor) else plain(value)
    modules = [*program.modules()]
    layers = [getattr(m, "out_features", getattr(m, "out_channels", None)) for m in modules]
    widths = [width for width in layers if isinstance(width, int)]
    sizes = dict.fromkeys(n for t in _structure(program).values() for n in _integers(t))
    if isinstance(default, list | tuple):
        for length in range(len(widths)):
            yield from (widths[i : i + length] for i in range(len(widths) - length + 1))
        yield from (default[:length] for length in range(1, len(default)))
        for at, size in product(range(len(default)), sizes):
            yield [*default[:at], size, *default[at + 1 :]]
    elif isinstance(default, str):
        yield from dict.fromkeys(type(each).__name__ for each in modules)
        with suppress(OSError, TypeError):
            yield from dict.fromkeys(re.findall(r'"(\w+)"', inspect.getsource(type(program))))
    elif isinstance(default, bool):
        yield not default
    else:
        yield from sizes
        # Networks often put out a few numbers more than the setting says.
        yield from (n - more for n in sizes for more in (1, 2) if n > more)
        yield from (len(each) for each in modules if isinstance(each, nn.ModuleList))


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, tuple | list):
        yield from (each for each in value if type(each) is int)
    elif type(value) is int:
        yield value
