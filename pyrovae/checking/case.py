"""A pair under examination: run once by each program alone, and left as it was found."""

from __future__ import annotations

import random
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.nn.parameter import is_lazy

from pyrovae._tools.seeding import seeded, undone
from pyrovae._tools.source_lines import Places, lines_with
from pyrovae.objectives import estimate
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.enumeration import enumerates
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import Layout, is_bookkeeping, samples, site_scores

# Batch sizes that few dimensions of data or networks share, so that a dimension is not taken for
# the batch; with data of other sizes than these, as many rows.
PRIMES = (61, 59, 53, 47, 43, 41, 37, 31, 29, 23, 19, 17, 13, 11, 7, 5, 3, 2)
# What averages over particles are taken for: enough data for a standard error over them.
FEW_ROWS = 13

# The width of the table.
WIDTH = 100

Status = Literal["passed", "warned", "failed", "skipped"]
Scores = dict[tuple[str, str], Tensor]


class Row(NamedTuple):
    """The result of one check.

    ``status`` is ``"passed"``, ``"warned"`` (the pair works, within limits), ``"failed"`` or
    ``"skipped"``; ``where`` holds the lines of source to look at, as ``file:line: source``;
    ``needs`` names the row that has to pass first, if the check was skipped for that.
    """

    name: str
    status: Status
    message: str
    where: tuple[str, ...] = ()
    needs: str = ""

    def __str__(self) -> str:
        lead = f"{'FAILED' if self.status == 'failed' else self.status:<8} {self.name:<19} "
        lines = textwrap.wrap(self.message, WIDTH - len(lead), break_on_hyphens=False) or [""]
        return f"\n{' ' * len(lead)}".join([lead + lines[0], *lines[1:], *self.where]).rstrip()


# What a check returns: a row whose name its place in the table gives.


def passed(message: str) -> Row:
    """Nothing is wrong."""
    return Row("", "passed", message)


def warned(message: str, *where: str) -> Row:
    """The pair works, with a limit that its author should know."""
    return Row("", "warned", message, where)


def failed(message: str, *where: str) -> Row:
    """A mistake."""
    return Row("", "failed", message, where)


def skipped(reason: str = "", *, needs: str = "") -> Row:
    """The check does not apply, or not before another row passes."""
    return Row("", "skipped", reason or f"needs {needs}", needs=needs)


class Case:
    """A pair with a batch whose size is no other dimension of the data, and its traces.

    Args:
        model: The model program.
        guide: The guide program.
        rows: The data ``[N, ...]`` and the programs' further arguments.
        seed: Seeds every draw, Python's and NumPy's as well as torch's.
        particles: The number of samples K of averages over draws.
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
    def _alone(self) -> tuple[dict[str, Trace], dict[str, Exception]]:
        traces, errors = {}, {}
        for kind, program in (("guide", self.pair.run_guide), ("model", self.pair.run_model)):
            places = Places()
            try:
                with self.quietly(), places:
                    traces[kind] = poutine.trace(program).get_trace(*self.rows)
            except Exception as error:
                errors[kind] = error
            self.places[kind] = places.found
        return traces, errors

    @property
    def traces(self) -> dict[str, Trace]:
        """The trace on the batch of each program that runs by itself."""
        return self._alone[0]

    @property
    def errors(self) -> dict[str, Exception]:
        """What each program raises that does not run by itself."""
        return self._alone[1]

    @cached_property
    def layout(self) -> Layout:
        """Where the batch lies, as the contract has it; the pair remembers it."""
        with self.quietly():
            return inspect_pair(self.pair, *self.rows)

    def sites(self, kind: str) -> dict[str, dict]:
        """The sample sites of a program, run alone."""
        return samples(self.traces[kind])

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

    def estimate(self, *rows: Any, particles: int = 1) -> tuple[Tensor, Tensor]:
        """The negative ELBO of a batch, and the scalar that has its gradient."""
        objective: ELBO = Trace_ELBO(num_particles=particles)
        if self.enumerated():
            nesting = -self.layout.particle_dim - 1
            objective = TraceEnum_ELBO(num_particles=particles, max_plate_nesting=nesting)
        found = estimate(objective, self.pair, *rows)
        # None only for an objective that propagates by itself, which neither of these does.
        return found.loss, cast(Tensor, found.surrogate)

    def where(self, *names: str) -> tuple[str, ...]:
        """The lines on which some sites stand, in either program."""
        lines = [self.places[kind].get(n, "") for n in names for kind in ("model", "guide")]
        return tuple(dict.fromkeys(filter(None, lines)))

    def suspects(self, words: Iterable[str]) -> list[str]:
        """The lines of both programs, and of their modules' classes, with one of some words."""
        return lines_with([self.model, self.guide, *self.pair.roots.values()], *words)

    @contextmanager
    def quietly(
        self, training: bool = False, gradients: bool = False, python_seed: int | None = None
    ) -> Iterator[None]:
        """Run a block from the same seed each time, without warnings, and restore buffers.

        Modules are in eval mode and nothing is differentiated, unless that is asked for.
        """
        other = self.seed if python_seed is None else python_seed
        random.seed(other)
        np.random.seed(other % 2**32)
        with (
            self.pair.mode(training),
            undone(self.pair.modules, self.rows[0].device),
            seeded(self.seed, self.rows[0].device),
            torch.set_grad_enabled(gradients),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield

    def guide_trace(
        self, rows: tuple, particles: int | None = None, *, training: bool = False
    ) -> Trace:
        """The guide's trace of some data, without the sites of subsampling plates."""
        self.pair.layout = self.layout
        with self.quietly(training):
            return prune_subsample_sites(self.pair.trace_guide(*rows, particles=particles))

    def scores(
        self,
        guide_trace: Trace,
        rows: tuple,
        particles: int | None = None,
        *,
        training: bool = False,
    ) -> Scores:
        """Every site's log-probability ``[K, N]`` at a guide's latents, by program and site."""
        size = particles or 1, len(rows[0])
        self.pair.layout = self.layout
        with self.quietly(training):
            guide = self.pair.replay_guide(guide_trace, *rows, particles=particles)
            model = self.pair.replay_model(guide_trace, *rows, particles=particles, sums=True)
            return {
                (kind, name): score
                for kind, trace in (("guide", guide), ("model", model))
                for name, score in site_scores(trace, self.layout, *size).items()
            }


def take(rows: tuple, part: slice | Tensor) -> tuple:
    """Some of the data, with what belongs to them."""
    return tuple(row[part] if isinstance(row, Tensor) else row for row in rows)


def _odd_size(x: Tensor) -> int:
    """A batch size that no other dimension is likely to share."""
    fitting = [p for p in PRIMES if p <= len(x) and p not in x.shape[1:]]
    return fitting[0] if fitting else min(len(x), PRIMES[0])


@contextmanager
def untouched(model: Callable, guide: Callable) -> Iterator[None]:
    """Run a block without validation, and leave nothing behind.

    Parameters, buffers and the other attributes of modules (their modes among them), Pyro's store,
    the setting of validation, and the random streams of torch, NumPy and Python are restored.
    Modules that take their sizes from the first batch keep what they found.
    """
    modules = Pair(model, guide).modules
    modules = [m for m in modules if not any(map(is_lazy, m.parameters(recurse=False)))]
    # A ParamStoreDict holds its entries in these three dictionaries (Pyro 1.9.2). Its public
    # get_state() copies values, and would give leaves another identity than optimizers know.
    store = pyro.get_param_store()
    dicts: list[dict[Any, Any]] = [store._params, store._constraints, store._param_to_name]
    for m in modules:
        dicts += [m._parameters, m._buffers, m._modules, vars(m)]
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
