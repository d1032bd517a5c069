"""Where the time goes: the parts of a compiled step of `fit`, and of log p(x).

    python benchmarks/speed_parts.py [--epochs E] [--images N] [--rounds R]

torch's profiler names kernels, Inductor's own among them; what is left of the wall-clock time of
an epoch that was not profiled is Python and what torch does around kernels. A step by one thread,
log p(x) by all. Eager steps with many particles are timed in long turns here, so that memory is the
contender's own. Writes results/speed_parts.json, in milliseconds a step or shares of the time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from speed_contenders import enter
from speed_floor import flops, products
from speed_hand import binarized
from speed_problem import IMAGES, Problem, make_images
from tables import machine, markdown, show, write
from torch import Tensor
from torch._inductor import config
from torch.profiler import ProfilerActivity, profile

import pyrovae

RESULTS = Path(__file__).resolve().parent / "results" / "speed_parts.json"
STEPS = (Problem("784-400-20", 128), Problem("784-200-200-50", 20))
LIKELIHOOD, SAMPLES = Problem("784-400-20", 128), 5000
# Its kernels are told by what is in their names: Adam alone takes roots.
KINDS: dict[str, Callable[[str], bool]] = {
    "products": lambda name: name in ("aten::mm", "aten::addmm"),
    "Adam": lambda name: "cpp_fused" in name and "sqrt" in name,
    "other compiled kernels": lambda name: "cpp_fused" in name,
    "copies": lambda name: name in ("aten::copy_", "aten::clone", "aten::cat"),
    "draws": lambda name: name in ("aten::normal_", "aten::random_", "aten::bernoulli_"),
}
REST = "the rest"
MANY, ROWS = Problem("784-400-20", 128, particles=50), 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=17, help="every second is profiled")
    parser.add_argument("--images", type=int, default=4000, help="of an epoch")
    parser.add_argument("--evaluated", type=int, default=256, help="images of log p(x)")
    parser.add_argument("--rounds", type=int, default=7, help="of the eager steps")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    images, threads = make_images("cpu"), torch.get_num_threads()
    found: dict[str, Any] = {"about": machine()}
    with config.patch({"cpp.enable_kernel_profile": True}):
        # First, as another thread that has worked once goes on to wait for work.
        torch.set_num_threads(1)
        found["steps"] = [step(p, images[: options.images], options.epochs) for p in STEPS]
        torch.set_num_threads(threads)
        found["log p(x)"] = likelihood(images[: options.evaluated])
    found["eager, many particles"] = eager(images, options.rounds)
    show(found["steps"], ".3f")
    show([found["log p(x)"]], ".3f")
    show([found["eager, many particles"]], ".3f")
    write(options.out, found)


def step(problem: Problem, images: Tensor, epochs: int) -> dict[str, Any]:
    """Milliseconds of a compiled step of `fit`, on binary images."""
    x, steps = (images > 127).float(), -(-len(images) // problem.batch)
    around, seen = ExitStack(), []

    def after(fit: pyrovae.Fit) -> None:
        # Every second epoch is profiled, so that what else the machine does falls on both.
        around.close()
        if len(fit.history) % 2 and len(fit.history) < epochs:
            seen.append(around.enter_context(profile(activities=[ProfilerActivity.CPU])))

    fit = pyrovae.fit(
        *problem.pair(), x, objective="trace_mean_field_elbo", epochs=epochs,
        batch_size=problem.batch, compile=True, seed=0, on_epoch=after, progress=False,
    )  # fmt: skip
    # The first epoch compiles.
    whole = 1e3 * median(row["seconds"] for row in fit.history[2::2]) / steps
    found = [_parts(each) for each in seen]
    parts = {kind: median(each[kind] for each in found) / steps for kind in KINDS}
    return {
        "networks": problem.networks,
        "batch": problem.batch,
        "ms": whole,
        **parts,
        REST: whole - sum(parts.values()),
        "GFLOP/s of products": flops(products(problem, images)) / parts["products"] / 1e6,
    }


def likelihood(images: Tensor) -> dict[str, Any]:
    """Shares of the time of log p(x)."""
    x, pair = binarized(images, torch.arange(len(images))), LIKELIHOOD.pair()

    def run() -> float:
        started = time.perf_counter()
        pyrovae.log_likelihood(*pair, x, num_samples=SAMPLES, compile=True, seed=0)
        return 1e3 * (time.perf_counter() - started)

    run()
    whole = run()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    parts = {kind: ms / whole for kind, ms in _parts(seen).items()}
    return {
        "networks": LIKELIHOOD.networks,
        "samples": SAMPLES,
        "images": len(x),
        "ms": whole,
        **parts,
        REST: 1 - sum(parts.values()),
    }


def _parts(seen: profile) -> dict[str, float]:
    """Milliseconds of each kind of kernels, by the thread that calls them."""
    found = dict.fromkeys(KINDS, 0.0)
    for event in seen.key_averages():
        kind = next((kind for kind, holds in KINDS.items() if holds(event.key)), None)
        if kind is not None:
            found[kind] += event.self_cpu_time_total / 1e3
    return found


def eager(images: Tensor, rounds: int) -> dict[str, Any]:
    """Milliseconds of an eager step with many particles, each contender long at it."""
    names = ["Pyro SVI", "pyrovae, eager"]
    races, _ = enter(names, MANY, images)
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(min(IMAGES, len(images)), (ROWS, MANY.batch), generator=generator)
    turns: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, run in races.items():
            run(index[: ROWS // 3])
            started = time.perf_counter()
            run(index)
            turns[name].append(1e3 * (time.perf_counter() - started) / len(index))
    ratios = [ours / pyros for pyros, ours in zip(*turns.values(), strict=True)]
    return {"particles": MANY.particles} | {name: median(t) for name, t in turns.items()} | {
        "ours / Pyro": median(ratios)
    }  # fmt: skip


def parts() -> str:
    """A row for each step, in milliseconds, and one for log p(x), in shares."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    names = [*KINDS, REST]
    body = [
        [f"a step of `fit`, {row['networks']}, batch {row['batch']}, one thread, ms",
         f"{row['ms']:.2f}", *(f"{row[name]:.2f}" for name in names),
         f"{row['GFLOP/s of products']:.0f}"]
        for row in found["steps"]
    ]  # fmt: skip
    row = found["log p(x)"]
    head = ["", "in all", *names, "GFLOP/s of products"]
    threads = found["about"]["threads"]
    about = f"log p(x), {row['networks']}, K = {row['samples']}, {threads} threads, shares"
    return markdown(head, [*body, [about, "1", *(f"{row[name]:.0%}" for name in names), "–"]])


TABLES = {"parts": parts}

if __name__ == "__main__":
    main()
