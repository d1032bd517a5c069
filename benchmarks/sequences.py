"""The bound and log p per quarter of Bach's chorales, and the time of an epoch beside Pyro's loop.

    PYROVAE_DATA=folder python benchmarks/sequences.py [--epochs E] [--only train time flows ...]

The pair `sequence` on the JSB chorales, trained with a rising weight of the KL and one cosine of
the learning rate; of all epochs the one with the best validation bound is kept, and the test
chorales are looked at once, at the end. The time is that of a pass over the training chorales, in
turns with one of a deep Markov model that samples step after step in Python, of the sizes of
Pyro's tutorial. `--only flows` trains the guide without and with a flow for so many epochs, by the
same recipe, and compares their validation bounds. In nats per quarter, the sum over the chorales
divided by the quarters that they have. Writes results/sequences.json.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from sequences_pyro import epoch_of_pyro
from sequences_tables import PUBLISHED
from tables import machine, show, write
from torch import Tensor
from torch.optim import Optimizer

import pyrovae
from pyrovae.guides.sequence import Sequence as Guide
from pyrovae.models.sequence import Sequence as Model
from pyrovae.optim import Combined

HOME = Path(__file__).resolve().parent
RESULTS = HOME / "results" / "sequences.json"
SEED, BATCH = 0, 20
PARTS = ("train", "time", "flows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=760)
    parser.add_argument("--latent", type=int, default=48)
    parser.add_argument("--hidden", type=int, default=128, help="the width of the guide's networks")
    parser.add_argument("--lr", type=float, default=1e-2, help="Muon's, of all matrices")
    parser.add_argument("--decay", type=float, default=0.2, help="Muon's weight decay")
    parser.add_argument("--samples", type=int, default=1000, help="of log p(x)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of an epoch each")
    parser.add_argument("--sequences", type=int, help="so many of each split, a trial")
    parser.add_argument("--quarters", type=int, help="so many of each sequence, a trial")
    parser.add_argument("--flows", type=int, default=0, help="of the guide that is trained")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=["train", "time"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    data = shortened(pyrovae.load_data("jsb"), options.sequences, options.quarters)
    results = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    for name in options.only:
        measure = {"train": train, "time": timed, "flows": flows}[name]
        kept = f"{name}, flows: {options.flows}" if name == "train" and options.flows else name
        results[kept] = measure(data, options) | machine()
        write(options.out, results)
    rows = [{"what": name, "nats": number} for name, number in PUBLISHED.items()]
    for name, found in results.items():
        if name.startswith("train"):
            rows += [
                {"what": f"{name}: {what}", "nats": found[what]} for what in ("bound", "log p")
            ]
    show(rows, ".3f")


def shortened(data: pyrovae.Dataset, count: int | None, steps: int | None) -> pyrovae.Dataset:
    """The first few sequences of each split, and the first steps of each."""
    parts = {name: getattr(data, name)[:count, :steps] for name in ("train", "valid", "test")}
    masks = (tuple(m[:count, :steps] for m in masks) for masks in data.context)
    return replace(data, context=type(data.context)(*masks), **parts)


def pair(data: pyrovae.Dataset, options: argparse.Namespace) -> tuple[Model, Guide]:
    torch.manual_seed(SEED)
    model = Model(data.shape, options.latent, hidden=(100,))
    mean = data.train.sum((0, 1)) / data.context.train[0].sum((0, 1))
    model.decoder.last.bias.data = mean.logit(eps=1e-3)
    return model, Guide(data.shape, options.latent, options.hidden, options.flows)


def optimizer(last: Tensor, options: argparse.Namespace, parameters: list[Tensor]) -> Optimizer:
    """Muon for matrices but the decoder's last, AdamW for all else."""
    matrices = [p for p in parameters if p.dim() == 2 and p is not last]
    rest = [p for p in parameters if p.dim() != 2 or p is last]
    decay = {"weight_decay": options.decay}
    return Combined(
        torch.optim.Muon(matrices, lr=options.lr, adjust_lr_fn="match_rms_adamw", **decay),
        torch.optim.AdamW(rest, lr=0.3 * options.lr, **decay),
    )


def fitted(data: pyrovae.Dataset, options: argparse.Namespace) -> tuple[pyrovae.Fit, dict]:
    """The trained pair, and its validation bounds."""
    model, guide = pair(data, options)
    steps = -(-len(data.train) // BATCH) * options.epochs
    objective = pyrovae.objectives.BetaELBO(warm_up=max(1, steps // 4))
    started = time.process_time()
    valid = quarters(data.context.valid[0])

    def tell(fit: pyrovae.Fit) -> None:
        last = fit.history[-1]
        bound = fit.elbo * len(data.valid) / valid
        print(f"epoch {last['epoch']}  valid {bound:.3f}  {last['seconds']:.1f} s", flush=True)

    fit = pyrovae.fit(
        model, guide, data, objective=objective, epochs=options.epochs, batch_size=BATCH,
        optimizer=partial(optimizer, model.decoder.last.weight, options),
        schedule="cosine", lr_warm_up=min(5, options.epochs - 1), clip_norm=1e4, average=0.99,
        patience=options.epochs, compile=True, seed=SEED, on_epoch=tell,
    )  # fmt: skip
    best = max(fit.history, key=lambda row: row["valid_elbo"])
    return fit, {
        "epochs": options.epochs,
        "best epoch": best["epoch"],
        "valid bound": best["valid_elbo"] * len(data.valid) / valid,
        "CPU seconds": time.process_time() - started,
        "settings": {
            name: getattr(options, name) for name in ("latent", "hidden", "flows", "lr", "decay")
        },
        "curve": [
            {"epoch": row["epoch"], "valid": row["valid_elbo"] * len(data.valid) / valid}
            for row in fit.history[:: max(1, len(fit.history) // 40)]
        ],
    }


def train(data: pyrovae.Dataset, options: argparse.Namespace) -> dict:
    """Train the pair, and measure it on the test chorales."""
    fit, about = fitted(data, options)
    x, mask = data.split("test")
    count = quarters(mask)
    bound = pyrovae.elbo(fit.model, fit.guide, x, mask, particles=100, seed=SEED)
    found = pyrovae.log_likelihood(
        fit.model, fit.guide, x, mask, num_samples=options.samples, seed=SEED, progress=True
    )
    return about | {
        "quarters": count,
        "bound": bound.elbo.double().sum().item() / count,
        "log p": found.log_prob.sum().item() / count,
        "log p ±": found.standard_error.square().sum().sqrt().item() / count,
        "samples": options.samples,
        "k-hat > 0.7": found.khat.gt(0.7).double().mean().item(),
    }


def flows(data: pyrovae.Dataset, options: argparse.Namespace) -> dict:
    """The guide without a flow and with one, as long each."""
    counts = (argparse.Namespace(**vars(options) | {"flows": count}) for count in (0, 1))
    rows = [fitted(data, each)[1] for each in counts]
    for row in rows:
        row["curve"] = row["curve"][:: max(1, len(row["curve"]) // 10)]
    return {"steps": data.shape[0], "rows": rows}


def timed(data: pyrovae.Dataset, options: argparse.Namespace) -> dict:
    """CPU seconds of an epoch here and of one of Pyro's loop over time, in turns."""
    model, guide = pair(data, options)
    svi = pyrovae.SVI(
        model, guide, partial(torch.optim.AdamW, lr=1e-3), pyrovae.objectives.BetaELBO(),
        compile=True, steps=10_000,
    )  # fmt: skip
    pyro_epoch, ours, theirs = epoch_of_pyro(data), [], []
    epoch_of(svi, data)
    for _ in range(options.rounds):
        for run, times in ((partial(epoch_of, svi, data), ours), (pyro_epoch, theirs)):
            started = time.process_time()
            run()
            times.append(time.process_time() - started)
    return {
        "CPU seconds an epoch": median(ours),
        "Pyro's, the tutorial's network": median(theirs),
        "ratio": median(a / b for a, b in zip(ours, theirs, strict=True)),
        "rounds": [ours, theirs],
    }


def epoch_of(svi: pyrovae.SVI, data: pyrovae.Dataset) -> None:
    for index in torch.randperm(len(data.train)).split(BATCH):
        if len(index) == BATCH:
            svi.update(*data.rows(index))


def quarters(mask: Tensor) -> int:
    return int(mask[..., 0].sum())


if __name__ == "__main__":
    main()
