"""What grows: one size at a time, and the task that is timed at each of its points."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from pyro.infer import TraceMeanField_ELBO
from speed_contenders import BEST
from speed_fit import Beside
from speed_hand import compiled_step
from speed_problem import LR, Problem, make_images
from torch import Tensor

import pyrovae
from pyrovae._tools.seeding import seeded
from pyrovae.guides.mean_field import MeanField
from pyrovae.guides.sequence import Sequence as SequenceGuide
from pyrovae.models.bernoulli import Bernoulli
from pyrovae.models.sequence import Sequence as SequenceModel

__all__ = ["SWEEPS", "Sweep", "Task"]

HAND = BEST


class Task(NamedTuple):
    """What is timed: ``run()`` does so many ``steps``; ``held`` are the tensors that it needs.

    What ``alike`` allocates is counted, if it is given, in place of what ``run`` does.
    """

    run: Callable[[], object]
    steps: int
    held: Callable[[], list[Tensor]]
    alike: Callable[[], object] | None = None


class Sweep(NamedTuple):
    """One size: its values, what a step is, and the tasks at a value, by contender."""

    values: tuple[int, ...]
    unit: str
    tasks: Callable[[int], Iterator[tuple[str, Task]]]


def _binary(*shape: int) -> Tensor:
    with seeded(3):
        return (torch.rand(shape) < 0.3).float()


def _adam(leaves: list[Tensor]) -> torch.optim.Adam:
    # So small that nothing diverges with 65,536 inputs; the time is that of any rate.
    return torch.optim.Adam(leaves, lr=1e-6, fused=True)


def _steps(
    pair: tuple, args: tuple, particles: int = 1, steps: int = 20, compile: bool = False
) -> Task:
    """Steps on one batch; compiling each point would take longer than all else together."""
    many = {"num_particles": particles, "vectorize_particles": True, "max_plate_nesting": 1}
    loss = TraceMeanField_ELBO(**(many if particles > 1 else {}))
    svi = pyrovae.SVI(*pair, _adam, loss, compile=compile)

    def held() -> list[Tensor]:
        state = [t for entry in svi.optimizer.state.values() for t in entry.values()]
        return [*args, *svi.trained.leaves, *state]

    return Task(lambda: [svi.update(*args) for _ in range(steps)], steps, held)


def _pair(shape: tuple[int, ...], latent: int, hidden: tuple[int, ...]) -> tuple:
    with seeded(2):
        return Bernoulli(shape, latent, hidden[::-1]), MeanField(shape, latent, hidden)


def _of_data(n: int) -> Iterator[tuple[str, Task]]:
    """Epochs of ``fit``, one each time; what it allocates is told by one of its own."""
    x = _binary(n, 64)

    def train(after: Callable | None = None, epochs: int = 1) -> None:
        pyrovae.fit(
            *_pair((64,), 10, (100,)), x, objective="trace_mean_field_elbo", epochs=epochs,
            batch_size=128, lr=LR, compile=False, seed=0, on_epoch=after, progress=False,
        )  # fmt: skip

    beside = Beside(partial(train, epochs=100))
    yield "fit", Task(beside.epoch, 1, lambda: [x], train)


def _of_dimensions(d: int) -> Iterator[tuple[str, Task]]:
    yield "step", _steps(_pair((d,), 20, (100,)), (_binary(32, d),), steps=20 if d < 10_000 else 4)


def _of_width(width: int) -> Iterator[tuple[str, Task]]:
    pair = _pair((784,), 20, (width, width))
    yield "step", _steps(pair, (_binary(32, 784),), steps=20 if width < 1000 else 4)


def _of_samples(k: int) -> Iterator[tuple[str, Task]]:
    x, pair = _binary(8, 64), _pair((64,), 10, (50,))
    run = partial(pyrovae.log_likelihood, *pair, x, num_samples=k, seed=0, compile=False)
    yield "log p(x)", Task(run, 1, lambda: [x, *(p for each in pair for p in each.parameters())])


def _of_particles(count: int) -> Iterator[tuple[str, Task]]:
    pair = _pair((784,), 20, (200,))
    yield "step", _steps(pair, (_binary(32, 784),), count, steps=20 if count < 32 else 4)


def _of_batch(m: int) -> Iterator[tuple[str, Task]]:
    pair = _pair((784,), 20, (200,))
    yield "step", _steps(pair, (_binary(m, 784),), steps=20 if m < 1000 else 4)


def _of_sites(sites: int) -> Iterator[tuple[str, Task]]:
    problem, images = Problem("784-200-20", 32, sites=sites, binarize=False), _images()
    rows = torch.arange(problem.batch)
    yield "step", _steps(problem.pair(), (images[rows],), compile=True)
    by_hand = compiled_step(problem, images)
    index = rows.expand(20, -1)
    yield HAND, Task(lambda: by_hand(index), len(index), lambda: [images[rows]])


def _images() -> Tensor:
    return (make_images("cpu") > 127).float()


def _of_time(length: int) -> Iterator[tuple[str, Task]]:
    with seeded(2):
        pair = SequenceModel((length, 16), 8, (32,), 32), SequenceGuide((length, 16), 8, 32)
    x = _binary(16, length, 16)
    yield "step", _steps(pair, (x, torch.ones_like(x, dtype=torch.bool)), steps=4)


SWEEPS: dict[str, Sweep] = {
    "data N": Sweep((1_024, 4_096, 16_384, 65_536), "an epoch of `fit`, eager", _of_data),
    "dimensions D": Sweep((64, 512, 4_096, 16_384, 65_536), "a step, eager", _of_dimensions),
    "width": Sweep((50, 100, 200, 400, 800, 1_600), "a step, eager", _of_width),
    "samples K": Sweep((100, 1_000, 10_000, 100_000, 1_000_000), "log p(x)", _of_samples),
    "particles L": Sweep((1, 4, 16, 64, 256), "a step, eager", _of_particles),
    "batch M": Sweep((4, 16, 64, 256, 1_024, 4_096), "a step, eager", _of_batch),
    "latent sites": Sweep((1, 20), "a step, compiled", _of_sites),
    "sequence length": Sweep((8, 32, 128, 512), "a step, eager", _of_time),
}
