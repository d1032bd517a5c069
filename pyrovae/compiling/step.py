"""Training steps as compiled graphs: when to make one, when it holds, and what it returns."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable
from functools import cached_property
from operator import is_
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyrovae._tools import should_compile
from pyrovae._tools.seeding import undone
from pyrovae.compiling.graph import CaptureError, Graph, compare
from pyrovae.compiling.update import Average, Update, UpdateError
from pyrovae.objectives import Estimate, estimate
from pyrovae.pairs.pair import Pair

# Inductor takes some 20 s with an empty cache, and a compiled step saves 2 to 10 ms.
PAYS_AFTER = 3_000
# Another shape of batch than the first is compiled once it has come so often.
AGAIN_AFTER = 500
# Batches whose shape changes each time must not fill the memory with counts.
REMEMBERED = 64
# A compiled step is compared with the eager one at these calls and at every AUDIT-th, so that a
# program that depends on what no graph can see (a global, the time) is found out. An audit costs an
# eager step and a compiled one: 0.5% to 2% of a long run.
FIRST_AUDITS, AUDIT = (1, 2, 4, 8, 16, 32), 500
# What a record takes for a constant; tensors are told by identity, their values are inputs.
SCALARS = (bool, int, float, str, type(None))


class Step(NamedTuple):
    """A step's estimate, its gradient for each leaf, and whether the leaves are updated with it."""

    estimate: Estimate
    gradients: tuple[Tensor | None, ...]
    updated: bool = False


class _Trainable(Protocol):
    """What :class:`pyrovae.training.optimizer.Trained` is here: a pair's parameters by name."""

    named: dict[str, Tensor]
    clips: bool

    @property
    def average(self) -> Average | None: ...

    @property
    def optimizer(self) -> Optimizer: ...

    def clip(self) -> None: ...


class CompiledSteps:
    """The compiled steps of an objective and its pair, made where that pays.

    There is one for each shape of batch and each state of the modules. The first is made at once,
    or after 3,000 eager steps if ``compile`` is ``"auto"`` and ``steps`` are not that many; others
    when their batches have come 500 times. What cannot be captured runs eagerly from then on, with
    one warning that says why, and is None in ``captures``.
    """

    def __init__(
        self,
        objective: Any,
        pair: Pair,
        trained: _Trainable,
        compile: bool | str = True,
        steps: int = 0,
    ) -> None:
        self.objective, self.pair, self.trained = objective, pair, trained
        # Called with a text before and after something is compiled.
        self.announce: Callable[[str], object] = lambda text: None
        self.captures: dict[Hashable, Capture | None] = {}
        self._watch_pair = watch_pair(objective, pair)
        self._wait = 0 if should_compile(compile, steps >= PAYS_AFTER) else PAYS_AFTER
        self._seen: dict[Hashable, int] = {}
        self._records_updates = True

    def __call__(self, args: tuple, load: Callable | None, update: bool) -> Step | None:
        """Take the compiled step of a batch, if there is one or it is time to make it.

        Arguments are as for :meth:`pyrovae.SVI.update`, with ``update`` for whether the parameters
        may be updated too: if they are not, their gradients are added to their ``.grad``.
        """
        if self._wait > 0:
            self._wait -= 1
            return None
        plain = all(isinstance(arg, Tensor) and not arg.requires_grad for arg in args)
        if not (args and plain and self.trained.named):
            return None
        optimizer = self.trained.optimizer
        # A gradient that waits to be added to would be lost in a graph that has the update.
        update = update and self._records_updates and Update.can_record(optimizer)
        update = update and all(p.grad is None for p in self.trained.named.values())
        if update and not any(optimizer.state.values()):
            # Optimizers make their state in their first step, which therefore is an eager one: a
            # captured step writes to tensors that are there.
            return None
        shapes = tuple((arg.shape, arg.dtype, arg.device) for arg in args)
        key = shapes, self._watch_pair(), load, self._watch_optimizer() if update else None
        leaves = [p for p in self.trained.named.values() if p.requires_grad]
        try:
            if key not in self.captures:
                if not self._pays(key):
                    return None
                self.captures[key] = self._capture(args, load, leaves, update)
            captured = self.captures[key]
            step = None if captured is None else captured(args)
        except CaptureError as error:
            if isinstance(error.__cause__, UpdateError):
                # Loss and gradients may be captured still, without the update.
                self._records_updates = False
            else:
                self.captures[key] = None
                warnings.warn(f"The pair runs eagerly, not compiled: {error}.", stacklevel=5)
            return None
        if step is not None and not step.updated:
            for leaf, gradient in zip(leaves, step.gradients, strict=True):
                if gradient is not None:
                    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        return step

    @cached_property
    def _watch_optimizer(self) -> Watch:
        return watch_optimizer(self.trained.optimizer)

    def _pays(self, key: Hashable) -> bool:
        if len(self._seen) > REMEMBERED:
            self._seen.clear()
        self._seen[key] = self._seen.get(key, 0) + 1
        return not self.captures or self._seen[key] >= AGAIN_AFTER

    def _capture(
        self, args: tuple, load: Callable | None, leaves: list[Tensor], update: bool
    ) -> Capture:
        clip = self.trained.clip if self.trained.clips else None
        updates = (
            Update(self.trained.optimizer, leaves, clip, self.trained.average) if update else None
        )
        started = time.perf_counter()
        self.announce("compiling the step")
        capture = Capture(self.objective, self.pair, leaves, args, load, updates)
        self.announce(f"compiled in {time.perf_counter() - started:.0f} s")
        return capture


class Capture:
    """The compiled step of an objective, from arguments of one shape to gradients for ``leaves``.

    ``load``, which makes the programs' arguments, and ``update``, which steps the leaves, are in
    the graph if they are given. A step that comes out otherwise than the eager one raises
    :class:`CaptureError`.
    """

    def __init__(
        self,
        objective: Any,
        pair: Pair,
        leaves: list[Tensor],
        args: tuple,
        load: Callable | None = None,
        update: Update | None = None,
    ) -> None:
        self.objective, self.pair, self.leaves = objective, pair, leaves
        self.load, self.update = load, update
        self.names: list[str] = []
        self.present: list[bool] = []
        self.calls = 0
        changed = () if update is None else update.changed
        # With the update inside, nobody keeps the gradients: only the numbers are copied out.
        self.graph = Graph(self._flat, args, pair, changed, copied=1 if update else None)

    def __call__(self, args: tuple) -> Step:
        """Run the captured step; now and then, first beside the eager one."""
        self.calls += 1
        if self.calls in FIRST_AUDITS or self.calls % AUDIT == 0:
            self._audit(args)
        return self._run(args)

    def eager(self, args: tuple) -> Step:
        """The same loss and gradients through Pyro's handlers."""
        found = estimate(self.objective, self.pair, *(self.load(*args) if self.load else args))
        if found.surrogate is None:
            raise CaptureError("the objective propagates its gradient itself")
        gradients = torch.autograd.grad(found.surrogate, self.leaves, allow_unused=True)
        return Step(found._replace(surrogate=None), gradients)

    def _flat(self, *args: Tensor) -> list[Tensor]:
        step = self.eager(args)
        self.names = list(step.estimate.terms)
        self.present = [g is not None for g in step.gradients]
        if self.update is not None:
            # A loss that is not finite changes no weight: its gradients become zeros.
            finite = step.estimate.loss.isfinite()
            self.update.record(
                [None if g is None else torch.where(finite, g, 0.0) for g in step.gradients]
            )
        found = [g for g in step.gradients if g is not None]
        numbers = torch.stack([step.estimate.loss, *step.estimate.terms.values()])
        return [numbers, *found]

    def _run(self, args: tuple) -> Step:
        if self.update is not None:
            self.update.refresh()
        numbers, *found = self.graph(*args)
        loss, *terms = numbers.unbind()
        rest = iter(found)
        gradients = tuple(next(rest) if present else None for present in self.present)
        named = dict(zip(self.names, terms, strict=True))
        return Step(Estimate(loss, None, named), gradients, self.update is not None)

    def _audit(self, args: tuple) -> None:
        """Compare the captured step with the eager one, from the same noise."""
        changed = () if self.update is None else self.update.changed
        with undone(self.pair.modules, args[0].device):
            expected = self.eager(args)
        before = [tensor.detach().clone() for tensor in changed]
        with undone(self.pair.modules, args[0].device, changed):
            found = self._run(args)
            after = [tensor.detach().clone() for tensor in changed]
        compare("the loss", found.estimate.loss, expected.estimate.loss)
        ours, theirs = (
            [
                torch.zeros_like(p) if g is None else g
                for p, g in zip(self.leaves, step.gradients, strict=True)
            ]
            for step in (found, expected)
        )
        largest = torch.stack([g.abs().max() for g in theirs]).max()
        for one, other in zip(ours, theirs, strict=True):
            compare(f"the gradient of shape {list(one.shape)}", one, other, 1e-5 * largest)
        if self.update is None:
            return
        # The update is compared with the optimizer's own, from the same gradients.
        with undone(self.pair.modules, args[0].device, changed):
            self.update(found.gradients)
            for old, one, other in zip(before, after, changed, strict=True):
                what = f"the update of a tensor of shape {list(old.shape)}"
                compare(what, one - old, other.detach() - old, 1e-6 * old.abs().max())


class Watch:
    """A number for the state that ``describe`` tells by value, another for another state.

    Describing a whole pair at each step would cost more than the step: it is done only where one of
    the objects that ``look`` finds is not that of the last call.
    """

    def __init__(self, look: Callable[[], list[Any]], describe: Callable[[], Hashable]) -> None:
        self._look, self._describe = look, describe
        # Held, so that no other object takes their place in memory.
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
    """Watch a pair's parameters and buffers, and attributes of its modules and its objective."""
    options = getattr(objective, "__dict__", {})
    # Walked once: modules that come later change the ``_modules`` of one that is known.
    modules: list[nn.Module] = []

    def look() -> list[Any]:
        found = list(options.values())
        tensors: list[Tensor | None] = [leaf for _, leaf in pair.statements]
        for module in modules or pair.modules:
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
        buffers = (b for module in modules for b in module.buffers(recurse=False))
        held = (*pair.leaves(), *buffers)
        tensors = tuple((id(t), t.dtype, t.device, t.requires_grad) for t in held)
        return tensors, tuple(map(_scalars, [options, *(m.__dict__ for m in modules)]))

    return Watch(look, describe)


def watch_optimizer(optimizer: Optimizer) -> Watch:
    """Watch an optimizer's hyperparameters, but for the learning rate, and where its state lies."""

    def look() -> list[Any]:
        found: list[Any] = []
        for group in optimizer.param_groups:
            for name, value in group.items():
                if name != "lr":
                    found += (name, *value) if name == "params" else (name, value)
        return found + [v for entry in optimizer.state.values() for v in entry.values()]

    def describe() -> Hashable:
        return tuple(v if isinstance(v, (*SCALARS, tuple)) else id(v) for v in look())

    return Watch(look, describe)


def _scalars(attributes: dict[str, Any]) -> tuple:
    return tuple(
        (name, value if isinstance(value, SCALARS) else id(value))
        for name, value in attributes.items()
        if isinstance(value, (*SCALARS, Tensor))
    )
