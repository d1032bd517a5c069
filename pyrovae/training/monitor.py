"""What training has come to: its result and history, and the check that losses are finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import infer
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from pyrovae._tools import InputError, warn
from pyrovae._tools.seeding import subseed, undone
from pyrovae._tools.shown import Shown, Told, counted, figures
from pyrovae.data import Dataset
from pyrovae.evidence.importance import log_likelihood
from pyrovae.objectives import Estimate
from pyrovae.objectives.elbo import elbo
from pyrovae.optim import place_counts
from pyrovae.pairs.contract import plate_scale, sentence
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import samples
from pyrovae.training.distributed import World
from pyrovae.training.optimizer import Schedules, SchedulesOnLoss, check_groups, in_order
from pyrovae.training.svi import SVI

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Pyro's ELBOs that tell no terms apart. The losses of its Trace_MMD and TraceTailAdaptive_ELBO are
# none.
UNDIVIDED = (
    *(infer.TraceEnum_ELBO, infer.JitTraceEnum_ELBO),
    *(infer.TraceGraph_ELBO, infer.JitTraceGraph_ELBO),
)


# Steps that are taken at once where they are compiled: what callbacks and other threads change is
# seen after so many at the latest. What is looked at before them takes as long as a small step.
AT_ONCE = 100
OnEpoch = Callable[["Fit"], Any]


@dataclass(repr=False)
class Fit(Shown):
    """A pair being trained, or trained.

    Attributes:
        model: The model program.
        guide: The guide program.
        history: One row an epoch: ``epoch``; ``train_loss``, the objective; ``train_`` and
            ``valid_`` ``elbo``, ``reconstruction`` and ``kl`` at β = 1 (None where the objective
            is no ELBO or sites are scaled), all in nats per datum; ``valid_bound`` if it has
            several samples; ``lr``; ``seconds``.
        seed: The seed that every draw of the training derives from.
        best_epoch: The epoch of the highest validation bound so far, if there is one.
        valid_samples: The samples of that bound; with one it is the ELBO.
        world: The processes that train it.
        asked: The arguments of :func:`pyrovae.fit`, as a run records them.
    """

    model: Callable
    guide: Callable
    svi: SVI
    seed: int
    scheduler: LRScheduler | ReduceLROnPlateau | Schedules | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int | None = None
    best_state: dict[str, Tensor] | None = None
    valid_samples: int = 1
    world: World = field(default_factory=World)
    asked: dict[str, Any] = field(default_factory=dict)

    @property
    def elbo(self) -> float:
        """The last epoch's validation ELBO (without one, minus its loss), nats per datum."""
        last = self.history[-1]
        return -last["train_loss"] if last["valid_elbo"] is None else last["valid_elbo"]

    def _told(self) -> Told:
        if not self.history:
            return Told("Fit: no epoch is done", [])
        last, bound = self.history[-1], "validation bound" if self.valid_samples > 1 else "ELBO"
        rows = [("loss (train)", f"{last['train_loss']:.3f} nats per datum")]
        for split in ("train", "valid"):
            if (value := last[f"{split}_elbo"]) is not None:
                parts = "reconstruction", "kl"
                known = [(n, last[f"{split}_{n}"]) for n in parts]
                split_up = ", ".join(f"{n} {v:.3f}" for n, v in known if v is not None)
                rows.append((f"ELBO ({split})", f"{value:.3f} nats per datum; {split_up}"))
        rows.append(("learning rate", f"{last['lr']:.3g}"))
        rows.append(("time", f"{sum(row['seconds'] for row in self.history):.1f} s"))
        best, done = self.best_epoch, len(self.history)
        verdict = f"The {bound} of validation data was highest in epoch {best} of {done}."
        return Told(f"Fit: {counted(done, 'epoch')}", rows, "" if best is None else verdict)

    def plot(self) -> Figure:
        """Draw the ELBO and its two terms after each epoch."""
        return figures().learning_curves(self.history)

    def save(self, path: str | Path) -> Path:
        """Write a run directory, which :func:`pyrovae.load` opens and every command takes.

        It holds what ``pyrovae train`` writes: the configuration, the history, the weights, a
        checkpoint to go on from, pictures, and the programs' sources as far as they can be had. Of
        others it says why not, and ``pyrovae.load(path, model=..., guide=...)`` takes them.

        Args:
            path: A new directory.

        Raises:
            InputError: If the directory is in use.
        """
        return recorder().save(self, path)

    def state_dict(self) -> dict[str, Any]:
        """All that training goes on from: weights, optimizer, schedule, history, seed."""
        # No random states: every epoch draws from a stream derived from the seed and its number.
        weights, average = self._weights()
        return {
            "weights": weights,
            "average": average,
            "optimizer": self.svi.optimizer.state_dict(),
            "stepped": self.svi.trained.stepped,
            "frozen": [n for n, p in self.svi.trained.named.items() if not p.requires_grad],
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "history": self.history,
            "seed": self.seed,
            "best_epoch": self.best_epoch,
            "best_state": self.best_state,
            "asked": {name: self.asked.get(name) for name in ("lr", "epochs")},
        }

    def _weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """The weights that a step goes on from, and their average if there is one."""
        average, pair = self.svi.trained.average, self.svi.pair
        if average is None:
            return pair.state_dict(), None
        shown, found = average.shown, []
        for each in (False, True, shown):
            average.show(each)
            found.append(pair.state_dict())
        return found[0], found[1]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`, or raise a ValueError if it is of another pair."""
        average = self.svi.trained.average
        if average is not None:
            average.show(True)
            self.svi.pair.load_state_dict(state.get("average") or state["weights"])
            average.show(False)
        self.svi.pair.load_state_dict(state["weights"])
        ours, theirs = self.svi.trained.stepped, state.get("stepped")
        # torch takes tensors as they are, and steps would change the state that was given.
        entries = deepcopy(in_order(state["optimizer"], ours, theirs))
        check_groups(self.svi.optimizer, entries)
        self.svi.optimizer.load_state_dict(entries)
        place_counts(self.svi.optimizer)
        for name in state.get("frozen", ()):  # none where it is an earlier version's
            self.svi.trained.named[name].requires_grad_(False)
        if self.scheduler and state["scheduler"]:
            self.scheduler.load_state_dict(state["scheduler"])
        self.history, self.seed = list(state["history"]), state["seed"]
        self.best_epoch, self.best_state = state["best_epoch"], state["best_state"]
        self._take_over(state.get("asked", {}))

    def _take_over(self, begun: dict[str, Any]) -> None:
        """Say where a state goes on in another way than this training was asked to."""
        differs = {n: v for n, v in begun.items() if v != self.asked.get(n, v)}
        if "lr" in differs:
            warn(f"lr={self.asked['lr']} is not used: the state goes on from lr={begun['lr']}.")
            self.asked["lr"] = begun["lr"]
        if "epochs" in differs and isinstance(by := self.scheduler, LambdaLR):
            last, now = by.get_last_lr()[0], by.base_lrs[0] * by.lr_lambdas[0](by.last_epoch)
            if not math.isclose(last, now):
                warn(
                    f"The schedule of {begun['epochs']} epochs goes on as one of "
                    f"{self.asked['epochs']}: the learning rate jumps from {last:.3g} to {now:.3g}."
                )

    def validate(self, rows: tuple[Tensor, ...]) -> dict[str, float | None]:
        """The mean bounds of validation data at β = 1, as ``history`` has them."""
        if not rows:
            return {"valid_elbo": None, "valid_reconstruction": None, "valid_kl": None}
        loss = self.svi.objective
        analytic = isinstance(loss, infer.TraceMeanField_ELBO) or getattr(loss, "analytic", False)
        name = "trace_mean_field_elbo" if analytic else "trace_elbo"
        # One stream for all epochs: what changes from one to the next is the weights.
        seed = subseed(self.seed, 0)
        parts = elbo(self.model, self.guide, *rows, objective=name, seed=seed)
        found = {f"valid_{n}": getattr(parts, n).double().mean().item() for n in parts._fields}
        if self.valid_samples > 1:
            found["valid_bound"] = log_likelihood(
                self.model, self.guide, *rows,
                num_samples=self.valid_samples, seed=seed, compile=False,
            ).mean  # fmt: skip
        return found

    def record(self, row: dict[str, Any], keep_best: bool) -> None:
        """End an epoch: add its row to the history, keep the best weights, step the schedule."""
        value = _bound(row)
        best = None if self.best_epoch is None else _bound(self.history[self.best_epoch - 1])
        self.history.append(row)
        if value is not None and (best is None or value > best):
            self.best_epoch = row["epoch"]
            self.best_state = self.svi.pair.state_dict() if keep_best else None
        loss = row["train_loss"] if value is None else -value
        on_loss = ReduceLROnPlateau, SchedulesOnLoss
        if isinstance(self.scheduler, on_loss):
            self.scheduler.step(loss)
        elif self.scheduler is not None:
            self.scheduler.step()

    def exhausted(self, patience: int | None) -> bool:
        """Whether the validation bound has not risen for so many epochs."""
        if patience is None or self.best_epoch is None:
            return False
        return len(self.history) - self.best_epoch >= patience


def callbacks(on_epoch: OnEpoch | Iterable[OnEpoch] | None) -> list[OnEpoch]:
    """What is to be called after each epoch, one by one."""
    if on_epoch is None:
        return []
    return [on_epoch] if callable(on_epoch) else [*on_epoch]


@contextmanager
def entered(calls: list[OnEpoch]) -> Iterator[list[OnEpoch]]:
    """Enter callbacks that are context managers; they are left with what ends the training."""
    with ExitStack() as stack:
        for call in calls:
            if isinstance(call, AbstractContextManager):
                stack.enter_context(call)
        yield calls


def attempt(svi: SVI, data: Dataset, batch_size: int) -> None:
    """Try the first batch, and the last where it is one row that is to be normalized."""
    svi.build(*data.head(batch_size))
    alone = batch_size == 1 or len(data.train) % batch_size == 1
    if not alone or not any(isinstance(module, _BatchNorm) for module in svi.pair.modules):
        return
    try:
        with svi.pair.mode(training=True):
            svi.build(*data.head(1))
    except ValueError as error:
        raise InputError(
            f"Of {len(data.train)} training data in batches of {batch_size} the last is a batch of "
            f"its own, and batch normalization needs two rows ({sentence(error)}): choose another "
            f"batch_size."
        ) from error


def recorder() -> Any:
    """What writes runs; it stands on training, so that it is imported by its name."""
    return import_module("pyrovae.recording")


def _bound(row: dict[str, Any]) -> float | None:
    """What an epoch is judged by."""
    return row.get("valid_bound", row["valid_elbo"])


class NonFiniteLoss(ArithmeticError):
    """The loss became NaN or infinite; the message names the epoch, the step and the site."""


class Monitor:
    """Takes the steps of an epoch and watches their losses.

    On a CPU the first loss that is no number stops training at once, on an accelerator at the
    epoch's end: until then nothing is read back from the device. ``load`` makes the programs'
    arguments from the numbers of rows.

    Losses are kept without the scale of a plate that takes the batch for a part of the data, which
    another number of rows changes.
    """

    def __init__(self, svi: SVI, load: Callable, epoch: int) -> None:
        self.svi, self.load, self.epoch = svi, load, epoch
        self.names: list[str] = []
        self.values: list[Tensor] = []
        self._kept = 0
        self._scales: dict[int, float] = {}

    def steps(self, batches: Sequence[Tensor], share: Callable[[Tensor], Tensor]) -> None:
        """Take a step on each of some batches of rows, of which a ``share`` is this process's."""
        taken = 0
        while taken < len(batches):
            batch = batches[taken]
            scale = self._scale_of(batch)
            found = self.svi.update_many(batches[taken : taken + AT_ONCE], self.load)
            if found is None:
                self._step(share(batch), scale)
            else:
                self._keep(found.names, found.numbers, scale)
            taken += 1 if found is None else len(found.numbers)

    def _step(self, index: Tensor, scale: float) -> None:
        def inspect(found: Estimate) -> None:
            numbers = torch.stack([found.loss, *found.terms.values()])
            self._keep(["loss", *found.terms], numbers[None], scale)

        try:
            self.svi.update(index, load=self.load, inspect=inspect)
        except ValueError as error:
            site = _non_finite_site(self.svi.pair, self.load(index))
            if site is None:
                raise
            raise self._stop(sum(map(len, self.values)) + 1, site) from error

    def _scale_of(self, batch: Tensor) -> float:
        pair, size = self.svi.pair, len(batch)
        if pair.known.plate_scale == 1:
            return 1.0
        if size not in self._scales:
            with undone(pair.modules, batch.device):
                self._scales[size] = plate_scale(pair, *self.load(batch))
        return self._scales[size]

    def _keep(self, names: list[str], numbers: Tensor, scale: float) -> None:
        """Keep the loss and its terms of some steps ``[S, 1 + terms]``, in this order."""
        # A term that is not finite says more than the loss, which then comes last.
        values = self._placed([*names[1:], names[0]], numbers.roll(-1, 1))
        self.values.append(values if scale == 1 else values / scale)
        self._kept += 1
        if self._kept % AT_ONCE == 0:
            # Small tensors that stay, one between the large ones of each step, keep the allocator
            # from putting these where the last step's were: some 34 kB a step.
            self.values[-AT_ONCE:] = [torch.cat(self.values[-AT_ONCE:])]
        if values.device.type == "cpu" and not math.isfinite(values[-1, -1]):
            self.totals()

    def _placed(self, names: list[str], values: Tensor) -> Tensor:
        """Steps' numbers in the epoch's columns: a batch may lack sites that another has."""
        new = [name for name in names if name not in self.names]
        if not self.names or names == self.names:
            self.names = names
            return values
        self.names = [*new, *self.names]
        self.values = [pad(each, (len(new), 0)) for each in self.values]
        columns = torch.tensor([self.names.index(name) for name in names], device=values.device)
        found = values.new_zeros(*values.shape[:-1], len(self.names))
        return found.index_copy(-1, columns, values)

    def totals(self) -> dict[str, float]:
        """The sum over the epoch's steps of the loss and of each term of it, in nats."""
        values = torch.cat(self.values).double()
        total = values.sum(0).tolist()
        if not all(map(math.isfinite, total)):
            step, column = (~values.isfinite()).nonzero()[0].tolist()
            raise self._stop(step + 1, self.names[column])
        return dict(zip(self.names, total, strict=True))

    def means(self, num_data: int) -> dict[str, float | None]:
        """The loss per datum, and as far as the objective knows it, the ELBO at β = 1, in nats."""
        layout = self.svi.pair.known
        mean = {name: total / num_data for name, total in self.totals().items()}
        self._check_weights()
        loss = mean.pop("loss")
        total = sum(mean.values()) if mean else -loss
        known = bool(mean) or type(self.svi.objective) in UNDIVIDED
        reconstruction = sum(value for name, value in mean.items() if name in layout.observed)
        split = bool(mean) and not layout.scaled
        return {
            "train_loss": loss,
            "train_elbo": total if known and not layout.scaled else None,
            "train_reconstruction": reconstruction if split else None,
            "train_kl": reconstruction - total if split else None,
        }

    def _check_weights(self) -> None:
        """A finite loss may have a gradient that is no number, and the last step's loss is none."""
        leaves = self.svi.trained.named
        sound = torch.stack([leaf.detach().isfinite().all() for leaf in leaves.values()]).tolist()
        if all(sound):
            return
        name = [*leaves][sound.index(False)]
        raise NonFiniteLoss(
            f"Training stopped in epoch {self.epoch}: the parameter {name!r} is not finite, though "
            f"every loss is, so that a gradient was not. Lower the learning rate, or bound what "
            f"makes it, as softplus(s) + 1e-3 does for a scale."
        )

    def _stop(self, step: int, site: str) -> NonFiniteLoss:
        what = "the loss" if site == "loss" else f"the log-probability of site {site!r}"
        return NonFiniteLoss(
            f"Training stopped in epoch {self.epoch}, step {step}: {what} is not finite. Lower "
            f"the learning rate, clip the gradient (clip_norm), or look at that site's parameters; "
            f"pyrovae.check looks for the cause."
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
