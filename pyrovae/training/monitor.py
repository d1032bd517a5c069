"""The watch over training: a loss that is no number stops it, with the site that caused it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import pyro
import torch
from torch import Tensor

from pyrovae.objectives import Estimate
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import samples
from pyrovae.training.svi import SVI

__all__ = ["Monitor", "NonFiniteLoss"]


class NonFiniteLoss(ArithmeticError):
    """The loss became NaN or infinite; the message names the epoch, the step and the site."""


class Monitor:
    """Takes the steps of an epoch and watches their losses.

    On a CPU the first loss that is no number stops training at once, on an accelerator at the
    epoch's end: until then nothing is read back from the device.

    Args:
        svi: Takes the steps.
        load: Makes the programs' arguments from the numbers of rows.
        epoch: What to call the epoch.
    """

    def __init__(self, svi: SVI, load: Callable, epoch: int) -> None:
        self.svi, self.load, self.epoch = svi, load, epoch
        self.names: list[str] = []
        self.values: list[Tensor] = []

    def step(self, index: Tensor) -> None:
        """Take a step on the training rows ``index`` ``[M]``."""
        try:
            self.svi.update(index, load=self.load, inspect=self._note)
        except ValueError as error:
            site = _non_finite_site(self.svi.pair, self.load(index))
            if site is None:
                raise
            raise self._stop(len(self.values) + 1, site) from error

    def _note(self, estimate: Estimate) -> None:
        self.names = [*estimate.terms, "loss"]
        self.values.append(torch.stack([*estimate.terms.values(), estimate.loss]))
        if estimate.loss.device.type == "cpu" and not math.isfinite(estimate.loss):
            self.totals()

    def totals(self) -> dict[str, float]:
        """The sum over the epoch's steps of the loss and of each term of it, in nats.

        Raises:
            NonFiniteLoss: At the first step whose loss, or a term of it, is not finite.
        """
        values = torch.stack(self.values).double()
        total = values.sum(0).tolist()
        if not all(map(math.isfinite, total)):
            step, column = (~values.isfinite()).nonzero()[0].tolist()
            raise self._stop(step + 1, self.names[column])
        return dict(zip(self.names, total, strict=True))

    def _stop(self, step: int, site: str) -> NonFiniteLoss:
        what = "the loss" if site == "loss" else f"the log-probability of site {site!r}"
        return NonFiniteLoss(
            f"Training stopped in epoch {self.epoch}, step {step}: {what} is not finite. Lower "
            f"the learning rate, clip the gradient (clip_norm), or look at that site's parameters."
        )


@torch.no_grad()
def _non_finite_site(pair: Pair, rows: Iterable[Tensor]) -> str | None:
    """The first site whose log-probability is not finite on a batch, if there is one."""
    with pyro.validation_enabled(False):
        for trace in reversed(pair.trace(*rows)):
            trace.compute_log_prob()
            for name, site in samples(trace).items():
                if not bool(site["log_prob"].isfinite().all()):
                    return name
    return None
