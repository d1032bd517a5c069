"""A pair's continuous latents as one vector of real coordinates, and its densities there."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from pyrovae.compiling.graph import Graph
from pyrovae.evidence.density import Joint, Values, add_up

__all__ = ["GeometricPath", "Line", "State"]


class Line:
    r"""The latents of a pair as vectors u ``[K, N, D]``, z = T(u).

    Args:
        joint: The pair.
        rows: A few data.

    Raises:
        ValueError: If a latent is discrete, or its support has no bijection from the real line.
    """

    def __init__(self, joint: Joint, rows: tuple) -> None:
        self.joint = joint
        self.axes = joint.axes(rows)
        example = joint.on_the_line(rows, 1, joint.draw_prior(rows, 1))
        self.dtype = torch.cat([value.reshape(-1) for value in example.values()]).dtype
        moved = {n: v.movedim(self.axes[n], 1) for n, v in example.items()}
        self.shapes = {name: value.shape[2:] for name, value in moved.items()}
        self.sizes = [prod(shape) for shape in self.shapes.values()]

    def join(self, values: Values) -> Tensor:
        """u of its parts by site."""
        moved = (values[name].movedim(axis, 1) for name, axis in self.axes.items())
        return torch.cat([value.reshape(*value.shape[:2], -1) for value in moved], -1)

    def part(self, u: Tensor) -> Values:
        """The parts of u by site."""
        parts = zip(self.shapes.items(), u.split(self.sizes, -1), strict=True)
        return {
            name: part.reshape(*u.shape[:2], *shape).movedim(1, self.axes[name])
            for (name, shape), part in parts
        }

    def place(self, rows: tuple, values: Values) -> Tensor:
        """u of latents z."""
        particles = len(next(iter(values.values())))
        return self.join(self.joint.on_the_line(rows, particles, values))


class State(NamedTuple):
    """Points u ``[K, N, D]`` with two log-densities ``[K, N]`` there, and their gradients.

    ``target`` is ln p(x, u), ``start`` ln q(u | x) or ln p(u).
    """

    u: Tensor
    target: Tensor
    start: Tensor
    target_slope: Tensor
    start_slope: Tensor

    def density(self, beta: float) -> Tensor:
        r"""The log-density :math:`(1 - \beta) \ln q + \beta \ln p` on the way, unnormalized."""
        return (1 - beta) * self.start + beta * self.target

    def slope(self, beta: float) -> Tensor:
        """Its gradient."""
        return (1 - beta) * self.start_slope + beta * self.target_slope

    def where(self, mask: Tensor, other: State) -> State:
        """This state where a mask ``[K, N]`` holds, another one elsewhere."""
        pairs = zip(self, other, strict=True)
        return State(
            *(torch.where(mask if a.dim() == 2 else mask[..., None], a, b) for a, b in pairs)
        )


class GeometricPath:
    r"""What lies between the guide, or the prior, and the posterior of each datum.

    .. math:: f_\beta(u) = q(u \mid x)^{1 - \beta}\, p(x, u)^\beta

    Args:
        line: The coordinates.
        initial: ``"guide"`` or ``"prior"``.
        max_rows: The largest number of (particle, datum) pairs to be scored at once.
    """

    def __init__(self, line: Line, initial: str, max_rows: int) -> None:
        self.line, self.joint = line, line.joint
        self.initial, self.max_rows = initial, max_rows
        self.graphs: dict[torch.Size, Graph] = {}

    def __call__(self, rows: tuple, u: Tensor) -> State:
        """Both densities and their gradients at u."""
        parts = [self._at(rows, some) for some in u.split(self._step(rows))]
        return State(u, *(torch.cat(part) for part in zip(*parts, strict=True)))

    def place(self, rows: tuple, values: Values) -> Tensor:
        """u of latents z."""
        step = self._step(rows)
        count = len(next(iter(values.values())))
        return torch.cat(
            [
                self.line.place(rows, {n: v[start : start + step] for n, v in values.items()})
                for start in range(0, count, step)
            ]
        )

    def compile(self, rows: tuple, particles: int) -> None:
        """Compile densities and gradients for so many particles of data of these shapes."""
        count = min(particles, self._step(rows))
        u = rows[0].new_zeros(count, len(rows[0]), sum(self.line.sizes), dtype=self.line.dtype)
        self.graphs[u.shape] = Graph(self._eager, (u, *rows), self.joint.pair)

    def _step(self, rows: tuple) -> int:
        return max(1, self.max_rows // len(rows[0]))

    def _at(self, rows: tuple, u: Tensor) -> list[Tensor]:
        graph = self.graphs.get(u.shape)
        return self._eager(u, *rows) if graph is None else graph(u, *rows)

    def _eager(self, u: Tensor, *rows: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            densities = self._densities(rows, u)
            slopes = [_slope(density, u) for density in densities]
        return [*(density.detach() for density in densities), *slopes]

    def _densities(self, rows: tuple, u: Tensor) -> tuple[Tensor, Tensor]:
        scored = self.joint.model(rows, len(u), self.line.part(u), line=True)
        prior, likelihood = self.joint.split(scored)
        if self.initial == "prior":
            return prior + likelihood, prior
        guide = add_up(self.joint.guide(rows, len(u), scored.latents).values())
        return prior + likelihood, guide + scored.log_det


def _slope(density: Tensor, u: Tensor) -> Tensor:
    if not density.requires_grad:
        return torch.zeros_like(u)
    slope = torch.autograd.grad(density.sum(), u, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(u) if slope is None else slope
