"""A pair under examination: run once by each program alone, and left as it was found."""

from __future__ import annotations

import random
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from torch import Tensor
from torch.nn.parameter import is_lazy

from pyrovae._tools import InputError
from pyrovae._tools.seeding import draw_seed, restore, seeded, undone
from pyrovae._tools.source_lines import Places, lines_with
from pyrovae.objectives import estimate
from pyrovae.pairs.contract import check_programs, check_tensor, inspect_pair
from pyrovae.pairs.enumeration import enumerates
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import Site, Values, drawn, is_bookkeeping, samples

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


def _found(status: Status, message: str, *where: str) -> Row:
    """What a check returns: a row whose name its place in the table gives."""
    return Row("", status, message, where)


passed = partial(_found, "passed")  # nothing is wrong
warned = partial(_found, "warned")  # the pair works, with a limit that its author should know
failed = partial(_found, "failed")  # a mistake


def skipped(reason: str = "", *, needs: str = "") -> Row:
    """The check does not apply, or not before another row passes."""
    return Row("", "skipped", reason or f"needs {needs}", needs=needs)


class Case:
    """A pair with a batch whose size is no other dimension of the data, each program run alone.

    ``every`` are all data and the programs' further arguments, ``[N, ...]`` each, ``rows`` the
    batch (all of them if ``whole``), and ``few`` do for averages over particles. ``sites`` are the
    sample sites of each program, ``places`` the lines on which they stand, and ``errors`` what a
    program raises that does not run.
    """

    def __init__(
        self, pair: Pair, rows: tuple, seed: int, particles: int, whole: bool = False
    ) -> None:
        check_programs(pair.model, pair.guide)
        check_tensor(rows[0])
        if rows[0].dim() == 0 or len(rows[0]) == 0:
            raise InputError("Expected at least one datum, got an empty tensor.")
        self.pair, self.seed, self.particles = pair, draw_seed(seed), particles
        self.every = tuple(r.to(pair.device) if isinstance(r, Tensor) else r for r in rows)
        size = len(self.every[0]) if whole else _odd_size(self.every[0])
        self.rows = take(self.every, slice(size))
        self.few = take(self.rows, slice(FEW_ROWS))
        self.sites: dict[str, dict[str, Site]] = {}
        self.errors: dict[str, Exception] = {}
        self.places: dict[str, dict[str, str]] = {}
        for kind, program in (("guide", pair.run_guide), ("model", pair.run_model)):
            places = Places()
            self.places[kind] = places.found
            try:
                # With gradients, as in training: some errors, as of NumPy, come up there alone.
                with self.quietly(gradients=True), places:
                    self.sites[kind] = samples(poutine.trace(program).get_trace(*self.rows))
            except Exception as error:
                self.errors[kind] = error

    @cached_property
    def fewer(self) -> Case:
        """The same pair on few of the data."""
        return Case(self.pair, self.few, self.seed, self.particles)

    @cached_property
    def inspected(self) -> Pair:
        """The pair, once it has been found to keep the contract."""
        with self.quietly():
            inspect_pair(self.pair, *self.rows)
        return self.pair

    def observed(self) -> dict[str, Site]:
        """The model's observed sites, without a factor or a deterministic."""
        found = self.sites["model"].items()
        return {n: s for n, s in found if s["is_observed"] and not is_bookkeeping(s)}

    def latents(self) -> dict[str, tuple[Site, Site]]:
        """The sites of model and guide for each latent."""
        guide, found = self.sites["guide"], self.sites["model"].items()
        return {n: (s, guide[n]) for n, s in found if n in guide and not s["is_observed"]}

    def enumerated(self) -> list[str]:
        """The latents that the model alone has, and sums over."""
        guide, found = self.sites["guide"], self.sites["model"].items()
        return [name for name, site in found if name not in guide and enumerates(site)]

    def estimate(self, *rows: Any, particles: int = 1) -> tuple[Tensor, Tensor]:
        """The negative ELBO of a batch, and the scalar that has its gradient."""
        objective: ELBO = Trace_ELBO(num_particles=particles)
        if self.enumerated():
            nesting = -self.inspected.known.particle_dim - 1
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
        return lines_with([self.pair.model, self.pair.guide, *self.pair.roots.values()], *words)

    @contextmanager
    def quietly(
        self, training: bool = False, gradients: bool = False, other: int = 0
    ) -> Iterator[None]:
        """Run a block from the same seed each time, without warnings, and restore buffers.

        Modules are in eval mode and nothing is differentiated, unless that is asked for; ``other``
        gives the streams of Python and NumPy another seed.
        """
        random.seed(self.seed + other)
        np.random.seed((self.seed + other) % 2**32)
        with (
            self.pair.mode(training),
            undone(self.pair.modules, self.rows[0].device),
            seeded(self.seed, self.rows[0].device),
            torch.set_grad_enabled(gradients),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield

    def draw(self, particles: int | None = None, *, training: bool = False) -> Values:
        """Latents of the batch from the guide, K of each datum or without a plate of particles."""
        pair = self.inspected
        with self.quietly(training):
            sites = drawn(pair.trace_guide(*self.rows, particles=particles))
        return {name: site["value"] for name, site in sites.items()}

    def scores(
        self, latents: Values, rows: tuple, particles: int | None = None, *, training: bool = False
    ) -> Scores:
        """Every site's log-probability ``[K, N]`` at given latents, by program and site."""
        pair = self.inspected
        with self.quietly(training):
            guide = pair.score_guide(rows, particles, latents)
            model, _ = pair.score_model(rows, particles, latents)
        scores = {("guide", name): score for name, score in guide.items()}
        return scores | {("model", name): score for name, score in model.items()}


def take(rows: tuple, part: slice | Tensor) -> tuple:
    """Some of the data, with what belongs to them."""
    return tuple(row[part] if isinstance(row, Tensor) else row for row in rows)


def _odd_size(x: Tensor) -> int:
    """A batch size that no other dimension is likely to share."""
    fitting = [p for p in PRIMES if p <= len(x) and p not in x.shape[1:]]
    return fitting[0] if fitting else min(len(x), PRIMES[0])


@contextmanager
def untouched(pair: Pair) -> Iterator[None]:
    """Run a block without validation, and leave nothing behind.

    Parameters, buffers and the other attributes of modules (their modes among them), Pyro's store,
    the setting of validation, and the random streams of torch, NumPy and Python are restored.
    Modules that take their sizes from the first batch keep what they found.
    """
    modules = [m for m in pair.modules if not any(map(is_lazy, m.parameters(recurse=False)))]
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
                restore(tensor, value)
