"""What the Python code of a step reads: found by running it once, then compared at every call."""

from __future__ import annotations

import dis
import functools
import gc
import io
import logging
import os
import random
import re
import sys
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from datetime import date, timedelta
from enum import Enum
from itertools import count
from operator import is_, itemgetter
from pathlib import PurePath
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from pyrovae._tools.precision import precision_settings
from pyrovae.compiling.graph import CaptureError

# Their globals and classes are taken for fixed; objects of these classes are looked into.
# torch 2.11 imports modules of its own as late as in a step, which state types (Python 3.12).
LIBRARIES = ("torch", "pyro", "pyrovae", "numpy", "opt_einsum", "typing_extensions")
# Described by type and value; whatever has the same description does the same.
VALUES: tuple[type, ...] = (
    *(bool, int, str, bytes, type(None), type(Ellipsis), range),
    *(torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format),
)
# repr() tells NaN from other numbers and from nothing else, and -0.0 from 0.0.
NUMBERS = (float, complex, slice, np.generic, date, timedelta, PurePath)
# Told by identity: their state is fixed, or of no consequence to a program.
FIXED: tuple[type, ...] = (
    *(BuiltinFunctionType, MethodWrapperType, WrapperDescriptorType, MethodDescriptorType),
    *(GetSetDescriptorType, MemberDescriptorType, CodeType, Enum),
    *(logging.Logger, weakref.ref, re.Pattern),
)
# What these hold changes unseen.
HIDDEN = (torch.Generator, random.Random, io.IOBase)
CONTAINERS = (dict, MappingProxyType, list, tuple, deque, set, frozenset)
WRAPPERS: tuple[type, ...] = (
    *(staticmethod, classmethod, property, functools.cached_property, functools.partial),
    *(MethodType, functools._lru_cache_wrapper),
)
PARTS = ("__self__", "__func__", "__wrapped__", "fget", "func", "args", "keywords")
# Names with which code reads attributes that its text may not name.
BY_NAME, UNNAMED = {"getattr", "hasattr", "vars", "__dict__", "attrgetter"}, {"globals", "eval"}
# Built-in functions whose result or effect no graph has, when a program calls them.
OUTSIDE = {"print", "open", "input", "now", "utcnow", "today", "urandom"}
# A comparison takes some 30 ns an object: beyond these sizes it would cost more than a step.
MOST_ITEMS, MOST_BYTES = 20_000, 2**14
# States that were met and not captured.
REMEMBERED = 64
MISSING = object()


class Same:
    """A description of an object by its identity, which keeps it from being replaced unseen."""

    __slots__ = ("thing",)

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


class Seen:
    """The code that ran in a block, with its globals, and every name that it may have read."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.ran: dict[CodeType, dict[str, Any]] = {}
        called: list[tuple[CodeType, Any]] = []

        def note(frame: Any, event: str, function: Any) -> None:
            if event == "call":
                self.ran[frame.f_code] = frame.f_globals
            elif event == "c_call":
                called.append((frame.f_code, function))

        streams = _streams()
        before: Any = sys.getprofile()
        collects = gc.isenabled()
        # What libraries do when garbage is collected (JAX has a callback) is no program's code.
        gc.disable()
        with redirect_stdout(io.StringIO()):
            sys.setprofile(note)
            try:
                run()
            finally:
                # Up to Python 3.11, cProfile is found there as an object that switches itself on.
                sys.setprofile(None if hasattr(before, "enable") else before)
                if hasattr(before, "enable"):
                    before.enable()
                if collects:
                    gc.enable()
        # What a program owns, as against what it calls of torch and Pyro.
        self.own = {c for c, scope in self.ran.items() if not is_library(scope.get("__name__"))}
        self.names = {name for code in self.ran for name in _names(code)}
        self.scopes: dict[int, tuple[dict[str, Any], set[str]]] = {}
        for code in self.own:
            scope = self.ran[code]
            self.scopes.setdefault(id(scope), (scope, set()))[1].update(_globals(code))
        self.own_names = {name for code in self.own for name in _names(code)}
        called_by_name = {name for code in self.own for name in code.co_names}
        self.wide = bool(BY_NAME & called_by_name)
        if unnamed := UNNAMED & called_by_name:
            raise CaptureError(f"it calls {min(unnamed)}(), which may read anything")
        if _streams() != streams:
            raise CaptureError("it draws random numbers that are not torch's: draw them with torch")
        for code, function in called:
            if code in self.own or str(self.ran.get(code, {}).get("__name__")).startswith(
                "logging"
            ):
                _refuse_outside(function)


def _refuse_outside(function: Any) -> None:
    owner = getattr(function, "__self__", None)
    named = function.__name__ in OUTSIDE and isinstance(owner, ModuleType | type)
    if named or isinstance(owner, io.IOBase) or getattr(function, "__module__", "") == "time":
        raise CaptureError(f"it calls {function.__qualname__}(), which a graph would leave out")


def _streams() -> tuple:
    state: Any = np.random.get_state()
    name, keys, *rest = state
    return random.getstate(), (name, keys.tobytes(), *rest)


@functools.cache
def is_library(name: str | None) -> bool:
    """Whether a module is of the libraries, whose code is taken for fixed."""
    top = str(name).partition(".")[0]
    if top in LIBRARIES:
        return True
    if top not in sys.stdlib_module_names:
        return False
    # A person's file may be called as a module of the standard library.
    file = getattr(sys.modules.get(top), "__file__", None)
    return file is None or os.path.dirname(file).startswith(os.path.dirname(os.__file__))


def _names(code: CodeType) -> Iterable[str]:
    return (*code.co_names, *(text for text in code.co_consts if isinstance(text, str)))


@functools.cache
def _globals(code: CodeType) -> frozenset[str]:
    loads = ("LOAD_GLOBAL", "LOAD_NAME")
    return frozenset(i.argval for i in dis.get_instructions(code) if i.opname in loads)


class Entry(NamedTuple):
    """A dictionary's entry, such as an attribute or a buffer."""

    entries: dict
    key: Any
    value: Any

    def is_of(self, other: Entry) -> bool:
        """Whether the other is the same entry, with any value."""
        return self.entries is other.entries and self.key == other.key


class Walk:
    """One look at what programs can reach: everything, or what code that was seen could read.

    ``items`` describes it, path by path, so that equal descriptions stand for equal behaviour;
    ``slots`` tells which entry of which dictionary a tensor, or a tuple of them, was. While no
    object that :meth:`look` collects is replaced, the description stays as it is. At paths in
    ``rebound``, any tensor will do.
    """

    def __init__(
        self, roots: Mapping[str, Any], seen: Seen | None = None, rebound: Iterable[str] = ()
    ) -> None:
        self.seen, self.rebound = seen, frozenset(rebound)
        self.items: dict[str, Hashable] = {}
        self.slots: dict[str, Entry] = {}
        self.attributes: list[tuple[dict, Callable]] = []
        self.dicts: list[Any] = []
        self.empty: list[Any] = []
        self.lists: list[Any] = []
        self.scopes: list[tuple[Any, Mapping[str, Any], tuple[str, ...]]] = []
        self.slotted: list[tuple[Any, list[str]]] = []
        self.cells: list[Any] = []
        self.functions: list[FunctionType] = []
        self.tensors: dict[int, Tensor] = {}
        self.arrays: list[np.ndarray] = []
        # Objects are held, so that no other takes the place of one in memory.
        self._known: dict[int, tuple[int, Any]] = {}
        self._waiting: list[tuple[str, Any, Entry | None]] = []
        for scope, names in seen.scopes.values() if seen else ():
            self._scope("", None, scope, names)
        self._waiting += [(path, thing, None) for path, thing in roots.items()]
        while self._waiting and len(self.items) < MOST_ITEMS:
            self._visit(*self._waiting.pop())
        if self._waiting and seen:
            raise CaptureError(f"it reads more than {MOST_ITEMS:,} values that may change")

    def look(self) -> list[Any]:
        """The objects on which the description rests."""
        found: list[Any] = [any(self.empty)]
        for entries, read in self.attributes:
            found.append(len(entries))
            found += read(entries)
        for each in self.dicts:
            found += each
            found += each.values()
        for values in self.lists:
            found += values
        for _, scope, names in self.scopes:
            found += map(scope.get, names)
        for thing, attributes in self.slotted:
            found += [getattr(thing, name, MISSING) for name in attributes]
        found += map(_content, self.cells)
        for function in self.functions:
            found += (function.__code__, function.__defaults__, function.__kwdefaults__)
        for tensor in self.tensors.values():
            found += (tensor.requires_grad, tensor.dtype)
            found += (tensor._backward_hooks, tensor._post_accumulate_grad_hooks)
        return found

    def values(self) -> tuple:
        """What has to be compared by value: small arrays, and torch's modes."""
        return (
            torch.get_default_dtype(),
            torch.is_autocast_enabled("cpu"),
            torch.is_autocast_enabled("cuda"),
            precision_settings(),
            torch.are_deterministic_algorithms_enabled(),
            *[array.tobytes() for array in self.arrays],
        )

    def _note(self, path: str, description: Hashable) -> None:
        self.items[self._unique(path)] = description

    def _unique(self, path: str) -> str:
        # Cells and globals of several functions may have one name.
        number, found = 1, path
        while found in self.items:
            number += 1
            found = f"{path} ({number})"
        return found

    def _visit(self, path: str, thing: Any, place: Entry | None) -> None:
        if isinstance(thing, weakref.ref) and thing() is None:
            thing = None  # what it led to is gone, as the inverse of a transform is in torch 2.11
        kind = type(thing)
        if isinstance(thing, FIXED) or thing is MISSING:
            self._note(path, Same(thing))
            owner = getattr(thing, "__self__", None)
            if isinstance(owner, CONTAINERS):
                self._waiting.append((f"{path}.__self__", owner, None))
        elif isinstance(thing, VALUES):
            self._note(path, (kind, thing))
        elif isinstance(thing, NUMBERS):
            self._note(path, (kind, repr(thing)))
        elif isinstance(thing, Tensor):
            path = self._unique(path)
            if place is not None:
                self.slots[path] = place
            told = (Same(thing), thing.dtype, thing.device, thing.requires_grad)
            self._note(path, Tensor if path in self.rebound else told)
            if id(thing) not in self.tensors:
                self.tensors[id(thing)] = thing
                self._tensor(path, thing)
        elif id(thing) in self._known:
            self._note(path, self._known[id(thing)][0])
        else:
            self._known[id(thing)] = len(self._known), thing
            self._enter(path, thing, kind, place)

    def _enter(self, path: str, thing: Any, kind: type, place: Entry | None) -> None:
        if isinstance(thing, FunctionType):
            self._function(path, thing)
        elif isinstance(thing, ModuleType):
            self._note(path, Same(thing))
            self._module(path, thing)
        elif isinstance(thing, type):
            self._note(path, Same(thing))
            self._class(path, thing)
        elif isinstance(thing, np.ndarray):
            self._array(path, thing)
        elif isinstance(thing, WRAPPERS):
            self._note(path, Same(kind))
            for part in PARTS:
                if (inner := getattr(thing, part, None)) is not None:
                    self._waiting.append((f"{path}.{part}", inner, None))
        elif isinstance(thing, CONTAINERS):
            tensors = kind is tuple and all(isinstance(n, Tensor) for n in thing)
            self._container(path, thing, kind, place if tensors else None)
        else:
            self._object(path, thing, kind)

    def _tensor(self, path: str, thing: Tensor) -> None:
        """What a tensor holds beside its values: attributes, and hooks on its gradient."""
        if vars(thing):
            self._attributes(path, thing, vars(thing), False)
        else:
            self.empty.append(vars(thing))
        # Private in torch 2.11 to 2.14.
        for hooks in (thing._backward_hooks, thing._post_accumulate_grad_hooks):
            if hooks is not None:
                self._waiting.append((f"a hook of {path}", hooks, None))

    def _container(self, path: str, thing: Any, kind: type, place: Entry | None) -> None:
        self._note(path, (kind, len(thing)))
        if self.seen and len(thing) > MOST_ITEMS:
            raise CaptureError(f"it reads {path}, which holds {len(thing):,} values: use a tensor")
        if isinstance(thing, dict | MappingProxyType):
            self._dict(path, thing, "{}[{!r}]")
        else:
            if not isinstance(thing, tuple | frozenset):
                self.lists.append(thing)
            self._waiting += [(f"{path}[{n}]", each, place) for n, each in enumerate(thing)]
        if getattr(thing, "__dict__", None):
            self._object(path, thing, kind)

    def _dict(self, path: str, thing: Any, spell: str) -> None:
        (self.dicts if thing else self.empty).append(thing)
        self._entries(path, thing, list(thing), spell)

    def _entries(self, path: str, entries: Any, keys: Iterable[Any], spell: str) -> None:
        for number, key in enumerate(keys):
            if isinstance(key, VALUES):
                inner = spell.format(path, key)
            else:
                inner = f"{path}[{number}]"
                self._note(inner, Same(key))
            self._waiting.append((inner, entries[key], Entry(entries, key, entries[key])))

    def _object(self, path: str, thing: Any, kind: type) -> None:
        self._note(path, Same(kind))
        own, slots = _layout(kind)
        slots = [n for n in slots if hasattr(thing, n)]
        entries = getattr(thing, "__dict__", None)
        if isinstance(thing, HIDDEN) or (entries is None and not slots):
            self._note(path, Same(thing))
            fixed = _is_of_libraries(kind) or kind is object
            fixed = fixed and not isinstance(thing, HIDDEN)
            if self.seen and not (fixed or hasattr(kind, "__get__")):
                raise CaptureError(f"it reads {path}, a {kind.__name__}, which may change unseen")
            return
        if own:
            self._waiting.append((f"{path}.__class__", kind, None))
        if slots:
            self.slotted.append((thing, slots))
            self._waiting += [(f"{path}.{n}", getattr(thing, n), None) for n in slots]
        if entries is not None:
            self._attributes(path, thing, entries, own)

    def _attributes(self, path: str, thing: Any, entries: dict, own: bool) -> None:
        keys = list(entries)
        if isinstance(thing, nn.Module):
            # Their entries are attributes of the module.
            for held in (thing._parameters, thing._buffers, thing._modules):
                self._known[id(held)] = len(self._known), held
                self._dict(path, held, "{}.{}")
        if self.seen is None or (self.seen.wide and not _is_of_libraries(type(thing))):
            self.dicts.append(entries)
        else:
            # Code that was seen to read an attribute by its name has it, or its class has it.
            keys = [n for n in keys if n in self.seen.names]
            read = itemgetter(keys[0], *keys) if keys else _nothing
            self.attributes.append((entries, read))
        keys = [n for n in keys if n not in ("_parameters", "_buffers", "_modules")]
        if isinstance(thing, pyro.plate):
            # A plate gets its rows anew each time that it is entered.
            keys = [n for n in keys if n != "_indices"]
        self._entries(path, entries, keys, "{}.{}")

    def _function(self, path: str, thing: FunctionType) -> None:
        code, scope = thing.__code__, thing.__globals__
        own = not is_library(scope.get("__name__"))
        if (code not in self.seen.ran) if self.seen else not (own or thing.__closure__):
            return self._note(path, Same(thing))
        self._note(path, Same(code))
        self.functions.append(thing)
        if own and self.seen is None:
            self._scope("", None, scope, _globals(code))
        cells = thing.__closure__ or ()
        self.cells += cells
        inner = zip(code.co_freevars, map(_content, cells), strict=True)
        self._waiting += [(name, each, None) for name, each in inner]
        self._waiting.append((f"{path}.__defaults__", thing.__defaults__, None))
        self._waiting.append((f"{path}.__kwdefaults__", thing.__kwdefaults__, None))
        return self._dict(path, vars(thing), "{}.{}")

    def _class(self, path: str, thing: type) -> None:
        own = [c for c in thing.__mro__ if not is_library(c.__module__)]
        if not own or issubclass(thing, Enum):
            return
        named = {n for c in own for n in vars(c) if self._may_read(n)}
        for each in own:
            self._scope(f"{each.__name__}.", each, vars(each), named)

    def _module(self, path: str, thing: ModuleType) -> None:
        entries = vars(thing)
        if not is_library(thing.__name__):
            self._scope(f"{path}.", None, entries, {n for n in entries if self._may_read(n)})
        elif self.seen:
            # What a program reads of torch and the like are functions and constants.
            kinds = (*VALUES, *NUMBERS, dict, list, type(os.environ))
            named = {n for n in self.seen.own_names & entries.keys() if type(entries[n]) in kinds}
            self._scope(f"{path}.", None, entries, named)

    def _may_read(self, name: str) -> bool:
        if self.seen is None:
            return not name.startswith("__")
        return name in self.seen.names

    def _scope(self, path: str, owner: Any, scope: Mapping[str, Any], names: Iterable[str]) -> None:
        found = tuple(sorted(names))
        self.scopes.append((owner, scope, found))
        self._waiting += [(f"{path}{n}", scope.get(n, MISSING), None) for n in found]

    def _array(self, path: str, thing: np.ndarray) -> None:
        if self.seen and (thing.nbytes > MOST_BYTES or thing.dtype.hasobject):
            raise CaptureError(
                f"it reads {path}, a NumPy array of {thing.size:,} values: use a tensor"
            )
        if thing.nbytes <= MOST_BYTES and not thing.dtype.hasobject:
            self.arrays.append(thing)
            self._note(path, (thing.dtype.str, thing.shape, thing.tobytes()))


@functools.cache
def _layout(kind: type) -> tuple[bool, list[str]]:
    """Whether a class is the program's own, and its slots."""
    slots: list[str] = []
    for each in kind.__mro__:
        names = vars(each).get("__slots__", ())
        slots += [names] if isinstance(names, str) else names
    own = not all(is_library(each.__module__) for each in kind.__mro__)
    return own, [name for name in slots if name not in ("__dict__", "__weakref__")]


def _is_of_libraries(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in LIBRARIES


def _nothing(entries: dict) -> tuple:
    return ()


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # It is empty.
        return MISSING


@contextmanager
def kept(roots: Mapping[str, Any]) -> Iterator[None]:
    """Run a block, and give every plain object that programs can reach back as it was."""
    walk, streams = Walk(roots), (random.getstate(), np.random.get_state())
    dicts = [(d, dict(d)) for d in (*walk.dicts, *walk.empty) if isinstance(d, dict)]
    lists = [(each, list(each)) for each in walk.lists]
    arrays = [(each, each.copy()) for each in walk.arrays]
    cells = [(cell, _content(cell)) for cell in walk.cells]
    scopes = [
        (owner, scope, {n: scope[n] for n in names if n in scope}, names)
        for owner, scope, names in walk.scopes
    ]
    slotted = [(each, n, getattr(each, n)) for each, names in walk.slotted for n in names]
    try:
        yield
    finally:
        random.setstate(streams[0])
        np.random.set_state(streams[1])
        for entries, before in dicts:
            _restore(entries, entries, before, tuple(entries))
        for values, elements in lists:
            if len(values) != len(elements) or not all(map(is_, values, elements)):
                values.clear()
                (values.update if isinstance(values, set) else values.extend)(elements)
        for array, content in arrays:
            if array.flags.writeable:
                array[...] = content
        for cell, inner in cells:
            if _content(cell) is not inner and inner is not MISSING:
                cell.cell_contents = inner
        for owner, scope, before, names in scopes:
            _restore(owner if owner is not None else scope, scope, before, names)
        for each, name, value in slotted:
            if getattr(each, name, MISSING) is not value:
                object.__setattr__(each, name, value)


def _restore(owner: Any, scope: Any, before: dict, names: Iterable[Any]) -> None:
    put = owner.__setitem__ if isinstance(owner, dict) else functools.partial(setattr, owner)
    drop = owner.__delitem__ if isinstance(owner, dict) else functools.partial(delattr, owner)
    for name in names:
        if name in scope and name not in before:
            drop(name)
    for name, value in before.items():
        if scope.get(name, MISSING) is not value:
            put(name, value)


def assigned(before: Walk, after: Walk) -> dict[str, Entry]:
    """Tensors and tuples of them that were assigned anew, by path, as they are after it.

    What else has changed no graph can do: it raises CaptureError.
    """
    old, new, found = before.items, after.items, {}
    for path in [*new, *(path for path in old if path not in new)]:
        if old.get(path) != new.get(path):
            one, other = before.slots.get(path), after.slots.get(path)
            if one is None or other is None or not one.is_of(other):
                raise CaptureError(f"it changes {path} while it runs")
            found[path] = other
    # With one tensor of a tuple, all are new.
    each = found.values()
    return {p: entry for p, entry in after.slots.items() if any(map(entry.is_of, each))}


class Watch:
    """A number for the state that :meth:`describe` tells by value, another for another state.

    Describing it at each step would cost as much as the step: it is done only where an object that
    :meth:`look` finds is not that of the last call.
    """

    _numbers = count()

    def __init__(self) -> None:
        # Held, so that no other object takes their place in memory.
        self._last: list[Any] = []
        self._told: dict[int, tuple] = {}
        self._tokens: dict[tuple, int] = {}
        self._kept: set[int] = set()
        self._token = -1

    def look(self) -> list[Any]:
        """The objects on which the description rests."""
        raise NotImplementedError

    def describe(self) -> tuple:
        """Pairs of a name and what has it."""
        raise NotImplementedError

    def __call__(self) -> int:
        try:
            now = self.look()
        except KeyError:  # An attribute was deleted.
            now = []
        if not now or len(now) != len(self._last) or not all(map(is_, now, self._last)):
            description = self.describe()
            self._last = self.look()
            if len(self._tokens) > REMEMBERED:
                self._tokens = {d: n for d, n in self._tokens.items() if n in self._kept}
            self._token = self._tokens.setdefault(description, next(self._numbers))
        return self._token

    def keep(self) -> int:
        """The number of the state of now, which is never forgotten."""
        token = self()
        self._kept.add(token)
        return token

    def changed(self, token: int | None) -> str:
        """The first name that has another description than in an earlier state."""
        (then,) = (description for description, n in self._tokens.items() if n == token)
        old, new = dict(then), dict(self.describe())
        return next(name for name in (*new, *old) if old.get(name) != new.get(name))


class ProgramWatch(Watch):
    """Watches what the code that was seen could read; ``rebound`` is as for :class:`Walk`."""

    def __init__(self, roots: Mapping[str, Any], seen: Seen, rebound: Iterable[str] = ()) -> None:
        super().__init__()
        self.roots, self.seen, self.rebound = roots, seen, frozenset(rebound)
        self._values: tuple = ()
        self._walk = Walk(roots, seen, self.rebound)

    def covers(self, other: ProgramWatch) -> bool:
        """Whether this one watches all that the other does."""
        ours, theirs = self.seen, other.seen
        return ours.own == theirs.own and (
            (self.rebound, ours.wide) == (other.rebound, theirs.wide) and ours.names >= theirs.names
        )

    def look(self) -> list[Any]:
        """What the walk rests on."""
        found, values = self._walk.look(), self._walk.values()
        if values != self._values:
            self._values = values
        found.append(self._values)
        return found

    def describe(self) -> tuple:
        """What a new walk finds."""
        self._walk = Walk(self.roots, self.seen, self.rebound)
        return (*self._walk.items.items(), ("torch's settings", self._walk.values()))
