"""The default pair on MNIST against the hand-written trainer: test ELBO and log p(x).

    PYROVAE_DATA=folder python benchmarks/mnist.py [--epochs 20] [--samples 1000] [--seed 0]

Bernoulli decoder and mean-field encoder, 784-400-20; minibatches of 128, binarized anew each epoch;
Adam at 1e-3; estimator B for both (TraceMeanField_ELBO; arXiv 1312.6114, equations 7 and 10). The
hand-written trainer starts from the same weights and draws the same minibatches and noise, so that
only the implementations differ; --hand-seed gives it a start and draws of its own. Both are judged
on the test set, binarized once. Writes results/mnist.json, in nats per datum, and exits with 1
where the test ELBOs are more than 0.3 nats apart.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from tables import machine, show, write
from torch import Tensor, nn

import pyrovae
from handwritten import VAE, copy_from_pair, copy_to_pair, evaluate, train
from pyrovae._tools.seeding import seeded, subseed
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.bernoulli import Bernoulli

RESULTS = Path(__file__).resolve().parent / "results" / "mnist.json"
OBJECTIVES = {"A": "trace_elbo", "B": "trace_mean_field_elbo"}
TOLERANCE, PARTICLES = 0.3, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--samples", type=int, default=1000, help="K of the estimate of log p(x)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hand-seed", type=int, help="the hand-written trainer's, if another")
    parser.add_argument("--limit", type=int, help="so many training and test images, for a trial")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    data = some(pyrovae.load_data("mnist", binarize="dynamic"), options.limit)
    hand_seed = options.seed if options.hand_seed is None else options.hand_seed
    print(f"{data}, {options.epochs} epochs, K = {options.samples}")

    ours = by_pyrovae(data, options.epochs, options.seed)
    theirs = by_hand(data, options.epochs, hand_seed)
    for row, programs in (ours, theirs):
        row |= log_likelihood(*programs, data.test, options.samples, options.seed)
    table = [ours[0], theirs[0]]
    show(table, ".2f")
    apart = {e: table[0][f"test ELBO {e}"] - table[1][f"test ELBO {e}"] for e in OBJECTIVES}
    print(f"\nTest ELBO, pyrovae's less the hand-written: {apart['A']:+.3f}, {apart['B']:+.3f}")

    about = {
        "epochs": options.epochs,
        "samples": options.samples,
        "seeds": [options.seed, hand_seed],
        "limit": options.limit,
        "pair": "bernoulli and mean_field, 784-400-20",
        "training": "batch 128, Adam 1e-3, estimator B, dynamic binarization",
        "test ELBO": f"L = {PARTICLES}",
        "data": data.provenance,
    }
    results = {"about": about | machine(), "trained": table, "test ELBO apart": apart}
    write(options.out, results)
    if max(map(abs, apart.values())) > TOLERANCE:
        raise SystemExit(f"Not as promised: the test ELBOs are over {TOLERANCE} nats apart.")


def some(data: pyrovae.Dataset, limit: int | None) -> pyrovae.Dataset:
    """The first rows of the training and the test data."""
    if limit is None:
        return data
    first = {name: getattr(data, name)[:limit] for name in ("train", "test", "intensities")}
    return replace(data, **first)


def pair(data: pyrovae.Dataset, seed: int) -> tuple[nn.Module, nn.Module]:
    """The default pair, its weights drawn under a seed."""
    with seeded(seed):
        return Bernoulli(data.shape, 20, (400,)), MeanField(data.shape, 20, (400,))


def by_pyrovae(data: pyrovae.Dataset, epochs: int, seed: int) -> tuple[dict, tuple]:
    """Train by pyrovae.fit, without validation: its row of the table, and the pair."""
    model, guide = pair(data, seed)
    started = time.perf_counter()
    fit = pyrovae.fit(
        model,
        guide,
        replace(data, valid=None),
        objective=OBJECTIVES["B"],
        epochs=epochs,
        batch_size=128,
        lr=1e-3,
        seed=seed,
    )
    row = {"trained by": "pyrovae.fit", "seconds": time.perf_counter() - started}
    row["train ELBO"] = [epoch["train_elbo"] for epoch in fit.history]
    for name, objective in OBJECTIVES.items():
        settings = {"objective": objective, "particles": PARTICLES, "seed": seed}
        row[f"test ELBO {name}"] = pyrovae.elbo(model, guide, data.test, **settings).mean
    return row, (model, guide)


def by_hand(data: pyrovae.Dataset, epochs: int, seed: int) -> tuple[dict, tuple]:
    """Train by hand, with the draws of pyrovae.fit: its row, and a pair with its weights."""
    model, guide = pair(data, seed)
    vae = copy_from_pair(VAE(data.shape, latent=20, hidden=400), model, guide)
    seeds = [subseed(seed, epoch) for epoch in range(1, epochs + 1)]
    settings = {"estimator": "B", "batch_size": 128, "lr": 1e-3}
    started = time.perf_counter()
    history = train(vae, data.batch, len(data.train), seeds, **settings)
    row = {"trained by": "hand", "seconds": time.perf_counter() - started, "train ELBO": history}
    for name in OBJECTIVES:
        with seeded(seed):
            row[f"test ELBO {name}"] = evaluate(vae, data.test, name, PARTICLES).mean().item()
    return row, copy_to_pair(vae, model, guide)


def log_likelihood(
    model: nn.Module, guide: nn.Module, x: Tensor, samples: int, seed: int
) -> dict[str, float]:
    """log p(x) of the test data with its Monte Carlo standard error, and how far to trust it."""
    started = time.perf_counter()
    found = pyrovae.log_likelihood(model, guide, x, num_samples=samples, seed=seed, progress=True)
    return {
        "log p(x)": found.mean,
        "±": found.mean_standard_error,
        "± over data": found.data_standard_error,
        "k-hat > 0.7": (found.khat > 0.7).double().mean().item(),
        "median ESS": found.ess.median().item(),
        "log p(x) seconds": time.perf_counter() - started,
    }


if __name__ == "__main__":
    main()
