"""Find the modules that a program is made of, whose parameters it trains."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from pyro import poutine
from torch import nn

__all__ = ["owners", "roots"]


def owners(program: Callable) -> list[nn.Module]:
    """The modules that a program is made of, each once.

    A module itself, the ``self`` of a bound method, what a partial or a handler wraps, and the
    modules that a function or a plain object refers to by name.
    """
    return _owners(program, set())


def _owners(thing: Any, seen: set[int]) -> list[nn.Module]:
    thing = poutine.unwrap(thing)
    if id(thing) in seen:
        return []
    seen.add(id(thing))
    if isinstance(thing, nn.Module):
        return [thing]
    return [module for inner in _inside(thing) for module in _owners(inner, seen)]


def _inside(thing: Any) -> list[Any]:
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if inspect.ismethod(thing):
        return [thing.__self__]
    if inspect.isfunction(thing):
        held = [_cell(cell) for cell in thing.__closure__ or ()]
        held += [thing.__globals__.get(name) for name in thing.__code__.co_names]
        return [v for v in held if isinstance(v, nn.Module) or _is_near(v, thing)]
    if isinstance(thing, type) or not callable(thing):
        return []
    return [v for v in getattr(thing, "__dict__", {}).values() if isinstance(v, nn.Module)]


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _is_near(thing: Any, function: Callable) -> bool:
    """Whether a function's module also defines another function or method that it refers to."""
    is_code = inspect.isfunction(thing) or inspect.ismethod(thing)
    return is_code and thing.__module__ == function.__module__


def roots(model: Callable | None, guide: Callable | None) -> dict[str, nn.Module]:
    """The modules of a pair by the prefix of their parameters' names.

    ``model`` and ``guide``, ``pair`` where one module owns both programs, and ``model.0``,
    ``model.1``, … where several own one; a module of both counts as the model's.
    """
    ours = [] if model is None else owners(model)
    theirs = [] if guide is None else owners(guide)
    shared = [m for m in theirs if any(m is other for other in ours)]
    if len(ours) == len(shared) == 1:
        return {"pair": ours[0]}
    found = {}
    for prefix, modules in (("model", ours), ("guide", [m for m in theirs if m not in shared])):
        for index, module in enumerate(modules):
            found[prefix if len(modules) == 1 else f"{prefix}.{index}"] = module
    return found
