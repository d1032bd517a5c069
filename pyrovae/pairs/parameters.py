"""The modules, parameters and buffers of a pair, each with one name."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from types import CodeType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrovae._tools import InputError
from pyrovae._tools.seeding import ALONE

# What these define is no part of a program: a module that it holds belongs to somebody else.
LIBRARIES = sys.stdlib_module_names | {"torch", "pyro", "pyrovae", "numpy"}
# What keeps a program's things by name.
HOLDERS = (Namespace, SimpleNamespace, Distribution)
# What holds nothing, of which there may be very many in a list.
PLAIN = (str, bytes, int, float, complex, Tensor, type(None))
# A module's own attributes, in which it keeps what it has registered.
_OWN = vars(nn.Module()).keys()
Seen = dict[int, Any]
Program = Callable | None


class Parameters:
    """What two programs own: ``model.…`` and ``guide.…`` of their modules, ``param.…`` of a store.

    ``owned`` are the modules of each program, ``roots`` those of both by prefix, as
    :func:`find_roots` has it, and ``module.…`` that a program registers as it runs; ``found`` has,
    for each program, the leaf of every parameter statement that was met, by Pyro's name for it,
    ``sites`` of every site whether it is observed, and its ``infer``; ``met`` the leaves that were
    met since it was last cleared, ``blocked`` those that :func:`pyro.poutine.block` hid.
    """

    def __init__(self, model: Program, guide: Program) -> None:
        self.folds = False
        owned = [[] if p is None else owners(p) for p in (model, guide)]
        self.roots = find_roots(*owned)
        self.owned = tuple([m for root in each for m in (root, *_all_held(root))] for each in owned)
        self.found: tuple[dict[str, Tensor], ...] = ({}, {})
        self.sites: tuple[dict[str, Any], ...] = ({}, {})
        self.met: set[Tensor] = set()
        self.blocked: set[Tensor] = set()
        self._asked: torch.device | None = None
        self._modes: list[tuple[bool, dict[nn.Module, bool]]] = []
        # Whether eval mode is set, and whether a relaxation that is rounded was seen.
        self.evaluates = self.rounds = False

    def adopt(self, modules: list[nn.Module]) -> None:
        """Own what :func:`pyro.module` is registering, in the mode of the rest, beside modules."""
        for name, module in registering():
            modules.append(module)
            if any(module is other for other in self.modules):
                continue
            prefix = f"module.{name}"
            while prefix in self.roots:
                prefix += "_"
            self.roots[prefix] = module
            for training, before in self._modes:
                before |= {m: m.training for m in module.modules()}
                module.train(training)

    @property
    def statements(self) -> list[tuple[str, Tensor]]:
        """Every parameter statement that was met: Pyro's name, and the leaf."""
        return [statement for each in self.found for statement in each.items()]

    def named(self) -> dict[str, Tensor]:
        """Every trainable leaf by name, each once."""
        found: dict[int, tuple[str, Tensor]] = {}
        for prefix, root in self.roots.items():
            for name, parameter in root.named_parameters(prefix):
                found.setdefault(id(parameter), (name, parameter))
        for name, leaf in self.statements:
            found.setdefault(id(leaf), (f"param.{name}", leaf))
        hidden = self.blocked - {leaf for _, leaf in self.statements}
        return {n: leaf for n, leaf in found.values() if leaf.requires_grad and leaf not in hidden}

    def leaves(self) -> Iterator[Tensor]:
        """Every parameter, frozen or not; one may come twice."""
        for root in self.roots.values():
            yield from root.parameters()
        yield from (leaf for _, leaf in self.statements)

    def _state(self) -> dict[str, Tensor]:
        """Every parameter and persistent buffer, as it is."""
        state = {f"{p}.{n}": v for p, r in self.roots.items() for n, v in r.state_dict().items()}
        owned = {id(leaf) for root in self.roots.values() for leaf in root.parameters()}
        return state | {f"param.{n}": leaf for n, leaf in self.statements if id(leaf) not in owned}

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of every parameter and persistent buffer."""
        return {name: value.detach().clone() for name, value in self._state().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a state into the pair, in place.

        Raises:
            ValueError: If names or shapes differ from the pair's.
        """
        own = self._state()
        missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or extra:
            raise InputError(f"The weights do not match: missing {missing}, unexpected {extra}.")
        for name, value in own.items():
            if value.shape != state[name].shape:
                raise InputError(
                    f"The weights do not match: {name} has shape {list(value.shape)} in the pair "
                    f"and {list(state[name].shape)} in the file."
                )
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(state[name])

    @property
    def device(self) -> torch.device:
        """Where the first parameter or buffer lies.

        Without modules, it is where functions were asked to be, or else where Pyro's parameters
        lie; the CPU if there are none.
        """
        held = (chain(root.parameters(), root.buffers()) for root in self.roots.values())
        stored = () if self.roots or self._asked else pyro.get_param_store()._params.values()
        for tensor in chain(*held, stored):
            return tensor.device
        return self._asked or torch.device("cpu")

    def to(self, device: torch.device | str) -> None:
        """Move the modules to a device, in place; functions state parameters on that of x."""
        self._asked = torch.device(device)
        for root in self.roots.values():
            root.to(device)

    @property
    def modules(self) -> list[nn.Module]:
        """Every module of both programs; one that both share comes once."""
        return [module for root in self.roots.values() for module in root.modules()]

    @contextmanager
    def mode(self, training: bool) -> Iterator[None]:
        """Set ``train`` or ``eval`` mode for a while, and give every module its own back."""
        with ALONE:
            before = {module: module.training for module in self.modules}
            evaluated, self.evaluates = self.evaluates, not training
            self._modes.append((training, before))
            try:
                for root in self.roots.values():
                    root.train(training)
                yield
            finally:
                self._modes.pop()
                self.evaluates = evaluated
                for module, flag in before.items():
                    module.training = flag


def owners(program: Any) -> list[nn.Module]:
    """The modules that a program is made of, each once.

    A module itself; or those that it reaches: the ``self`` of a bound method, what a partial or a
    handler wraps, what a function refers to in its closure, its defaults and its globals, and what
    lists, dictionaries and plain objects among these hold.
    """
    return [module for _, module in _reach(program, "", {})]


def held(module: nn.Module, path: str, seen: Seen) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a module reaches without having registered them, with their names."""
    for name, child in module.named_modules(prefix=path):
        seen[id(child)] = child
        for attribute, value in vars(child).items():
            if attribute not in _OWN:
                for where, other in _reach(value, f"{name}.{attribute}", seen):
                    yield where, other
                    yield from held(other, where, seen)


def _all_held(module: nn.Module) -> Iterator[nn.Module]:
    return (other for _, other in held(module, "", {}))


def _reach(thing: Any, path: str, seen: Seen) -> Iterator[tuple[str, nn.Module]]:
    """The modules that anything refers to, with where they were found; not what these hold."""
    if id(thing) in seen:
        return
    seen[id(thing)] = thing
    if isinstance(thing, nn.Module):
        yield path, thing
        return
    for name, inner in _inside(thing):
        yield from _reach(inner, f"{path}.{name}", seen)


def _inside(thing: Any) -> Iterable[tuple[Any, Any]]:
    """What anything refers to, by name; nothing of what libraries define."""
    if isinstance(thing, functools.partial):
        return enumerate((thing.func, *thing.args, *thing.keywords.values()))
    if isinstance(thing, dict | list | tuple | set | frozenset | deque):
        items = thing.items() if isinstance(thing, dict) else enumerate(thing)
        return [(name, value) for name, value in items if not isinstance(value, PLAIN)]
    if isinstance(thing, MethodType):
        return [("self", thing.__self__), ("method", thing.__func__)]
    if isinstance(thing, HOLDERS):
        return vars(thing).items()
    if _home(thing if isinstance(thing, FunctionType | type) else type(thing)) in LIBRARIES:
        return ()
    if isinstance(thing, FunctionType):
        return _referred(thing)
    if isinstance(thing, type):
        return [(n, v) for n, v in vars(thing).items() if isinstance(v, nn.Module | list | dict)]
    call = [("call", thing.__call__)] if callable(thing) else []
    return [*getattr(thing, "__dict__", {}).items(), ("class", type(thing)), *call]


def _referred(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """A function's closure, its defaults, and the globals that it names."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # a cell that has not been filled
            yield name, cell.cell_contents
    yield from enumerate(function.__defaults__ or ())
    yield from (function.__kwdefaults__ or {}).items()
    for name in _globals(function.__code__):
        thing = function.__globals__.get(name)
        # Functions of another file are somebody else's: what pyro.module says of them is met later.
        if not isinstance(thing, FunctionType) or thing.__module__ == function.__module__:
            yield name, thing


@functools.cache
def _globals(code: CodeType) -> tuple[str, ...]:
    """The names of globals that a function's code looks up, and those of the code inside it."""
    own = [i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"]
    inner = [name for c in code.co_consts if isinstance(c, CodeType) for name in _globals(c)]
    return tuple(dict.fromkeys([*own, *inner]))


def _home(thing: Any) -> str:
    """The package in which a function or a class was defined."""
    return str(getattr(thing, "__module__", "")).partition(".")[0]


def registering() -> list[tuple[str, nn.Module]]:
    """The name and the module that :func:`pyro.module` is registering, if it is running."""
    # It sends a message for each parameter, which does not say of which module (Pyro 1.9.2).
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not pyro.module.__code__:
        frame = frame.f_back
    return [(frame.f_locals["name"], frame.f_locals["nn_module"])] if frame else []


def find_roots(ours: list[nn.Module], theirs: list[nn.Module]) -> dict[str, nn.Module]:
    """The modules of a model and its guide by the prefix of their parameters' names.

    ``model`` and ``guide``, ``pair`` where one module owns both programs, and ``model.0``,
    ``model.1``, … where several own one; a module of both counts as the model's. What one of them
    holds unregistered follows under its attributes' names, as ``model.nets.0``.
    """
    shared = [m for m in theirs if any(m is other for other in ours)]
    found: dict[str, nn.Module] = {}
    if len(ours) == len(theirs) == len(shared) == 1:
        found["pair"] = ours[0]
    else:
        for prefix, modules in (("model", ours), ("guide", [m for m in theirs if m not in shared])):
            for index, module in enumerate(modules):
                found[prefix if len(modules) == 1 else f"{prefix}.{index}"] = module
    seen: Seen = {id(m): m for root in found.values() for m in root.modules()}
    return found | dict(chain(*[[*held(root, path, seen)] for path, root in found.items()]))
