"""Data that are larger than memory: mapped as they are, or unpacked once into a file that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from pyrovae._tools import InputError
from pyrovae.data.annotated import open_h5ad, read_obs, row_reader, shape_of, split_layer
from pyrovae.data.disk import MEMORY, is_on_disk, written
from pyrovae.data.files import (
    Arrays,
    beside_matrix,
    checked_labels,
    encoded,
    ends_inside,
    finite,
    open_npz,
    open_zarr,
    plain,
    roles,
    take_arrays,
    take_columns,
    title_of,
)
from pyrovae.data.given import dense, exceeds, is_torch_data, package_of, read_items
from pyrovae.data.sources import no_columns, split_end, type_name
from pyrovae.data.tables import (
    Column,
    Context,
    Schema,
    check_columns,
    is_label,
    labels_of,
    measured,
    named_columns,
    parquet_files,
    read_column,
    take_context,
)

# The kinds of columns that are asked for, by name.
Kinds = Mapping[str, str] | None


class Packed(NamedTuple):
    """Rows that have to be decoded: ``[N, ...]``, ``step`` of them together at least.

    ``take(start, stop)`` decodes some of them, ``beside()`` reads labels and context, and
    uint8 have to be told from numbers that are taken as they are. ``mask`` is true where sequences
    have not ended, ``array`` are the rows where they can be mapped as they are.
    """

    shape: tuple[int, ...]
    dtype: Any
    take: Callable[[int, int], np.ndarray]
    beside: Callable[[], tuple[np.ndarray | None, Context]] = lambda: (None, {})
    step: int = 1
    columns: Schema | None = None
    mask: np.ndarray | None = None
    array: np.memmap | None = None

    def blocks(self, count: int) -> Iterator[np.ndarray]:
        """All rows, about so many at a time."""
        rows, count = self.shape[0], max(self.step, count // self.step * self.step)
        for start in range(0, rows, count):
            yield self.take(start, min(start + count, rows))


def open_large(
    source: Any,
    memory: float | None,
    limit: int,
    context: Sequence[str] = (),
    kinds: Kinds = None,
) -> tuple[Arrays, str] | None:
    """Data whose rows stay on disk: of more than ``memory`` GiB, or a limit in bytes.

    A ``.npy`` file of float32 is mapped. Parquet, Zarr and HDF5 decode whole row groups and chunks,
    a compressed ``.npz`` all that is before a row, and a torch data set every datum by itself: of
    these an epoch in a random order would need all for each batch, so their rows are unpacked once,
    as float32, into a file without a name, in the folder that ``TMPDIR`` names. It is gone when the
    last array of it is. Tables of text, whose columns nobody knows before the end, are refused.

    Returns:
        The arrays, x a memmap, and how they were scaled; or None where they are smaller, or are of
        another kind.
    """
    most = limit if memory is None else int(memory * 2**30)
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        file, _ = split_layer(str(path))
        opener = OPENERS.get(file.suffix.lower())
        packed = opener(path, context, most, kinds) if opener and file.exists() else None
    else:
        path = Path(f"the {type(source).__name__}")
        found = _memmap if isinstance(source, np.memmap) else _sliced
        found = _items if is_torch_data(source) else found
        packed = found(source, path, context, most, kinds)
    if packed is None:
        return None
    if len(packed.shape) < 2 or not all(packed.shape):
        raise InputError(f"Expected rows [N, ...] in {path}, got {list(packed.shape)}.")
    if np.dtype(packed.dtype).kind not in "biuf":
        raise InputError(f"Expected real numbers in {path}, got dtype {packed.dtype}.")
    y, taken = packed.beside()
    ys = [] if y is None else [checked_labels(y, packed.shape[0], title_of(path, "y"))]
    array, grey = packed.array, False
    if array is None:
        count = _rows_at_once(packed, path, int((memory or MEMORY) * 2**30))
        grey = packed.dtype == np.uint8 and any(block.max() > 1 for block in packed.blocks(count))
        array = _unpacked(packed, path, count, 255 if grey else 1)
    labels, classes = encoded(ys, path)
    arrays = Arrays(
        array, labels, None, classes, packed.mask, packed.columns, taken, packed.mask is not None
    )
    return arrays, "uint8 / 255" if grey else "none"


def _npy(path: Path, context: Sequence[str], most: int, kinds: Kinds) -> Packed | None:
    """The rows of a ``.npy`` file, and columns of it by their numbers."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError):
        return None  # what is no array is told of where it is read
    return _memmap(array, path, context, most, kinds)


def _memmap(
    array: np.memmap, path: Path, context: Sequence[str], most: int, kinds: Kinds
) -> Packed | None:
    if 4 * array.size <= most:
        return None
    _no_kinds(kinds, path)
    rest, taken = take_columns(array, context, path) if context else (None, {})
    return _mapped(array, rest, lambda: (None, taken))


def _sliced(
    data: Any, path: Path, context: Sequence[str], most: int, kinds: Kinds
) -> Packed | None:
    """An AnnData, a sparse matrix, or an array of Zarr, h5py or xarray, by slices of its rows."""
    kind, shape = package_of(data), tuple(getattr(data, "shape", ()))
    known = kind in ("", "scipy", "anndata") and not isinstance(data, Tensor)
    if not known or len(shape) < 2 or 4 * math.prod(shape) <= most:
        return None
    cells = kind == "anndata"
    if cells and not data.isbacked and isinstance(data.X, np.ndarray):
        return None
    if cells and data.isbacked and data.is_view:
        raise InputError(
            f"Expected an AnnData whose rows can be read by slices, got {list(shape)} of them as a "
            f"view of one on disk: write it with .copy(filename), or give a larger memory."
        )
    _no_kinds(kinds, path)
    if context and not cells:
        raise no_columns(context, type_name(data))
    rows = data.tocsr() if kind == "scipy" else data

    def take(start: int, stop: int) -> np.ndarray:
        block = rows[start:stop].X if cells else rows[start:stop]
        return dense(block) if hasattr(block, "toarray") else np.asarray(block)

    def beside() -> tuple[np.ndarray | None, Context]:
        return beside_matrix(data.obs, path, context) if cells else (None, {})

    # Of each axis one size, or in xarray those of all chunks.
    chunks = getattr(data, "chunks", None)
    step = int(np.max(chunks[0])) if chunks else 1
    return Packed(shape, take(0, 1).dtype, take, beside, step)


def _items(data: Any, path: Path, context: Sequence[str], most: int, kinds: Kinds) -> Packed | None:
    """The data of a torch data set, of x or of x and a label."""
    if not exceeds(data, most):
        return None
    _no_kinds(kinds, path)
    if context:
        raise InputError(
            f"Expected no names in context for {path}, whose columns have none, got "
            f"{','.join(context)}: fit takes all that a datum has beside x as context."
        )
    array, *more = read_items(data, most)
    if len(more) > 1:
        raise InputError(
            f"Expected x, or x and a label, in each datum of {path}, got {1 + len(more)} tensors: "
            f"give it to fit, which takes the others as context."
        )
    return _mapped(array, None, lambda: (np.asarray(more[0]) if more else None, {}))


def _mapped(array: Any, columns: Sequence[int] | None, beside: Callable) -> Packed:
    """Rows that are on disk already, or some columns of them."""

    def take(start: int, stop: int) -> np.ndarray:
        block = np.asarray(array[start:stop])
        return block if columns is None else block[:, columns]

    shape = array.shape if columns is None else (len(array), len(columns))
    ready = array if columns is None and is_on_disk(array) else None
    return Packed(shape, array.dtype, take, beside, array=ready)


def _parquet(path: Path, context: Sequence[str], most: int, kinds: Kinds) -> Packed | None:
    """The rows of a Parquet file, or of a folder of them, with their columns as a table's."""
    import pandas as pd

    try:
        files = parquet_files(path)
    except (OSError, ValueError):
        return None  # what is no Parquet file is told of where it is read
    schema, rows = files[0].schema_arrow, sum(each.metadata.num_rows for each in files)
    index = (schema.pandas_metadata or {}).get("index_columns", [])
    names = [name for name in schema.names if name not in index]
    labels = [name for name in names if is_label(name) and name not in context]
    of_x = [name for name in names if name not in {*labels, *context}]
    if 4 * rows * len(of_x) <= most:
        return None
    named_columns(context, names, str(path))
    check_columns([*of_x, *labels], kinds or {}, str(path))
    columns: list[Column] = []
    train = split_end(rows, str(path))[0][0]

    def frame(wanted: Sequence[str]) -> pd.DataFrame:
        return pd.concat([each.read(wanted).to_pandas() for each in files], ignore_index=True)

    def numbers() -> Iterator[tuple[np.ndarray]]:
        for name in of_x:
            column, values = read_column(frame([name])[name], (kinds or {}).get(name), str(path))
            x = finite(values[:, None], f"column {name!r} of {path}", "mask")
            rows_of_train = torch.from_numpy(x[:train])
            columns.extend(measured((column,), rows_of_train, ~rows_of_train.isnan()))
            yield (x.T,)

    # A column at a time, as its kind is told by all of its values.
    (by_column,) = written(numbers(), len(of_x), f"the columns of {path.name}")

    def beside() -> tuple[np.ndarray | None, Context]:
        rest, taken = take_context(frame([*labels, *context]), context, str(path))
        return (labels_of(rest[labels[0]], str(path)) if labels else None), taken

    shape = rows, len(of_x)
    return Packed(
        shape, np.float32, lambda start, stop: by_column[:, start:stop].T, beside,
        columns=tuple(columns),
    )  # fmt: skip


def _h5ad(path: Path, context: Sequence[str], most: int, kinds: Kinds) -> Packed | None:
    """The rows of X of a ``.h5ad`` file, or of a layer of it, with obs beside them."""
    try:
        found, obs = open_h5ad(*split_layer(str(path)))
        shape = shape_of(found)
    except (OSError, ValueError, KeyError):
        return None  # as above
    if 4 * math.prod(shape) <= most:
        return None
    _no_kinds(kinds, path)
    step = (getattr(found, "chunks", None) or (1,))[0]
    dtype = getattr(found, "dtype", np.float32)

    take = row_reader(found, str(path))
    return Packed(shape, dtype, take, lambda: beside_matrix(read_obs(obs), path, context), step)


def _arrays(path: Path, context: Sequence[str], most: int, kinds: Kinds) -> Packed | None:
    """The rows of x of a ``.npz`` file or of Zarr, which may have labels and context."""
    try:
        arrays: Mapping[str, Any] = (open_npz if path.suffix.lower() == ".npz" else open_zarr)(path)
    except (OSError, ValueError, KeyError, BadZipFile):
        return None  # as above
    apart = {name: each for name, each in arrays.items() if name not in context}
    names = roles(apart, path)
    size = sum(4 * math.prod(arrays[x].shape) for x, _ in names)
    if size <= most:
        return None
    _no_kinds(kinds, path)
    if len(names) > 1:
        raise InputError(
            f"Expected one array x in {path}, which stays on disk, got {', '.join(dict(names))}: "
            f"join them, the rows of test last, or give a larger memory."
        )
    ((name, labels),) = names
    x = arrays[name]
    mask = None
    if "lengths" in arrays:
        mask = ends_inside({name: x, "lengths": plain(arrays["lengths"])}, name, path)

    def beside() -> tuple[np.ndarray | None, Context]:
        given = {each: array for each, array in arrays.items() if each in context}
        taken = take_arrays({**apart, **given}, context, path, plain)
        return (plain(arrays[labels]) if labels else None), taken

    return Packed(
        tuple(x.shape), x.dtype, lambda start, stop: x[start:stop], beside, x.chunks[0], mask=mask
    )


def _text(path: Path, context: Sequence[str], most: int, kinds: Kinds) -> None:
    """Refuse a table of text that is larger: what its columns are, its last row may change."""
    if (size := path.stat().st_size) > most:
        raise InputError(
            f"Expected a {path.suffix} file that fits into memory, of {most / 2**30:.3g} GiB at "
            f"most, got {path} of {size / 2**30:.3g} GiB: write it as .parquet, which stays on "
            f"disk, or give a larger memory."
        )


OPENERS: Mapping[str, Callable[[Path, Sequence[str], int, Kinds], Packed | None]] = {
    ".npy": _npy,
    ".npz": _arrays,
    ".parquet": _parquet,
    ".zarr": _arrays,
    ".h5ad": _h5ad,
    ".csv": _text,
    ".arff": _text,
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

    def blocks() -> Iterator[tuple[np.ndarray]]:
        for block in packed.blocks(count):
            # As data in memory are scaled.
            values = np.ascontiguousarray(block, np.float32)
            yield (values / np.float32(scale) if scale != 1 else values,)

    return written(blocks(), packed.shape[0], path.name)[0]


def _no_kinds(kinds: Kinds, path: Path) -> None:
    if kinds:
        raise InputError(f"Expected a table for columns={dict(kinds)}, got {path}.")
