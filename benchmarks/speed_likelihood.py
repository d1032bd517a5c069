"""Time to log p(x), against the decoder's matrix products alone."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from speed_floor import decoder_products, fastest, flops
from speed_hand import binarized
from speed_problem import Problem
from speed_race import synchronize
from torch import Tensor

import pyrovae
from pyrovae.evidence.tiles import Evaluation

__all__ = ["K", "crews", "estimate", "likelihood"]

K, IMAGES = 5000, 10_000
TILE = 64
TILES = (1024, 8192, 32_768)


def estimate(problem: Problem, images: Tensor, samples: int) -> float:
    """The seconds that log p(x) of some images takes; the weights are untrained."""
    x = binarized(images, torch.arange(len(images), device=problem.device))
    pair = problem.pair()
    synchronize()
    started = time.perf_counter()
    pyrovae.log_likelihood(*pair, x, num_samples=samples, compile=True, seed=0)
    synchronize()
    return time.perf_counter() - started


def likelihood(problem: Problem, images: Tensor, rounds: int) -> dict:
    """Seconds for 10,000 images at K = 5000, from a quarter of some images and all of them.

    What does not grow with the images (capture, compilation) is told from what does by the
    difference of the two. The products are those of the decoder for as many rows, in tiles of the
    size that is fastest; the ratio is the median of the turns' own.

    Raises:
        SystemExit: If a quarter of the images are not some tiles of 64.
    """
    if len(images) < 4 * TILE:
        raise SystemExit(f"Expected {4 * TILE} images or more, got {len(images)}: see --images.")
    some = images[: len(images) // 4 // TILE * TILE]
    estimate(problem, some, K)
    tiles = {rows: fastest(decoder_products(problem, rows))[0] for rows in TILES}
    turns = []
    for _ in range(rounds):
        few, all_ = estimate(problem, some, K), estimate(problem, images, K)
        each = (all_ - few) / (len(images) - len(some))
        floor = IMAGES * K * min(_a_row(run, rows) for rows, run in tiles.items())
        fixed = few - len(some) * each
        turns.append({"fixed": fixed, "seconds": fixed + IMAGES * each, "products": floor})
    fixed, seconds, floor = (median(turn[name] for turn in turns) for name in turns[0])
    made = decoder_products(problem, TILES[0])
    return {
        "K": K,
        "images": len(images),
        "turns": turns,
        "seconds fixed": fixed,
        "seconds": seconds,
        "seconds of products": floor,
        "gigaflop/s of products": flops(made) / TILES[0] * IMAGES * K / floor / 1e9,
        "ratio": median(turn["seconds"] / turn["products"] for turn in turns),
    }


def crews(problem: Problem, images: Tensor, rounds: int) -> dict:
    """Milliseconds of an image's log p(x), by a thread for each tile, and by all threads for one.

    In turns, on a machine that is left alone, and beside as many other processes as torch has
    threads, each of which keeps a core busy. Whole calls are timed, whose graphs were compiled
    before.
    """
    rows = {}
    _crew_and_one(problem, images)
    for name, others in (("alone", 0), ("beside others", torch.get_num_threads())):
        turns: list[tuple[float, float]] = []
        with ExitStack() as stack:
            for _ in range(others):
                other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
                stack.callback(other.kill)
            turns += [_crew_and_one(problem, images) for _ in range(rounds)]
        crew, each = (1e3 * median(turn) for turn in zip(*turns, strict=True))
        ratio = median(a / b for a, b in turns)
        rows[name] = {"a tile a thread": crew, "tile by tile": each, "ratio": ratio, "turns": turns}
    return {"K": K, "images": len(images), "threads": torch.get_num_threads(), "rows": rows}


def _crew_and_one(problem: Problem, images: Tensor) -> tuple[float, float]:
    """Seconds of an image in both ways."""
    crew = estimate(problem, images, K)
    with patch.object(Evaluation, "each", _one_by_one):
        return crew / len(images), estimate(problem, images, K) / len(images)


def _one_by_one(
    task: Evaluation, find: Callable, prepare: Callable, *work: Any, **options: Any
) -> None:
    """What an evaluation does where it calls no threads together."""
    tiles = task.tiles(*work, **options)
    prepare(tiles[0][1])
    for index, rows in tiles:
        task.keep(index, find(index, rows))


def _a_row(run: object, rows: int, least: float = 0.5) -> float:
    """Seconds for a row's products, from at least half a second of them."""
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < least:
        run()
        synchronize()
        count += 1
    return (time.perf_counter() - started) / count / rows
