"""The watch over training: a loss that is no number stops it, with the site that caused it."""

from __future__ import annotations

import pyro
import torch
from torch import Tensor

from pyrovae.objectives import Estimate
from pyrovae.params import Parameters
from pyrovae.svi import SVI
from pyrovae.traces import samples, trace_pair

__all__ = ["Monitor", "NonFiniteLoss"]


class NonFiniteLoss(ArithmeticError):
    """The loss became NaN or infinite; the message names the epoch, the step and the site."""


class Monitor:
    """Watches the loss of every step: at once on a CPU, at the epoch's end on an accelerator."""

    def __init__(self, svi: SVI, epoch: int) -> None:
        self.svi, self.epoch = svi, epoch
        self.names: list[str] = []
        self.values: list[Tensor] = []

    def gradients(self, x: Tensor) -> Estimate:
        """A batch's estimate, its gradient left on the parameters."""
        try:
            estimate = self.svi.gradients(x)
        except ValueError as error:
            site = _non_finite_site(self.svi.parameters, x)
            if site is None:
                raise
            raise self._stop(len(self.values) + 1, site) from error
        self.names = [*estimate.terms, "loss"]
        self.values.append(torch.stack([*estimate.terms.values(), estimate.loss]))
        if x.device.type == "cpu" and not bool(estimate.loss.isfinite()):
            self.check()
        return estimate

    def check(self) -> None:
        """Stop at the first step whose loss, or a term of it, is not finite."""
        finite = torch.stack(self.values).isfinite()
        if not bool(finite.all()):
            step, column = (~finite).nonzero()[0].tolist()
            raise self._stop(step + 1, self.names[column])

    def _stop(self, step: int, site: str) -> NonFiniteLoss:
        what = "the loss" if site == "loss" else f"the log-probability of site {site!r}"
        return NonFiniteLoss(
            f"Training stopped in epoch {self.epoch}, step {step}: {what} is not finite. Lower "
            f"the learning rate, clip the gradient (clip_norm), or look at that site's parameters."
        )


@torch.no_grad()
def _non_finite_site(parameters: Parameters, x: Tensor) -> str | None:
    """The first site whose log-probability is not finite on a batch, if there is one."""
    with pyro.validation_enabled(False):
        for trace in reversed(trace_pair(parameters, x)):
            trace.compute_log_prob()
            for name, site in samples(trace).items():
                if not bool(site["log_prob"].isfinite().all()):
                    return name
    return None
