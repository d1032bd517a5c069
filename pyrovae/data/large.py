"""Files that are larger than memory: mapped as they are, or unpacked once into a file that is."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pyrovae._tools import InputError, progress_bar
from pyrovae.data.disk import MEMORY, open_array
from pyrovae.data.files import (
    Arrays,
    as_events,
    checked_labels,
    encoded,
    open_zarr,
    plain,
    roles,
    take_arrays,
    title_of,
)
from pyrovae.data.tables import (
    LABELS,
    Context,
    labels_of,
    named_columns,
    parquet_files,
    take_context,
)


class Packed(NamedTuple):
    """Rows that have to be decoded: ``[N, ...]``, ``step`` of them together at least.

    ``blocks(count)`` yields about so many at a time, ``beside()`` reads labels and context, and
    uint8 have to be told from numbers that are taken as they are.
    """

    shape: tuple[int, ...]
    step: int
    dtype: Any
    blocks: Callable[[int], Iterator[np.ndarray]]
    beside: Callable[[], tuple[np.ndarray | None, Context]]


def open_large(
    path: Path, memory: float | None, limit: int, context: Sequence[str] = ()
) -> tuple[Arrays, str] | None:
    """A file whose rows stay on disk: one of more than ``memory`` GiB, or a limit in bytes.

    A ``.npy`` file of float32 is mapped. Parquet and Zarr decode whole row groups and chunks, of
    which an epoch in a random order would need all for each batch: their rows are unpacked once,
    as float32, into a file without a name, in the folder that ``TMPDIR`` names. It is gone when the
    last array of it is.

    Returns:
        The file's arrays, x a memmap, and how they were scaled; or None where it is smaller, or of
        another kind.
    """
    most = limit if memory is None else int(memory * 2**30)
    if path.suffix.lower() == ".npy":
        array = open_array(path, most)
        return None if array is None else (Arrays(array), "none")
    if path.suffix.lower() not in OPENERS or not path.exists():
        return None
    packed = OPENERS[path.suffix.lower()](path, context, most)
    if packed is None:
        return None
    if len(packed.shape) < 2 or not all(packed.shape):
        raise InputError(f"Expected rows [N, ...] in {path}, got {list(packed.shape)}.")
    y, taken = packed.beside()
    ys = [] if y is None else [checked_labels(y, packed.shape[0], title_of(path, "y"))]
    count = _rows_at_once(packed, path, int((memory or MEMORY) * 2**30))
    grey = packed.dtype == np.uint8 and any(block.max() > 1 for block in packed.blocks(count))
    array = _unpacked(packed, path, count, 255 if grey else 1)
    labels, classes = encoded(ys, path)
    arrays = Arrays(array, labels, None, classes, context=taken)
    return arrays, "uint8 / 255" if grey else "none"


def _parquet(path: Path, context: Sequence[str], most: int) -> Packed | None:
    """The rows of a Parquet file, or of a folder of them, whose columns are numbers."""
    import pandas as pd
    from pyarrow import types

    try:
        files = parquet_files(path)
    except (OSError, ValueError):
        return None  # what is no Parquet file is told of where it is read
    schema, rows = files[0].schema_arrow, sum(each.metadata.num_rows for each in files)
    index = (schema.pandas_metadata or {}).get("index_columns", [])
    names = [name for name in schema.names if name not in index]
    labels = [name for name in names if name.strip().lower() in LABELS and name not in context]
    of_x = [name for name in names if name not in {*labels, *context}]
    if 4 * rows * len(of_x) <= most:
        return None
    named_columns(context, names, str(path))
    for name in of_x:
        kind = schema.field(name).type
        if not (types.is_floating(kind) or types.is_integer(kind) or types.is_boolean(kind)):
            raise InputError(
                f"Expected numbers in column {name!r} of {path}, which stays on disk, got {kind}: "
                f"make it numbers, name it in context, leave it out, or give a larger memory."
            )

    def blocks(count: int) -> Iterator[np.ndarray]:
        for each in files:
            for batch in each.iter_batches(count, columns=of_x, use_threads=False):
                block = np.empty((batch.num_rows, len(of_x)), np.float32)
                for j, name in enumerate(of_x):
                    block[:, j] = batch.column(name).to_numpy(zero_copy_only=False)
                yield block

    def beside() -> tuple[np.ndarray | None, Context]:
        wanted = [*labels, *context]
        frame = pd.concat([each.read(wanted).to_pandas() for each in files], ignore_index=True)
        rest, taken = take_context(frame, context, str(path))
        return (labels_of(rest[labels[0]], str(path)) if labels else None), taken

    return Packed((rows, len(of_x)), 1, np.float32, blocks, beside)


def _zarr(path: Path, context: Sequence[str], most: int) -> Packed | None:
    """The rows of a Zarr array, or of x in a group that may have labels and context."""
    try:
        arrays: dict[str, Any] = open_zarr(path)
    except (OSError, ValueError, KeyError):
        return None  # as above
    apart = {name: each for name, each in arrays.items() if name not in context}
    names = roles(apart, path)
    size = sum(4 * math.prod(arrays[x].shape) for x, _ in names)
    if size <= most:
        return None
    if len(names) > 1:
        raise InputError(
            f"Expected one array x in {path}, which stays on disk, got {', '.join(dict(names))}: "
            f"join them, the rows of test last, or give a larger memory."
        )
    ((name, labels),) = names
    x = arrays[name]
    if "lengths" in arrays:
        raise InputError(
            f"Expected no lengths in {path}, which stays on disk and has no room for a mask: give "
            f"a larger memory, or shorter parts of the sequences."
        )
    if x.dtype.kind not in "biuf":
        raise InputError(f"Expected real numbers in {title_of(path, name)}, got dtype {x.dtype}.")
    shape = as_events(np.empty((0, *x.shape[1:]), bool), None, name).shape[1:]
    step = x.chunks[0]

    def blocks(count: int) -> Iterator[np.ndarray]:
        count = max(step, count // step * step)
        for start in range(0, x.shape[0], count):
            yield as_events(x[start : start + count], None, name)

    def beside() -> tuple[np.ndarray | None, Context]:
        given = {each: array for each, array in arrays.items() if each in context}
        taken = take_arrays({**apart, **given}, context, path, plain)
        return (plain(arrays[labels]) if labels else None), taken

    return Packed((x.shape[0], *shape), step, x.dtype, blocks, beside)


OPENERS: Mapping[str, Callable[[Path, Sequence[str], int], Packed | None]] = {
    ".parquet": _parquet,
    ".zarr": _zarr,
}


def _rows_at_once(packed: Packed, path: Path, memory: int) -> int:
    """How many rows are decoded together, so that they take about a quarter of some bytes."""
    row = 4 * math.prod(packed.shape[1:])
    if packed.step * row > memory:
        raise InputError(
            f"Expected chunks of {path} that fit into memory={memory / 2**30:g} GiB, got "
            f"{packed.step} rows of {row / 2**10:.3g} KiB together: give a larger memory, or write "
            f"it with smaller chunks."
        )
    # They are there as they were stored, in double precision perhaps, and as float32.
    return max(1, memory // 4 // (3 * row))


def _unpacked(packed: Packed, path: Path, count: int, scale: int) -> np.memmap:
    """All rows over a scale, so many of them at a time, as a memmap of float32."""
    folder, size = _folder(), 4 * math.prod(packed.shape)
    if size > (free := shutil.disk_usage(folder).free):
        raise InputError(
            f"Expected room for {size / 2**30:.3g} GiB, the rows of {path} as float32, in "
            f"{folder}, got {free / 2**30:.3g} GiB: name a folder with more in TMPDIR."
        )
    bar = progress_bar(None, total=packed.shape[0], desc=f"unpacking {path.name}", unit="row")
    with tempfile.TemporaryFile(dir=folder) as file, bar:
        for block in packed.blocks(count):
            # As data in memory are scaled.
            values = np.ascontiguousarray(block, np.float32)
            file.write((values / np.float32(scale) if scale != 1 else values).data)
            bar.update(len(block))
        file.flush()
        return np.memmap(file, np.float32, "r", shape=packed.shape)


def _folder() -> str:
    """Where large temporary files go: /tmp is in memory on many systems, /var/tmp on none."""
    asked = any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    return "/var/tmp" if os.path.isdir("/var/tmp") and not asked else tempfile.gettempdir()
