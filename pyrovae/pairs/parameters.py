"""The modules, parameters and buffers of a pair, each with one name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyrovae._tools import InputError


class Parameters:
    """What two programs own: ``model.…`` and ``guide.…`` of their modules, ``param.…`` of a store.

    ``owned`` are the modules of each program, ``roots`` those of both by prefix, as
    :func:`find_roots` has it; ``found`` has, for each program, the leaf of every parameter
    statement that was met, by Pyro's name for it.
    """

    def __init__(self, model: Callable | None, guide: Callable | None) -> None:
        self.owned = tuple([] if p is None else owners(p) for p in (model, guide))
        self.roots = find_roots(*self.owned)
        self.found: tuple[dict[str, Tensor], ...] = ({}, {})

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
        return {name: leaf for name, leaf in found.values() if leaf.requires_grad}

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
        """Where the first parameter or buffer lies; the CPU if there is none."""
        for root in self.roots.values():
            for tensor in (*root.parameters(), *root.buffers()):
                return tensor.device
        return torch.device("cpu")

    def to(self, device: torch.device | str) -> None:
        """Move the modules to a device, in place."""
        for root in self.roots.values():
            root.to(device)

    @property
    def modules(self) -> list[nn.Module]:
        """Every module of both programs; one that both share comes once."""
        return [module for root in self.roots.values() for module in root.modules()]

    @contextmanager
    def mode(self, training: bool) -> Iterator[None]:
        """Set ``train`` or ``eval`` mode for a while, and give every module its own back."""
        modules = self.modules
        before = [module.training for module in modules]
        try:
            for root in self.roots.values():
                root.train(training)
            yield
        finally:
            for module, flag in zip(modules, before, strict=True):
                module.training = flag


def owners(program: Any, seen: set[int] | None = None) -> list[nn.Module]:
    """The modules that a program is made of, each once, but for things that were ``seen``.

    A module itself, the ``self`` of a bound method, what a partial or a handler wraps, and the
    modules that a function or a plain object refers to by name.
    """
    program, seen = poutine.unwrap(program), set() if seen is None else seen
    if id(program) in seen:
        return []
    seen.add(id(program))
    if isinstance(program, nn.Module):
        return [program]
    return [module for inner in _inside(program) for module in owners(inner, seen)]


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


def find_roots(ours: list[nn.Module], theirs: list[nn.Module]) -> dict[str, nn.Module]:
    """The modules of a model and its guide by the prefix of their parameters' names.

    ``model`` and ``guide``, ``pair`` where one module owns both programs, and ``model.0``,
    ``model.1``, … where several own one; a module of both counts as the model's.
    """
    shared = [m for m in theirs if any(m is other for other in ours)]
    if len(ours) == len(shared) == 1:
        return {"pair": ours[0]}
    found = {}
    for prefix, modules in (("model", ours), ("guide", [m for m in theirs if m not in shared])):
        for index, module in enumerate(modules):
            found[prefix if len(modules) == 1 else f"{prefix}.{index}"] = module
    return found
