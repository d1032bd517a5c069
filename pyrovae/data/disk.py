"""Arrays on disk that are larger than memory, read ahead of the steps that take their rows."""

from __future__ import annotations

import math
import mmap
import os
import shutil
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain, pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyrovae._tools import InputError, progress_bar

# GiB of an array that are in memory at once where nothing is said.
MEMORY = 1.0
# Batches that are read together are a multiple of what fit takes in one call of a compiled step.
AT_ONCE = 100
# Bytes that the number of a row takes in the batches of a part, their order, and the sorted order.
NUMBERS = 6 * 8

A = TypeVar("A")
B = TypeVar("B")


class Disk:
    """The rows of arrays on disk, ``memory`` GiB of which are in memory at most.

    Rows are read by a thread, in the order of the epoch, into tensors that stay where they are, on
    the ``device``: a compiled step gathers its batch from these as from data in memory. ``array``
    is what batches are made of, ``beside`` further arrays on disk of a row for each of its rows.
    """

    def __init__(
        self,
        array: np.memmap,
        memory: float = MEMORY,
        device: torch.device | str | int = "cpu",
        beside: Sequence[np.memmap] = (),
    ) -> None:
        if not memory > 0:
            raise InputError(f"Expected memory > 0, in GiB, got {memory}.")
        self.array, self.gib, self.device = array, memory, torch.device(device)
        self.beside, self.memory = tuple(beside), int(memory * 2**30)
        for each in (array, *self.beside):
            _advise(each, "MADV_RANDOM")  # or else each row brings the 32 pages after it
        self.row = sum(each[:1].nbytes for each in (array, *self.beside))
        self._held: tuple[Tensor, ...] = ()
        self.at_hand: Any = None

    def to(self, device: torch.device | str | int) -> Disk:
        """The same arrays for another device."""
        return Disk(self.array, self.gib, device, self.beside)

    def read(
        self, index: Tensor, context: Sequence[Tensor] = ()
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Copies of some rows in the order of the file, and where among them each is ``[M]``.

        They are in pinned memory where they go to a GPU.
        """
        # By NumPy: a thread in which torch works has a team of OpenMP's threads of its own, and
        # with more of them than cores those of the thread that trains sleep between two loops
        # (libgomp), for which a step of 2 ms took twice as long.
        sources = mapped(self.array), *context
        found = [_room(len(index), each, self.device.type == "cuda") for each in sources]
        copies = [(new.numpy(), each.numpy()) for new, each in zip(found, sources, strict=True)]
        order = np.argsort(index.numpy())
        rows = index.numpy()[order]
        # A range of the file at a time, as a page fault maps what lies around a row: 64 KiB in
        # Linux before 6.18, and since then up to 2 MiB.
        span = max(1, self.memory // 4 // self.row)
        ends = np.flatnonzero(np.diff(rows // span, append=-1)) + 1
        for start, stop in pairwise([0, *ends]):
            for new, source in copies:
                # NumPy would write to a copy first if it had to raise for a number out of bounds.
                np.take(source, rows[start:stop], 0, new[start:stop], "clip")
            self._release()
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        return torch.from_numpy(places), tuple(found)

    def blocks(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Copies of all rows of some tensors, a part at a time, on the device."""
        count = max(1, self.memory // 4 // self.row)
        for start in range(0, len(tensors[0]), count):
            rows = [each[start : start + count] for each in tensors]
            copies = [_room(len(each), each).copy_(each) for each in rows]
            self._release()
            yield tuple(each.to(self.device) for each in copies)

    def held(self, rows: int, context: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tensors of x and its context that rows are read into, room for so many."""
        if not self._held or len(self._held[0]) < rows:
            self._held = tuple(
                torch.empty(rows, *each.shape[1:], dtype=each.dtype, device=self.device)
                for each in (mapped(self.array), *context)
            )
        return self._held

    def batches_at_once(self, size: int) -> int:
        """How many batches of a size are read together."""
        # Four parts are there: at hand, being copied, ready, and being read, each with the numbers
        # of its rows, some of them sorted. A quarter of it all is for pages, and one for what the
        # allocator keeps. The more of them, the fewer times are the pages of the file mapped.
        count = min(self.memory // 8 // ((self.row + NUMBERS) * size), -(-len(self.array) // size))
        return max(1, count // AT_ONCE * AT_ONCE or count)

    def parts(
        self, batches: Sequence[Tensor], context: Sequence[Tensor]
    ) -> Iterator[Sequence[Tensor]]:
        """Read the rows of some batches into :meth:`held`, and yield their numbers in there."""
        size = len(batches[0])
        count = self.batches_at_once(size)
        # One after the other: all together are as large as the order of all rows.
        groups = (torch.cat([*batches[i : i + count]]) for i in range(0, len(batches), count))
        held = self.held(count * size, context)
        for places, rows in ahead(lambda index: self.read(index.cpu(), context), groups):
            for place, new in zip(held, rows, strict=True):
                place[: len(new)].copy_(new, non_blocking=True)
            # In the order of the batches here, which is a copy less than in that of the rows.
            yield places.to(self.device).split(size)

    def _release(self) -> None:
        """Give back what is mapped: else it counts as memory until somebody else needs it."""
        for each in (self.array, *self.beside):
            _advise(each, "MADV_DONTNEED")


def _room(rows: int, like: Tensor, pinned: bool = False) -> Tensor:
    """A tensor for so many rows, whose memory is given back at once when it is not needed."""
    shape = rows, *like.shape[1:]
    if pinned:
        return torch.empty(shape, dtype=like.dtype, pin_memory=True)
    # Once it was given back 32 MiB, glibc keeps twice as many for each thread.
    size = math.prod(shape) * like.dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, size), dtype=like.dtype).reshape(shape)


def _advise(array: np.memmap, how: str) -> None:
    if hasattr(mmap, how):  # not on Windows
        array._mmap.madvise(getattr(mmap, how))  # type: ignore[attr-defined]


def mapped(array: np.memmap) -> Tensor:
    """An array on disk as a tensor of the same bytes, which are never written."""
    with warnings.catch_warnings(action="ignore"):
        return torch.from_numpy(array)


def written(blocks: Iterable[Sequence[np.ndarray]], rows: int, title: str) -> list[np.memmap]:
    """Write arrays to files without a name, in the folder that ``TMPDIR`` names.

    Args:
        blocks: Some rows of each array, one after the other.
        rows: How many rows there are, as far as that is known.
        title: What they are the rows of.

    Returns:
        The arrays; the file of each is gone when the last view of it is.
    """
    blocks, folder = iter(blocks), _folder()
    first = next(blocks)
    size = rows * sum(each[:1].nbytes for each in first)
    if size > (free := shutil.disk_usage(folder).free):
        raise InputError(
            f"Expected room for {size / 2**30:.3g} GiB, the rows of {title} as they are used, in "
            f"{folder}, got {free / 2**30:.3g} GiB: name a folder with more in TMPDIR."
        )
    bar, done = progress_bar(None, total=rows, desc=f"unpacking {title}", unit="row"), 0
    with ExitStack() as opened, bar:
        files = [opened.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in first]
        for block in chain([first], blocks):
            for file, values in zip(files, block, strict=True):
                file.write(np.ascontiguousarray(values).data)
            done += len(block[0])
            bar.update(len(block[0]))
        for file in files:
            file.flush()
        shapes = [(done, *values.shape[1:]) for values in first]
        return [
            np.memmap(file, values.dtype, "r", shape=shape)
            for file, values, shape in zip(files, first, shapes, strict=True)
        ]


def _folder() -> str:
    """Where large temporary files go: /tmp is in memory on many systems, /var/tmp on none."""
    asked = any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    return "/var/tmp" if os.path.isdir("/var/tmp") and not asked else tempfile.gettempdir()


def is_on_disk(value: object) -> bool:
    """Whether rows of it can be taken from the disk as they are."""
    return (
        isinstance(value, np.memmap)
        and value.dtype == np.float32
        and value.flags.c_contiguous
        and value.ndim > 1
        and value.size > 0
    )


def ahead(function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """Apply a function to items in a thread, while what came before is being used."""
    pool, waiting = ThreadPoolExecutor(1, "pyrovae-read"), deque()  # type: ignore[var-annotated]
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
