"""How far log p(x) can be trusted: coverage on oracles, and two VAEs of MNIST by every estimate.

    PYROVAE_DATA=folder python benchmarks/evaluation.py [--epochs 20] [--images 1000]

A one-layer VAE and an IWAE with 50 particles, both 784-200-200-50, trained alike: batch 128, Adam
at 1e-3, binarized anew each epoch. On the first test images, binarized once: importance sampling
with K = 50 to 50,000, the same from a guide refined for each image, annealed importance sampling,
and its bidirectional gap on images that the model made itself. Times are CPU seconds: run it with
OMP_NUM_THREADS=1. Trained weights and finished parts are kept, so that a stopped run goes on where
it was. Writes results/evaluation.json and docs/figures/evaluation.png, in nats per datum.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from evaluation_coverage import coverage
from evaluation_figure import draw
from tables import machine, write
from torch import Tensor, nn

import pyrovae
from pyrovae._tools.seeding import seeded
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.bernoulli import Bernoulli

HOME = Path(__file__).resolve().parent
RESULTS = HOME / "results" / "evaluation.json"
FIGURE = HOME.parent / "docs" / "figures" / "evaluation.png"
OBJECTIVES = {"VAE": ("trace_mean_field_elbo", 1), "IWAE": ("iwae", 50)}
SAMPLES = (50, 500, 5000, 50_000)
CURVE = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
REFINED = {"num_samples": 5000, "refine_steps": 200}
SEED = 0

Pair = tuple[nn.Module, nn.Module]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--images", type=int, default=1000, help="test images to evaluate")
    parser.add_argument("--simulated", type=int, default=100, help="images for the sandwich")
    parser.add_argument("--chains", type=int, default=8)
    parser.add_argument("--temperatures", type=int, default=200)
    parser.add_argument("--limit", type=int, help="so many training images, for a trial")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args()
    names = ("epochs", "images", "simulated", "chains", "temperatures", "limit", "device")
    protocol = {name: getattr(options, name) for name in names}
    parts = _kept(options.out, protocol)
    about = {"protocol": protocol, "pair": "784-200-200-50", "seed": SEED} | machine()
    for name, work in _work(options).items():
        if name not in parts:
            print(f"{name} …", flush=True)
            parts[name] = work()
            print(json.dumps(parts[name])[:400], flush=True)
            write(options.out, {"about": about, "parts": parts})
    draw(parts, options.figure)


def _kept(path: Path, protocol: dict) -> dict[str, dict]:
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["parts"] if found["about"]["protocol"] == protocol else {}


def _work(options: argparse.Namespace) -> dict[str, Callable[[], dict]]:
    """Every part by name, the cheap ones first."""
    data = pyrovae.load_data("mnist", binarize="dynamic")
    images = data.train[: options.limit], data.intensities[: options.limit]
    data = replace(data, train=images[0], intensities=images[1], valid=None).to(options.device)
    x, found = data.test[: options.images], {"coverage": coverage}
    for name in OBJECTIVES:
        found[f"{name}/training"] = lambda name=name: train(name, data, options)
    for name in OBJECTIVES:
        found[f"{name}/refined"] = lambda name=name: sampled(
            trained(name, data, options), x, REFINED
        )
    for name in OBJECTIVES:
        found[f"{name}/annealed"] = lambda name=name: annealed(
            trained(name, data, options), x, options
        )
        found[f"{name}/sandwich"] = lambda name=name: sandwich(
            trained(name, data, options), x, options
        )
    for k in SAMPLES:
        how = {"num_samples": k, "curve": [p for p in CURVE if p <= k]}
        for name in OBJECTIVES:
            found[f"{name}/K = {k}"] = lambda name=name, how=how: sampled(
                trained(name, data, options), x, how
            )
    return found


def train(name: str, data: pyrovae.Dataset, options: argparse.Namespace) -> dict:
    """Train one of the two and keep its weights."""
    objective, particles = OBJECTIVES[name]
    model, guide = _pair(data)
    started = time.perf_counter()
    fit = pyrovae.fit(
        model, guide, data, objective=objective, particles=particles, epochs=options.epochs,
        compile=True, seed=SEED,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    _file(name, options).parent.mkdir(parents=True, exist_ok=True)
    torch.save([model.state_dict(), guide.state_dict()], _file(name, options))
    bound = pyrovae.elbo(model, guide, data.test, particles=10, seed=SEED)
    return {
        "objective": objective,
        "particles": particles,
        "epochs": options.epochs,
        "seconds": seconds,
        "train loss": fit.history[-1]["train_loss"],
        "test ELBO": bound.mean,
    }


def trained(name: str, data: pyrovae.Dataset, options: argparse.Namespace) -> Pair:
    """The pair with the weights that were kept."""
    pair = _pair(data)
    for program, state in zip(
        pair, torch.load(_file(name, options), weights_only=True), strict=True
    ):
        program.load_state_dict(state)
    return pair[0].to(options.device), pair[1].to(options.device)


def sampled(pair: Pair, x: Tensor, how: dict) -> dict:
    """Importance sampling: the estimate, its errors, and its time."""
    started = time.process_time()
    found = pyrovae.log_likelihood(*pair, x, seed=SEED, **how)
    row = _row(found, time.process_time() - started)
    row |= {"k-hat > 0.7": found.khat.gt(0.7).double().mean().item(), "verdict": found.verdict}
    row["smoothed"] = found.smoothed_mean
    if found.amortization_gap is not None:
        gap = found.amortization_gap.double()
        error = gap.std().item() / len(gap) ** 0.5
        row |= {"amortization gap": gap.mean().item(), "± of it": error}
        row["refined ELBO"] = found.curve.mean[1]
    points = found.curve.mean
    return row | {"points": list(points), "curve": list(points.values())}


def annealed(pair: Pair, x: Tensor, options: argparse.Namespace) -> dict:
    """Annealed importance sampling of the same images."""
    started = time.process_time()
    found = pyrovae.annealed_log_likelihood(*pair, x, seed=SEED, **_annealing(options))
    row = _row(found, time.process_time() - started)
    return row | {"acceptance": found.acceptance.mean().item(), "verdict": found.verdict}


def sandwich(pair: Pair, x: Tensor, options: argparse.Namespace) -> dict:
    """Both bounds of annealing on images that the model made."""
    started = time.process_time()
    how = {"n": options.simulated, "seed": SEED} | _annealing(options)
    found = pyrovae.bidirectional(*pair, like=x, **how)
    return {
        "images": options.simulated,
        "lower": found.lower.mean,
        "upper": found.upper.mean().item(),
        "gap": found.mean_gap,
        "±": found.mean_gap_standard_error,
        "CPU seconds": time.process_time() - started,
        "verdict": found.verdict,
    }


def _row(found: pyrovae.LogLikelihood, seconds: float) -> dict:
    return {
        "images": len(found.log_prob),
        "samples": found.num_samples,
        "log p(x)": found.mean,
        "±": found.mean_standard_error,
        "± over data": found.data_standard_error,
        "bias by the delta method": found.mean_bias,
        "median ESS": found.ess.median().item(),
        "CPU seconds": seconds,
    }


def _annealing(options: argparse.Namespace) -> dict:
    return {"num_chains": options.chains, "num_temperatures": options.temperatures}


def _pair(data: pyrovae.Dataset) -> Pair:
    with seeded(SEED):
        return Bernoulli(data.shape, 50, (200, 200)), MeanField(data.shape, 50, (200, 200))


def _file(name: str, options: argparse.Namespace) -> Path:
    return options.out.with_suffix(".cache") / f"{name}-{options.epochs}-{options.limit}.pt"


if __name__ == "__main__":
    main()
