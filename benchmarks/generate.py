"""Time and memory of samples and reconstructions, against the decoder's matrix products alone.

    OMP_NUM_THREADS=2 python benchmarks/generate.py [--images N] [--rounds R]

Eager, compiled and products take turns; results/generate.json has the medians. Peak memory is that
of processes of their own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from speed_floor import decoder_products, fastest, flops
from speed_hand import binarized
from speed_problem import CONVOLUTIONAL, SHAPE, Problem, make_images
from tables import machine, show, write
from torch import Tensor

import pyrovae
from pyrovae.sampling import tile_size

HOME = Path(__file__).resolve().parent
NETWORKS = ("784-400-20", CONVOLUTIONAL)
TASKS = ("sample", "reconstruct")
EAGER, COMPILED, PRODUCTS = "eager", "compiled", "products alone"
FEW = 2
MEMORY = (5_000, 50_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", nargs=2, metavar=("TASK", "IMAGES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        peak(options.peak[0], int(options.peak[1]))
    else:
        measure(options.images, options.rounds)


def measure(images: int, rounds: int) -> None:
    """All networks and tasks, written to the results."""
    rows = [row(networks, task, images, rounds) for networks in NETWORKS for task in TASKS]
    memory = [{"task": task} | peaks(task) for task in TASKS]
    show(rows, ".4g")
    show(memory, ".0f")
    about = machine() | {"rounds": rounds, "dtype": "float32"}
    found = {"about": about, "images": images, "seconds": rows, "memory": memory}
    write(HOME / "results" / "generate.json", found)


def row(networks: str, task: str, images: int, rounds: int) -> dict:
    """Median seconds of each contender, of what compiling costs, and where that is won back."""
    problem = Problem(networks, batch=0)
    size = tile_size(torch.device("cpu"))
    run, made = work(problem, task, images), decoder_products(problem, size)
    few, (products, _) = work(problem, task, FEW * size), fastest(made)
    contenders: dict[str, Callable[[], object]] = {
        EAGER: lambda: run(compile=False),
        COMPILED: lambda: run(compile=True),
        "few, compiled": lambda: few(compile=True),
        PRODUCTS: lambda: [products() for _ in range(-(-images // size))],
    }
    seconds = {name: [] for name in contenders}
    few(compile=True)
    for _ in range(rounds):
        for name, contender in contenders.items():
            started = time.perf_counter()
            contender()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: median(times) for name, times in seconds.items()}
    fixed = medians.pop("few, compiled")
    won = (medians[EAGER] - medians[COMPILED] + fixed) / images
    return {
        "networks": networks,
        "task": task,
        **medians,
        "of it capture": fixed,
        "pays after": fixed / won if won > 0 else None,
        "eager / products": medians[EAGER] / medians[PRODUCTS],
        "compiled / products": (medians[COMPILED] - fixed) / medians[PRODUCTS],
        "gigaflop/s of products": flops(made) / size * images / medians[PRODUCTS] / 1e9,
        "turns": [value for times in seconds.values() for value in times],
    }


def work(problem: Problem, task: str, images: int) -> Callable[..., Tensor]:
    """A task on so many images; the weights are untrained."""
    model, guide = problem.pair()
    if task == "sample":
        like = torch.zeros(1, *SHAPE)
        return lambda **options: pyrovae.sample(model, like=like, n=images, seed=0, **options)
    levels, x = make_images("cpu"), torch.empty(images, *SHAPE)
    for rows in torch.arange(images).split(1000):
        x[rows] = binarized(levels, rows % len(levels))
    return lambda **options: pyrovae.reconstruct(model, guide, x, seed=0, **options)


def peaks(task: str) -> dict[str, float]:
    """MiB that a task adds beside its result, for few images and for many."""
    found = {}
    for images in MEMORY:
        command = [sys.executable, __file__, "--peak", task, str(images)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[f"{images} images, MiB"] = float(done.stdout)
    return found


def peak(task: str, images: int) -> None:
    """Print what the task adds to the peak memory of this process, without its result."""
    run = work(Problem(NETWORKS[0], batch=0), task, images)
    before = _peak()
    result = run(compile=False)
    print(_peak() - before - result.nbytes / 2**20)


def _peak() -> float:
    """MiB, of this program alone: what its parent process had is in the resource usage too."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 2**10


if __name__ == "__main__":
    main()
