"""Importance weights of fresh draws, tile by tile, eagerly or compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from pyrovae._tools.seeding import seeded
from pyrovae.compiling.graph import CaptureError, Graph, compare
from pyrovae.evidence.density import Joint, refuse_nan
from pyrovae.evidence.proposals import Defensive, FromGuide

__all__ = ["Weights"]


class Weights:
    r"""ln p(x, z) − ln q(z | x) of fresh draws, ``[K, N]`` in float64.

    Draws are made for a whole tile of particles at once, and scored in chunks whose results stay
    in the processor's cache.

    Args:
        joint: The pair.
        proposal: Where the draws come from.
        tile: How many particles a tile has.
        chunk: How many are scored at once; a power of two, as ``tile``.
    """

    def __init__(
        self, joint: Joint, proposal: FromGuide | Defensive, tile: int, chunk: int
    ) -> None:
        self.joint, self.proposal = joint, proposal
        self.tile, self.chunk = tile, min(chunk, tile)
        self.drawing: Graph | None = None
        self.scoring: Graph | None = None

    def __call__(self, rows: tuple, particles: int) -> Tensor:
        """The first weights of a tile, ``[particles, N]``."""
        *values, density = self.drawing(*rows) if self.drawing else self._draw(*rows)
        parts = []
        for start in range(0, particles, self.chunk):
            stop = start + self.chunk if self.scoring else min(start + self.chunk, particles)
            score = self.scoring or self._score
            prior, likelihood = score(*rows, *(value[start:stop] for value in values))
            own = self.proposal.density(density[start:stop], prior)
            parts.append((prior + likelihood)[: len(own)] - own)
        return torch.cat(parts)[:particles]

    def compile(self, rows: tuple) -> None:
        """Compile draws and scores for data of this shape; where that fails, stay eager."""
        with seeded(0, rows[0].device):
            some = [value[: self.chunk].clone() for value in self._draw(*rows)[:-1]]
        self.joint.fused = True
        try:
            self.drawing = self._graph("a draw", self._draw, rows)
            self.scoring = self._graph("a score", self._score, (*rows, *some))
        except CaptureError as error:
            self.drawing = self.scoring = None
            warnings.warn(f"log p(x) runs eagerly, not compiled: {error}.", stacklevel=3)
        self.joint.fused = False

    def _graph(self, what: str, function: Callable, args: tuple) -> Graph:
        graph = Graph(function, args, self.joint.pair)
        with seeded(0, args[0].device):
            expected = function(*args)
        with seeded(0, args[0].device):
            found = graph(*args)
        for one, other in zip(found, expected, strict=True):
            compare(what, one, other)
        return graph

    def refuse_nan(self, rows: tuple, seed: int, first_row: int) -> None:
        """Say which site's log-probability is NaN in a tile's draws, and for which datum."""
        with seeded(seed, rows[0].device):
            _, guide = self.joint.draw(rows, self.tile)
        with seeded(seed, rows[0].device):
            values, _ = self.proposal.draw(rows, self.tile)
        model = self.joint.model(rows, self.tile, values, self.proposal.line).scores
        refuse_nan(guide, model, first_row)

    def _draw(self, *rows: Tensor) -> list[Tensor]:
        values, density = self.proposal.draw(rows, self.tile)
        return [*values.values(), density]

    def _score(self, *args: Tensor) -> list[Tensor]:
        names = self.joint.layout.latents
        rows, values = args[: len(args) - len(names)], args[len(args) - len(names) :]
        particles = len(values[0]) if names else self.chunk
        placed = dict(zip(names, values, strict=True))
        return list(self.joint.split(self.joint.model(rows, particles, placed, self.proposal.line)))
