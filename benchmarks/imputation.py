"""Imputation: MIWAE's protocol, a table of mixed columns with gaps, and an exact conditional.

    python benchmarks/imputation.py [--parts exact cancer flchain] [--seeds 5] [--epochs 200]

Parts that are done are kept in benchmarks/results/imputation.json; a part that is run again is
replaced. The table of mixed columns, flchain.arff, is looked for in --tables, by default the folder
tables/ of PYROVAE_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
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
HIDDEN = 0.15
KINDS = {
    "kappa": "positive",
    "lambda": "positive",
    "creatinine": "positive",
    "sample.yr": "ordinal",
    "flc.grp": "ordinal",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", default=["exact", "cancer", "flchain"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", default=["file", "stated"], help="of flchain")
    parser.add_argument("--epochs", type=int, default=200)
    folder = Path(os.environ.get("PYROVAE_DATA", ".")) / "tables"
    parser.add_argument("--tables", type=Path, default=folder)
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

    Of the observed cells of the test rows 15% are hidden, a seed being that of the cells, the
    weights and the noise; all learn from the training rows as they are. The kinds of the columns
    are those of the file's types, or as many as KINDS says. The epoch is chosen on the validation
    rows. Rivals get numbers that are standardized by the training rows. KNNImputer gets a number
    for each category; so does IterativeImputer for categories without an order, and codes for
    others, as it would learn that the numbers of one column add up to 1, and change none.
    """
    rows, told = [], {}
    for kinds in [{"file": {}, "stated": KINDS}[name] for name in options.kinds]:
        data = pyrovae.load_data(options.tables / "flchain.arff", missing="mask", columns=kinds)
        x, mask = data.split("test")
        kind_of = {column.name: column.kind for column in data.columns}
        told["kinds_stated" if kinds else "kinds_of_file"] = kind_of
        for seed in range(options.seeds):
            hidden = mask & (torch.rand(x.shape, generator=_stream(seed)) < HIDDEN)
            holes = torch.where(mask & ~hidden, x, torch.nan)
            pyro.set_rng_seed(seed)
            pair = Table(data.shape, data.columns), TableGuide(data.shape, data.columns)
            start = time.process_time()
            fit = pyrovae.fit(
                *pair, data, objective="iwae", particles=10, epochs=options.epochs, batch_size=128,
                lr=2e-3, schedule="cosine", lr_warm_up=1, patience=options.epochs,
                valid_samples=10, seed=seed, compile=False,
            )  # fmt: skip
            row = {"kinds": "stated" if kinds else "from the file", "seed": seed}
            row |= {"epochs": len(fit.history), "seconds": time.process_time() - start}
            ll = pyrovae.log_likelihood(*pair, x, mask, num_samples=1000, seed=seed)
            row |= {"log p": ll.mean, "±": ll.mean_standard_error}
            row |= {"± over data": ll.data_standard_error}
            row["k-hat > 0.7"] = (ll.khat > 0.7).double().mean().item()
            found = pyrovae.impute(*pair, holes, num_samples=1000, seed=seed)
            ways = {"pyrovae": found.filled} | ({} if kinds else _rivals(data, holes, seed))
            row["cells"] = {
                name: _cells(filled, x, hidden, data.columns) for name, filled in ways.items()
            }
            rows.append(row)
            sizes = {"train": len(data.train), "test": len(x), "hidden": HIDDEN}
            yield {**sizes, **told, "rows": rows}


def _rivals(data, holes, seed) -> dict[str, torch.Tensor]:
    """What others find in the holes ``[N, D]`` of test rows."""
    ordered = {name for name, kind in KINDS.items() if kind == "ordinal"}
    coded = {c.name for c in data.columns if c.kind == "binary" or c.name in ordered}
    found = {
        "IterativeImputer": _filled(RIVALS["IterativeImputer"](seed), data, holes, coded),
        "KNNImputer": _filled(RIVALS["KNNImputer"](seed), data, holes, set()),
    }
    return found | {"mean": _middles(data, holes)}


def _stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _units(x, data, coded) -> np.ndarray:
    """Numbers standardized, and one for each category of a column that is not coded; NaN stays."""
    parts = []
    for j, column in enumerate(data.columns):
        value = x[:, j, None].double().numpy()
        if column.categories and column.name not in coded:
            codes = np.arange(len(column.categories))
            parts.append(np.where(np.isnan(value), np.nan, value == codes))
        else:
            parts.append((value - column.loc) / column.scale)
    return np.concatenate(parts, 1)


def _filled(imputer, data, holes, coded) -> torch.Tensor:
    """What an imputer finds, as numbers of the file and codes of the likeliest categories."""
    train = torch.where(data.context.train[0], data.train, torch.nan)
    found = imputer.fit(_units(train, data, coded)).transform(_units(holes, data, coded))
    columns, start = [], 0
    for column in data.columns:
        width = 1 if column.name in coded else max(1, len(column.categories))
        part = found[:, start : start + width]
        start += width
        if column.name in coded:
            columns.append(part[:, 0].round().clip(0, len(column.categories) - 1))
        elif column.categories:
            columns.append(part.argmax(1))
        else:
            columns.append(part[:, 0] * column.scale + column.loc)
    return torch.tensor(np.stack(columns, 1))


def _middles(data, holes) -> torch.Tensor:
    """The mean of each number, and the most frequent category."""
    filled = holes.double().clone()
    for j, column in enumerate(data.columns):
        seen = data.train[data.context.train[0][:, j], j].double()
        middle = seen.mode().values if column.categories else seen.mean()
        filled[:, j] = torch.where(filled[:, j].isnan(), middle, filled[:, j])
    return filled


def _cells(filled, x, hidden, columns) -> dict[str, float]:
    """Of numbers the root mean square error over their deviation; of categories the share wrong."""
    found = {}
    for j, column in enumerate(columns):
        at = hidden[:, j]
        one, other = filled[at, j].double(), x[at, j].double()
        if column.categories:
            found[column.name] = (one.round() != other).double().mean().item()
        else:
            # Over that of the same cells, so that 1 is what their own mean would have.
            rms = (one - other).square().mean().sqrt()
            found[column.name] = (rms / other.std(correction=0)).item()
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
