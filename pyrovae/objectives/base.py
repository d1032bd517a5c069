"""What an objective is: it looks at a pair once, then estimates a loss and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pyrovae._tools import at_least
from pyrovae._tools.seeding import seeded
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.pair import Pair


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
    be known of a pair, :meth:`examine`. It is given to :class:`pyrovae.SVI` and :func:`pyrovae.fit`
    like one of Pyro's; ``objective(model, guide, x, *context)`` is a loss to differentiate, for
    :class:`pyro.infer.SVI` too.

    Args:
        particles: The number of samples of each datum, drawn as one vectorized plate of size
            ``draws``; there is none (None) for a single sample.

    Raises:
        ValueError: If ``particles`` is no positive integer.
    """

    def __init__(self, particles: int = 1) -> None:
        at_least({"particles": 1}, particles)
        self.particles = particles
        self.draws = particles if particles > 1 else None
        self._facts: WeakKeyDictionary[Pair, Any] = WeakKeyDictionary()
        self._called: tuple = ()

    def __getstate__(self) -> dict[str, Any]:
        # What is known of pairs stays behind: they are looked at again.
        return {n: value for n, value in vars(self).items() if n not in ("_facts", "_called")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _facts=WeakKeyDictionary(), _called=())

    def prepare(self, pair: Pair, args: tuple, steps: int | None = None) -> None:
        """Look at a pair once, so that no step has to: the only place that reads values back.

        ``args`` are a batch and further arguments; ``steps`` are to be taken, if that is known.
        A pair that breaks the contract, or is none for this objective, raises a ValueError.
        """
        with seeded(0, pair.device), pair.mode(training=False):
            inspect_pair(pair, *args)
            self._facts[pair] = self.examine(pair, args)

    def known(self, pair: Pair, args: tuple) -> Any:
        """What :meth:`examine` found, looked up or found out now; then ``pair.known`` is there."""
        if pair not in self._facts:
            self.prepare(pair, args)
        return self._facts[pair]

    def examine(self, pair: Pair, args: tuple) -> Any:
        """What is to be known of a pair before the first step, beside its layout."""

    def at_step(self, step: int) -> None:
        """Set what changes from step to step, in place; called before step 0, 1, 2, …"""

    def estimate(self, pair: Pair, *args: Any) -> Estimate:
        """The loss of a batch and its surrogate, with nothing read back from the device."""
        raise NotImplementedError

    def bounds(self, pair: Pair, *args: Any) -> Tensor:
        """The bound of each datum, ``[N]``, in nats, before scales and subsampling multiply it."""
        raise NotImplementedError

    def per_datum(self, pair: Pair, *args: Any) -> Tensor:
        """The same without a gradient: better when higher."""
        with torch.no_grad():
            return self.bounds(pair, *args)

    def __call__(self, model: Callable, guide: Callable, *args: Any) -> Tensor:
        """The loss of a batch with the estimator's gradient, as Pyro's SVI takes it."""
        if self._called[:2] != (model, guide):
            self._called = model, guide, Pair(model, guide, store=True)
        found = self.estimate(self._called[2], *args)
        surrogate = found.loss if found.surrogate is None else found.surrogate
        return found.loss + (surrogate - surrogate.detach())
