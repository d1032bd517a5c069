"""Detect changes that make a captured step stale.

A record holds every number and flag as it was. Describing a whole pair at each step would cost more
than the step: objects are compared by identity, and described only where one has been replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from pyrovae.pairs.pair import Pair

__all__ = ["Watch", "watch_optimizer", "watch_pair"]

# What a record takes for a constant; tensors are told by identity, their values are inputs.
SCALARS = (bool, int, float, str, type(None))


class Watch:
    """A number that stands for a state, and changes when the state does.

    Objects are compared by identity with those of the last call, which are held so that no other
    object takes their place; only where one differs is the state described in full.

    Args:
        look: The objects that make up the state, and whose places are compared.
        describe: The state by value.
    """

    def __init__(self, look: Callable[[], list[Any]], describe: Callable[[], Hashable]) -> None:
        self._look, self._describe = look, describe
        self._last: list[Any] = []
        self._tokens: dict[Hashable, int] = {}
        self._token = -1

    def __call__(self) -> int:
        now = self._look()
        if len(now) != len(self._last) or not all(map(is_, now, self._last)):
            self._token = self._tokens.setdefault(self._describe(), len(self._tokens))
            self._last = now
        return self._token


def watch_pair(objective: Any, pair: Pair) -> Watch:
    """Watch a pair and its objective.

    Which parameters and buffers there are, what they are and which are frozen, and every number,
    flag and loose tensor that is an attribute of the objective or of a module.
    """
    things = [getattr(objective, "__dict__", {})]
    # Walked once: modules that come later change the ``_modules`` of one that is known.
    modules: list[nn.Module] = []

    def look() -> list[Any]:
        known = modules or pair.modules
        found = [value for thing in things for value in thing.values()]
        tensors: list[Tensor | None] = [leaf for _, leaf in pair.statements]
        for module in known:
            found += module.__dict__.values()
            found += module._modules.values()
            tensors += module._parameters.values()
            tensors += module._buffers.values()
        for tensor in tensors:
            if tensor is not None:
                found += (tensor, tensor.requires_grad, tensor.dtype)
        return found

    def describe() -> Hashable:
        modules[:] = pair.modules
        held = (
            *pair.leaves(),
            *(b for module in modules for b in module.buffers(recurse=False)),
        )
        tensors = tuple((id(t), t.dtype, t.device, t.requires_grad) for t in held)
        attributes = [*things, *(module.__dict__ for module in modules)]
        return tensors, tuple(_scalars(each) for each in attributes)

    return Watch(look, describe)


def watch_optimizer(optimizer: Optimizer) -> Watch:
    """Watch an optimizer's hyperparameters, but for the learning rate, and where its state lies."""

    def look() -> list[Any]:
        found = [v for group in optimizer.param_groups for k, v in group.items() if k != "lr"]
        return found + [v for entry in optimizer.state.values() for v in entry.values()]

    def describe() -> Hashable:
        groups = tuple(
            tuple((k, v if isinstance(v, (*SCALARS, tuple)) else id(v)) for k, v in group.items())
            for group in ({k: v for k, v in g.items() if k not in ("params", "lr")}
                          for g in optimizer.param_groups)
        )  # fmt: skip
        members = tuple(id(p) for group in optimizer.param_groups for p in group["params"])
        state = tuple(id(v) for entry in optimizer.state.values() for v in entry.values())
        return groups, members, state

    return Watch(look, describe)


def _scalars(attributes: dict[str, Any]) -> tuple:
    return tuple(
        (name, value if isinstance(value, SCALARS) else id(value))
        for name, value in attributes.items()
        if isinstance(value, (*SCALARS, Tensor))
    )
