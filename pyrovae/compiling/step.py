"""A training step as one graph, captured from a pair's handlers and compiled.

From a batch, or from the rows' numbers, to loss and gradients, and where the optimizer allows it to
the updated weights. A captured step is held against the eager one for the same noise at its calls
1, 2, 4, 8, 16 and 32, and at every 500th.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae.compiling.graph import CaptureError, Graph, compare, undone
from pyrovae.compiling.update import Descent
from pyrovae.objectives import Estimate, estimate
from pyrovae.pairs.pair import Pair

__all__ = ["Capture", "CaptureError", "Graph", "Step", "compare", "undone"]

FIRST_AUDITS, AUDIT = (1, 2, 4, 8, 16, 32), 500


class Step(NamedTuple):
    """An estimate, and the gradient of its surrogate for each leaf."""

    estimate: Estimate
    gradients: tuple[Tensor | None, ...]


class Capture:
    """The compiled step of an objective for batches of one shape.

    Args:
        objective: A Pyro ELBO or a function, as :func:`pyrovae.objectives.estimate` takes it.
        pair: The pair.
        leaves: The parameters to differentiate for.
        args: A batch of the shape to capture, with the programs' further arguments, or what
            ``load`` makes one from.
        load: Makes the programs' arguments from ``args``, inside the graph.
        descent: Updates the parameters, inside the graph; without it, gradients are the outcome.

    Raises:
        CaptureError: As :class:`Graph`, and if a step comes out otherwise than the eager one.
    """

    def __init__(
        self,
        objective: Any,
        pair: Pair,
        leaves: list[Tensor],
        args: tuple,
        load: Callable | None = None,
        descent: Descent | None = None,
    ) -> None:
        self.objective, self.pair, self.leaves = objective, pair, leaves
        self.load, self.descent = load, descent
        self.names: list[str] = []
        self.present: list[bool] = []
        self.calls = 0
        changed = () if descent is None else descent.changed
        self.graph = Graph(self._flat, args, pair, changed, copied=1 if descent else None)

    def __call__(self, args: tuple) -> Step:
        """Run the captured step; now and then, first beside the eager one."""
        self.calls += 1
        if self.calls in FIRST_AUDITS or self.calls % AUDIT == 0:
            self._audit(args)
        return self._run(args)

    def _audit(self, args: tuple) -> None:
        changed = () if self.descent is None else self.descent.changed
        with undone(self.pair, args):
            expected = self.eager(args)
        with undone(self.pair, args, changed):
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
        if self.descent is not None:
            self._audit_update(args, found, after)

    def _audit_update(self, args: tuple, found: Step, after: list[Tensor]) -> None:
        """Hold the update against the optimizer's own, from the same gradients."""
        changed = self.descent.changed
        before = [tensor.detach().clone() for tensor in changed]
        with undone(self.pair, args, changed):
            self.descent(found.gradients)
            for old, one, other in zip(before, after, changed, strict=True):
                slack = 1e-6 * old.abs().max()
                what = f"the update of a tensor of shape {list(old.shape)}"
                compare(what, one - old, other.detach() - old, slack)

    def eager(self, args: tuple) -> Step:
        """The same gradients through Pyro's handlers."""
        found = estimate(self.objective, self.pair, *(self.load(*args) if self.load else args))
        if found.surrogate is None:
            raise CaptureError("the objective propagates its gradient itself")
        gradients = torch.autograd.grad(found.surrogate, self.leaves, allow_unused=True)
        return Step(found._replace(surrogate=None), gradients)

    def _flat(self, *args: Tensor) -> list[Tensor]:
        step = self.eager(args)
        self.names = list(step.estimate.terms)
        self.present = [g is not None for g in step.gradients]
        if self.descent is not None:
            self.descent.record(_if_finite(step))
        found = [g for g in step.gradients if g is not None]
        numbers = torch.stack([step.estimate.loss, *step.estimate.terms.values()])
        return [numbers, *found]

    def _run(self, args: tuple) -> Step:
        if self.descent is not None:
            self.descent.refresh()
        numbers, *found = self.graph(*args)
        loss, *terms = numbers.unbind()
        rest = iter(found)
        gradients = tuple(next(rest) if present else None for present in self.present)
        return Step(Estimate(loss, None, dict(zip(self.names, terms, strict=True))), gradients)


def _if_finite(step: Step) -> list[Tensor | None]:
    """The gradients of a loss that is finite, zeros of any other."""
    finite = step.estimate.loss.isfinite()
    return [None if g is None else torch.where(finite, g, 0.0) for g in step.gradients]
