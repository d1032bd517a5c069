"""Training steps as compiled graphs: when to make one, when it holds, and what it returns.

A step goes from a batch, or from the numbers of its rows, to loss and gradients, and where the
optimizer allows it to the updated weights.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyrovae._tools import should_compile
from pyrovae._tools.seeding import undone
from pyrovae.compiling.graph import CaptureError, Graph, compare
from pyrovae.compiling.update import Update, UpdateError
from pyrovae.compiling.watch import Watch, watch_optimizer, watch_pair
from pyrovae.objectives import Estimate, estimate
from pyrovae.pairs.pair import Pair

__all__ = ["Capture", "CompiledSteps", "Step", "Trainable"]

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


class Step(NamedTuple):
    """The outcome of a step.

    Attributes:
        estimate: The objective's value, nats summed over the batch.
        gradients: The gradient of its surrogate for each leaf.
        updated: Whether the parameters have been updated with them.
    """

    estimate: Estimate
    gradients: tuple[Tensor | None, ...]
    updated: bool = False


class Trainable(Protocol):
    """The parameters of a pair and what steps them, as :class:`pyrovae.SVI` has them.

    Attributes:
        named: The parameters by name.
        clips: Whether :meth:`clip` has anything to do.
    """

    named: dict[str, Tensor]
    clips: bool

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of all of them, which is there if they are."""

    def clip(self) -> None:
        """Clip the parameters' gradients in place."""


class CompiledSteps:
    """The compiled steps of an objective and its pair, made where that pays.

    There is one for each shape of batch and each state of the modules. The first is made at once,
    or after 3,000 eager steps; others when their batches have come 500 times. What cannot be
    captured runs eagerly from then on, with one warning that says why.

    Args:
        objective: A Pyro ELBO, an objective or a function to differentiate.
        pair: The pair.
        trained: Its parameters and their optimizer.
        compile: True to compile at once, ``"auto"`` to wait for 3,000 eager steps first.
        steps: How many steps are going to be taken: with 3,000 there is nothing to wait for.

    Attributes:
        captures: Each compiled step by what it is good for; None for what runs eagerly.
        announce: Called with a text before and after something is compiled.
    """

    def __init__(
        self,
        objective: Any,
        pair: Pair,
        trained: Trainable,
        compile: bool | str = True,
        steps: int = 0,
    ) -> None:
        self.objective, self.pair, self.trained = objective, pair, trained
        self.announce: Callable[[str], object] | None = None
        self.captures: dict[Hashable, Capture | None] = {}
        self._watch_pair = watch_pair(objective, pair)
        self._watch_optimizer: Watch | None = None
        self._wait = 0 if should_compile(compile, steps >= PAYS_AFTER) else PAYS_AFTER
        self._seen: dict[Hashable, int] = {}
        self._records_updates = True

    def __call__(self, args: tuple, load: Callable | None, update: bool) -> Step | None:
        """Take the compiled step of a batch, if there is one or it is time to make it.

        Args:
            args: The batch and the programs' further arguments, or what ``load`` makes them from.
            load: Makes the programs' arguments from ``args``; it becomes a part of the step.
            update: Whether the step may update the parameters too.

        Returns:
            The outcome, with the gradients added to every parameter's ``.grad`` where the step
            has not updated the parameters; None if the step has to be taken eagerly.
        """
        if self._wait > 0:
            self._wait -= 1
            return None
        if not self.trained.named or not args or not all(map(_is_plain, args)):
            return None
        optimizer = self.trained.optimizer
        update = update and self._can_update(optimizer)
        if update and not optimizer.state:
            # Optimizers make their state in their first step, which therefore is an eager one: a
            # captured step writes to tensors that are there.
            return None
        shapes = tuple((arg.shape, arg.dtype, arg.device) for arg in args)
        key = shapes, self._watch_pair(), load, self._watched(optimizer) if update else None
        leaves = [p for p in self.trained.named.values() if p.requires_grad]
        try:
            if key not in self.captures:
                if not self._pays(key):
                    return None
                self.captures[key] = self._capture(
                    args, load, leaves, optimizer if update else None
                )
            captured = self.captures[key]
            step = None if captured is None else captured(args)
        except CaptureError as error:
            self._give_up(key, error)
            return None
        if step is not None and not step.updated:
            _accumulate(leaves, step.gradients)
        return step

    def _can_update(self, optimizer: Optimizer) -> bool:
        """Whether the update may be in the graph: no gradient waits to be added to."""
        untouched = not any(p.grad is not None for p in self.trained.named.values())
        return untouched and self._records_updates and Update.can_record(optimizer)

    def _watched(self, optimizer: Optimizer) -> int:
        if self._watch_optimizer is None:
            self._watch_optimizer = watch_optimizer(optimizer)
        return self._watch_optimizer()

    def _pays(self, key: Hashable) -> bool:
        if len(self._seen) > REMEMBERED:
            self._seen.clear()
        self._seen[key] = self._seen.get(key, 0) + 1
        return not self.captures or self._seen[key] >= AGAIN_AFTER

    def _capture(
        self, args: tuple, load: Callable | None, leaves: list[Tensor], steps: Optimizer | None
    ) -> Capture:
        clip = self.trained.clip if self.trained.clips else None
        update = None if steps is None else Update(steps, leaves, clip)
        started = time.perf_counter()
        if self.announce is not None:
            self.announce("compiling the step")
        capture = Capture(self.objective, self.pair, leaves, args, load, update)
        if self.announce is not None:
            self.announce(f"compiled in {time.perf_counter() - started:.0f} s")
        return capture

    def _give_up(self, key: Hashable, error: CaptureError) -> None:
        if isinstance(error.__cause__, UpdateError):
            # Loss and gradients may be captured still, without the update.
            self._records_updates = False
            return
        self.captures[key] = None
        warnings.warn(f"The pair runs eagerly, not compiled: {error}.", stacklevel=5)


class Capture:
    """The compiled step of an objective for batches of one shape.

    Args:
        objective: A Pyro ELBO or a function, as :func:`pyrovae.objectives.estimate` takes it.
        pair: The pair.
        leaves: The parameters to differentiate for.
        args: A batch of the shape to capture, with the programs' further arguments, or what
            ``load`` makes one from.
        load: Makes the programs' arguments from ``args``, inside the graph.
        update: Updates the parameters, inside the graph; without it, gradients are the outcome.

    Raises:
        CaptureError: As :class:`~pyrovae.compiling.graph.Graph`, and if a step comes out otherwise
            than the eager one.
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
            self.update.record(_if_finite(step))
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
        if self.update is not None:
            self._audit_update(self.update, args, found, after)

    def _audit_update(self, update: Update, args: tuple, found: Step, after: list[Tensor]) -> None:
        """Compare the update with the optimizer's own, from the same gradients."""
        before = [tensor.detach().clone() for tensor in update.changed]
        with undone(self.pair.modules, args[0].device, update.changed):
            update(found.gradients)
            for old, one, other in zip(before, after, update.changed, strict=True):
                slack = 1e-6 * old.abs().max()
                what = f"the update of a tensor of shape {list(old.shape)}"
                compare(what, one - old, other.detach() - old, slack)


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.requires_grad


def _accumulate(leaves: list[Tensor], gradients: tuple[Tensor | None, ...]) -> None:
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if gradient is not None:
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient


def _if_finite(step: Step) -> list[Tensor | None]:
    """The gradients of a loss that is finite, zeros of any other."""
    finite = step.estimate.loss.isfinite()
    return [None if g is None else torch.where(finite, g, 0.0) for g in step.gradients]
