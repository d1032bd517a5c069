"""The README's picture: what comes out of the default pair on MNIST.

    python benchmarks/first_figure.py [--data mnist] [--epochs 10]

Trains bernoulli × mean_field (784-400-20, dynamic binarization), and draws samples,
reconstructions, the map of posterior means, and what log p(x) of 64 test images is by importance
sampling and by annealing, into docs/figures/first.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyro
import torch
from elbo_figure import STYLE
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

import pyrovae
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.bernoulli import Bernoulli

PATH = Path(__file__).resolve().parents[1] / "docs" / "figures" / "first.png"
BLUE, ORANGE, GAP = "#1f5fa8", "#d1700f", 2
IMAGES, POINTS, SAMPLES = 64, 2000, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    data = pyrovae.load_data(options.data, binarize="dynamic")
    pyro.set_rng_seed(0)
    pair = Bernoulli(data.shape), MeanField(data.shape)
    pyrovae.fit(*pair, data, objective="trace_mean_field_elbo", epochs=options.epochs, seed=0)
    x = data.test[:IMAGES]
    ll = pyrovae.log_likelihood(*pair, x, num_samples=SAMPLES, seed=0)
    ais = pyrovae.annealed_log_likelihood(*pair, x, num_chains=8, num_temperatures=300, seed=0)
    print(f"ELBO {ll.curve.mean[1]:.2f}, log p(x) {ll.mean:.2f}, annealed {ais.mean:.2f}")
    with style.context(["default", STYLE]), torch.no_grad():
        figure = Figure((12, 3.6), dpi=150, layout="constrained")
        panels = figure.subplots(1, 4, width_ratios=(1, 1, 1.15, 1.15))
        drawn = pyrovae.sample(pair[0], like=x, n=64, mean=True, seed=0)
        again = pyrovae.reconstruct(*pair, x[:32], seed=0)
        pairs = torch.stack([x[:32].unflatten(0, (4, 8)), again.unflatten(0, (4, 8))], 1)
        _mosaic(panels[0], drawn, "samples from p(x)")
        _mosaic(panels[1], pairs.flatten(0, 2), "test data, and E[x | z] below each")
        _map(panels[2], pair[1], data)
        _evidence(panels[3], ll, ais)
        PATH.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(PATH, metadata={"Software": None})


def _mosaic(axes: Axes, images: torch.Tensor, title: str) -> None:
    """64 images ``[64, 1, H, W]``, eight in a row."""
    cells = torch.nn.functional.pad(images[:, 0], (GAP, GAP, GAP, GAP))
    rows = cells.unflatten(0, (8, 8)).transpose(1, 2).flatten(2).flatten(0, 1)
    axes.imshow(rows, cmap="gray_r", vmin=0, vmax=1, interpolation="none")
    axes.set_title(title)
    axes.set_axis_off()


def _map(axes: Axes, guide: MeanField, data: pyrovae.Dataset) -> None:
    codes = pyrovae.encode(guide, data.test[:POINTS], seed=0)["z"]
    place, labels = PCA(2).fit_transform(codes), data.labels.test[:POINTS].numpy()
    colours = colormaps["tab10"].colors
    for digit in np.unique(labels):
        at = labels == digit
        axes.scatter(*place[at].T, s=4, color=colours[digit], linewidths=0)
        axes.annotate(str(digit), np.median(place[at], 0), weight="bold", ha="center", va="center")
    axes.set_title("posterior means E[z | x], two axes")
    axes.set_axis_off()


def _evidence(axes: Axes, ll: pyrovae.LogLikelihood, ais: pyrovae.LogLikelihood) -> None:
    k, bound = zip(*ll.curve.mean.items(), strict=True)
    axes.plot(k, bound, "o-", color=BLUE, markersize=3.5)
    low, high = (ais.mean + s * ais.mean_standard_error for s in (-2, 2))
    axes.axhspan(low, high, color=ORANGE, alpha=0.25, linewidth=0)
    axes.axhline(ais.mean, color=ORANGE, linewidth=1)
    beside = {"textcoords": "offset points", "va": "center"}
    axes.annotate("the ELBO", (k[0], bound[0]), (8, 0), color=BLUE, **beside)
    axes.annotate("importance sampling", (k[2], bound[2]), (6, -9), color=BLUE, **beside)
    axes.annotate("annealed importance sampling", (k[0], ais.mean), (0, -9), color=ORANGE, **beside)
    poor = (ll.khat > 0.7).float().mean()
    axes.set(xscale="log", xlabel="K", title=f"log p(x), nats; k-hat > 0.7 for {poor:.0%}")


if __name__ == "__main__":
    main()
