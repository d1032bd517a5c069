"""fit(): one visible loop over epochs and minibatches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyrovae._tools import InputError, plain_numbers, progress_bar
from pyrovae._tools.precision import check_precision, matmul_precision, warn_without_effect
from pyrovae._tools.seeding import draw_seed, seeded, subseed
from pyrovae.data import Dataset
from pyrovae.objectives import Objective, make_objective
from pyrovae.pairs.contract import check_objective, check_support, inspect_pair
from pyrovae.training.distributed import join
from pyrovae.training.monitor import Fit, Monitor, OnEpoch, attempt, callbacks, entered, recorder
from pyrovae.training.optimizer import make_optim
from pyrovae.training.schedules import make_schedule
from pyrovae.training.svi import SVI, with_gradients

BATCH_SIZE = 128


@plain_numbers
def fit(
    model: Callable,
    guide: Callable,
    data: Dataset | Tensor,
    *context: Any,
    objective: str | ELBO | Objective | Callable = "trace_elbo",
    epochs: int = 50,
    batch_size: int | None = None,
    particles: int | None = None,
    optimizer: type[Optimizer] | PyroOptim | Optimizer | Callable | None = None,
    lr: float = 1e-3,
    schedule: str | Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] = "none",
    lr_warm_up: int = 0,
    clip_norm: float | None = None,
    normalize_gradients: bool = False,
    average: float | None = None,
    patience: int | None = None,
    valid_samples: int = 1,
    compile: bool | str = "auto",
    precision: str = "float32",
    device: str | torch.device | None = None,
    seed: int | None = None,
    state: dict[str, Any] | None = None,
    out: str | Path | None = None,
    on_epoch: OnEpoch | Sequence[OnEpoch] | None = None,
    progress: bool = True,
) -> Fit:
    r"""Train a pair by stochastic variational inference, in place.

    .. math:: \max_{\theta, \phi} \frac1N \sum_n \mathcal{L}(\theta, \phi; x_n)

    Args:
        model: The model program.
        guide: The guide program.
        data: A data set of :func:`pyrovae.load_data`, or training data ``[N, ...]`` alone; after
            these may stand ``context``, further arguments of both programs.
        objective: A name in :data:`pyrovae.objectives.OBJECTIVES`, an objective that
            :func:`pyrovae.objectives.make_objective` made, a Pyro ELBO, or a function.
        epochs: How many passes over the training data, those of ``state`` included.
        batch_size: The size M of a minibatch, of which the last of an epoch may be smaller; None is
            128, or all data if they are fewer.
        particles: The samples per datum of a named objective; None is the objective's own number.
        optimizer: A torch optimizer's class, called with ``lr``; a Pyro or torch optimizer; or a
            function of the parameters. Adam by default.
        lr: The learning rate of an optimizer given by class, or of the default.
        schedule: Of the learning rate, stepped each epoch, as Pyro's are: a name in
            :data:`pyrovae.training.schedules.SCHEDULES`, or makes a torch schedule from the
            optimizer (``ReduceLROnPlateau`` on the validation loss).
        lr_warm_up: The epochs in which the rate of a named schedule rises to ``lr``.
        clip_norm: The largest norm of the gradient of the batch's summed loss.
        normalize_gradients: Divide the gradient of each parameter by its norm before the update.
        average: The decay d of an exponential moving average of weights and batch statistics, such
            as 0.999. The pair has the averages when an epoch is validated and at the end.
        patience: Stop when the validation bound has not risen for so many epochs, and restore the
            best weights. None trains to the end and keeps the last weights.
        valid_samples: With more than one, the validation bound is that of so many importance
            samples, ``valid_bound`` in the history; else it is the ELBO.
        compile: As for :class:`pyrovae.SVI`; ``"auto"`` compiles runs of 2,000 steps or more.
        precision: Of matrix products: ``"float32"``, ``"tf32"`` or ``"bf16"``; see
            :func:`pyrovae._tools.precision.matmul_precision`.
        device: Where to train; None: where the pair is. Of several processes each has a GPU.
        seed: Seeds every draw; None draws one from torch's global stream.
        state: A :meth:`Fit.state_dict` to go on from.
        out: A run directory to write meanwhile, as ``pyrovae train`` does; see :meth:`Fit.save`.
        on_epoch: Called with the :class:`Fit` after each epoch, by rank 0 alone; or several of
            such. One that is a context manager is entered before and left with what ends the
            training, as those of :mod:`pyrovae.tracking` are.
        progress: Show a bar if standard error is a terminal, on rank 0.

    Returns:
        The trained pair with its history.

    Raises:
        ValueError: If an argument, the pair or data outside the likelihood's support are refused.
        NonFiniteLoss: If the loss stops being a number.

    References:
        Kingma and Welling, Auto-Encoding Variational Bayes (arXiv 1312.6114), algorithm 1.

    Example:
        >>> result = pyrovae.fit(model, guide, data, epochs=2, seed=0)
        >>> print(f"ELBO {result.elbo:.2f} nats per datum")
        ELBO -2... nats per datum
    """
    asked = dict(locals()) | {"data": (data, *context) if context else data}
    del asked["context"]
    if out is not None:
        return recorder().record(fit, asked)
    loss = make_objective(objective, particles)
    data = asked["data"] = Dataset.of(asked["data"])  # a torch data set is read once
    check_precision(precision)
    if batch_size is None:
        batch_size = asked["batch_size"] = min(BATCH_SIZE, len(data.train))
    _check_sizes(data, batch_size, lr, asked, "epochs", "patience", "valid_samples")
    epoch_steps = -(-len(data.train) // batch_size)
    svi = SVI(
        model, guide, make_optim(optimizer, lr), loss,
        clip_norm=clip_norm, normalize_gradients=normalize_gradients, average=average,
        compile=compile, steps=epochs * epoch_steps,
    )  # fmt: skip
    world = join()
    svi.pair.to(world.place(svi.pair.device if device is None else device))
    warn_without_effect(precision, svi.pair.device)
    data = data.to(svi.pair.device)
    seed = world.share(draw_seed(seed)) if state is None else state["seed"]
    result = Fit(model, guide, svi, seed, valid_samples=valid_samples, world=world, asked=asked)
    _prepare(svi, data, batch_size, result.seed, epochs * epoch_steps)
    made = make_schedule(schedule, svi.optimizer, epochs, lr_warm_up)
    result.scheduler = made or svi.trained.scheduler
    if state is not None:
        result.load_state_dict(state)
    first = len(result.history) + 1
    svi.steps_taken = len(result.history) * epoch_steps
    facts = {"epoch": first, "epochs": epochs, "batch_size": batch_size, "data": len(data.train)}
    world.prepare(svi, data.head(batch_size), **facts)
    shown = progress and world.first
    bar = progress_bar(range(first, epochs + 1), enabled=shown, desc="training", unit="epoch")
    if svi.compiled is not None:
        svi.compiled.announce = bar.set_postfix_str
    calls = callbacks(on_epoch) if world.first else []
    with matmul_precision(precision), entered(calls):
        for epoch in bar:
            if result.exhausted(patience):
                break
            started = time.perf_counter()
            with seeded(subseed(result.seed, epoch), svi.pair.device):
                row = {"epoch": epoch} | _train(result, data, batch_size, epoch)
            svi.trained.show_average()
            world.settle(svi.pair)
            row |= result.validate(data.split("valid")) if world.first else {}
            row["lr"] = float(svi.optimizer.param_groups[0]["lr"])
            row["seconds"] = time.perf_counter() - started
            result.record(world.share(row), keep_best=patience is not None)
            bar.set_postfix_str(f"ELBO {result.elbo:.2f}")
            for call in calls:
                call(result)
            world.follow(svi.trained)
    svi.trained.show_average()
    if patience is not None and result.best_state is not None:
        svi.pair.load_state_dict(result.best_state)
    return result


@with_gradients()
def _train(result: Fit, data: Dataset, batch_size: int, epoch: int) -> dict[str, float | None]:
    """Take the steps of an epoch, in minibatches of rows in a new order."""
    svi, world = result.svi, result.world
    order = torch.randperm(len(data.train)).to(svi.pair.device)
    load, parts = data.parts(order.split(batch_size))
    monitor = Monitor(svi, load, epoch)
    with svi.pair.mode(training=True), world.stream(result.seed, epoch, order.device):
        for batches in parts:
            monitor.steps(batches, world.rows)
    return monitor.means(len(data.train))


@with_gradients()
def _prepare(svi: SVI, data: Dataset, batch_size: int, seed: int, steps: int) -> None:
    """Check the pair and all data, and make the optimizer."""
    from pyrovae.checking import quick

    pair, loss = svi.pair, svi.objective
    first = data.head(batch_size)
    with seeded(subseed(seed, 0), pair.device), pair.mode(training=False):
        quick(svi.model, svi.guide, *first, called=[c.name for c in data.context_columns])
        layout = inspect_pair(pair, *first)
        for rows in data.blocks():
            check_support(pair, *rows)
        check_objective(layout, loss, bool(data.split("valid")), first)
        if isinstance(loss, Objective):
            loss.prepare(pair, first, steps)
        elif isinstance(loss, ELBO) and loss.max_plate_nesting == math.inf:
            loss.max_plate_nesting = -layout.particle_dim
        attempt(svi, data, batch_size)


def _check_sizes(data: Dataset, batch: int, lr: float, asked: dict, *counts: str) -> None:
    for name in counts:
        if asked[name] is not None and not (isinstance(asked[name], int) and asked[name] >= 1):
            raise InputError(f"Expected an integer {name} >= 1, got {asked[name]}.")
    n = len(data.train)
    if not (isinstance(batch, int) and 1 <= batch <= n):
        raise InputError(f"Expected a batch size between 1 and the {n} training data, got {batch}.")
    if not lr > 0:
        raise InputError(f"Expected a learning rate > 0, got {lr}.")
    if asked["patience"] is not None and data.valid is None:
        raise InputError("Expected validation data for patience; got training data alone.")
