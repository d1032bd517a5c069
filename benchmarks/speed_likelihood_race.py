"""Time to log p(x) beside the same by others, and what the precision of its products does to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median, quantiles
from typing import Any

import torch
from speed_floor import decoder_products, fastest, flops
from speed_hand import binarized
from speed_likelihood_rivals import RIVALS
from speed_problem import Problem
from speed_race import synchronize
from torch import Tensor
from torch.overrides import TorchFunctionMode

import pyrovae
from pyrovae._tools.precision import rounds

__all__ = ["precisions", "race"]

K, TILE = 5000, 64
TILES = (2048, 8192)
OURS, FLOOR = "`log_likelihood`", "products alone"
# How far the means over images of two estimates of the same log p(x) may lie apart, in nats: the
# weights of an untrained pair are nearly equal.
APART = 0.05


def estimate(problem: Problem, images: Tensor) -> Tensor:
    """log p(x) of some images as a user asks for it; the weights are untrained."""
    found = pyrovae.log_likelihood(*problem.pair(), images, num_samples=K, compile=True, seed=0)
    return found.log_prob


def race(problem: Problem, images: Tensor, rounds: int) -> dict:
    """Milliseconds of an image's log p(x) at K = 5000, of everybody in turns.

    What does not grow with the images (capture, compilation) is told from what does by the
    difference of one tile and all; rivals are compiled before. The products are those of
    the decoder for as many rows, in tiles of the size that is fastest.

    Raises:
        SystemExit: If results differ.
    """
    x = binarized(images, torch.arange(len(images), device=problem.device))
    some, absent = x[:TILE], {}
    means = {OURS: estimate(problem, some).mean().item()}
    runs: dict[str, Callable[[], object]] = {}
    for name, make in RIVALS.items():
        try:
            run = make(problem)
        except ImportError as error:
            absent[name] = str(error)
            continue
        means[name] = run(some, K).mean().item()
        runs[name] = lambda run=run: run(some, K)
    if max(means.values()) - min(means.values()) > APART:
        raise SystemExit(f"Not the same log p(x), nats per image: {means}")
    tiles = {rows: fastest(decoder_products(problem, rows))[0] for rows in TILES}
    turns: dict[str, list] = {name: [] for name in (OURS, *runs, FLOOR)}
    fixed = []
    for _ in range(rounds):
        few = _clocked(lambda: estimate(problem, some))
        every = _clocked(lambda: estimate(problem, x))
        each = [(b - a) / (len(x) - len(some)) for a, b in zip(few, every, strict=True)]
        turns[OURS].append(each)
        fixed.append(few[0] - len(some) * each[0])
        for name, run in runs.items():
            turns[name].append([seconds / TILE for seconds in _clocked(run)])
        turns[FLOOR].append(min(_a_row(run, rows) for rows, run in tiles.items()))
    made = decoder_products(problem, TILES[0])
    floor = median(cpu for _, cpu in turns[FLOOR])
    return {
        "K": K,
        "images": len(x),
        "seconds fixed": median(fixed),
        "contenders": {name: _row(each) for name, each in turns.items()},
        "gigaflop/s of products": flops(made) / TILES[0] * K / floor / 1e9,
        "ratios": {f"{OURS} / {name}": _ratio(turns, name) for name in (*runs, FLOOR)},
        "means": means,
        "absent": absent,
    }


def precisions(problem: Problem, samples: int = 1000, count: int = 200) -> dict:
    """What rounding the factors of products does to log p(x) of test images.

    The pair is trained on MNIST for a few epochs. The draws are the same, so that what differs is
    the rounding of the factors in the encoder and in the decoder, which is done here by hand, with
    sums in float32, so that it can be told on any machine.
    """
    data = pyrovae.load_data("mnist", binarize="dynamic")
    pair = problem.pair()
    pyrovae.fit(
        *pair, data, objective="trace_mean_field_elbo", epochs=3, seed=0, progress=False,
        compile=False,
    )  # fmt: skip
    found = {}
    for name in ("float32", *ROUNDED):
        with Rounded(ROUNDED[name]) if name in ROUNDED else nullcontext():
            found[name] = pyrovae.log_likelihood(
                *pair, data.test[:count], num_samples=samples, compile=False, seed=0
            )
    exact, rows = found.pop("float32"), {}
    for name, other in found.items():
        moved = other.log_prob - exact.log_prob
        rows[name] = {
            "mean": moved.mean().item(), "sd": moved.std().item(),
            "largest": moved.abs().max().item(), "here": rounds(name, exact.log_prob.device),
        }  # fmt: skip
    stated = exact.standard_error.median().item()
    about = {"K": samples, "images": count, "standard error": stated, "mean": exact.mean}
    return about | {"rows": rows}


def _without(bits: int) -> Callable[[Tensor], Tensor]:
    """Rounds to the nearest float32 whose last bits are zero."""

    def rounded(x: Tensor) -> Tensor:
        bent = x.contiguous().view(torch.int32) + (1 << (bits - 1))
        return (bent >> bits << bits).view(torch.float32)

    return rounded


ROUNDED = {"tf32": _without(13), "bf16": _without(16)}


class Rounded(TorchFunctionMode):
    """Rounds both factors of every product of a linear layer."""

    def __init__(self, rounded: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rounded = rounded

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        if func is torch.nn.functional.linear:
            args = (*map(self.rounded, args[:2]), *args[2:])
        return func(*args, **(kwargs or {}))


def _row(turns: list) -> dict:
    walls, cpus = zip(*turns, strict=True)
    low, _, high = quantiles(cpus, n=4) if len(cpus) > 1 else [*cpus] * 3
    return {
        "ms": 1e3 * median(walls), "cpu, ms": 1e3 * median(cpus),
        "quartiles of cpu, ms": [1e3 * low, 1e3 * high], "turns": [[*turn] for turn in turns],
    }  # fmt: skip


def _ratio(turns: dict[str, list], other: str) -> dict[str, float]:
    pairs = list(zip(turns[OURS], turns[other], strict=True))
    clocks = enumerate(("wall", "cpu"))
    return {name: median(a[which] / b[which] for a, b in pairs) for which, name in clocks}


def _clocked(run: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and CPU seconds."""
    synchronize()
    started = time.perf_counter(), time.process_time()
    run()
    synchronize()
    return time.perf_counter() - started[0], time.process_time() - started[1]


def _a_row(run: Callable[[], object], rows: int, least: float = 0.3) -> tuple[float, float]:
    """Seconds for as many rows as an image has samples, from at least a third of a second."""
    count, started = 0, (time.perf_counter(), time.process_time())
    while time.perf_counter() - started[0] < least:
        run()
        synchronize()
        count += 1
    spent = time.perf_counter() - started[0], time.process_time() - started[1]
    wall, cpu = (K * seconds / count / rows for seconds in spent)
    return wall, cpu
