"""A torch optimizer's update as part of a captured step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Descent", "UpdateError"]

RECORDABLE = ("Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSprop")
WHILE_RECORDED = {"capturable": True, "foreach": True, "fused": False, "differentiable": False}


class UpdateError(RuntimeError):
    """An optimizer's step is no function of tensors alone."""


class Descent:
    """Clips gradients and steps a torch optimizer, in a form that a tracer can record.

    The learning rate becomes a tensor, so that a schedule may change it between calls; the other
    hyperparameters are fixed in the record.

    Args:
        optimizer: An optimizer that has stepped at least once.
        leaves: The parameters that it steps.
        clip: Clips their ``.grad`` in place; None where nothing is clipped.
    """

    def __init__(
        self, optimizer: Optimizer, leaves: list[Tensor], clip: Callable[[], None] | None
    ) -> None:
        self.optimizer, self.leaves, self.clip = optimizer, leaves, clip
        device = leaves[0].device
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self._values = [math.nan] * len(self._rates)
        step = type(optimizer).step
        self._step = getattr(step, "__wrapped__", step)

    @staticmethod
    def can_record(optimizer: Optimizer) -> bool:
        """Whether an optimizer's step is a function of tensors alone."""
        hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        ours = type(optimizer) is getattr(torch.optim, type(optimizer).__name__, None)
        return ours and type(optimizer).__name__ in RECORDABLE and not hooks

    @property
    def changed(self) -> tuple[Tensor, ...]:
        """Every tensor that a step writes to."""
        entries = [v for entry in self.optimizer.state.values() for v in entry.values()]
        return (*self.leaves, *(v for v in entries if isinstance(v, Tensor)))

    def follow_rates(self) -> None:
        """Bring the recorded learning rates up to the optimizer's."""
        for index, group in enumerate(self.optimizer.param_groups):
            rate = group["lr"]
            if isinstance(rate, Tensor):
                self._rates[index].copy_(rate)
            elif rate != self._values[index]:
                self._rates[index].fill_(rate)
                self._values[index] = rate

    def __call__(self, gradients: list[Tensor | None]) -> None:
        """Step on some gradients, which may be clipped in place."""
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            leaf.grad = gradient
        try:
            if self.clip is not None:
                self.clip()
            with torch.no_grad():
                self._step(self.optimizer)
        finally:
            for leaf in self.leaves:
                leaf.grad = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Have the optimizer step by functions of tensors, learning rate included."""
        groups = self.optimizer.param_groups
        before = [dict(group) for group in groups]
        compiling = torch.compiler._is_compiling_flag
        for group, rate in zip(groups, self._rates, strict=True):
            group.update({k: v for k, v in WHILE_RECORDED.items() if k in group}, lr=rate)
        torch.compiler._is_compiling_flag = True
        try:
            yield
        except RuntimeError as error:
            raise UpdateError(str(error)) from error
        finally:
            torch.compiler._is_compiling_flag = compiling
            for group, values in zip(groups, before, strict=True):
                group.update(values)
