"""Parameters of a pair, kept on the modules that own them.

Pyro files every parameter under its name in one global store, where a second module with the same
attribute names meets the first one's values. Here a module's parameters are its own: the store
holds only what a program asks of it by name, with ``pyro.param("name", initial_value)``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyrovae._tools import InputError

__all__ = ["OwnParameters", "Pair", "owners"]


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


class OwnParameters(Messenger):
    """Runs a program with its modules' parameters served by the modules, not by the store.

    ``found`` collects the trainable leaf of every parameter statement, by Pyro's name for it.
    Entries of the store that a :class:`~pyro.nn.PyroModule` would read in place of its own
    parameters are set aside while the program runs.

    Raises:
        ValueError: If the store holds another shape under the name of a ``pyro.param``.
    """

    def __init__(self, program: Callable) -> None:
        super().__init__()
        self._owners = owners(program)
        self.found: dict[str, Tensor] = {}

    def __enter__(self) -> OwnParameters:
        store = pyro.get_param_store()
        self._own_names = _pyro_param_names(self._owners)
        foreign = [n for n, value in store._params.items() if isinstance(value, nn.Parameter)]
        aside = dict.fromkeys([*self._own_names, *foreign])
        self._aside = {n: _take(store, n) for n in aside if n in store}
        self._local = pyro.settings.get("module_local_params")
        if self._local:
            pyro.settings.set(module_local_params=False)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._local:
            pyro.settings.set(module_local_params=True)
        store = pyro.get_param_store()
        for name, value in list(store._params.items()):
            if name in self._own_names or isinstance(value, nn.Parameter):
                _take(store, name)
        for name, (value, constraint) in self._aside.items():
            store.set_state({"params": {name: value}, "constraints": {name: constraint}})

    def _pyro_param(self, msg: dict) -> None:
        store = pyro.get_param_store()
        if msg["fn"] != store.get_param or len(msg["args"]) < 2:
            return
        name, initial = msg["args"][0], msg["args"][1]
        if isinstance(initial, nn.Parameter):
            msg["value"] = initial
        elif isinstance(initial, Tensor) and name in store and initial.shape != store[name].shape:
            raise InputError(
                f"pyro.param({name!r}) asks for shape {list(initial.shape)}, but Pyro's store "
                f"holds {list(store[name].shape)} under that name, from another program: call "
                f"pyro.clear_param_store() first, or give the parameter another name."
            )

    def _pyro_post_param(self, msg: dict) -> None:
        value = msg["value"]
        leaf = value if isinstance(value, nn.Parameter) else value.unconstrained()
        if leaf is not None:
            self.found[msg["name"]] = leaf


def _pyro_param_names(modules: list[nn.Module]) -> list[str]:
    return [
        f"{child._pyro_name}.{name}" if child._pyro_name else name
        for module in modules
        for child in module.modules()
        if isinstance(child, PyroModule)
        for name in child._pyro_params
    ]


def _take(store: Any, name: str) -> tuple[Tensor, Any]:
    taken = store._params[name], store._constraints[name]
    del store[name]
    return taken


class Pair:
    """The parameters and buffers of a model and its guide, with one name each.

    Args:
        model: The model program.
        guide: The guide program.

    A module's entries are called ``model.…`` and ``guide.…`` (``pair.…`` when one module owns
    both programs, ``model.0.…`` and so on when several own one); those in Pyro's store,
    ``param.…``.
    """

    def __init__(self, model: Callable, guide: Callable) -> None:
        self.roots = _roots(owners(model), owners(guide))
        self.model, self.guide = OwnParameters(model), OwnParameters(guide)
        self.run_model, self.run_guide = self.model(model), self.guide(guide)

    def named(self) -> dict[str, Tensor]:
        """Every trainable leaf by name, each once."""
        named: dict[str, Tensor] = {}
        known: set[int] = set()
        for prefix, root in self.roots.items():
            for name, parameter in root.named_parameters():
                if parameter.requires_grad and id(parameter) not in known:
                    known.add(id(parameter))
                    named[f"{prefix}.{name}"] = parameter
        for name, leaf in self._loose().items():
            if leaf.requires_grad and id(leaf) not in known:
                known.add(id(leaf))
                named[f"param.{name}"] = leaf
        return named

    def leaves(self) -> Iterator[Tensor]:
        """Every parameter, frozen or not; one may come twice."""
        for root in self.roots.values():
            yield from root.parameters()
        yield from self.model.found.values()
        yield from self.guide.found.values()

    def _loose(self) -> dict[str, Tensor]:
        owned = {id(p) for root in self.roots.values() for p in root.parameters()}
        found = self.model.found | self.guide.found
        return {name: leaf for name, leaf in found.items() if id(leaf) not in owned}

    def check_reach(self, surrogate: Tensor, args: tuple = ()) -> None:
        """Refuse a loss that depends on parameters which belong to no module and no statement.

        Raises:
            ValueError: With the shapes of those parameters and the mend.
        """
        known = {id(leaf) for leaf in (*self.named().values(), *args)}
        lost = [list(leaf.shape) for leaf in _leaves(surrogate) if id(leaf) not in known]
        if lost:
            raise InputError(
                f"The loss depends on parameters of shapes {lost} that neither the model nor the "
                f"guide owns, so they would not be trained: make their module an attribute, call "
                f"pyro.module('name', module) in the program, or freeze it with requires_grad_()."
            )

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of every parameter and persistent buffer."""
        state = {
            f"{prefix}.{name}": value.detach().clone()
            for prefix, root in self.roots.items()
            for name, value in root.state_dict().items()
        }
        state |= {f"param.{name}": leaf.detach().clone() for name, leaf in self._loose().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a state into the pair, in place.

        Raises:
            ValueError: If names or shapes differ from the pair's.
        """
        own = {f"{p}.{n}": v for p, r in self.roots.items() for n, v in r.state_dict().items()}
        own |= {f"param.{name}": leaf for name, leaf in self._loose().items()}
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

    @contextmanager
    def mode(self, training: bool) -> Iterator[None]:
        """Set ``train`` or ``eval`` mode for a while, and give every module its own back."""
        modules = [m for root in self.roots.values() for m in root.modules()]
        before = [m.training for m in modules]
        try:
            for root in self.roots.values():
                root.train(training)
            yield
        finally:
            for module, flag in zip(modules, before, strict=True):
                module.training = flag


def _roots(model: list[nn.Module], guide: list[nn.Module]) -> dict[str, nn.Module]:
    shared = [m for m in guide if any(m is other for other in model)]
    if len(model) == len(shared) == 1:
        return {"pair": model[0]}
    roots = {}
    for prefix, found in (("model", model), ("guide", [m for m in guide if m not in shared])):
        for index, module in enumerate(found):
            roots[prefix if len(found) == 1 else f"{prefix}.{index}"] = module
    return roots


def _leaves(tensor: Tensor) -> list[Tensor]:
    found, seen, stack = [], set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        stack.extend(parent for parent, _ in node.next_functions)
    return found
