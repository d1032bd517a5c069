"""Imputation: MIWAE's protocol, a table of mixed columns with gaps, and an exact conditional.

    python benchmarks/imputation.py [--parts exact cancer flchain] [--seeds 5] [--epochs 200]

Parts that are done are kept in benchmarks/results/imputation.json; a part that is run again is
replaced. The table of mixed columns, flchain.arff, is looked for in --tables.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from sklearn.datasets import load_breast_cancer
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer
from tables import machine, write

import pyrovae
from pyrovae.data import Dataset, Splits
from pyrovae.guides.mean_field import MeanField
from pyrovae.guides.table import Table as TableGuide
from pyrovae.models.gaussian import Gaussian
from pyrovae.models.linear_gaussian import LinearGaussian
from pyrovae.models.table import Table

HOME = Path(__file__).resolve().parent
RESULTS = HOME / "results" / "imputation.json"
RIVALS = {
    "IterativeImputer": lambda seed: IterativeImputer(max_iter=20, random_state=seed, tol=1e-2),
    "KNNImputer": lambda seed: KNNImputer(),
    "mean": lambda seed: SimpleImputer(),
}
KINDS = {
    "kappa": "positive",
    "lambda": "positive",
    "creatinine": "positive",
    "futime": "count",
    "sample.yr": "ordinal",
    "flc.grp": "ordinal",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", default=["exact", "cancer", "flchain"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--tables", type=Path, default=Path("../shared/data/tables"))
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for part in options.parts:
        rows = {"exact": exact, "cancer": cancer, "flchain": flchain}[part](options)
        for found in rows:
            results = {"about": machine(), **results, part: found}
            write(RESULTS, results)
            print(part, found, flush=True)


def cancer(options):
    """Half of the entries of 569 x 30 real numbers missing completely at random.

    The data are standardized, the training data are those to impute, and the error is the mean
    square over missing entries, of single imputation: Mattei and Frellsen (arXiv 1812.02633),
    section 5.3. A standard normal prior of 10 dimensions, networks of two hidden layers of 128 Tanh
    units, K = 20 in training, 1,000 samples to impute with.
    """
    x = load_breast_cancer().data
    x = torch.tensor((x - x.mean(0)) / x.std(0)).float()
    rows = []
    for seed in range(options.seeds):
        mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) >= 0.5
        holes, row = torch.where(mask, x, torch.nan), {"seed": seed}
        data = Dataset("cancer", x.shape[1:], holes.nan_to_num(0), context=Splits((mask,), (), ()))
        pyro.set_rng_seed(seed)
        networks = {"latent": 10, "hidden": (128, 128), "activation": "Tanh"}
        pair = Gaussian(data.shape, **networks), MeanField(data.shape, **networks)
        start = time.process_time()
        pyrovae.fit(
            *pair,
            data,
            objective="iwae",
            particles=20,
            epochs=options.epochs,
            batch_size=64,
            seed=seed,
            compile=False,
        )
        found = pyrovae.impute(*pair, holes, num_samples=1000, seed=seed)
        row["pyrovae"] = error(found.mean, x, mask)
        row["seconds"] = time.process_time() - start
        row["median ESS of 1,000"] = found.ess.median().item()
        for name, make in RIVALS.items():
            filled = torch.tensor(make(seed).fit_transform(holes.double().numpy()))
            row[name] = error(filled, x, mask)
        rows.append(row)
        yield {"epochs": options.epochs, "rows": rows}


def error(filled, x, mask) -> float:
    """The mean square error over missing entries."""
    return (filled - x)[~mask].square().mean().item()


def flchain(options):
    """11 mixed columns, 7,874 rows with gaps: log p(x) of what is observed, and hidden cells.

    A tenth of the observed cells of the test rows are hidden; rivals see codes as numbers, and
    round what they find.
    """
    data = pyrovae.load_data(options.tables / "flchain.arff", missing="mask", columns=KINDS)
    pyro.set_rng_seed(0)
    pair = Table(data.shape, data.columns), TableGuide(data.shape, data.columns)
    epochs = max(1, options.epochs // 5)
    start = time.process_time()
    pyrovae.fit(*pair, data, epochs=epochs, batch_size=256, lr=3e-3, seed=0, compile=False)
    seconds = time.process_time() - start
    x, mask = data.split("test")
    ll = pyrovae.log_likelihood(*pair, x, mask, num_samples=500, seed=0)
    hidden = mask & (torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.1)
    holes = torch.where(mask & ~hidden, x, torch.nan)
    ways = {"pyrovae": pyrovae.impute(*pair, holes, num_samples=500, seed=0).filled}
    train = torch.where(data.context.train[0], data.train, torch.nan).double().numpy()
    for name, make in RIVALS.items():
        ways[name] = torch.tensor(make(0).fit(train).transform(holes.double().numpy()))
    scores = {name: _cells(filled, x, hidden, data.columns) for name, filled in ways.items()}
    yield {
        "epochs": epochs,
        "seconds": seconds,
        "log p(x observed)": ll.mean,
        "±": ll.mean_standard_error,
        "± over data": ll.data_standard_error,
        "k-hat > 0.7": (ll.khat > 0.7).double().mean().item(),
        "cells": scores,
    }


def _cells(filled, x, hidden, columns) -> dict[str, float]:
    """Of numbers the root mean square error over their deviation; of categories the share wrong."""
    found = {}
    for j, column in enumerate(columns):
        at = hidden[:, j]
        one, other = filled[at, j].double(), x[at, j].double()
        if column.categories:
            found[column.name] = (one.round() != other).double().mean().item()
        else:
            rms = (one - other).square().mean().sqrt()
            found[column.name] = (rms / x[:, j].double().std()).item()
    return found


def exact(options):
    """A linear-Gaussian model, whose missing entries have a known conditional.

    Errors over stated errors: their mean square is 1 where what is stated is right.
    """
    pyro.set_rng_seed(0)
    n, d = 200, 8
    model = LinearGaussian((d,), 3, scale=0.6)
    with torch.no_grad():
        model.decoder.last.weight.normal_(0, 1)
    x = pyrovae.sample(model, like=torch.zeros(1, d), n=n, seed=1)
    mask = torch.rand(x.shape) > 0.5
    guide = _Wider(model)
    found = pyrovae.impute(model, guide, x, mask, num_samples=5000, num_draws=1000, seed=0)
    ais = pyrovae.annealed_log_likelihood(
        model, guide, x.masked_fill(~mask, 0), mask, num_chains=32, num_temperatures=50, seed=0
    )
    weight, bias = (
        p.detach().double() for p in (model.decoder.last.weight, model.decoder.last.bias)
    )
    cov = weight @ weight.mT + model.scale.detach().double() ** 2 * torch.eye(d).double()
    means, log_prob, spread = torch.zeros(n, d).double(), torch.zeros(n).double(), []
    for i in range(n):
        o, m = mask[i], ~mask[i]
        rest = x[i, o].double() - bias[o]
        gain = cov[m][:, o] @ torch.linalg.inv(cov[o][:, o])
        means[i, m] = bias[m] + gain @ rest
        if o.any():
            log_prob[i] = dist.MultivariateNormal(bias[o], cov[o][:, o]).log_prob(x[i, o].double())
        inner = cov[m][:, m] - gain @ cov[o][:, m]
        spread += (found.draws[:, i, m].double().var(0) / inner.diagonal()).tolist()
    z = {
        "mean": ((found.mean - means) / found.standard_error)[~mask],
        "log p(x observed)": (found.log_likelihood.log_prob - log_prob)
        / found.log_likelihood.standard_error,
        "log p(x observed), annealed": (ais.log_prob - log_prob) / ais.standard_error,
    }
    rows = [
        {"of": name, "mean square": v.square().mean().item(), "largest": v.abs().max().item()}
        for name, v in z.items()
    ]
    yield {"data": n, "rows": rows, "variance of draws over the exact one": float(np.mean(spread))}


class _Wider(PyroModule):
    """The exact posterior given what is observed, its covariance one and a half times as large."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, mask):
        weight, bias = self.model.decoder.last.weight, self.model.decoder.last.bias
        seen = mask.to(x) / self.model.scale**2
        outer = torch.einsum("nd,di,dj->nij", seen, weight, weight)
        cov = torch.linalg.inv(torch.eye(weight.shape[1]) + outer)
        loc = torch.einsum("nij,dj,nd->ni", cov, weight, seen * (x - bias))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, 1.5 * cov))


if __name__ == "__main__":
    main()
