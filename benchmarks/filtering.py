"""Particle filters beside importance sampling and annealing, at the CPU seconds that each takes.

    PYROVAE_DATA=folder python benchmarks/filtering.py [--only linear chorales]

Two pairs whose latents are a chain: a linear-Gaussian walk of 100 steps, with the exact posterior's
chain but wider steps for a guide, against the exact value; and `sequence` on the first 48 quarters
of the chorales, trained for few epochs, where nothing is exact and the highest estimate in the mean
is the closest, as all of them are lower bounds. Writes results/filtering.json, in nats.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import torch
from sequences import optimizer, pair, shortened
from tables import machine, show, write
from torch import Tensor, nn

import pyrovae
from pyrovae.distributions import MarkovNormal

RESULTS = Path(__file__).resolve().parent / "results" / "filtering.json"
# z_t = A z_{t-1} + S ε, x_t = z_t + R ε; steps and sequences.
A, S, R, T, N = 0.8, 0.6, 0.5, 100, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="of each estimate, with other seeds")
    parser.add_argument("--epochs", type=int, default=30, help="of the pair on the chorales")
    parser.add_argument("--pair", type=Path, help="a file to keep that pair in, or to take it from")
    parts = {"linear": linear, "chorales": chorales}
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    for name in options.only:
        rows = parts[name](options)
        results[name] = {"runs": options.runs, "rows": rows} | machine()
        write(options.out, results)
        show(rows, ".3f")


class Step(nn.Module):
    """The walk, or its posterior's steps from precisions and shifts to come, but wider."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        self.width = width

    def forward(self, z: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        precision, shift = given[0].chunk(2, -1) if given else (torch.zeros(1), torch.zeros(1))
        total = 1 / S**2 + precision
        return (A * z / S**2 + shift) / total, self.width * total.rsqrt().expand_as(z)


def linear(options: argparse.Namespace) -> list[dict]:
    """Against the exact log p(x), for a guide that is a tenth and three tenths too wide."""
    torch.manual_seed(0)
    start, lags = torch.zeros(1), torch.arange(T)
    with torch.no_grad():
        z = MarkovNormal(Step(), start, (N, T)).sample()
    x = z + R * torch.randn_like(z)
    gain = torch.tril(A ** (lags[:, None] - lags).clamp(min=0).double())
    covariance = S**2 * gain @ gain.T + R**2 * torch.eye(T)
    exact = dist.MultivariateNormal(torch.zeros(T).double(), covariance).log_prob(
        x[..., 0].double()
    )

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", MarkovNormal(walk, start, x.shape[:2]).to_event(1))
            pyro.sample("x", dist.Normal(z, R).to_event(2), obs=x)

    def guide(x: Tensor) -> None:
        precision, shift, found = x.new_zeros(len(x), 1), x.new_zeros(len(x), 1), []
        for each in reversed(x.unbind(1)):
            less = 1 + S**2 * precision
            precision, shift = 1 / R**2 + A**2 * precision / less, each / R**2 + A * shift / less
            found.append(torch.cat([precision, shift], -1))
        chain = MarkovNormal(back, start, x.shape[:2], torch.stack(found[::-1], 1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", chain.to_event(1))

    walk, rows = Step(), []
    for width in (1.1, 1.3):
        back = Step(width)
        for row, runs in estimates(model, guide, (x,), options.runs, (1000, 5000)):
            error = (runs - exact).square().mean().sqrt().item()
            rows.append({"guide": f"{width} times as wide"} | row | {"off by": error})
    return rows


def chorales(options: argparse.Namespace) -> list[dict]:
    """By the mean over the first validation chorales, nats per quarter."""
    data = shortened(pyrovae.load_data("jsb"), None, 48)
    small = SimpleNamespace(latent=16, hidden=64, flows=0, lr=1e-2, decay=0.2)
    model, guide = pair(data, small)
    if options.pair is not None and options.pair.exists():
        for part, state in zip((model, guide), torch.load(options.pair), strict=True):
            part.load_state_dict(state)
    else:
        pyrovae.fit(
            model, guide, data, objective=pyrovae.objectives.BetaELBO(warm_up=100),
            epochs=options.epochs, batch_size=20, schedule="cosine", lr_warm_up=5, clip_norm=1e4,
            optimizer=partial(optimizer, model.decoder.last.weight, small), compile=False, seed=0,
        )  # fmt: skip
    if options.pair is not None:
        torch.save([part.state_dict() for part in (model, guide)], options.pair)
    rows = tuple(each[:8] for each in data.split("valid"))
    quarters = int(rows[1][..., 0].sum())
    return [
        row | {"log p": runs.sum(1).mean().item() / quarters, "sd": runs.std(0).mean().item()}
        for row, runs in estimates(model, guide, rows, options.runs, (1000,))
    ]


def estimates(
    model: Callable, guide: Callable, rows: tuple, runs: int, samples: tuple[int, ...]
) -> list[tuple]:
    """Each way's CPU seconds, and its estimates of so many runs ``[R, N]``."""
    ways = {
        f"importance sampling, K = {k:,}": partial(pyrovae.log_likelihood, num_samples=k)
        for k in samples
    } | {
        "annealing, 8 chains, 8 temperatures": partial(
            pyrovae.annealed_log_likelihood, num_chains=8, num_temperatures=8
        ),
        "10 filters of 50 particles": partial(
            pyrovae.filtered_log_likelihood, num_filters=10, num_particles=50
        ),
        "10 filters of 200 particles": partial(
            pyrovae.filtered_log_likelihood, num_filters=10, num_particles=200
        ),
    }
    found = []
    for name, way in ways.items():
        times, logs = [], []
        for seed in range(runs):
            started = time.process_time()
            logs.append(way(model, guide, *rows, seed=seed).log_prob)
            times.append(time.process_time() - started)
        found.append(({"estimate": name, "CPU seconds": median(times)}, torch.stack(logs)))
        print(f"{name}: {median(times):.2f} s", flush=True)
    return found


if __name__ == "__main__":
    main()
