"""A torch optimizer's update as part of a captured step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

# Those that torch can step without reading a value back: they have the option ``capturable``, or
# (Adagrad) need none. SGD has neither, nor a state to begin with.
RECORDABLE = ("Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSprop")
# The fused kernels are one opaque operator, which the compiler cannot fuse with the gradients.
WHILE_RECORDED = {"capturable": True, "foreach": True, "fused": False, "differentiable": False}


class UpdateError(RuntimeError):
    """An optimizer's step is no function of tensors alone."""


class Average(Protocol):
    """What :class:`pyrovae.training.optimizer.Average` is here: each leaf's average."""

    of: dict[Tensor, Tensor]

    def update(self) -> None:
        """Move every average towards its leaf."""


class Update:
    """Clips gradients, steps a torch optimizer and averages, in a form that a tracer can record.

    The optimizer has stepped before. Its learning rate becomes a tensor, so that a schedule may
    change it between calls; the other hyperparameters are fixed in the record. On a CPU, Adam's is
    written out, because a compiler would raise β to the power of the step's count once for every
    weight.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        leaves: list[Tensor],
        clip: Callable[[], None] | None,
        average: Average | None = None,
    ) -> None:
        self.optimizer, self.leaves, self.clip, self.average = optimizer, leaves, clip, average
        device = leaves[0].device
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self._values = [math.nan] * len(self._rates)
        # torch wraps every step() for the profiler and for hooks, whose operators must not be
        # recorded; functools.wraps leaves the step itself here (torch 2.11 to 2.14).
        step = type(optimizer).step
        self._step = getattr(step, "__wrapped__", step)
        self._groups = [
            next(i for i, group in enumerate(optimizer.param_groups)
                 if any(p is leaf for p in group["params"]))
            for leaf in leaves
        ]  # fmt: skip
        self._own = device.type == "cpu" and all(map(self._is_plain_adam, leaves, self._groups))
        self._scales = torch.ones(len(leaves), 3)

    @staticmethod
    def can_record(optimizer: Optimizer) -> bool:
        """Whether an optimizer's step is a function of tensors alone."""
        # A hook would run once, while recording. torch has no public way to ask for them.
        hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        ours = type(optimizer) is getattr(torch.optim, type(optimizer).__name__, None)
        return ours and type(optimizer).__name__ in RECORDABLE and not hooks

    @property
    def changed(self) -> tuple[Tensor, ...]:
        """Every tensor that a step writes to."""
        entries = [v for entry in self.optimizer.state.values() for v in entry.values()]
        averages = [] if self.average is None else self.average.of.values()
        return (*self.leaves, *(v for v in entries if isinstance(v, Tensor)), *averages)

    def refresh(self) -> None:
        """Bring what the record reads up to the optimizer's learning rates and counts of steps."""
        if self._own:
            self._scales.copy_(torch.tensor(self._adam_scales()))
            return
        for index, group in enumerate(self.optimizer.param_groups):
            rate = group["lr"]
            if isinstance(rate, Tensor):
                self._rates[index].copy_(rate)
            elif rate != self._values[index]:
                self._rates[index].fill_(rate)
                self._values[index] = rate

    def __call__(self, gradients: Sequence[Tensor | None]) -> None:
        """Step on some gradients, which may be clipped in place."""
        self._apply(gradients, lambda: self._step(self.optimizer))

    def record(self, gradients: Sequence[Tensor | None]) -> None:
        """Step by functions of tensors, which a tracer can record, or raise UpdateError."""
        if self._own:
            return self._apply(gradients, self._adam)
        groups = self.optimizer.param_groups
        before = [dict(group) for group in groups]
        # While torch.compiler.is_compiling(), optimizers leave their counts and rates as tensors
        # (otherwise _get_value() in torch/optim/optimizer.py calls .item()) and take
        # ``capturable`` on a CPU too. make_fx does not set this, and in torch 2.11 to 2.14 only the
        # private flag does.
        compiling = torch.compiler._is_compiling_flag
        for group, rate in zip(groups, self._rates, strict=True):
            group.update({k: v for k, v in WHILE_RECORDED.items() if k in group}, lr=rate)
        torch.compiler._is_compiling_flag = True
        try:
            self(gradients)
        except RuntimeError as error:
            raise UpdateError(str(error)) from error
        finally:
            torch.compiler._is_compiling_flag = compiling
            for group, values in zip(groups, before, strict=True):
                group.update(values)

    def _apply(self, gradients: Sequence[Tensor | None], step: Callable[[], None]) -> None:
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            leaf.grad = gradient
        try:
            if self.clip is not None:
                self.clip()
            with torch.no_grad():
                step()
            if self.average is not None:
                self.average.update()
        finally:
            for leaf in self.leaves:
                leaf.grad = None

    def _is_plain_adam(self, leaf: Tensor, group: int) -> bool:
        options = self.optimizer.param_groups[group]
        plain = not (options.get("amsgrad") or options.get("maximize") or leaf.is_complex())
        known = type(self.optimizer).__name__ in ("Adam", "AdamW")
        return known and plain and leaf in self.optimizer.state

    def _adam_scales(self) -> list[tuple[float, float, float]]:
        """For each leaf, as :func:`_scales_of` has it; leaves mostly share a count of steps."""
        counts = torch.stack([self.optimizer.state[leaf]["step"] for leaf in self.leaves]).tolist()
        keys = list(zip(self._groups, counts, strict=True))
        groups = self.optimizer.param_groups
        found = {key: _scales_of(groups[key[0]], key[1] + 1) for key in set(keys)}
        return [found[key] for key in keys]

    def _adam(self) -> None:
        """Adam's update, its powers of β worked out before it rather than for every weight."""
        for leaf, group, scales in zip(self.leaves, self._groups, self._scales, strict=True):
            if leaf.grad is None:
                continue
            options, state = self.optimizer.param_groups[group], self.optimizer.state[leaf]
            (first, second), decay = options["betas"], options["weight_decay"]
            rate, spread, left = scales.unbind()
            gradient = leaf.grad
            if decay and options.get("decoupled_weight_decay", False):
                leaf.mul_(left)
            elif decay:
                gradient = gradient + decay * leaf
            mean, square = state["exp_avg"], state["exp_avg_sq"]
            mean.lerp_(gradient, 1 - first)
            square.mul_(second).add_((1 - second) * gradient * gradient)
            leaf.sub_(rate * mean / (square.sqrt() * spread + options["eps"]))
            state["step"].add_(1)


def _scales_of(options: dict, count: float) -> tuple[float, float, float]:
    """Adam's rate at a step, the spread of its moments, and what is left of the weights."""
    rate, (first, second) = float(options["lr"]), options["betas"]
    decoupled = options.get("decoupled_weight_decay", False)
    left = 1 - rate * options["weight_decay"] if decoupled else 1.0
    return rate / (1 - first**count), 1 / math.sqrt(1 - second**count), left
