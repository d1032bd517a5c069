"""Time to log p(x), against the decoder's matrix products alone."""

from __future__ import annotations

import time
from statistics import median

import torch
from speed_floor import decoder_products, fastest, flops
from speed_hand import binarized
from speed_problem import Problem
from speed_race import synchronize
from torch import Tensor

import pyrovae

__all__ = ["K", "estimate", "likelihood"]

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


def _a_row(run: object, rows: int, least: float = 0.5) -> float:
    """Seconds for a row's products, from at least half a second of them."""
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < least:
        run()
        synchronize()
        count += 1
    return (time.perf_counter() - started) / count / rows
