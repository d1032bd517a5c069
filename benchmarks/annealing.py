"""What annealing costs: CPU seconds against the matrix products that its gradients ask for.

    OMP_NUM_THREADS=1 PYROVAE_DATA=folder python benchmarks/annealing.py [--pairs VAE]

The pairs of evaluation.py, 784-200-200-50 on MNIST, trained for 20 epochs. The first test images
by 8 chains of so many temperatures, with the time of compiling, and the bidirectional gap on
images that the model made. The products are those of the decoder, forward and backward, for as many
gradients as were taken, by BLAS in batches of the size that was used. Writes
results/annealing.json; trained weights are kept beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import torch
from evaluation import OBJECTIVES, annealed, sandwich, train, trained
from tables import machine, write

import pyrovae
from pyrovae.evidence.annealing import PILOT_CHAINS, Settings
from pyrovae.evidence.path import WARM_UP
from pyrovae.evidence.tiles import DATA_TILE

RESULTS = Path(__file__).resolve().parent / "results" / "annealing.json"
WIDTHS = (50, 200, 200, 784)
TRIES = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", nargs="+", choices=OBJECTIVES, default=[*OBJECTIVES])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--images", type=int, default=1000, help="test images to evaluate")
    parser.add_argument("--simulated", type=int, default=100, help="images for the sandwich")
    parser.add_argument("--chains", type=int, default=8)
    parser.add_argument("--temperatures", nargs="+", type=int, default=[200, 400])
    parser.add_argument("--limit", type=int, help="so many training images, for a trial")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.device = "cpu"
    data = pyrovae.load_data("mnist", binarize="dynamic")
    images = data.train[: options.limit], data.intensities[: options.limit]
    data = replace(data, train=images[0], intensities=images[1], valid=None)
    x, rows = data.test[: options.images], []
    protocol = {"chains": options.chains, "steps": Settings().num_steps, "pair": "784-200-200-50"}
    for name, number in product(options.pairs, options.temperatures):
        rows.append(
            row(name, data, x, argparse.Namespace(**vars(options) | {"temperatures": number}))
        )
        print(json.dumps(rows[-1]), flush=True)
        write(options.out, {"about": protocol | machine(), "rows": rows})


def row(name: str, data: pyrovae.Dataset, x: torch.Tensor, options: argparse.Namespace) -> dict:
    """Annealing of one of the two, and what its products alone take."""
    kept = options.out.with_suffix(".cache") / f"{name}-{options.epochs}-{options.limit}.pt"
    if not kept.exists():
        train(name, data, options)
    pair = trained(name, data, options)
    before = products(options.chains)
    found = annealed(pair, x, options)
    seconds = min(before, products(options.chains)) * gradients(len(x), options)
    both = sandwich(pair, x, options)
    return {
        "pair": f"{name}, {options.epochs} epochs",
        "temperatures": options.temperatures,
        "images": len(x),
        "log p(x)": found["log p(x)"],
        "±": found["±"],
        "median ESS": found["median ESS"],
        "acceptance": found["acceptance"],
        "gap": both["gap"],
        "± of it": both["±"],
        "CPU seconds": found["CPU seconds"],
        "products": seconds,
        "ratio": found["CPU seconds"] / seconds,
    }


def gradients(images: int, options: argparse.Namespace) -> int:
    """How many points the decoder is asked for, with those of the run that finds step sizes."""
    settings = Settings(options.chains, options.temperatures)
    least, most = PILOT_CHAINS
    pilots = min(max(options.chains, least), most)
    each = options.chains * (1 + settings.num_temperatures * settings.num_steps)
    each += pilots * (1 + (len(settings.knots) + WARM_UP) * settings.num_steps)
    return -(-images // DATA_TILE) * DATA_TILE * each


def products(chains: int) -> float:
    """CPU seconds for one point's products, forward and backward, the least of some tries."""
    rows, seconds = chains * DATA_TILE, []
    pairs = [(torch.randn(rows, a), torch.randn(b, a)) for a, b in pairwise(WIDTHS)]
    pairs += [(torch.randn(rows, b), torch.randn(a, b)) for a, b in pairwise(WIDTHS)]
    for _ in range(TRIES):
        started = time.process_time()
        for _ in range(10):
            for left, right in pairs:
                torch.mm(left, right.t())
        seconds.append((time.process_time() - started) / 10 / rows)
    return min(seconds)


if __name__ == "__main__":
    main()
