"""What a gradient through a few of many samples costs, and how much noise it has.

    PYROVAE_DATA=folder python benchmarks/few_backward.py [--rounds R] [--batches B]

IWAE of 50 samples on MNIST with dreg gradients, through all samples and through some: one and two
stochastic layers, batch 100. Contenders take compiled steps in turns; the processor time of one
thread is measured, and a ratio is the median over rounds of two turns of one round. Then each
draws the gradient of one batch again and again, with weights that a short training by the ELBO has
found. Writes results/few_backward.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tables import machine, markdown, show, write
from torch import Tensor, nn

import pyrovae
from pyrovae.guides.mean_field import MeanField
from pyrovae.guides.two_layer import TwoLayer as TwoLayerGuide
from pyrovae.models.bernoulli import Bernoulli
from pyrovae.models.two_layer import TwoLayer
from pyrovae.objectives import ImportanceWeighted, estimate
from pyrovae.pairs.pair import Pair

RESULTS = Path(__file__).resolve().parent / "results" / "few_backward.json"
PARTICLES, BATCH, STEPS = 50, 100, 4
THROUGH = (None, 10, 5, 1)
ONE = {"latent": 50, "hidden": (200, 200), "activation": "Tanh"}
PAIRS: dict[str, Any] = {
    "784-200-200-50": lambda shape: (Bernoulli(shape, **ONE), MeanField(shape, **ONE)),
    "two layers (100, 50)": lambda shape: (TwoLayer(shape), TwoLayerGuide(shape)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="of the steps")
    parser.add_argument("--batches", type=int, default=100, help="gradients of one batch")
    parser.add_argument("--epochs", type=int, default=3, help="of the ELBO, before gradients")
    parser.add_argument("--images", type=int, default=20_000, help="to train on")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = pyrovae.load_data("mnist", binarize="static").train[: options.images]
    rows = []
    for name in PAIRS:
        times = steps(name, images, options.rounds)
        noise = noises(name, images, options)
        for through, ms in times.items():
            ratio = median(a / b for a, b in zip(ms, times[None], strict=True))
            about = {"networks": name, "samples": PARTICLES, "through": through or PARTICLES}
            rows.append(about | {"CPU ms": median(ms), "of all": ratio, "noise": noise[through]})
    show(rows, ".3f")
    write(options.out, {"about": machine(), "rows": rows})


def objective(through: int | None) -> ImportanceWeighted:
    """IWAE with the gradient through so many samples, or all."""
    return ImportanceWeighted(PARTICLES, gradient="dreg", backward=through)


def steps(name: str, x: Tensor, rounds: int) -> dict[int | None, list[float]]:
    """Milliseconds of processor time of a compiled step, in each of some turns."""
    contenders = {}
    for through in THROUGH:
        torch.manual_seed(0)
        model, guide = PAIRS[name](tuple(x.shape[1:]))
        optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=1e-3)
        svi = pyrovae.SVI(model, guide, optimizer, objective(through), compile=True)
        contenders[through] = svi
    turns: dict[int | None, list[float]] = {through: [] for through in THROUGH}
    # The first turn compiles.
    for turn in range(rounds + 1):
        for through, svi in contenders.items():
            started = time.process_time()
            for batch in x[: STEPS * BATCH].split(BATCH):
                svi.step(batch)
            spent = 1e3 * (time.process_time() - started) / STEPS
            if turn:
                turns[through].append(spent)
    return turns


def noises(name: str, x: Tensor, options: argparse.Namespace) -> dict[int | None, float]:
    """The gradient's standard deviation over draws, as one vector, over its length."""
    torch.manual_seed(0)
    model, guide = PAIRS[name](tuple(x.shape[1:]))
    pyrovae.fit(model, guide, x, epochs=options.epochs, batch_size=BATCH, seed=0, progress=False)
    pair, found = Pair(model, guide), {}
    leaves = [p for program in (model, guide) for p in program.parameters()]
    for through in THROUGH:
        each = [_gradient(pair, objective(through), x[:BATCH], leaves)
                for _ in range(options.batches)]  # fmt: skip
        draws = torch.stack(each)
        if through is None:
            length = draws.mean(0).norm()
        found[through] = (draws.var(0).sum().sqrt() / length).item()
    return found


def _gradient(pair: Pair, loss: Any, x: Tensor, leaves: list[nn.Parameter]) -> Tensor:
    slopes = torch.autograd.grad(estimate(loss, pair, x).surrogate, leaves)
    return torch.cat([slope.flatten() for slope in slopes])


def few_backward() -> str:
    """A row for each number of samples that the gradient goes through."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    head = ["networks", "gradient through", "CPU ms a step", "of all", "noise / gradient"]
    body = [
        [row["networks"], f"{row['through']} of {row['samples']}", f"{row['CPU ms']:.1f}",
         f"{row['of all']:.2f}", f"{row['noise']:.2f}"]
        for row in found["rows"]
    ]  # fmt: skip
    return markdown(head, body)


TABLES = {"few_backward": few_backward}

if __name__ == "__main__":
    main()
