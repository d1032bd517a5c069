"""A pair under examination: run once by each program alone, and left as it was found."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.nn.parameter import is_lazy

from pyrovae._tools.seeding import seeded
from pyrovae._tools.source_lines import Places
from pyrovae.compiling.graph import undone
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.enumeration import enumerates
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import (
    Layout,
    is_bookkeeping,
    samples,
    site_scores,
)

__all__ = [
    "Case",
    "Finding",
    "failed",
    "passed",
    "sentence",
    "skipped",
    "take",
    "untouched",
    "warned",
]

ROWS, FEW_ROWS = 61, 13
PRIMES = (61, 59, 53, 47, 43, 41, 37, 31, 29, 23, 19, 17, 13, 11, 7, 5, 3, 2)


class Finding(NamedTuple):
    """What one check found: a status, a sentence, and the lines of source that it is about."""

    status: str
    message: str
    where: tuple[str, ...] = ()


def passed(message: str = "") -> Finding:
    """Nothing is wrong."""
    return Finding("passed", message)


def warned(message: str, *where: str) -> Finding:
    """The pair works, with a limit that its author should know."""
    return Finding("warned", message, where)


def failed(message: str, *where: str) -> Finding:
    """A mistake."""
    return Finding("failed", message, where)


def skipped(reason: str) -> Finding:
    """The check does not apply."""
    return Finding("skipped", reason)


class Case:
    """A pair, a batch whose size is no other dimension of the data, and what both have done so far.

    Args:
        model: The model program.
        guide: The guide program.
        rows: The data ``[N, ...]`` and the programs' further arguments.
        seed: Seeds every draw, Python's and NumPy's as well as torch's.
        particles: The number of samples K of what is averaged.
        whole: Take the batch as it is, in place of some of its rows.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        rows: tuple,
        seed: int,
        particles: int,
        whole: bool = False,
    ) -> None:
        self.model, self.guide = model, guide
        self.pair = Pair(model, guide)
        self.seed, self.particles = seed, particles
        device = self.pair.device
        self.every = tuple(r.to(device) if isinstance(r, Tensor) else r for r in rows)
        size = len(self.every[0]) if whole else _odd_size(self.every[0])
        self.rows = take(self.every, slice(size))
        self.few = take(self.rows, slice(FEW_ROWS))
        self.places: dict[str, dict[str, str]] = {"model": {}, "guide": {}}

    @cached_property
    def alone(self) -> dict[str, Trace | Exception]:
        """Each program's trace on the batch by itself, or what it raised."""
        programs = {"guide": self.pair.run_guide, "model": self.pair.run_model}
        return {kind: self._alone(kind, program) for kind, program in programs.items()}

    def _alone(self, kind: str, program: Callable) -> Trace | Exception:
        places = Places()
        try:
            with self.quietly(), places:
                return poutine.trace(program).get_trace(*self.rows)
        except Exception as error:
            return error
        finally:
            self.places[kind] = places.found

    @cached_property
    def layout(self) -> Layout:
        """Where the batch lies, as the contract has it."""
        with self.quietly():
            return inspect_pair(self.pair, *self.rows)

    def sites(self, kind: str) -> dict[str, dict]:
        """The sample sites of a program, run alone."""
        return samples(self.alone[kind])

    def observed(self) -> dict[str, dict]:
        """The model's observed sites, without a factor or a deterministic."""
        found = self.sites("model").items()
        return {n: s for n, s in found if s["is_observed"] and not is_bookkeeping(s)}

    def latents(self) -> dict[str, tuple[dict, dict]]:
        """The sites of model and guide for each latent."""
        guide = self.sites("guide")
        found = self.sites("model").items()
        return {n: (s, guide[n]) for n, s in found if n in guide and not s["is_observed"]}

    def enumerated(self) -> list[str]:
        """The latents that the model alone has, and sums over."""
        guide, found = self.sites("guide"), self.sites("model").items()
        return [name for name, site in found if name not in guide and enumerates(site)]

    def objective(self, particles: int = 1) -> ELBO:
        """The objective of Pyro that takes a pair of this kind."""
        if not self.enumerated():
            return Trace_ELBO(num_particles=particles)
        nesting = -self.layout.particle_dim - 1
        return TraceEnum_ELBO(num_particles=particles, max_plate_nesting=nesting)

    def where(self, *names: str) -> tuple[str, ...]:
        """The lines on which some sites stand, in either program."""
        lines = [self.places[kind].get(n, "") for n in names for kind in ("model", "guide")]
        return tuple(dict.fromkeys(filter(None, lines)))

    @contextmanager
    def quietly(
        self, training: bool = False, gradients: bool = False, python_seed: int | None = None
    ) -> Iterator[None]:
        """Run a block from the same seed each time, without warnings, and give buffers back.

        Modules are in eval mode and nothing is differentiated, unless that is asked for.
        """
        other = self.seed if python_seed is None else python_seed
        random.seed(other)
        np.random.seed(other % 2**32)
        with (
            self.pair.mode(training),
            undone(self.pair, self.rows),
            seeded(self.seed, self.rows[0].device),
            torch.set_grad_enabled(gradients),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield

    def guide_trace(self, rows: tuple, particles: int | None = None) -> Trace:
        """The guide's trace of some data, without the sites of subsampling plates."""
        self.pair.layout = self.layout
        return prune_subsample_sites(self.pair.trace_guide(*rows, particles=particles))

    def scores(
        self, guide_trace: Trace, rows: tuple, particles: int | None = None
    ) -> dict[tuple[str, str], Tensor]:
        """Every site's log-probability at the latents of a guide's trace.

        Returns:
            ``[K, N]`` by program and site, in nats.
        """
        self.pair.layout = self.layout
        size = particles or 1, len(rows[0])
        guide = self.pair.replay_guide(guide_trace, *rows, particles=particles)
        model = self.pair.replay_model(guide_trace, *rows, particles=particles, sums=True)
        return {
            (kind, name): score
            for kind, trace in (("guide", guide), ("model", model))
            for name, score in site_scores(trace, self.layout, *size).items()
        }


def sentence(error: BaseException) -> str:
    """What an error says, without Pyro's table of shapes."""
    return str(error).partition("Trace Shapes:")[0].strip()


def take(rows: tuple, part: slice | Tensor) -> tuple:
    """Some of the data, with what belongs to them."""
    return tuple(row[part] if isinstance(row, Tensor) else row for row in rows)


def _odd_size(x: Tensor) -> int:
    """A batch size that no other dimension is likely to share."""
    fitting = [p for p in PRIMES if p <= len(x) and p not in x.shape[1:]]
    return fitting[0] if fitting else min(len(x), ROWS)


@contextmanager
def untouched(model: Callable, guide: Callable) -> Iterator[None]:
    """Run a block without validation, and leave nothing behind.

    Parameters, buffers and the other attributes of modules (their modes among them), Pyro's store,
    the setting of validation, and the random streams of torch, NumPy and Python are given back as
    they were. Modules that take their sizes from the first batch keep what they found.
    """
    modules = [
        m for m in Pair(model, guide).modules if not any(map(is_lazy, m._parameters.values()))
    ]
    store = pyro.get_param_store()
    dicts = [store._params, store._constraints, store._param_to_name]
    dicts += [held for m in modules for held in (m._parameters, m._buffers, m._modules, vars(m))]
    before = [(held, dict(held)) for held in dicts]
    tensors = {id(t): t for held in dicts for t in held.values() if isinstance(t, Tensor)}
    values = [(t, t.detach().clone()) for t in tensors.values()]
    streams = random.getstate(), np.random.get_state()
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        random.setstate(streams[0])
        np.random.set_state(streams[1])
        for held, entries in before:
            held.clear()
            held.update(entries)
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
