"""scVI's model here, and scvi-tools' own, on the counts of docs/tutorials/counts.py.

    python benchmarks/counts.py [--epochs 400] [--seeds 2] [--parts ours theirs]

Both train on the same cells with the same sizes and batches, with networks of the same widths, for
as many epochs at the same learning rate, and state log p(x | size, batch) of the same test cells by
importance sampling of their own (scvi-tools by ``get_marginal_ll``). The truth's is the tutorial's,
by quadrature. scvi-tools (1.4) is no dependency of this project: for the second
part, install it beside pyrovae in an environment of its own. Parts that are done are kept in
benchmarks/results/counts.json.
"""

from __future__ import annotations

import argparse
import json
import runpy
import time
from importlib.metadata import version
from pathlib import Path

import pyro
import torch
from tables import machine, write

import pyrovae

HOME = Path(__file__).resolve().parent
TUTORIAL = HOME.parent / "docs" / "tutorials" / "counts.py"
RESULTS = HOME / "results" / "counts.json"
SAMPLES, RATE, BATCH = 500, 1e-3, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--parts", nargs="+", default=["ours", "theirs"])
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    names = runpy.run_path(str(TUTORIAL))
    results |= {
        "about": results.get("about", {}) | machine(),
        "cells": len(names["gap"]),
        "truth": names["truth"].mean().item(),
        "tutorial": names["ll"].mean,
    }
    if "ours" in options.parts:
        rows = [ours(names, options.epochs, seed) for seed in range(options.seeds)]
        results["pyrovae, zinb"] = {"epochs": options.epochs, "seeds": rows}
    if "theirs" in options.parts:
        results["about"]["scvi-tools"] = version("scvi-tools")
        for likelihood in ("zinb", "nb"):
            rows = [
                theirs(names, likelihood, options.epochs, seed) for seed in range(options.seeds)
            ]
            results[f"scvi-tools, {likelihood}"] = {"epochs": options.epochs, "seeds": rows}
    write(RESULTS, results)


def ours(names: dict, epochs: int, seed: int) -> dict:
    """log p(x) of the test cells under the tutorial's pair, and what its training took."""
    data, start = names["data"], time.process_time()
    pyro.set_rng_seed(seed)
    pair = names["ScVI"](*data.shape), names["Encoder"](*data.shape)
    how = {"objective": "trace_mean_field_elbo", "compile": False, "progress": False}
    pyrovae.fit(*pair, data, epochs=epochs, lr=RATE, batch_size=BATCH, seed=seed, **how)
    seconds = time.process_time() - start
    ll = pyrovae.log_likelihood(*pair, *data.split("test"), num_samples=SAMPLES, seed=seed)
    return {"log p(x)": ll.mean, "seconds": seconds}


def theirs(names: dict, likelihood: str, epochs: int, seed: int) -> dict:
    """scvi-tools' log p(x) of the test cells, nats per cell, and what its training took."""
    import anndata
    import scvi

    scvi.settings.seed = seed
    data, start = names["data"], time.process_time()
    parts = {}
    for split in ("train", "test"):
        x, size, batch = (t.numpy() for t in data.split(split))
        parts[split] = anndata.AnnData(x)
        parts[split].obs["size"], parts[split].obs["batch"] = size, batch.astype(str)
    scvi.model.SCVI.setup_anndata(parts["train"], batch_key="batch", size_factor_key="size")
    model = scvi.model.SCVI(
        parts["train"], n_latent=2, n_hidden=64, gene_likelihood=likelihood, dropout_rate=0.0
    )
    quiet = {"enable_progress_bar": False, "accelerator": "cpu", "logger": False}
    model.train(max_epochs=epochs, train_size=1.0, batch_size=BATCH, **quiet)
    seconds = time.process_time() - start
    with torch.no_grad():
        found = model.get_marginal_ll(parts["test"], n_mc_samples=SAMPLES, n_mc_samples_per_pass=50)
    return {"log p(x)": float(found), "seconds": seconds}


if __name__ == "__main__":
    main()
