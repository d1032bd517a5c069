"""Random draws whose size follows the batch, made for a whole batch and cut to some of its rows."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "FEW",
    "MORE",
    "Draw",
    "OnDraw",
    "Part",
    "Size",
    "compare_draws",
    "draw_part",
    "see_draw",
]

FEW, MORE = 2, 3


class OnDraw(TorchDispatchMode):
    """Hands every operation that draws random numbers to a function.

    Args:
        handle: Takes the operation with its positional and its named arguments.
    """

    def __init__(self, handle: Callable[[Any, tuple, dict], Any]) -> None:
        super().__init__()
        self.handle = handle

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            return self.handle(func, args, kwargs or {})
        return func(*args, **kwargs or {})


class Part(NamedTuple):
    """The rows ``start`` to ``stop`` of a batch of ``total``."""

    start: int
    stop: int
    total: int

    @property
    def rows(self) -> int:
        """How many they are."""
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        """Whether they are the whole batch."""
        return self.rows == self.total


class Size(NamedTuple):
    """A shape whose dimension ``dim`` is ``factor`` times the number of rows, if any is."""

    shape: tuple[int, ...]
    dim: int | None = None
    factor: int = 0

    def at(self, rows: int) -> tuple[int, ...]:
        """The shape for so many rows."""
        if self.dim is None:
            return self.shape
        return (*self.shape[: self.dim], self.factor * rows, *self.shape[self.dim + 1 :])


class Draw(NamedTuple):
    """A random operation that was seen, the shapes in it, and its other arguments.

    ``follows`` says whether all that it returns follows the number of rows, so that it can be made
    for a whole batch.
    """

    func: Any
    inputs: tuple[Size | None, ...]
    outputs: tuple[Size | None, ...]
    others: tuple = ()
    follows: bool = False

    def fits(self, func: Any, args: tuple, kwargs: dict, rows: int) -> bool:
        """Whether a call is this one, on so many rows."""
        if func is not self.func:
            return False
        sizes = _sizes((*args, *kwargs.values()))
        known = (size and size.at(rows) for size in self.inputs)
        return tuple(size and size.shape for size in sizes) == tuple(known)


def see_draw(func: Any, args: tuple, kwargs: dict) -> tuple[Any, Draw]:
    """Make a draw as it is.

    Returns:
        Its result and its description.
    """
    given = (*args, *kwargs.values())
    inputs, others = _sizes(given), tuple(v for v in given if not _has_size(v))
    found = func(*args, **kwargs)
    return found, Draw(func, inputs, _sizes(_as_tuple(found)), others)


def compare_draws(few: Draw, more: Draw) -> Draw:
    """What follows the number of rows in a draw that was seen for two and for three."""
    inputs, outputs = (
        tuple(_growth(*pair) for pair in zip_longest(*sizes))
        for sizes in ((few.inputs, more.inputs), (few.outputs, more.outputs))
    )
    written = [argument.is_write for argument in few.func._schema.arguments]
    alike = few.func is more.func and few.others == more.others and not any(written[1:])
    plain = all(grown is not None for was, grown in zip(few.inputs, inputs, strict=False) if was)
    follows = alike and plain and all(size is not None and size.dim is not None for size in outputs)
    return Draw(few.func, inputs, outputs, few.others, follows)


def draw_part(draw: Draw, args: tuple, kwargs: dict, part: Part, particles: int) -> Any:
    """Make a draw for a whole batch and take a part of it.

    Parameters of a distribution that belong to rows outside the part are filled with those of
    rows inside: their draws are thrown away.

    Args:
        draw: What is known of it; it follows the number of rows.
        args: Its positional arguments, for the part.
        kwargs: Its named arguments, for the part.
        part: The part.
        particles: How many values lie before each row, where one dimension holds both.
    """
    given, writes = (*args, *kwargs.values()), draw.func._schema.is_mutable
    pairs = list(zip(given, draw.inputs, strict=True))
    whole = [_grown(*pair, part, particles) for pair in pairs[writes:]]
    if writes:
        whole.insert(0, _empty(args[0], draw.inputs[0].at(part.total)))
    named = dict(zip(kwargs, whole[len(args) :], strict=True))
    found = draw.func(*whole[: len(args)], **named)
    sizes = zip(_as_tuple(found), draw.outputs, strict=True)
    taken = tuple(_taken(value, size, part, particles) for value, size in sizes)
    if writes:
        return args[0].copy_(taken[0])
    return taken[0] if isinstance(found, Tensor) else taken


def _growth(few: Size | None, more: Size | None) -> Size | None:
    if few is None or more is None or len(few.shape) != len(more.shape):
        return None
    pairs = enumerate(zip(few.shape, more.shape, strict=True))
    grown = [(dim, b - a) for dim, (a, b) in pairs if a != b]
    found = Size(few.shape, *grown[0]) if grown else few
    return found if (found.at(FEW), found.at(MORE)) == (few.shape, more.shape) else None


def _has_size(value: Any) -> bool:
    return isinstance(value, Tensor | list | tuple)


def _sizes(values: tuple) -> tuple[Size | None, ...]:
    shapes = (
        tuple(v.shape if isinstance(v, Tensor) else v) if _has_size(v) else None for v in values
    )
    return tuple(None if shape is None else Size(shape) for shape in shapes)


def _as_tuple(found: Any) -> tuple:
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _grown(value: Any, size: Size | None, part: Part, particles: int) -> Any:
    """An argument for the whole batch, lying in memory as the part does."""
    if size is None or size.dim is None:
        return value
    if not isinstance(value, Tensor):
        return list(size.at(part.total))
    order, back = _order(value)
    thin = value[tuple(slice(0, 1 if stride == 0 else None) for stride in value.stride())]
    if value.stride(size.dim):
        index = torch.arange(part.total, device=value.device) - part.start
        rows = _apart(thin, size, part.rows, particles)
        rows = rows.index_select(size.dim + 1, index.clamp(0, part.rows - 1))
        thin = rows.flatten(size.dim, size.dim + 2).permute(order).contiguous().permute(back)
    return thin.expand(size.at(part.total))


def _taken(value: Tensor, size: Size, part: Part, particles: int) -> Tensor:
    rows = _apart(value, size, part.total, particles).narrow(size.dim + 1, part.start, part.rows)
    return rows.flatten(size.dim, size.dim + 2).clone()


def _apart(value: Tensor, size: Size, rows: int, particles: int) -> Tensor:
    """The particles, the rows, and what else lies in the dimension of the rows, each in its own."""
    return value.unflatten(size.dim, (gcd(size.factor, particles), rows, -1))


def _empty(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    order, back = _order(tensor)
    return tensor.new_empty([shape[dim] for dim in order]).permute(back)


def _order(tensor: Tensor) -> tuple[list[int], list[int]]:
    """A tensor's dimensions as they lie in memory, and the way back."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return order, sorted(range(tensor.dim()), key=order.__getitem__)
