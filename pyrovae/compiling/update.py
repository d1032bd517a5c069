"""A torch optimizer's update as part of a captured step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyrovae.compiling.graph import CaptureError
from pyrovae.compiling.reads import VALUES, Same, Watch

# Those that torch can step without reading a value back: they have the option ``capturable``, or
# (Adagrad) need none. SGD has neither, nor a state to begin with.
RECORDABLE = ("Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSprop")
# The fused kernels are one opaque operator, which the compiler cannot fuse with the gradients.
WHILE_RECORDED = {"capturable": True, "foreach": True, "fused": False, "differentiable": False}
# What is an input of the update and may change from step to step, of Adam's own and of any.
OF_ADAM, OF_ANY = ("lr", "betas", "eps", "weight_decay"), ("lr",)
# An option that had so many values is on the move.
MOVES_AFTER = 3


class UpdateError(RuntimeError):
    """An optimizer's step is no function of tensors alone."""


class Average(Protocol):
    """What :class:`pyrovae.training.optimizer.Average` is here: each leaf's average."""

    of: dict[Tensor, Tensor]

    def update(self) -> None:
        """Move every average towards its leaf."""


class Update:
    """Clips gradients, steps a torch optimizer and averages, in a form that a tracer can record.

    The optimizer has stepped before. Its learning rate is an input, so that a schedule may change
    it between calls, and so are all numbers of plain Adam, which is written out: a compiler would
    raise β to the power of the step's count once for every weight, where a CPU has the count.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        leaves: list[Tensor],
        clip: Callable[[], None] | None,
        average: Average | None = None,
    ) -> None:
        self.optimizer, self.leaves, self.clip, self.average = optimizer, leaves, clip, average
        groups, device = optimizer.param_groups, leaves[0].device
        # torch wraps every step() for the profiler and for hooks, whose operators must not be
        # recorded; functools.wraps leaves the step itself here (torch 2.11 to 2.14).
        step = type(optimizer).step
        self._step = getattr(step, "__wrapped__", step)
        held = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        if any(id(leaf) not in held for leaf in leaves):
            cause = UpdateError("the optimizer steps some of the parameters alone")
            raise CaptureError(str(cause)) from cause
        self._groups = [held[id(leaf)] for leaf in leaves]
        self._own = is_plain_adam(optimizer) and all(
            leaf in optimizer.state and optimizer.state[leaf]["step"].device == leaf.device
            for leaf in leaves
        )
        # One row a group: its numbers, as the record reads them; and what they were made from.
        self._numbers = torch.zeros(len(groups), len(_numbers_of(groups[0])), device=device)
        self._made_from: list = []
        # One row a leaf, where its count of steps can be read: as :func:`_debiased` has it.
        counted = self._own and device.type == "cpu"
        self.counts = torch.zeros(len(leaves), 2) if counted else None

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
        """Bring what the record reads up to the optimizer's numbers and counts of steps."""
        groups = self.optimizer.param_groups
        now = [[group.get(name) for name in OF_ADAM] for group in groups]
        if now != self._made_from or any(isinstance(group["lr"], Tensor) for group in groups):
            self._numbers.copy_(torch.tensor([_numbers_of(group) for group in groups]))
            self._made_from = now
        if self.counts is not None:
            self.counts.copy_(self.ahead(1)[0])

    def ahead(self, steps: int) -> list[Tensor]:
        """What ``counts`` have to be in each of the next steps."""
        counts = torch.stack([self.optimizer.state[leaf]["step"] for leaf in self.leaves]).tolist()
        keys = list(zip(self._groups, counts, strict=True))
        groups, rows = self.optimizer.param_groups, []
        for taken in range(1, steps + 1):
            found = {key: _debiased(groups[key[0]], key[1] + taken) for key in set(keys)}
            rows.append([found[key] for key in keys])
        return [*torch.tensor(rows, dtype=self._numbers.dtype).unbind()]

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
        for group, row in zip(groups, self._numbers, strict=True):
            group.update({k: v for k, v in WHILE_RECORDED.items() if k in group}, lr=row[0])
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

    def _adam(self) -> None:
        """Adam's update from numbers that are tensors."""
        rows = zip(self.leaves, self._groups, strict=True)
        for index, (leaf, group) in enumerate(rows):
            if leaf.grad is None:
                continue
            options, state = self.optimizer.param_groups[group], self.optimizer.state[leaf]
            rate, left, first, fresh, second, freshest, eps, decay = self._numbers[group].unbind()
            state["step"].add_(1)
            if self.counts is None:
                rate = rate / (1 - first ** state["step"])
                spread = (1 - second ** state["step"]).rsqrt()
            else:
                rate, spread = self.counts[index].unbind()
            gradient = leaf.grad
            if options.get("decoupled_weight_decay", False):
                leaf.mul_(left)
            elif options["weight_decay"]:
                gradient = gradient + decay * leaf
            mean, square = state["exp_avg"], state["exp_avg_sq"]
            mean.add_((gradient - mean) * fresh)
            square.mul_(second).add_(freshest * gradient * gradient)
            leaf.sub_(rate * mean / (square.sqrt() * spread + eps))


def is_plain_adam(optimizer: Optimizer) -> bool:
    """Whether an optimizer is torch's Adam without a variant, for real numbers."""
    return type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and not any(
        group["amsgrad"] or group["maximize"] or any(p.is_complex() for p in group["params"])
        for group in optimizer.param_groups
    )


def _numbers_of(group: dict[str, Any]) -> tuple[float, ...]:
    """A group's numbers, each rounded once: 1 - β in float32 would have β's error."""
    rate, decay = float(group["lr"]), float(group.get("weight_decay", 0.0))
    first, second = map(float, group.get("betas", (0.0, 0.0)))
    eps = float(group.get("eps", 0.0))
    return rate, 1 - rate * decay, first, 1 - first, second, 1 - second, eps, decay


def _debiased(group: dict[str, Any], count: float) -> tuple[float, float]:
    """Adam's rate at a step, and the factor of the root of its second moment."""
    first, second = group["betas"]
    return float(group["lr"]) / (1 - first**count), 1 / math.sqrt(1 - second**count)


class OptionsWatch(Watch):
    """Watches an optimizer's options, but for those that are inputs, and where its state lies."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__()
        self.optimizer = optimizer
        self._inputs = OF_ADAM if is_plain_adam(optimizer) else OF_ANY

    @property
    def moves(self) -> bool:
        """Whether options that are no inputs change again and again."""
        return len(self._tokens) >= MOVES_AFTER

    def look(self) -> list[Any]:
        """Parameters, options and state."""
        found: list[Any] = []
        for group in self.optimizer.param_groups:
            # Without a decay it is left out of the record.
            found += (*group["params"], bool(group.get("weight_decay")))
            found += [value for name, value in group.items() if name not in self._inputs]
        for entry in self.optimizer.state.values():
            found += entry.values()
        return found

    def describe(self) -> tuple:
        """The same by name."""
        found: list[tuple[str, Any]] = []
        for number, group in enumerate(self.optimizer.param_groups):
            found += [
                (f"parameter {n} of group {number}", p) for n, p in enumerate(group["params"])
            ]
            found.append((f"whether group {number} decays", bool(group.get("weight_decay"))))
            names = [n for n in group if n not in (*self._inputs, "params")]
            found += [(f"{name} of the optimizer's group {number}", group[name]) for name in names]
        for number, entry in enumerate(self.optimizer.state.values()):
            found += [(f"the optimizer's {n} of parameter {number}", v) for n, v in entry.items()]
        return tuple(
            (n, v if isinstance(v, (*VALUES, float, tuple)) else Same(v)) for n, v in found
        )
