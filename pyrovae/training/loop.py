"""fit(): one visible loop over epochs and minibatches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.infer import ELBO, TraceMeanField_ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyrovae._tools import InputError, progress_bar
from pyrovae._tools.seeding import draw_seed, seeded, subseed
from pyrovae.checking import quick
from pyrovae.data import Dataset, Splits
from pyrovae.objectives import Objective, elbo, make_objective
from pyrovae.pairs.contract import check_objective, check_support, inspect_pair
from pyrovae.pairs.traces import Layout
from pyrovae.training.arguments import as_dataset, check_sizes, make_optim
from pyrovae.training.distributed import World, join
from pyrovae.training.monitor import Monitor, NonFiniteLoss
from pyrovae.training.precision import check_precision, matmul_precision
from pyrovae.training.svi import SVI

__all__ = ["Fit", "NonFiniteLoss", "fit"]


@dataclass
class Fit:
    """A pair being trained, or trained.

    Attributes:
        model: The model program.
        guide: The guide program.
        history: One row an epoch: ``epoch``; ``train_loss``, the objective; ``train_`` and
            ``valid_`` ``elbo``, ``reconstruction`` and ``kl`` at β = 1 (None where the objective
            is no ELBO or sites are scaled), all in nats per datum; ``lr``; ``seconds``.
        seed: The seed that every draw of the training derives from.
        best_epoch: The epoch of the highest validation ELBO so far, if there is one.
        world: The processes that train it.
    """

    model: Callable
    guide: Callable
    svi: SVI
    seed: int
    scheduler: LRScheduler | ReduceLROnPlateau | None = None
    history: list[dict] = field(default_factory=list)
    best_epoch: int | None = None
    best_state: dict[str, Tensor] | None = None
    world: World = field(default_factory=World)

    @property
    def elbo(self) -> float:
        """The last epoch's validation ELBO (without one, minus its loss), nats per datum."""
        last = self.history[-1]
        return -last["train_loss"] if last["valid_elbo"] is None else last["valid_elbo"]

    def state_dict(self) -> dict[str, Any]:
        """All that training goes on from: weights, optimizer, schedule, history, seed.

        Random states need no place in it: every epoch draws from a stream of its own, derived
        from the seed and the epoch's number.
        """
        return {
            "weights": self.svi.pair.state_dict(),
            "optimizer": self.svi.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "history": self.history,
            "seed": self.seed,
            "best_epoch": self.best_epoch,
            "best_state": self.best_state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`.

        Raises:
            ValueError: If it belongs to another pair.
        """
        self.svi.pair.load_state_dict(state["weights"])
        self.svi.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler and state["scheduler"]:
            self.scheduler.load_state_dict(state["scheduler"])
        self.history, self.seed = list(state["history"]), state["seed"]
        self.best_epoch, self.best_state = state["best_epoch"], state["best_state"]


def fit(
    model: Callable,
    guide: Callable,
    data: Dataset | Tensor,
    *,
    objective: str | ELBO | Objective | Callable = "trace_elbo",
    epochs: int = 50,
    batch_size: int = 128,
    particles: int | None = None,
    optimizer: type[Optimizer] | PyroOptim | Optimizer | Callable | None = None,
    lr: float = 1e-3,
    scheduler: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None = None,
    clip_norm: float | None = None,
    patience: int | None = None,
    compile: bool | str = "auto",
    precision: str = "float32",
    device: str | torch.device | None = None,
    seed: int | None = None,
    state: dict[str, Any] | None = None,
    on_epoch: Callable[[Fit], None] | None = None,
    progress: bool = True,
) -> Fit:
    r"""Train a pair by stochastic variational inference, in place.

    .. math:: \max_{\theta, \phi} \frac1N \sum_n \mathcal{L}(\theta, \phi; x_n)

    Args:
        model: The model program.
        guide: The guide program.
        data: A data set of :func:`pyrovae.load_data`, or training data ``[N, ...]`` alone.
        objective: A name in :data:`pyrovae.objectives.OBJECTIVES`, an objective that
            :func:`pyrovae.objectives.make_objective` made, a Pyro ELBO, or a function.
        epochs: How many passes over the training data, those of ``state`` included.
        batch_size: The size M of a minibatch; the last of an epoch may be smaller.
        particles: The samples per datum of a named objective; None is the objective's own number.
        optimizer: A torch optimizer's class, called with ``lr``; a Pyro or torch optimizer; or a
            function of the parameters. Adam by default.
        lr: The learning rate of an optimizer given by class, or of the default.
        scheduler: Makes a torch learning-rate schedule from the optimizer; stepped each epoch
            (``ReduceLROnPlateau`` on the validation loss). Pyro's schedulers too step each epoch.
        clip_norm: The largest norm of the gradient of the batch's summed loss.
        patience: Stop when the validation ELBO has not risen for so many epochs, and restore the
            best weights. None trains to the end and keeps the last weights.
        compile: As for :class:`pyrovae.SVI`; ``"auto"`` compiles runs of 3,000 steps or more.
        precision: Of matrix products: ``"float32"``, ``"tf32"`` or ``"bf16"``; see
            :func:`pyrovae.training.precision.matmul_precision`.
        device: Where to train; None stays where the pair is. Data move there once. On CUDA, each
            of several processes has the GPU of its rank on its machine.
        seed: Seeds every draw; None draws one from torch's global stream.
        state: A :meth:`Fit.state_dict` to go on from.
        on_epoch: Called with the :class:`Fit` after each epoch, by rank 0 alone.
        progress: Show a bar if standard error is a terminal, on rank 0.

    Returns:
        The trained pair with its history.

    Raises:
        ValueError: If an argument is out of range, the pair breaks the contract, or data lie
            outside the likelihood's support.
        NonFiniteLoss: If the loss stops being a number.

    References:
        Kingma and Welling, Auto-Encoding Variational Bayes (arXiv 1312.6114), algorithm 1.

    Example:
        >>> result = pyrovae.fit(model, guide, data, epochs=2, seed=0)
        >>> print(f"ELBO {result.elbo:.2f} nats per datum")
        ELBO -2... nats per datum
    """
    loss = make_objective(objective, particles)
    data = as_dataset(data)
    check_precision(precision)
    check_sizes(len(data.train), epochs, batch_size, patience, lr)
    if patience is not None and data.valid is None:
        raise InputError("Expected validation data for patience; got training data alone.")
    epoch_steps = -(-len(data.train) // batch_size)
    svi = SVI(
        model, guide, make_optim(optimizer, lr), loss,
        clip_norm=clip_norm, compile=compile, steps=epochs * epoch_steps,
    )  # fmt: skip
    world = join()
    svi.pair.to(world.place(svi.pair.device if device is None else device))
    data = data.to(svi.pair.device)
    seed = world.share(draw_seed(seed)) if state is None else state["seed"]
    result = Fit(model, guide, svi, seed, world=world)
    layout = _prepare(svi, data, batch_size, result.seed, epochs * epoch_steps)
    result.scheduler = scheduler(svi.optimizer) if scheduler else svi.scheduler
    if state is not None:
        result.load_state_dict(state)
    first = len(result.history) + 1
    svi.steps_taken = len(result.history) * epoch_steps
    facts = {"epoch": first, "epochs": epochs, "batch_size": batch_size, "data": len(data.train)}
    world.prepare(svi, tuple(tensor[:batch_size] for tensor in data.split("train")), **facts)
    shown = progress and world.first
    bar = progress_bar(range(first, epochs + 1), enabled=shown, desc="training", unit="epoch")
    svi.compiling = lambda: _compiling(bar)
    with matmul_precision(precision):
        for epoch in bar:
            if _exhausted(result, patience):
                break
            _run_epoch(result, layout, data, batch_size, epoch, keep_best=patience is not None)
            bar.set_postfix_str(f"ELBO {result.elbo:.2f}")
            if on_epoch is not None and world.first:
                on_epoch(result)
    if result.best_state is not None:
        svi.pair.load_state_dict(result.best_state)
    return result


@contextmanager
def _compiling(bar: Any) -> Iterator[None]:
    """Say on the bar that the step is being compiled, and how long that took."""
    started = time.perf_counter()
    bar.set_postfix_str("compiling the step")
    yield
    bar.set_postfix_str(f"compiled in {time.perf_counter() - started:.0f} s")


def _prepare(svi: SVI, data: Dataset, batch_size: int, seed: int, steps: int) -> Layout:
    pair = svi.pair
    first = [tensor[:batch_size] for tensor in data.split("train")]
    with seeded(subseed(seed, 0), pair.device), pair.mode(training=False):
        layout = inspect_pair(pair, *first)
        for rows in filter(None, map(data.split, Splits._fields)):
            check_support(pair, *rows)
        quick(svi.model, svi.guide, *first)
        check_objective(layout, svi.objective)
        _prepare_objective(svi, layout, tuple(first), steps)
        svi.build(*first)
    return layout


def _prepare_objective(svi: SVI, layout: Layout, args: tuple, steps: int) -> None:
    loss = svi.objective
    if isinstance(loss, Objective):
        loss.prepare(svi.pair, args, layout, steps)
    elif isinstance(loss, ELBO) and loss.max_plate_nesting == math.inf:
        loss.max_plate_nesting = -layout.particle_dim


def _run_epoch(
    result: Fit, layout: Layout, data: Dataset, batch_size: int, epoch: int, keep_best: bool
) -> None:
    started = time.perf_counter()
    svi = result.svi
    with seeded(subseed(result.seed, epoch), svi.pair.device):
        row = {"epoch": epoch} | _train_epoch(result, layout, data, batch_size, epoch)
    result.world.settle(svi.pair)
    if result.world.first:
        row |= _validate(result, data.split("valid"))
    row["lr"] = float(svi.optimizer.param_groups[0]["lr"])
    row["seconds"] = time.perf_counter() - started
    _finish_epoch(result, result.world.share(row), keep_best)


def _train_epoch(
    result: Fit, layout: Layout, data: Dataset, batch_size: int, epoch: int
) -> dict[str, float | None]:
    svi, world, num_data = result.svi, result.world, len(data.train)
    monitor = Monitor(svi, data.rows, epoch)
    order = torch.randperm(num_data).to(svi.pair.device)
    with svi.pair.mode(training=True), world.stream(result.seed, epoch, order.device):
        for index in order.split(batch_size):
            monitor.step(world.rows(index))
    mean = {n: total / num_data / layout.plate_scale for n, total in monitor.totals().items()}
    loss = mean.pop("loss")
    return {"train_loss": loss} | _split_elbo(svi.objective, layout, loss, mean)


def _split_elbo(
    objective: Any, layout: Layout, loss: float, terms: dict[str, float]
) -> dict[str, float | None]:
    """The ELBO at β = 1 and its two parts, as far as an objective knows them."""
    elbo = sum(terms.values()) if terms else -loss
    known = bool(terms) or type(objective).__module__.startswith("pyro.infer.trace")
    reconstruction = sum(value for name, value in terms.items() if name in layout.observed)
    split = bool(terms) and not layout.scaled
    return {
        "train_elbo": elbo if known and not layout.scaled else None,
        "train_reconstruction": reconstruction if split else None,
        "train_kl": reconstruction - elbo if split else None,
    }


def _validate(result: Fit, rows: tuple[Tensor, ...]) -> dict[str, float | None]:
    if not rows:
        return {"valid_elbo": None, "valid_reconstruction": None, "valid_kl": None}
    loss = result.svi.objective
    analytic = isinstance(loss, TraceMeanField_ELBO) or getattr(loss, "analytic", False)
    name = "trace_mean_field_elbo" if analytic else "trace_elbo"
    seed = subseed(result.seed, 0)
    parts = elbo(result.model, result.guide, *rows, objective=name, seed=seed)
    return {f"valid_{name}": getattr(parts, name).double().mean().item() for name in parts._fields}


def _finish_epoch(result: Fit, row: dict[str, float | None], keep_best: bool) -> None:
    value = row["valid_elbo"]
    best = None if result.best_epoch is None else result.history[result.best_epoch - 1]
    result.history.append(row)
    if value is not None and (best is None or value > best["valid_elbo"]):
        result.best_epoch = row["epoch"]
        if keep_best:
            result.best_state = result.svi.pair.state_dict()
    if isinstance(result.scheduler, ReduceLROnPlateau):
        result.scheduler.step(row["train_loss"] if value is None else -value)
    elif result.scheduler is not None:
        result.scheduler.step()


def _exhausted(result: Fit, patience: int | None) -> bool:
    if patience is None or result.best_epoch is None:
        return False
    return len(result.history) - result.best_epoch >= patience
