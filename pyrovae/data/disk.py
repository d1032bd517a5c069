"""Arrays on disk that are larger than memory, read ahead of the steps that take their rows."""

from __future__ import annotations

import mmap
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyrovae._tools import InputError

# GiB of an array that are in memory at once where nothing is said.
MEMORY = 1.0
# Batches that are read at once: as many as fit takes in one call of a compiled step.
AT_ONCE = 100

A = TypeVar("A")
B = TypeVar("B")


class Disk:
    """The rows of an array on disk, ``memory`` bytes of which are in memory at most.

    Rows are read by a thread, in the order of the epoch, into tensors that stay where they are, on
    the ``device``: a compiled step gathers its batch from these as from data in memory.
    """

    def __init__(
        self, array: np.memmap, memory: float = MEMORY, device: torch.device | str | int = "cpu"
    ) -> None:
        if not memory > 0:
            raise InputError(f"Expected memory > 0, in GiB, got {memory}.")
        self.array, self.gib, self.device = array, memory, torch.device(device)
        _advise(array, "MADV_RANDOM")  # or else each row brings the 32 pages after it
        self.memory, self.row = int(memory * 2**30), array[0].nbytes
        self._held: tuple[Tensor, ...] = ()
        self.at_hand: Any = None

    def to(self, device: torch.device | str | int) -> Disk:
        """The same array for another device."""
        return Disk(self.array, self.gib, device)

    def read(self, index: Tensor) -> Tensor:
        """Copies of some rows ``[M, ...]``, in pinned memory where they go to a GPU."""
        pinned = self.device.type == "cuda"
        found = torch.empty(len(index), *self.array.shape[1:], pin_memory=pinned)
        source = mapped(self.array)
        # In the order of the file and a range of it at a time, as a page fault maps what lies
        # around a row: 64 KiB in Linux before 6.18, and since then up to 2 MiB.
        rows, places = index.sort()
        span = max(1, self.memory // 4 // self.row)
        counts = torch.unique_consecutive(rows // span, return_counts=True)[1].tolist()
        for part, place in zip(rows.split(counts), places.split(counts), strict=True):
            found.index_copy_(0, place, source.index_select(0, part))
            self._release()
        return found

    def blocks(self, first: int, last: int) -> Iterator[Tensor]:
        """Copies of the rows of a range, a part at a time, on the device."""
        count = max(1, self.memory // 4 // self.row)
        for start in range(first, last, count):
            rows = self.array[start : min(start + count, last)]
            block = torch.from_numpy(np.array(rows, order="C"))
            self._release()
            yield block.to(self.device)

    def held(self, rows: int, context: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tensors of x and its context that rows are read into, room for so many."""
        if not self._held or len(self._held[0]) < rows:
            x = torch.empty(rows, *self.array.shape[1:], device=self.device)
            more = (torch.empty(rows, *c.shape[1:], dtype=c.dtype) for c in context)
            self._held = x, *(each.to(self.device) for each in more)
        return self._held

    def batches_at_once(self, size: int) -> int:
        """How many batches of a size are read together."""
        # Four parts are there: at hand, being copied, ready, and being read. A quarter of it all
        # is for pages, and one for what the allocator keeps.
        return max(1, min(AT_ONCE, self.memory // 8 // (self.row * size)))

    def parts(
        self, batches: Sequence[Tensor], context: Sequence[Tensor]
    ) -> Iterator[Sequence[Tensor]]:
        """Read the rows of some batches into :meth:`held`, and yield their numbers in there."""
        size = len(batches[0])
        count = self.batches_at_once(size)
        # One after the other: all together are as large as the order of all rows.
        groups = (torch.cat([*batches[i : i + count]]) for i in range(0, len(batches), count))
        held = self.held(count * size, context)

        def read(index: Tensor) -> tuple[Tensor, ...]:
            index = index.cpu()
            return self.read(index), *(each[index.to(each.device)] for each in context)

        for rows in ahead(read, groups):
            for place, new in zip(held, rows, strict=True):
                place[: len(new)].copy_(new, non_blocking=True)
            yield torch.arange(len(rows[0]), device=self.device).split(size)

    def _release(self) -> None:
        """Give back what is mapped: else it counts as memory until somebody else needs it."""
        _advise(self.array, "MADV_DONTNEED")


def _advise(array: np.memmap, how: str) -> None:
    if hasattr(mmap, how):  # not on Windows
        array._mmap.madvise(getattr(mmap, how))  # type: ignore[attr-defined]


def mapped(array: np.memmap) -> Tensor:
    """A float32 array on disk as a tensor of the same bytes, which are never written."""
    with warnings.catch_warnings(action="ignore"):
        return torch.from_numpy(array)


def is_on_disk(value: object) -> bool:
    """Whether rows of it can be taken from the disk as they are."""
    return (
        isinstance(value, np.memmap)
        and value.dtype == np.float32
        and value.flags.c_contiguous
        and value.ndim > 1
        and value.size > 0
    )


def open_array(path: Path, most: int) -> np.memmap | None:
    """A ``.npy`` file of more than so many bytes, which stays on disk."""
    if not path.is_file() or path.stat().st_size <= most:
        return None
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except ValueError:
        return None  # what is no array is told of where it is read
    if not is_on_disk(array):
        raise InputError(
            f"Expected float32 rows [N, ...] in C order in {path}, which stays on disk, got "
            f"{array.dtype} {list(array.shape)}: convert it once, a part at a time, with "
            f"numpy.lib.format.open_memmap(new, 'w+', 'float32', shape)."
        )
    return array


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
