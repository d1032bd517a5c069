"""The step through Pyro's own SVI, and through this project's."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pyro
import torch
from pyro.infer import JitTraceMeanField_ELBO, TraceMeanField_ELBO
from speed_hand import pixels
from speed_problem import LR, Problem, Race
from torch import Tensor

import pyrovae
from pyrovae.data import Dataset

__all__ = ["audit", "by_pyro", "by_pyro_jit", "graph_alone", "ours", "ours_compiled"]


def by_pyro(problem: Problem, images: Tensor) -> Race:
    """``pyro.infer.SVI`` as it is."""
    return _own_store(problem, images, TraceMeanField_ELBO(**_particles(problem)))


def by_pyro_jit(problem: Problem, images: Tensor) -> Race:
    """``pyro.infer.SVI`` with its loss traced by ``torch.jit``, once."""
    loss = TracedOnce(ignore_jit_warnings=True, **_particles(problem))
    return _own_store(problem, images, loss)


class TracedOnce(JitTraceMeanField_ELBO):
    """Pyro's, which in 1.9.2 looks for its trace under another name and makes it at every step."""

    def differentiable_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        result = super().differentiable_loss(*args, **kwargs)
        self._loss_and_surrogate_loss = self._differentiable_loss
        return result


def _own_store(problem: Problem, images: Tensor, loss: object) -> Race:
    """Steps of Pyro's SVI; its parameters live in a store that no other contender sees."""
    model, guide = problem.pair()
    store = pyro.get_param_store()
    state: dict = {"params": {}, "constraints": {}}
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": LR}), loss)

    def run(index: Tensor) -> list[float]:
        store.clear()
        store.set_state(state)
        losses = [svi.step(pixels(problem, images, rows)) for rows in index]
        state.update(store.get_state())
        store.clear()
        return losses

    return run


def ours(problem: Problem, images: Tensor, compile: bool = False) -> Race:
    """``pyrovae.SVI`` with every step through the handlers."""
    svi, load = _svi(problem, images, compile)
    return lambda index: torch.stack([svi.update(rows, load=load).loss for rows in index])


def ours_compiled(problem: Problem, images: Tensor) -> Race:
    """``pyrovae.SVI`` with its step captured and compiled, images to updated weights."""
    return ours(problem, images, compile=True)


def graph_alone(problem: Problem, images: Tensor) -> Race:
    """Once there is one, the graph of :func:`ours_compiled` and nothing of what is around it."""
    svi, load = _svi(problem, images, compile=True)

    def run(index: Tensor) -> Tensor:
        assert svi.compiled is not None
        capture = next((each for each in svi.compiled.captures.values() if each), None)
        if capture is None:
            return torch.stack([svi.update(rows, load=load).loss for rows in index])
        capture.update.refresh()
        counts = capture.update.counts
        call = capture.graph.bound(counts)
        with torch.no_grad():
            return torch.stack([call(counts, (rows,))[0][0] for rows in index])

    return run


def audit(problem: Problem, images: Tensor) -> float:
    """What it adds to a compiled step to be held against the eager one, in milliseconds.

    That is so at the 33rd step, and then at one in 500, which a turn does not hold.
    """
    run, times = ours(problem, images, compile=True), []
    for rows in torch.randint(len(images), (33, 1, problem.batch), device=problem.device):
        started = time.perf_counter()
        run(rows).tolist()
        times.append(time.perf_counter() - started)
    return 1e3 * (times[-1] - median(times[-15:-1]))


def _svi(problem: Problem, images: Tensor, compile: bool) -> tuple[pyrovae.SVI, Callable]:
    drawn = {"binarize": "dynamic", "intensities": images, "scale": 255.0}
    given = drawn if problem.binarize else {}
    data = Dataset("images", images.shape[1:], images, None, None, **given)
    loss = TraceMeanField_ELBO(**_particles(problem))
    return pyrovae.SVI(*problem.pair(), _adam, loss, compile=compile), data.rows


def _adam(pair: list[Tensor]) -> torch.optim.Adam:
    return torch.optim.Adam(pair, lr=LR, fused=True)


def _particles(problem: Problem) -> dict:
    many = problem.particles > 1
    return {
        "num_particles": problem.particles,
        "vectorize_particles": many,
        "max_plate_nesting": 1 if many else float("inf"),
    }
