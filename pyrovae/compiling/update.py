"""A torch optimizer's update as part of a captured step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyrovae.compiling.graph import CaptureError
from pyrovae.compiling.reads import VALUES, Same, Watch
from pyrovae.optim import parts_of

# Those that torch can step without reading a value back: they have the option ``capturable``, or
# (Adagrad) need none. RULES has others.
RECORDABLE = ("Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSprop")
# The fused kernels are one opaque operator, which the compiler cannot fuse with the gradients.
WHILE_RECORDED = {"capturable": True, "foreach": True, "fused": False, "differentiable": False}
# What is an input of any update and may change from step to step.
OF_ANY = ("lr",)
# Options without which an update is another one.
LEFT_OUT = {"weight_decay": "whether there is a decay", "momentum": "whether there is a momentum"}
# By so much Muon's update may differ where clipping rounds a gradient otherwise.
TURNED = 0.1
# An option that had so many values is on the move.
MOVES_AFTER = 3
# A mean of gradients counts as zero below the first, and one of their squares stays above the
# second. Where gradients stay zero (a pixel that is nearly always black, a unit that never fires),
# both decay to subnormal numbers, of which rounding keeps some for good, and with which a CPU takes
# ten times as long. Beside the 1e-8 that Adam adds to the root, no weight shows the difference.
LEAST, LEAST_SQUARE = 2.0**-100, 2.0**-120


class UpdateError(RuntimeError):
    """An optimizer's step is no function of tensors alone."""


class Average(Protocol):
    """What :class:`pyrovae.training.optimizer.Average` is here: what each leaf's average is.

    Leaves are the parameters, and buffers that a step has changed before its update.
    """

    of: dict[Tensor, Tensor]

    def update(self) -> None:
        """Move every average towards its leaf."""


class Update:
    """Clips gradients, steps a torch optimizer and averages, in a form that a tracer can record.

    The optimizer has stepped before. Its learning rate is an input, so that a schedule may change
    it between calls, and so are the numbers of those that are written out here: a compiler would
    raise Adam's β to the power of the step's count once for every weight, where a CPU has the
    count, and SGD, ASGD and Muon read values back.
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
            raise _refused("it steps some of the parameters alone")
        self._groups = [held[id(leaf)] for leaf in leaves]
        # No schedule is to warn that it steps first (torch 2.14).
        vars(optimizer)["_opt_called"] = True
        self._rules = rules(optimizer)
        self._adam = [i for i, g in enumerate(self._groups) if self._rules[g] is ADAM]
        steps = [optimizer.state.get(leaves[i], {}).get("step") for i in self._adam]
        self._own = None not in self._rules and all(
            step is not None and step.device == leaves[i].device
            for i, step in zip(self._adam, steps, strict=True)
        )
        if not (self._own or _is_torchs(optimizer)):
            raise _refused("it has no state of some parameters, or keeps it elsewhere")
        # One row a group: its numbers, as the record reads them; and what they were made from.
        # In float32 a rate would be off by 1e-8 of itself, more than a weight's float64 rounds.
        kind = torch.float64 if any(p.dtype is torch.float64 for p in leaves) else torch.float32
        numbers = len(_numbers_of(groups[0]))
        self._numbers = torch.zeros(len(groups), numbers, dtype=kind, device=device)
        self._made_from: list = []
        # One row a leaf, where its count of steps can be read: as :func:`_debiased` has it.
        counted = self._own and self._adam and device.type == "cpu"
        self.counts = torch.zeros(len(leaves), 2, dtype=kind) if counted else None

    @staticmethod
    def can_record(optimizer: Optimizer) -> bool:
        """Whether an optimizer's step is a function of tensors alone."""
        # A hook would run once, while recording. torch has no public way to ask for them.
        for each in (optimizer, *parts_of(optimizer)):
            if each._optimizer_step_pre_hooks or each._optimizer_step_post_hooks:
                return False
        return _is_torchs(optimizer) or None not in rules(optimizer)

    @staticmethod
    def is_ready(optimizer: Optimizer) -> bool:
        """Whether an optimizer has made its state, which it does in its first step, or has none."""
        bare = all(
            type(part) is torch.optim.SGD and not any(g["momentum"] for g in part.param_groups)
            for part in parts_of(optimizer)
        )
        return bare or any(optimizer.state.values())

    @property
    def changed(self) -> tuple[Tensor, ...]:
        """Every tensor that a step writes to."""
        entries = [v for entry in self.optimizer.state.values() for v in entry.values()]
        averages = [] if self.average is None else self.average.of.values()
        return (*self.leaves, *(v for v in entries if isinstance(v, Tensor)), *averages)

    @property
    def buffers(self) -> list[Tensor]:
        """What is averaged and is no parameter."""
        own = set(map(id, self.leaves))
        return [t for t in (self.average.of if self.average else ()) if id(t) not in own]

    def slack(self, leaf: Tensor) -> float:
        """The share of its largest entry by which a leaf's update may be off beside rounding."""
        turned = {id(own) for own, g in self._grouped() if self._rules[g] is MUON}
        return TURNED if id(leaf) in turned else 0.0

    def _grouped(self) -> Iterator[tuple[Tensor, int]]:
        return zip(self.leaves, self._groups, strict=True)

    def refresh(self) -> None:
        """Bring what the record reads up to the optimizer's numbers and counts of steps."""
        groups = self.optimizer.param_groups
        now = [[group.get(name) for name in NUMBERS] for group in groups]
        if now != self._made_from or any(isinstance(group["lr"], Tensor) for group in groups):
            self._numbers.copy_(torch.tensor([*map(_numbers_of, groups)], dtype=torch.float64))
            self._made_from = now
        if self.counts is not None:
            self.counts.copy_(self.ahead(1)[0])

    def ahead(self, steps: int) -> list[Tensor]:
        """What ``counts`` have to be in each of the next steps."""
        state, groups = self.optimizer.state, self.optimizer.param_groups
        counts = torch.stack([state[self.leaves[i]]["step"] for i in self._adam]).tolist()
        keys = [(self._groups[i], n) for i, n in zip(self._adam, counts, strict=True)]
        kinds = [*dict.fromkeys(keys)]
        found = [[_debiased(groups[g], n + 1 + taken) for g, n in kinds] for taken in range(steps)]
        rows = torch.zeros(steps, len(self.leaves), 2, dtype=self._numbers.dtype)
        each = torch.tensor(found, dtype=rows.dtype)
        rows[:, self._adam] = each[:, [kinds.index(key) for key in keys]]
        return [*rows.unbind()]

    def __call__(self, gradients: Sequence[Tensor | None]) -> None:
        """Step on some gradients, which may be clipped in place."""
        self._apply(gradients, lambda: self._step(self.optimizer))

    def record(self, gradients: Sequence[Tensor | None]) -> None:
        """Step by functions of tensors, which a tracer can record, or raise UpdateError."""
        if self._own:
            try:
                return self._apply(gradients, self._written)
            except ImportError as error:
                raise UpdateError(str(error)) from error
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

    def _written(self) -> None:
        """The updates of RULES, from numbers that are tensors."""
        for index, (leaf, group) in enumerate(self._grouped()):
            rule, gradient = self._rules[group], leaf.grad
            if gradient is None or rule is None:
                continue
            options, state = self.optimizer.param_groups[group], self.optimizer.state.get(leaf, {})
            if rule.needs(options) and rule.needs(options) not in state:
                raise UpdateError("it has no state of some parameters")
            count = None if self.counts is None else self.counts[index]
            rule.step(leaf, gradient, options, state, self._numbers[group], count)


class Rule(NamedTuple):
    """How an optimizer steps a leaf, which of its options are inputs, and what state it needs."""

    step: Callable[..., None]
    inputs: tuple[str, ...]
    needs: Callable[[dict[str, Any]], str]


def _adam(
    leaf: Tensor, gradient: Tensor, group: dict, state: dict, row: Tensor, count: Tensor | None
) -> None:
    rate, left, first, fresh, second, freshest, eps, decay = row.unbind()
    state["step"].add_(1)
    if count is None:
        rate = rate / (1 - first ** state["step"])
        spread = (1 - second ** state["step"]).rsqrt()
    else:
        rate, spread = count.unbind()
    if group.get("decoupled_weight_decay", False):
        leaf.mul_(left)
    elif group["weight_decay"]:
        gradient = gradient + decay * leaf
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.copy_(_normal(mean + (gradient - mean) * fresh))
    square.copy_((square * second + freshest * gradient * gradient).clamp(min=LEAST_SQUARE))
    leaf.sub_(rate * mean / (square.sqrt() * spread + eps))


def _normal(mean: Tensor) -> Tensor:
    return torch.where(mean.abs() < LEAST, 0.0, mean)


def _sgd(
    leaf: Tensor, gradient: Tensor, group: dict, state: dict, row: Tensor, count: Tensor | None
) -> None:
    rate, _, momentum, *_, decay = row.unbind()
    if group["weight_decay"]:
        gradient = gradient + decay * leaf
    if group["momentum"]:
        buffer = state["momentum_buffer"]
        buffer.copy_(_normal(buffer * momentum + gradient * (1 - group["dampening"])))
        gradient = gradient + momentum * buffer if group["nesterov"] else buffer
    leaf.sub_(rate * gradient)


def _asgd(
    leaf: Tensor, gradient: Tensor, group: dict, state: dict, row: Tensor, count: Tensor | None
) -> None:
    rate, *_, decay = row.unbind()
    step, eta, mu, average = (state[name] for name in ("step", "eta", "mu", "ax"))
    step.add_(1)
    if group["weight_decay"]:
        gradient = gradient + decay * leaf
    leaf.mul_(1 - group["lambd"] * eta).sub_(eta * gradient)
    average.add_((leaf - average) * mu)
    eta.copy_(rate / (1 + group["lambd"] * rate * step) ** group["alpha"])
    mu.copy_(1 / (step - group["t0"]).clamp(min=1))


def _muon(
    leaf: Tensor, gradient: Tensor, group: dict, state: dict, row: Tensor, count: Tensor | None
) -> None:
    # Private in torch 2.11 to 2.14; imported here, so that all else does without them.
    from torch.optim._muon import _adjust_lr

    rate, left, momentum, fresh, *_ = row.unbind()
    numbers = [float(each) for each in group["ns_coefficients"]]
    how = group["nesterov"], numbers, group["ns_steps"], group["eps"]
    buffer, turned = turn(state["momentum_buffer"], gradient, momentum, fresh, *how)
    state["momentum_buffer"].copy_(buffer)
    leaf.mul_(left).sub_(_adjust_lr(1.0, group["adjust_lr_fn"], leaf.shape) * rate * turned)


@torch.library.custom_op("pyrovae::turn", mutates_args=())
def turn(
    buffer: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    fresh: Tensor,
    nesterov: bool,
    coefficients: Sequence[float],
    steps: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Muon's momentum and what its iteration makes of it, in one piece.

    A compiler would round its bfloat16 otherwise than torch, of which small singular values make a
    few hundred times as much.
    """
    from torch.optim._muon import _zeropower_via_newtonschulz

    a, b, c = coefficients
    buffer = buffer.lerp(gradient, fresh.to(gradient))
    moved = gradient.lerp(buffer, momentum.to(gradient)) if nesterov else buffer.clone()
    return buffer, _zeropower_via_newtonschulz(moved, (a, b, c), steps, eps).contiguous()


@turn.register_fake
def _(buffer: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    turned = torch.empty(buffer.shape, dtype=torch.bfloat16, device=buffer.device)
    return torch.empty_like(buffer), turned


ADAM = Rule(_adam, ("lr", "betas", "eps", "weight_decay"), lambda group: "exp_avg")
OF_SGD = ("lr", "momentum", "weight_decay")
MUON = Rule(_muon, OF_SGD, lambda group: "momentum_buffer")
# By an optimizer's own class: one of somebody else's may step otherwise.
RULES: dict[type[Optimizer], Rule] = {
    torch.optim.Adam: ADAM,
    torch.optim.AdamW: ADAM,
    torch.optim.ASGD: Rule(_asgd, ("lr", "weight_decay"), lambda group: "eta"),
    torch.optim.Muon: MUON,
    torch.optim.SGD: Rule(_sgd, OF_SGD, lambda group: "momentum_buffer" * bool(group["momentum"])),
}
NUMBERS = (*ADAM.inputs, "momentum")


def rules(optimizer: Optimizer) -> list[Rule | None]:
    """How each group of an optimizer is stepped; None where that is not written out here."""
    return [_rule(part) for part in parts_of(optimizer) for _ in part.param_groups]


def _rule(optimizer: Optimizer) -> Rule | None:
    """The rule of one of torch's optimizers without a variant, for real numbers."""
    variant = any(
        group.get("amsgrad")
        or group.get("maximize")
        or any(p.is_complex() for p in group["params"])
        for group in optimizer.param_groups
    )
    return None if variant else RULES.get(type(optimizer))


def _is_torchs(optimizer: Optimizer) -> bool:
    """Whether torch itself can step an optimizer without reading a value back."""
    name = type(optimizer).__name__
    return name in RECORDABLE and type(optimizer) is getattr(torch.optim, name, None)


def _refused(why: str) -> CaptureError:
    error = CaptureError(why)
    error.__cause__ = UpdateError(why)
    return error


def _numbers_of(group: dict[str, Any]) -> tuple[float, ...]:
    """A group's numbers, each rounded once: 1 - β in float32 would have β's error."""
    rate, decay = float(group["lr"]), float(group.get("weight_decay", 0.0))
    first, second = map(float, group.get("betas", (group.get("momentum", 0.0), 0.0)))
    eps = float(group.get("eps", 0.0))
    return rate, 1 - rate * decay, first, 1 - first, second, 1 - second, eps, decay


def _debiased(group: dict[str, Any], count: float) -> tuple[float, float]:
    """Adam's rate at a step, and the factor of the root of its second moment."""
    first, second = group["betas"]
    return float(group["lr"]) / (1 - first**count), 1 / math.sqrt(1 - second**count)


class OptionsWatch(Watch):
    """Watches an optimizer's options, but for those that are inputs, and where its state lies.

    ``clipped`` says by name how gradients are clipped before it.
    """

    def __init__(self, optimizer: Optimizer, clipped: Callable[[], dict] = dict) -> None:
        super().__init__()
        self.optimizer, self.clipped = optimizer, clipped
        self._parts = [(p, r.inputs if (r := _rule(p)) else OF_ANY) for p in parts_of(optimizer)]

    @property
    def moves(self) -> bool:
        """Whether options that are no inputs change again and again."""
        return len(self._tokens) >= MOVES_AFTER

    def _groups(self) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
        return ((group, inputs) for part, inputs in self._parts for group in part.param_groups)

    def look(self) -> list[Any]:
        """Parameters, options and state."""
        found: list[Any] = [*self.clipped().values()]
        for group, inputs in self._groups():
            # Without a decay or a momentum these are left out of the record.
            found += (*group["params"], *(bool(group.get(name)) for name in LEFT_OUT))
            found += [value for name, value in group.items() if name not in inputs]
        for entry in self.optimizer.state.values():
            found += entry.values()
        return found

    def describe(self) -> tuple:
        """The same by name."""
        found: list[tuple[str, Any]] = [*self.clipped().items()]
        for number, (group, inputs) in enumerate(self._groups()):
            found += [
                (f"parameter {n} of group {number}", p) for n, p in enumerate(group["params"])
            ]
            found += [(f"{w} of group {number}", bool(group.get(n))) for n, w in LEFT_OUT.items()]
            names = [n for n in group if n not in (*inputs, "params")]
            found += [(f"{name} of the optimizer's group {number}", group[name]) for name in names]
        for number, entry in enumerate(self.optimizer.state.values()):
            found += [(f"the optimizer's {n} of parameter {number}", v) for n, v in entry.items()]
        return tuple(
            (n, v if isinstance(v, (*VALUES, float, tuple)) else Same(v)) for n, v in found
        )
