"""Time of a training step: hand-written PyTorch, Pyro, and this project, interleaved.

    python benchmarks/speed.py [--rounds 30] [--threads 2]

Every contender goes from uint8 images to updated weights: gather, binarize, estimator B, Adam at
1e-3. They take turns, four steps at a time, and the median over all their steps counts, so that
what else the machine does falls on all alike. All are first trained for 200 steps from the same
weights, and must have reached the same loss. Writes results/speed.json, in milliseconds a step.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import pyro
import torch
from pyro.infer import JitTraceMeanField_ELBO, TraceMeanField_ELBO
from tables import machine, show, write
from torch import Tensor

import pyrovae
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.bernoulli import Bernoulli
from pyrovae.seeding import seeded

RESULTS = Path(__file__).resolve().parent / "results" / "speed.json"
SHAPE, IMAGES, LR = (1, 28, 28), 10_000, 1e-3
SIZES = [(20, (400,), 128), (20, (400,), 512), (50, (200, 200), 20), (50, (200, 200), 100)]
SIZES.append((50, (200, 200), 1000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = [measure(*size, options.rounds) for size in SIZES]
    show([{"networks": row["networks"], "batch": row["batch"]} | row["milliseconds"]
          for row in sizes], ".2f")  # fmt: skip
    write(RESULTS, {"about": {"rounds": options.rounds} | machine(), "sizes": sizes})


def measure(latent: int, hidden: tuple[int, ...], batch: int, rounds: int) -> dict:
    """One row of the table."""
    images = _images()
    steps = {n: make(latent, hidden) for n, make in CONTENDERS.items()}
    losses = {name: _train(step, images, batch) for name, step in steps.items()}
    low, high = min(losses.values()), max(losses.values())
    if high - low > 0.02 * abs(low):
        raise SystemExit(f"Not the same training: {losses}")
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            for index in torch.randint(IMAGES, (4, batch)):
                started = time.perf_counter()
                step(_binary(images, index))
                times[name].append(1e3 * (time.perf_counter() - started))
    widths = "-".join(map(str, (784, *hidden, latent)))
    spread = {n: [round(q, 3) for q in quantiles(t, n=10)[::8]] for n, t in times.items()}
    return {
        "networks": widths,
        "batch": batch,
        "milliseconds": {name: median(values) for name, values in times.items()},
        "deciles 1 and 9": spread,
        "loss after 200 steps": losses,
    }


def _images() -> Tensor:
    with seeded(0):
        blobs = torch.nn.functional.interpolate(
            torch.rand(IMAGES, 1, 4, 4), size=28, mode="bicubic"
        )
    return (255 * blobs.clamp(0, 1)).to(torch.uint8)


def _binary(images: Tensor, index: Tensor) -> Tensor:
    x = images[index].float() / 255
    return (torch.rand_like(x) < x).float()


def _train(step: Callable, images: Tensor, batch: int) -> float:
    with seeded(1):
        losses = [step(_binary(images, index)) for index in torch.randint(IMAGES, (200, batch))]
    return sum(float(loss) for loss in losses[-20:]) / 20 / batch


def _pair(latent: int, hidden: tuple[int, ...]) -> tuple[Bernoulli, MeanField]:
    with seeded(2):
        return Bernoulli(SHAPE, latent, hidden[::-1]), MeanField(SHAPE, latent, hidden)


def _adam(parameters: object) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=LR, fused=True)


class Plain(torch.nn.Module):
    """The hand-written step: same networks, closed-form KL, no handlers."""

    def __init__(self, latent: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        model, guide = _pair(latent, hidden)
        self.decoder, self.encoder = copy.deepcopy(model.decoder), copy.deepcopy(guide.encoder)

    def forward(self, x: Tensor) -> Tensor:
        loc, log_scale = self.encoder(x).unbind(-2)
        z = loc + log_scale.exp() * torch.randn_like(loc)
        kl = 0.5 * (loc.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).sum()
        logits = self.decoder(z)
        bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        return bce + kl


def hand(latent: int, hidden: tuple[int, ...], compiled: bool = False) -> Callable:
    net = Plain(latent, hidden)
    optimizer = _adam(net.parameters())
    loss_of = torch.compile(net) if compiled else net

    def step(x: Tensor) -> Tensor:
        loss = loss_of(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def hand_compiled(latent: int, hidden: tuple[int, ...]) -> Callable:
    return hand(latent, hidden, compiled=True)


def by_pyro(latent: int, hidden: tuple[int, ...]) -> Callable:
    return _own_store(latent, hidden, TraceMeanField_ELBO())


def by_pyro_jit(latent: int, hidden: tuple[int, ...]) -> Callable:
    return _own_store(latent, hidden, JitTraceMeanField_ELBO(ignore_jit_warnings=True))


def _own_store(latent: int, hidden: tuple[int, ...], loss: object) -> Callable:
    """A step of Pyro's own SVI; its parameters live in a store that no other contender sees."""
    model, guide = _pair(latent, hidden)
    store = pyro.get_param_store()
    state: dict = {"params": {}, "constraints": {}}
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": LR}), loss)

    def step(x: Tensor) -> float:
        store.clear()
        store.set_state(state)
        loss = svi.step(x)
        state.update(store.get_state())
        return loss

    return step


def ours(latent: int, hidden: tuple[int, ...], compiled: bool = False) -> Callable:
    svi = pyrovae.SVI(*_pair(latent, hidden), _adam, TraceMeanField_ELBO(), compile=compiled)
    return lambda x: svi.update(x).loss


def ours_compiled(latent: int, hidden: tuple[int, ...]) -> Callable:
    return ours(latent, hidden, compiled=True)


CONTENDERS: dict[str, Callable] = {
    "hand-written": hand,
    "hand-written, torch.compile": hand_compiled,
    "Pyro SVI": by_pyro,
    "Pyro SVI, JIT": by_pyro_jit,
    "pyrovae, eager": ours,
    "pyrovae, compiled": ours_compiled,
}


if __name__ == "__main__":
    main()
