"""Schedules of the learning rate by name, which are stepped once an epoch."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from pyrovae._tools import InputError
from pyrovae.data.sources import unknown

STAGES = 8


def _iwae(done: float) -> float:
    """Stage i has 3^i of the (3^8 - 1) / 2 passes, at 10^(-i/7) of the rate."""
    # Rounded, so that a share of 3,280 epochs gives the very number of passes.
    passes = round(done * (3**STAGES - 1) / 2, 6)
    return 10.0 ** -(sum(passes >= (3**i - 1) / 2 for i in range(1, STAGES)) / (STAGES - 1))


# From the share of training that is done to that of the rate. A plateau is looked for in the
# validation loss, by torch's own schedule.
SHAPES: dict[str, Callable[[float], float]] = {
    "none": lambda done: 1.0,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "iwae": _iwae,
}
SCHEDULES = (*SHAPES, "plateau")


def make_schedule(
    schedule: str | Callable[[Optimizer], LRScheduler | ReduceLROnPlateau],
    optimizer: Optimizer,
    epochs: int,
    warm_up: int,
) -> LRScheduler | ReduceLROnPlateau | None:
    r"""Make a schedule from its name, or by a function from an optimizer.

    .. math:: \frac{\eta_e}{\eta} = \frac{e + 1}{W + 1} \text{ for } e < W, \qquad
              h\Bigl(\frac{e - W}{E - W}\Bigr) \text{ from there on}

    Args:
        schedule: ``"none"``, ``"cosine"``, ``"iwae"``, ``"plateau"`` (half the rate once the
            validation loss has not fallen for ten epochs), or a function.
        optimizer: Whose rates are scheduled.
        epochs: The number E of epochs, at whose end the schedule is done.
        warm_up: The number W of epochs in which the rate rises, for h by name.

    Raises:
        ValueError: If there is no such schedule, or it has no warm-up of that length.

    References:
        Loshchilov and Hutter, SGDR (arXiv 1608.03983), equation 5; Burda et al., Importance
        Weighted Autoencoders (arXiv 1509.00519), section 5, for its 3,280 passes.
    """
    if isinstance(schedule, str) and schedule not in SCHEDULES:
        raise InputError(unknown("schedule", schedule, SCHEDULES))
    if warm_up and (callable(schedule) or schedule == "plateau"):
        raise InputError(f"There is no lr_warm_up with the schedule {schedule!r}: leave it out.")
    if not 0 <= warm_up < epochs:
        raise InputError(f"Expected 0 <= lr_warm_up < {epochs} epochs, got {warm_up}.")
    if callable(schedule):
        return schedule(optimizer)
    if schedule == "plateau":
        # torch's threshold is a share of the loss, by which one below 0 (a density's) never stalls.
        return ReduceLROnPlateau(optimizer, factor=0.5, patience=10, threshold=0.0)
    if schedule == "none" and not warm_up:
        return None
    shape = SHAPES[schedule]

    def share(epoch: int) -> float:
        if epoch < warm_up:
            return (epoch + 1) / (warm_up + 1)
        return shape(min(1.0, (epoch - warm_up) / (epochs - warm_up)))

    return LambdaLR(optimizer, share)
