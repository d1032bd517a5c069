"""What an objective is: it looks at a pair once, then estimates a loss and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pyrovae._tools import InputError
from pyrovae._tools.seeding import seeded
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import Layout

__all__ = ["Estimate", "Objective"]


class Estimate(NamedTuple):
    """One evaluation of an objective over a batch, in nats summed over the batch.

    ``loss`` is the value to report and ``surrogate`` the scalar whose gradient is the estimator's
    (None if it has already been propagated). ``terms`` splits the ELBO at β = 1 by site, whatever
    the loss makes of it: ln p for an observed site, ln p − ln q or −KL for a latent; it is empty
    where an objective has no such split. An objective of several losses has them in ``parts``.
    """

    loss: Tensor
    surrogate: Tensor | None
    terms: dict[str, Tensor]
    parts: tuple[Tensor, ...] = ()


class Objective:
    """A bound on log p(x) of each datum, with an estimator of its gradient.

    To write one, define :meth:`bounds` and :meth:`estimate`, and, if more than the layout has to
    be known of a pair, :meth:`examine`. An objective is given to :class:`pyrovae.SVI` and to
    :func:`pyrovae.fit` like one of Pyro's; called as ``objective(model, guide, x, *context)``, it
    is a differentiable loss for :class:`pyro.infer.SVI` too.

    Args:
        particles: The number of samples of each datum, drawn as one vectorized plate.

    Raises:
        ValueError: If ``particles`` is no positive integer.
    """

    def __init__(self, particles: int = 1) -> None:
        if not isinstance(particles, int) or particles < 1:
            raise InputError(f"Expected an integer particles >= 1, got {particles!r}.")
        self.particles = particles
        self._pairs: WeakKeyDictionary[Pair, tuple[Layout, Any]] = WeakKeyDictionary()
        self._called: tuple | None = None

    def prepare(
        self,
        pair: Pair,
        args: tuple,
        layout: Layout | None = None,
        steps: int | None = None,
    ) -> None:
        """Look at a pair once, so that no step has to: the only place that reads values back.

        Args:
            pair: The pair.
            args: A batch with the programs' further arguments.
            layout: The pair's layout, if it has been inspected.
            steps: How many steps are going to be taken, if that is known.

        Raises:
            ValueError: If the pair breaks the contract, or is none for this objective.
        """
        with seeded(0, pair.device), pair.mode(training=False):
            if layout is None:
                layout = inspect_pair(pair, *args)
            pair.layout = layout
            self._pairs[pair] = layout, self.examine(pair, layout, args)

    def known(self, pair: Pair, args: tuple) -> tuple[Layout, Any]:
        """The pair's layout and what :meth:`examine` found, looked up or found out now."""
        if pair not in self._pairs:
            self.prepare(pair, args)
        return self._pairs[pair]

    def examine(self, pair: Pair, layout: Layout, args: tuple) -> Any:
        """What else is to be known of a pair before the first step."""

    def at_step(self, step: int) -> None:
        """Set what changes from step to step, in place; called before step 0, 1, 2, …"""

    def estimate(self, pair: Pair, *args: Any) -> Estimate:
        """The loss of a batch and its surrogate, with nothing read back from the device."""
        raise NotImplementedError

    def bounds(self, pair: Pair, *args: Any) -> Tensor:
        """The bound of each datum before any scale, ``[N]``, in nats."""
        raise NotImplementedError

    def per_datum(self, pair: Pair, *args: Any) -> Tensor:
        """The bound of each datum, ``[N]``, in nats: better when higher, without a gradient.

        It is the bound before :func:`pyro.poutine.scale` and the batch's subsampling, which
        multiply it in the loss.
        """
        with torch.no_grad():
            return self.bounds(pair, *args)

    def __call__(self, model: Callable, guide: Callable, *args: Any) -> Tensor:
        """The loss of a batch with the estimator's gradient, as Pyro's SVI takes it."""
        if self._called is None or self._called[:2] != (model, guide):
            self._called = model, guide, Pair(model, guide, store=True)
        found = self.estimate(self._called[2], *args)
        surrogate = found.loss if found.surrogate is None else found.surrogate
        return found.loss + (surrogate - surrogate.detach())
