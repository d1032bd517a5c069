"""Every shipped program: the two lines that matter, log p(x), and a picture of samples.

    PYROVAE_DATA=folder python benchmarks/gallery.py [--epochs 5] [--only NAME ...]

One protocol for all: 50,000 training images of MNIST (drawn shapes for programs of colour images),
batch 128, Adam at 1e-3 unless a row says otherwise, the same seed; log p(x) by importance sampling
on the first test images, each program beside the first of its group on the same images. Rows that
are done under the same protocol are kept, so that a stopped run goes on where it was. Writes
results/gallery.json and docs/figures/gallery/, in nats per datum.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gallery_rows import ROWS, Row
from tables import machine, show, write
from torch import Tensor

import pyrovae
from pyrovae._tools.seeding import seeded
from pyrovae.objectives import make_objective
from pyrovae.reporting import sample_picture
from pyrovae.reporting.figures import image_grid, png
from pyrovae.runs.programs import find_program

HOME = Path(__file__).resolve().parent
RESULTS = HOME / "results" / "gallery.json"
FIGURES = HOME.parent / "docs" / "figures" / "gallery"
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=1000, help="test images for log p(x)")
    parser.add_argument("--samples", type=int, default=1000, help="K of the estimate of log p(x)")
    parser.add_argument("--limit", type=int, help="so many training images, for a trial")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="train these rows alone")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    options = parser.parse_args()
    protocol = {k: getattr(options, k) for k in ("epochs", "images", "samples", "limit", "device")}
    about = {"protocol": protocol, "training": "batch 128, Adam 1e-3", "seed": SEED} | machine()
    kept, about = _kept(options.out, about)
    rows = [row for row in ROWS if not options.only or row.name in options.only]
    for row in sorted(rows, key=lambda row: row.heavy):
        if row.name in kept:
            continue
        print(f"{row.name}: {row.model} and {row.guide}", flush=True)
        kept[row.name] = run(row, options, protocol, kept)
        ordered = {r.name: kept[r.name] for r in ROWS if r.name in kept}
        write(options.out, {"about": about, "rows": ordered})
    show([{"name": n, "log p(x)": r["log p(x)"], "±": r["±"], "ELBO": r["ELBO"]}
          for n, r in kept.items()], ".2f")  # fmt: skip


def _kept(path: Path, about: dict[str, Any]) -> tuple[dict[str, dict], dict[str, Any]]:
    """The rows of the same protocol that are done, and what is said of all."""
    if not path.exists():
        return {}, about
    found = json.loads(path.read_text(encoding="utf-8"))
    same = found["about"]["protocol"] == about["protocol"]
    return (found["rows"], found["about"]) if same else ({}, about)


def run(row: Row, options: argparse.Namespace, protocol: dict, kept: dict[str, dict]) -> dict:
    """Train one pair, measure it, and draw its samples."""
    data = _data(row, options.limit).to(options.device)
    model, guide = _pair(row, data)
    started = time.perf_counter()
    epochs = row.epochs or options.epochs
    fit = pyrovae.fit(
        model,
        guide,
        replace(data, valid=None),
        objective=make_objective(row.objective, row.particles, **row.options),
        epochs=epochs,
        lr=row.lr,
        compile=row.heavy or "auto",
        seed=SEED,
        device=options.device,
    )
    seconds = time.perf_counter() - started
    images, samples = row.images or options.images, row.samples or options.samples
    x = tuple(tensor[:images] for tensor in data.split("test"))
    bound = pyrovae.elbo(model, guide, *x, particles=10, batch_size=100, seed=SEED)
    ll = pyrovae.log_likelihood(model, guide, *x, num_samples=samples, seed=SEED)
    options.figures.mkdir(parents=True, exist_ok=True)
    if row.group == "colour":
        figure = _colours(model, guide, x[0][:12])
    else:
        figure = sample_picture(model, *(t[:16] for t in x), n=16, seed=SEED)
    (options.figures / f"{row.name}.png").write_bytes(png(figure))
    found = {
        "epochs": epochs,
        "lr": row.lr,
        "training images": len(data.train),
        "test images": len(x[0]),
        "samples": samples,
        "seconds": seconds,
        "train loss": fit.history[-1]["train_loss"],
        "ELBO": bound.mean,
        "log p(x)": ll.mean,
        "±": ll.data_standard_error,
        "Monte Carlo ±": ll.mean_standard_error,
        "k-hat > 0.7": ll.khat.gt(0.7).double().mean().item(),
        "bits per dimension": -ll.mean / math.log(2) / x[0][0].numel() if row.bits else None,
    }
    # Rows may be done one by one, and not all where the first ones were.
    return found | _against(row, ll.log_prob, options.out) | {"machine": machine()}


def _colours(model: Any, guide: Any, x: Tensor) -> Any:
    """Twelve data, their reconstructions and as many samples: a grid of six columns."""
    xhat = pyrovae.reconstruct(model, guide, x, seed=SEED)
    drawn = pyrovae.sample(model, like=x, n=len(x), mean=True, seed=SEED)
    title = "Two rows each: data, reconstructions, and E[x | z] with z from the prior"
    return image_grid(torch.cat([x, xhat, drawn]).clamp(0, 1), title=title)


def _data(row: Row, limit: int | None) -> pyrovae.Dataset:
    data = pyrovae.load_data(row.source, binarize=row.binarize, **row.data)
    if row.counts:
        counted = {n: (row.counts * getattr(data, n)).round() for n in ("train", "valid", "test")}
        data = replace(data, **counted)
    rows = min(n for n in (limit, row.limit, len(data.train)) if n is not None)
    first = {n: t[:rows] for n in ("train", "intensities") if (t := getattr(data, n)) is not None}
    context = data.context and data.context._replace(
        train=tuple(t[:rows] for t in data.context.train)
    )
    return replace(data, context=context, **first)


def _pair(row: Row, data: pyrovae.Dataset) -> tuple[Any, Any]:
    shape = tuple(data.shape)
    model, guide = find_program(row.model, "model"), find_program(row.guide, "guide")
    with seeded(SEED):
        made = guide.build(shape, row.guide_settings)
        parts = {"guide": made} if "guide" in model.arguments() else {}
        return model.build(shape, row.model_settings, **parts), made


def _against(row: Row, log_prob: Tensor, out: Path) -> dict[str, Any]:
    """The mean difference to the row's base on the same images, with its error."""
    first = row.base or next(r.name for r in ROWS if r.group == row.group)
    folder = out.with_suffix(".cache")
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(log_prob.cpu(), folder / f"{row.name}.pt")
    if row.name == first or not row.comparable or not (folder / f"{first}.pt").exists():
        return {"against": None}
    base = torch.load(folder / f"{first}.pt", weights_only=True)
    size = min(len(base), len(log_prob))
    difference = (log_prob.cpu()[:size] - base[:size]).double()
    error = difference.std().item() / math.sqrt(size)
    return {"against": first, "difference": difference.mean().item(), "± of it": error}


if __name__ == "__main__":
    main()
