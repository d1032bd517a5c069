"""The log-weights ln p(x, z) − ln q(z|x) of every particle, in the cells of a batch.

A cell is one index of every plate that holds all sites: a datum, or a part of a datum that is
independent of its other parts. Sums run over all other plates, inside a log-sum-exp; sums over
cells, and scales, are outside.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyrovae._tools import InputError
from pyrovae.pairs.traces import Layout, is_bookkeeping, samples

__all__ = ["Cells", "cells", "check_scales"]


class Cells(NamedTuple):
    """Where the cells of a batch lie in a log-probability, and what multiplies them.

    ``rank`` is the number of dimensions with that of the particles, which is the first; ``kept``
    are those of the cells, counted from the right; ``scale`` multiplies a cell's bound, a number
    or ``[*cells]``; ``inner`` is the part of it that subsampling within a datum makes up.
    """

    layout: Layout
    rank: int
    kept: frozenset[int]
    scale: Tensor | float
    inner: float

    def fold(self, log_prob: Tensor) -> Tensor:
        """Sum a site's log-probabilities to the cells, ``[K, *cells]`` with every dimension."""
        log_prob = log_prob.reshape((1,) * (self.rank - log_prob.dim()) + log_prob.shape)
        summed = [d for d in range(1, self.rank) if d - self.rank not in self.kept]
        return log_prob.sum(summed, keepdim=True) if summed else log_prob

    def by_datum(self, bound: Tensor) -> Tensor:
        """Sum a bound ``[*cells]`` to the data, ``[N]``, before the scales of training."""
        batch = self.rank - 1 + self.layout.dim
        others = [d for d in range(self.rank - 1) if d != batch]
        return (bound.sum(others) if others else bound) * self.inner

    def loss(self, bound: Tensor) -> Tensor:
        """Minus the sum over cells, each times its scale, in nats."""
        return -(bound * self.scale).sum()


def cells(traces: Iterable[Trace], layout: Layout) -> Cells:
    """Find the cells in the traces of a model and its guide.

    Raises:
        ValueError: If a scale varies within a cell.
    """
    every = [s for trace in traces for s in samples(trace).values() if not is_bookkeeping(s)]
    stacks = [{f.name: f for f in site["cond_indep_stack"] if f.vectorized} for site in every]
    common = [
        frame
        for name, frame in stacks[0].items()
        if frame.dim != layout.particle_dim and all(name in stack for stack in stacks)
    ]
    rank, kept = -layout.particle_dim, frozenset(frame.dim for frame in common)
    inner = [f.full_size / f.size for f in common if f.full_size and f.name != layout.plate]
    return Cells(layout, rank, kept, _scale(every[0]["scale"], rank, kept), prod(inner))


def _scale(scale: Tensor | float, rank: int, kept: frozenset[int]) -> Tensor | float:
    if not isinstance(scale, Tensor) or scale.dim() == 0:
        return scale
    scale = scale.reshape((1,) * (rank - 1 - scale.dim()) + scale.shape)
    if any(n != 1 and d - (rank - 1) not in kept for d, n in enumerate(scale.shape)):
        raise InputError(
            "Expected one scale for all sites of a datum, got a scale that varies within it: an "
            "importance-weighted bound is not defined; drop poutine.scale, or train with an ELBO."
        )
    return scale


def check_scales(traces: Iterable[Trace], layout: Layout) -> None:
    """Refuse sites that do not share one scale, or lie in no datum, comparing values.

    Raises:
        ValueError: Naming two sites whose scales differ, or a factor outside the batch's plate.
    """
    traces = list(traces)
    for name, site in ((n, s) for trace in traces for n, s in samples(trace).items()):
        plates = [frame.name for frame in site["cond_indep_stack"]]
        if type(site["fn"]).__name__ == "Unit" and layout.plate not in plates:
            raise InputError(
                f"The factor {name!r} lies outside the plate {layout.plate!r}, so it belongs to no "
                f"datum: move it inside, or train with an ELBO."
            )
    sites = {
        name: site["scale"]
        for trace in traces
        for name, site in samples(trace).items()
        if not is_bookkeeping(site)
    }
    (first, scale), *rest = sites.items()
    for name, other in rest:
        if not bool((torch.as_tensor(scale) == torch.as_tensor(other)).all()):
            raise InputError(
                f"Sites {first!r} and {name!r} carry different scales, so an importance-weighted "
                f"bound is not defined: drop poutine.scale and subsampling within a datum, or "
                f"train with an ELBO."
            )
