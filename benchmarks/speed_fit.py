"""Epochs of ``fit`` as a user calls it, beside whole epochs of whatever else computes the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from statistics import median, quantiles

import torch
from speed_contenders import ALONE, BEST, OURS, enter
from speed_problem import IMAGES, LR, Problem
from speed_race import check
from torch import Tensor

import pyrovae
from pyrovae.data import Dataset

__all__ = ["EAGER", "FIT", "fits", "sizes"]

FIT, EAGER = "fit", "fit, eager"
# Of the compiled ones by hand, the one that is faster at every size of the table of steps.
RIVALS = [f"{BEST}: step", "NumPyro, jit", "Pyro SVI", OURS, ALONE]
# Those that take several times as long show so in a part of an epoch.
PARTS = {"Pyro SVI": 5}
# Images of an epoch: 200 steps at the smallest batch, 10 at the largest.
FEW, MANY = 4_000, IMAGES
# Epochs in which everybody compiles; the losses of the last of them are compared.
UNTIMED = 2


def sizes(device: str) -> list[Problem]:
    """What is trained: each size with pixels drawn anew at each step, and as they are."""
    found = (("784-400-20", 128), *(("784-200-200-50", m) for m in (20, 100, 1000)))
    return [
        Problem(networks, batch, device=device, binarize=drawn)
        for networks, batch in found
        for drawn in (False, True)
    ]


def fits(problem: Problem, images: Tensor, rounds: int) -> dict:
    """Time epochs in turns: of ``fit``, compiled and eager, of its steps one by one, of rivals.

    Returns:
        By contender: the medians of wall-clock and CPU milliseconds a step, the deciles of the
        second, each turn of both, and the loss of the second epoch, in nats per datum; and the
        ratios of ``fit`` to each other, medians over rounds and quartiles of one round's times.

    Raises:
        SystemExit: If they have not reached the same loss.
    """
    whole = (FEW if problem.batch < 500 else MANY) // problem.batch * problem.batch
    images = images[:whole] if problem.binarize else (images[:whole] > 127).float()
    races, absent = enter(RIVALS, problem, images)
    beside = Beside(lambda after: _fit(problem, images, UNTIMED + rounds, after, compile=False))
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in (FIT, EAGER, *races)}
    losses: dict[str, float] = {}
    clocks = [_clocks()]

    def after(fit: pyrovae.Fit) -> None:
        found = {FIT: _since(clocks[0], whole // problem.batch)}
        losses[FIT] = fit.history[-1]["train_loss"]
        started = _clocks()
        losses[EAGER] = beside.epoch()
        found[EAGER] = _since(started, whole // problem.batch)
        for name, run in races.items():
            index = _index(problem, whole, len(fit.history), name)
            started = _clocks()
            each = run(index)
            found[name] = _since(started, len(index))
            losses[name] = sum(map(float, each)) / index.numel()
        if len(fit.history) == UNTIMED:
            check(losses)
            settled.update(losses)
        elif len(fit.history) > UNTIMED:
            for name, turn in found.items():
                turns[name].append(turn)
        clocks[0] = _clocks()

    settled: dict[str, float] = {}
    _fit(problem, images, UNTIMED + rounds, after, compile=True)
    contenders = {name: _row(each) | {"loss": settled[name]} for name, each in turns.items()}
    others = [name for name in turns if name != FIT]
    ratios = {f"{FIT} / {name}": _ratio(turns[FIT], turns[name], 0) for name in others}
    ratios_cpu = {f"{FIT} / {name}": _ratio(turns[FIT], turns[name], 1) for name in others}
    size = {"networks": problem.networks, "batch": problem.batch, "binarize": problem.binarize}
    ratios = {"ratios": ratios, "ratios of CPU time": ratios_cpu}
    return size | {"contenders": contenders} | ratios | {"absent": absent}


class Beside(threading.Thread):
    """A training that goes on by one epoch each time that it is asked to, in a thread."""

    def __init__(self, train: Callable[[Callable], None]) -> None:
        super().__init__(daemon=True)
        self._train = train
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._losses: list[float] = []

    def run(self) -> None:
        """Train, an epoch at a time."""
        self._go.acquire()
        self._train(self._after)

    def epoch(self) -> float:
        """Take an epoch, and return its loss."""
        if not self.is_alive():
            self.start()
        self._go.release()
        self._done.acquire()
        return self._losses[-1]

    def _after(self, fit: pyrovae.Fit) -> None:
        self._losses.append(fit.history[-1]["train_loss"])
        self._done.release()
        if len(self._losses) < fit.asked["epochs"]:
            self._go.acquire()


def _fit(
    problem: Problem, images: Tensor, epochs: int, after: Callable, compile: bool
) -> pyrovae.Fit:
    model, guide = problem.pair()
    drawn = {"binarize": "dynamic", "intensities": images, "scale": 255.0}
    train = (images > 127).float() if problem.binarize else images
    given = drawn if problem.binarize else {}
    data = Dataset("images", images.shape[1:], train, None, None, **given)
    return pyrovae.fit(
        model, guide, data, objective="trace_mean_field_elbo", epochs=epochs, seed=0,
        batch_size=problem.batch, lr=LR, compile=compile, on_epoch=after, progress=False,
    )  # fmt: skip


def _index(problem: Problem, whole: int, epoch: int, name: str) -> Tensor:
    """The rows of an epoch, or of a part of it once those that take long are timed."""
    generator = torch.Generator().manual_seed(epoch)
    rows = torch.randperm(whole, generator=generator).view(-1, problem.batch)
    part = PARTS.get(name, 1) if epoch > UNTIMED else 1
    return rows[: max(1, len(rows) // part)].to(problem.device)


def _row(turns: list[tuple[float, float]]) -> dict:
    walls, cpus = zip(*turns, strict=True)
    low, *_, high = quantiles(cpus, n=10) if len(cpus) > 1 else cpus * 2
    return {
        "ms": median(walls),
        "cpu, ms": median(cpus),
        "deciles of cpu, ms": [low, high],
        "turns": [[*turn] for turn in turns],
    }


def _ratio(ours: list, theirs: list, clock: int) -> list[float]:
    """The median of one round's times over rounds, and its quartiles."""
    each = [a[clock] / b[clock] for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = quantiles(each, n=4) if len(each) > 1 else each * 3
    return [middle, low, high]


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(started: tuple[float, float], steps: int) -> tuple[float, float]:
    """Wall-clock and CPU milliseconds a step."""
    wall, cpu = (1e3 * (now - then) / steps for now, then in zip(_clocks(), started, strict=True))
    return wall, cpu
