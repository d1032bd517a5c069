"""What subnormal numbers in Adam's moments cost a step, with a compiled one's bounds and without.

    OMP_NUM_THREADS=1 PYROVAE_DATA=folder python benchmarks/subnormal.py [--epochs E]

784-200-200-50 at batch 20, on the first images of MNIST as binary data: pixels that are black in
nearly all of them give their weights no gradient, and the means of Adam decay. Three trainings of
`fit` from the same weights in turn: compiled, compiled with the bounds set to zero, and
eager. CPU milliseconds a step of each epoch, and how many means are subnormal in the end. Writes
results/subnormal.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from tables import machine, markdown, show, write

import pyrovae
from pyrovae._tools.seeding import seeded
from pyrovae.compiling import update
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.bernoulli import Bernoulli

__all__ = ["TABLES"]

RESULTS = Path(__file__).resolve().parent / "results" / "subnormal.json"
SEED, BATCH = 0, 20
# Whether steps are compiled, and whether the bounds of the moments hold.
WAYS = {
    "compiled": (True, True),
    "compiled, without the bounds": (True, False),
    "eager": (False, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--hidden", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    x = pyrovae.load_data(options.data, binarize="threshold").train[: options.images]
    rows = [_row(name, x, options) for name in WAYS]
    show(rows, ".2f")
    write(options.out, {"rows": rows} | machine())


def _row(name: str, x: torch.Tensor, options: argparse.Namespace) -> dict:
    compiled, bounded = WAYS[name]
    bounds, each = (update.LEAST, update.LEAST_SQUARE), []
    if not bounded:
        update.LEAST = update.LEAST_SQUARE = 0.0
    started = time.process_time()

    def after(_: pyrovae.Fit) -> None:
        nonlocal started
        now = time.process_time()
        each.append(1e3 * (now - started) / -(-len(x) // BATCH))
        started = now

    try:
        with seeded(SEED):
            sizes = {"latent": options.hidden // 4, "hidden": (options.hidden,) * 2}
            pair = [program(x.shape[1:], **sizes) for program in (Bernoulli, MeanField)]
        fit = pyrovae.fit(
            *pair, x, objective="trace_mean_field_elbo", epochs=options.epochs, batch_size=BATCH,
            lr=1e-3, compile=compiled, seed=SEED, on_epoch=after,
        )  # fmt: skip
    finally:
        update.LEAST, update.LEAST_SQUARE = bounds
    means = torch.cat([s["exp_avg"].flatten() for s in fit.svi.optimizer.state.values()])
    slow = (means != 0) & (means.abs() < torch.finfo(means.dtype).tiny)
    # The first epoch compiles.
    return {
        "way": name,
        "CPU ms a step, epoch 2": each[1],
        "CPU ms a step, last 3 epochs": median(each[-3:]),
        "means": len(means),
        "subnormal": int(slow.sum()),
        "loss": fit.history[-1]["train_loss"],
        "epochs": each,
    }


def subnormal() -> str:
    """A row for each way: its time at first and in the end, and its subnormal means."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    head = ["`fit`", "CPU ms a step, epoch 2", "last 3 epochs", "subnormal means", "loss"]
    times = ("CPU ms a step, epoch 2", "CPU ms a step, last 3 epochs")
    return markdown(
        head,
        [
            [
                row["way"],
                *(f"{row[name]:.2f}" for name in times),
                f"{row['subnormal']:,} of {row['means']:,}",
                f"{row['loss']:.2f}",
            ]
            for row in found
        ],
    )


TABLES = {"subnormal": subnormal}

if __name__ == "__main__":
    main()
