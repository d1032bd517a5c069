"""Draws as functions of numbers that are given: a program with these is deterministic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Size, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyrovae.compiling.graph import CaptureError

aten: Any = torch.ops.aten
Take = Callable[[Any], Tensor]


class Noise(TorchDispatchMode):
    """Makes every draw of a block from standard normal numbers, ``[N, K, M]`` for N data.

    Without numbers, the block draws as it does, and ``shapes`` has what it drew. ``single`` has
    these of one datum; a run of N data takes a datum's numbers for that datum's part. What data
    share, None, is NaN: a program may draw what it does not use.
    """

    def __init__(self, given: Tensor | None = None, single: Sequence[Size | None] = ()) -> None:
        super().__init__()
        self.given, self.single = given, single
        self.shapes: list[Size] = []
        self.used = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or _is_certain(func, args, kwargs):
            return func(*args, **kwargs)
        if func.overloadpacket is aten.randperm:
            raise CaptureError(
                "a plate of it draws a subsample: export it with pyro.plate('data', len(x)), whose "
                "size is the batch's"
            )
        draw = DRAWS.get(func.overloadpacket)
        if draw is None or any(isinstance(each, Tensor) for each in kwargs.values()):
            raise CaptureError(
                f"it draws by {func.overloadpacket}, which is no function of normal noise: take a "
                f"distribution such as Normal, LogNormal, Uniform, Laplace or Categorical"
            )
        if self.given is None:
            found = func(*args, **kwargs)
            self.shapes.append(found.shape)
            return found
        # Where and of which type values are does not matter: they go where the noise is.
        plain = {n: v for n, v in kwargs.items() if n in ("mean", "std", "p", "lambd")}
        return draw(self._take, *args, **plain)

    def _take(self, shape: Any) -> Tensor:
        """The next numbers, of this shape."""
        shape, number, data = Size(shape), len(self.shapes), len(self.given)  # type: ignore[arg-type]
        if number == len(self.single):
            raise CaptureError("the number of its draws changes from call to call")
        single = self.single[number]
        self.shapes.append(shape)
        if single is None:
            return self.given.new_full(shape, torch.nan)  # type: ignore[union-attr]
        _, particles, _ = self.given.shape  # type: ignore[union-attr]
        first, self.used = self.used, self.used + single.numel() // particles
        part = self.given[:, :, first : self.used].reshape(data, *single)  # type: ignore[index]
        wide = [d for d, (n, one) in enumerate(zip(shape, single, strict=False)) if n != one]
        place = wide[0] if wide else 0
        # Of several rows of a datum in one dimension, as its particles, those of all data follow.
        return part.movedim(0, place + 1).flatten(place, place + 1).reshape(shape)


def _is_certain(func: Any, args: tuple, kwargs: dict) -> bool:
    """Whether an operator, as that of attention, draws nothing for want of dropout."""
    given = {each.name: value for each, value in zip(func._schema.arguments, args, strict=False)}
    defaults = {each.name: each.default_value for each in func._schema.arguments}
    return (defaults | given | kwargs).get("dropout_p") == 0


def _uniform(take: Take, shape: Any) -> Tensor:
    """Uniform numbers, off 0 and 1, whose logarithms would be infinite."""
    found = 0.5 * (1 + torch.erf(take(shape) / math.sqrt(2)))
    tiny = torch.finfo(found.dtype)
    return found.clamp(tiny.tiny, 1 - tiny.eps)


def _normal(take: Take, mean: Any, std: Any = 1.0, size: Any = None) -> Tensor:
    if size is None:
        shapes = (each.shape for each in (mean, std) if isinstance(each, Tensor))
        size = torch.broadcast_shapes(*shapes)
    return mean + std * take(size)


def _multinomial(take: Take, p: Tensor, n: int, replacement: bool = False) -> Tensor:
    if n != 1 and not replacement:
        raise CaptureError("it draws without replacement, which is no function of normal noise")
    u = _uniform(take, (*p.shape[:-1], n)).to(p.dtype)
    below = (p / p.sum(-1, keepdim=True)).cumsum(-1)[..., None, :] <= u[..., None]
    return below.sum(-1).clamp(max=p.shape[-1] - 1)


def _bits(take: Take, like: Tensor, p: Any) -> Tensor:
    return (_uniform(take, like.shape) < p).to(like.dtype)


# How each of torch's random operators is made of normal numbers, with the operator's arguments.
DRAWS: dict[Any, Callable[..., Tensor]] = {
    aten.randn: lambda take, size: take(size),
    aten.randn_like: lambda take, self: take(self.shape),
    aten.rand: _uniform,
    aten.rand_like: lambda take, self: _uniform(take, self.shape),
    aten.normal: _normal,
    aten.normal_: lambda take, self, mean=0.0, std=1.0: self.copy_(mean + std * take(self.shape)),
    aten.uniform_: lambda take, self, low=0.0, high=1.0: self.copy_(
        low + (high - low) * _uniform(take, self.shape)
    ),
    aten.exponential_: lambda take, self, lambd=1.0: self.copy_(
        -_uniform(take, self.shape).log() / lambd
    ),
    aten.cauchy_: lambda take, self, median=0.0, sigma=1.0: self.copy_(
        median + sigma * (math.pi * (_uniform(take, self.shape) - 0.5)).tan()
    ),
    aten.bernoulli: lambda take, self, p=None: _bits(take, self, self if p is None else p),
    aten.bernoulli_: lambda take, self, p=0.5: self.copy_(_bits(take, self, p)),
    aten.multinomial: _multinomial,
}
