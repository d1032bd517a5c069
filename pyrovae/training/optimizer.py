"""One torch optimizer over all parameters, from whatever Pyro or torch has for an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.params.param_store import (
    module_from_param_with_module_name,
    normalize_param_name,
    user_param_name,
)
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyrovae._tools import InputError, InputTypeError

__all__ = ["clip_gradients", "clips", "lend_to_pyro", "make_groups", "make_optimizer"]


def make_optimizer(optim: PyroOptim | Optimizer | Callable, named: dict[str, Tensor]) -> Optimizer:
    """The optimizer of some parameters.

    Args:
        optim: A Pyro optimizer, whose options it takes; a torch optimizer, which it is; or a
            function from parameters to one.
        named: The parameters by Pyro's names.

    Raises:
        ValueError: If there is nothing to train, or a Pyro optimizer waits for a state by name.
        TypeError: If the function returns something else.
    """
    if not named:
        raise InputError("The pair has no parameters to train.")
    if isinstance(optim, Optimizer):
        return optim
    if isinstance(optim, PyroOptim):
        if optim._state_waiting_to_be_consumed:
            raise InputError(
                "One optimizer steps all parameters here: restore its state with "
                "svi.build() and svi.optimizer.load_state_dict(state), not with optim.load()."
            )
        return optim.pt_optim_constructor(make_groups(optim, named))
    made = optim(list(named.values()))
    if not isinstance(made, Optimizer):
        raise InputTypeError(f"Expected a torch optimizer from {optim!r}.")
    return made


def make_groups(optim: Any, named: dict[str, Tensor]) -> list[dict]:
    """The parameter groups of some parameters, with a Pyro optimizer's options for each."""
    options = optim.pt_optim_args if isinstance(optim, PyroOptim) else {}
    if not callable(options):
        return [{"params": list(named.values()), **options}]
    by_path = optim.pt_optim_args_argc == 1
    return [
        {"params": [p], **(options(normalize_param_name(n)) if by_path else options(*_split(n)))}
        for n, p in named.items()
    ]


def lend_to_pyro(optim: PyroOptim, optimizer: Optimizer, key: Tensor) -> LRScheduler | None:
    """Let ``optim.step()`` of Pyro's schedulers reach the one optimizer; the schedule, if any."""
    make_scheduler = getattr(optim, "pt_scheduler_constructor", None)
    scheduler = None if make_scheduler is None else make_scheduler(optimizer, **optim.kwargs)
    optim.optim_objs = {key: scheduler or optimizer}
    return scheduler


def clips(optim: Any, clip_norm: float | None) -> bool:
    """Whether :func:`clip_gradients` has anything to do."""
    return clip_norm is not None or (isinstance(optim, PyroOptim) and bool(optim.pt_clip_args))


def clip_gradients(
    optim: Any, optimizer: Optimizer, named: dict[str, Tensor], clip_norm: float | None
) -> None:
    """Clip gradients in place: each as a Pyro optimizer says, then their common norm."""
    options = optim.pt_clip_args if isinstance(optim, PyroOptim) else {}
    for name, parameter in named.items() if options else ():
        if parameter.grad is not None:
            own = options(*_split(name)) if callable(options) else options
            PyroOptim._clip_grad(parameter, **own)
    if clip_norm is not None:
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(stepped, clip_norm)


def _split(name: str) -> tuple[str, str]:
    return module_from_param_with_module_name(name), user_param_name(name)
