"""Read arrays from files or a frame, and check them."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple
from weakref import finalize
from zipfile import BadZipFile, ZipFile, is_zipfile

import numpy as np

from pyrovae._tools import InputError, did_you_mean, physical_memory, warn
from pyrovae.data.annotated import read_h5ad, split_layer
from pyrovae.data.tables import (
    LABELLED,
    LABELS,
    Context,
    Schema,
    Table,
    labels_of,
    lacking,
    read_arff,
    read_csv,
    read_parquet,
    read_table,
    take_context,
)

if TYPE_CHECKING:
    import pandas as pd

TABLES: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": read_csv,
    ".arff": read_arff,
    ".parquet": read_parquet,
}
SUFFIXES = (".npy", ".npz", ".zarr", ".h5ad", *TABLES)
# What may be a folder of files that are one.
FOLDERS = (".zarr", ".parquet")
MISSING = ("refuse", "mask")
# The rows that are looked at for what float32 rounds, and the share of the spread that may go.
ROUNDED, COARSE = 1_000, 0.01


class Arrays(NamedTuple):
    """What a file holds: rows, their labels, and the splits where the file fixes them.

    ``x`` is uint8 or float32 ``[N, ...]``; ``y`` is int64 or float32 ``[N]`` or None; ``sizes``
    counts the leading rows that are train, valid and test, with 0 for a valid left to the reader;
    ``classes`` are the names behind the integers where the labels were words. ``mask`` is True
    where x is observed, ``[N, ...]``, and x is 0 elsewhere; None where gaps are refused.
    ``columns`` are those of a table, ``context`` what was asked for beside x, by name. Of
    ``sequences``, x is ``[N, T, D]``, and no image.
    """

    x: np.ndarray
    y: np.ndarray | None = None
    sizes: tuple[int, int, int] | None = None
    classes: list[str] | None = None
    mask: np.ndarray | None = None
    columns: Schema | None = None
    context: Context | None = None
    sequences: bool = False


def read_arrays(
    path: Path,
    missing: str = "refuse",
    kinds: Mapping[str, str] | None = None,
    context: Sequence[str] = (),
) -> Arrays:
    """Read the rows and labels of a file; no pickle is executed.

    Args:
        path: ``.npy``: one array ``[N, ...]``. ``.npz``: ``x`` with ``y`` or ``labels`` if there
            are any, or ``x_train``, ``x_valid`` (may be missing), ``x_test`` with ``y_train``, …,
            or one array of any name. ``.zarr``: an array, or a group of arrays with these names.
            With ``lengths`` ``[N]``, or ``lengths_train``, …, x are sequences ``[N, T, D]`` of
            which what lies behind their ends is masked. ``.csv``: one datum a row, with or without
            a header; a column called label, labels, y, target or class holds the labels.
            ``.arff`` and ``.parquet``: the same.
            ``.h5ad``: the matrix X, or the layer of ``FILE.h5ad:LAYER``, with obs as the table
            that labels and context are columns of.
        missing: What NaN or an empty field is: ``"refuse"`` or ``"mask"``.
        kinds: The kinds of a table's columns, as :func:`pyrovae.data.tables.read_table` has them.
        context: Columns of a table, or arrays of a ``.npz`` (``age``, or ``age_train``, …), that
            are no part of x but go beside it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is empty, damaged, or holds what is no finite number.
    """
    path, layer = split_layer(str(path))
    suffix = path.suffix.lower()
    if not path.is_file() and not (suffix in FOLDERS and path.is_dir()):
        found = "a folder" if path.is_dir() else "nothing"
        raise FileNotFoundError(f"Expected a data file at {path}, found {found} there.")
    if path.stat().st_size == 0:
        raise InputError(f"Expected data in {path}, got an empty file.")
    if suffix in TABLES:
        with _readable(path, ValueError, OSError, Warning, NotImplementedError, TypeError):
            frame, taken = take_context(TABLES[suffix](path), context, str(path))
        table = read_table(frame, str(path), kinds, words=suffix != ".csv")
        return table_arrays(table, path, missing)._replace(context=taken)
    if kinds:
        raise InputError(f"Expected a table for columns={dict(kinds)}, got {path}.")
    if suffix == ".h5ad":
        with _readable(path, OSError, KeyError, TypeError):
            return matrix_arrays(*read_h5ad(path, layer), path, missing, context)
    arrays = _read_zarr(path) if suffix == ".zarr" else _read_numpy(path)
    if suffix == ".npy" and context:
        rest, taken = take_columns(arrays[""], context, path)
        arrays = {"": arrays[""][:, rest]}
    else:
        taken = take_arrays(arrays, context, path)
    return checked(arrays, path, missing)._replace(context=taken)


def matrix_arrays(
    x: np.ndarray, about: pd.DataFrame, path: Path, missing: str, context: Sequence[str]
) -> Arrays:
    """The rows of a matrix, with labels and context from a table about its rows."""
    y, taken = beside_matrix(about, path, context)
    arrays = {"x": x} | ({} if y is None else {"y": y})
    return checked(arrays, path, missing)._replace(context=taken)


def beside_matrix(
    about: pd.DataFrame, path: Path, context: Sequence[str]
) -> tuple[np.ndarray | None, Context]:
    """The labels and the context that a table about the rows of a matrix has."""
    rest, taken = take_context(about, context, f"obs of {path}")
    labels = [name for name in rest.columns if str(name).strip().lower() in LABELS]
    return (labels_of(rest[labels[0]], str(path)) if labels else None), taken


def table_arrays(table: Table, path: Path, missing: str) -> Arrays:
    """The rows and labels of a table; the path is what to call it."""
    arrays = {"x": table.x} | ({} if table.y is None else {"y": table.y})
    found = checked(arrays, path, missing)._replace(columns=table.columns)
    if found.mask is not None:
        return found._replace(x=np.where(found.mask, found.x, fillers(table.columns)))
    return found


def fillers(columns: Schema | None) -> np.ndarray:
    """What stands at the gaps of each column: it is not scored, but may need a logarithm."""
    positive = None if columns is None else [column.kind == "positive" for column in columns]
    return np.asarray(0 if positive is None else positive, np.float32)


def take_columns(x: np.ndarray, names: Sequence[str], path: Path) -> tuple[list[int], Context]:
    """The columns of an array that are no context, and those that are, by their numbers."""
    columns = range(x.shape[1] if x.ndim == 2 else 0)
    try:
        numbers = [columns[int(name)] for name in names]
    except (ValueError, IndexError):
        numbers = []
    if not numbers or len({*numbers}) < len(numbers):
        raise InputError(
            f"Expected numbers of columns [N, D] of {path} for context, each once, from 0 or, "
            f"backwards, from -1, got {','.join(names)!r} for {list(x.shape)}: the columns of a "
            f".csv or .parquet file and the arrays of a .npz have names."
        )
    taken: Context = {
        name: (_context(x[:, n], name, path), ()) for name, n in zip(names, numbers, strict=True)
    }
    return [n for n in columns if n not in numbers], taken


def _context(values: np.ndarray, name: str, path: Path) -> np.ndarray:
    """Numbers of a context as int64, if they are whole, or finite float32."""
    return (
        values.astype(np.int64)
        if values.dtype.kind in "biu"
        else finite(values, title_of(path, name))
    )


def take_arrays(
    arrays: dict[str, Any], names: Sequence[str], path: Path, read: Callable = np.asarray
) -> Context:
    """Take what is context out of the arrays of a file, its splits joined."""
    found: Context = {}
    for name in names:
        splits = [f"{name}_{split}" for split in ("train", "valid", "test")]
        parts = [each for each in ([name] if name in arrays else splits) if each in arrays]
        if not parts:
            have, near = sorted(filter(None, arrays)), did_you_mean(name, [*arrays, *LABELLED])
            raise InputError(
                f"Expected an array {name!r} in {path} for context, got {have}"
                f"{near}; name it in np.savez(file, x=..., {name}=...)."
            )
        values = np.concatenate([read(arrays.pop(part)) for part in parts])
        if values.dtype.kind in "biuf":
            found[name] = _context(values, name, path), ()
        else:
            words, codes = np.unique(values.astype(str), return_inverse=True)
            found[name] = codes.astype(np.int64), tuple(words.tolist())
    return found


def checked(arrays: Mapping[str, np.ndarray], path: Path, missing: str) -> Arrays:
    """The rows and labels of named arrays, if they are finite numbers; the path names them."""
    names, sequences = roles(arrays, path), _lengths(arrays, path)
    inside = [ends_inside(arrays, x, path) if sequences else None for x, _ in names]
    raw = [
        arrays[x] if seen is None else np.where(seen, arrays[x], arrays[x].dtype.type(0))
        for (x, _), seen in zip(names, inside, strict=True)
    ]
    xs = [_rows(x, title_of(path, n), missing) for x, (n, _) in zip(raw, names, strict=True)]
    pairs = zip(names, xs, strict=True)
    ys = [checked_labels(arrays[y], len(x), title_of(path, y)) for (_, y), x in pairs if y]
    x, (y, classes) = _join(xs, path), encoded(ys, path)
    mask = np.concatenate([each for each in inside if each is not None]) if sequences else None
    if missing == "mask":
        there = ~np.isnan(x)
        x = x if there.all() else np.where(there, x, np.float32(0))
        mask = there if mask is None else there & mask
    sizes = None
    if len(names) > 1:
        train, *valid, test = map(len, xs)
        sizes = train, sum(valid), test
    return Arrays(x, y, sizes, classes, mask, sequences=sequences)


def _lengths(arrays: Mapping[str, np.ndarray], path: Path) -> bool:
    """Whether x are sequences: each x, or none, has lengths beside it."""
    wanted = {_lengths_of(x) for x, _ in roles(arrays, path)}
    found = {name for name in arrays if name.partition("_")[0] == "lengths"}
    if found and found != wanted:
        raise InputError(
            f"Expected the lengths of all sequences in {path}, {sorted(wanted)}, or none, got "
            f"{sorted(found)}."
        )
    return bool(found)


def _lengths_of(x: str) -> str:
    return "lengths" + x.removeprefix("x")


def ends_inside(arrays: Mapping[str, np.ndarray], name: str, path: Path) -> np.ndarray:
    """Where sequences have not ended, ``[N, T, D]``."""
    x, lengths = arrays[name], arrays[_lengths_of(name)]
    title = title_of(path, _lengths_of(name))
    if x.ndim != 3 or lengths.shape != x.shape[:1] or lengths.dtype.kind not in "iu":
        raise InputError(
            f"Expected a whole number for each sequence of x [N, T, D] in {title}, got "
            f"{lengths.dtype} {list(lengths.shape)} for x {list(x.shape)}."
        )
    if not ((lengths >= 1) & (lengths <= x.shape[1])).all():
        raise InputError(
            f"Expected lengths from 1 to the {x.shape[1]} steps of x in {title}, got "
            f"{lengths.min()} to {lengths.max()}."
        )
    seen: np.ndarray = np.arange(x.shape[1]) < lengths[:, None].astype(int)
    return np.broadcast_to(seen[..., None], x.shape)


def as_events(x: np.ndarray, shape: Sequence[int] | None, title: str) -> np.ndarray:
    """Rows ``[N, ...]`` as events of a shape, or else as images where they may be some.

    Of that shape they stay as they are, and with their channels first if they have it then; others
    are read row by row.
    """
    images = channels_first(x)
    if shape is None or images.shape[1:] == tuple(shape) != x.shape[1:]:
        return images
    if any(n < 1 for n in shape) or math.prod(shape) != math.prod(x.shape[1:]):
        raise InputError(
            f"Expected a shape of {math.prod(x.shape[1:])} numbers for the data {list(x.shape)} of "
            f"{title}, got {','.join(map(str, shape))}."
        )
    return x.reshape(len(x), *shape)


def channels_first(x: np.ndarray) -> np.ndarray:
    """``[N, H, W]`` as ``[N, 1, H, W]``, and ``[N, H, W, C]`` as ``[N, C, H, W]``."""
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[-1] in (1, 3):
        return np.moveaxis(x, -1, 1)
    return x


class Member:
    """An array in a ``.npz`` file, of which some rows are read at a time."""

    def __init__(self, archive: ZipFile, name: str, path: Path) -> None:
        # Also where a reader is refused and goes with the error: the last one closes the file.
        finalize(self, archive.close)
        self.path, self.file = path, archive.open(name)
        finalize(self, self.file.close)
        self.shape, fortran, self.dtype = _header(self.file, path)
        if fortran:
            raise ValueError(f"{name} of {path} has no row in one place")
        self.begin, self.ndim, self.chunks = self.file.tell(), len(self.shape), (1,)

    def __getitem__(self, rows: Any) -> np.ndarray:
        start, stop, _ = (slice(None) if rows is ... else rows).indices(self.shape[0])
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        with _readable(self.path, ValueError, OSError, EOFError, BadZipFile, zlib.error):
            self.file.seek(self.begin + start * row)
            found = np.frombuffer(self.file.read((stop - start) * row), self.dtype)
            return found.reshape(stop - start, *self.shape[1:])


def open_npz(path: Path) -> dict[str, Member]:
    """The arrays of a ``.npz`` file by name; nothing of them is read."""
    archive = ZipFile(path)
    return {name.removesuffix(".npy"): Member(archive, name, path) for name in archive.namelist()}


def open_zarr(path: Path) -> dict[str, Any]:
    """The arrays of a Zarr group by name, or the only one as ``""``; nothing of them is read."""
    try:
        import zarr
    except ImportError as error:
        raise lacking("zarr", "zarr") from error
    root = zarr.open(path, mode="r")
    return dict(root.arrays()) if isinstance(root, zarr.Group) else {"": root}


def plain(array: Any) -> np.ndarray:
    """A Zarr array in memory, words as NumPy has them."""
    found = np.asarray(array[...])
    return found.astype(str) if found.dtype.kind in "OT" else found


def _read_zarr(path: Path) -> dict[str, np.ndarray]:
    with _readable(path, Exception):
        arrays = open_zarr(path)
        check_memory(sum(array.nbytes for array in arrays.values()), path)
        return {name: plain(array) for name, array in arrays.items()}


def _read_numpy(path: Path) -> dict[str, np.ndarray]:
    with _readable(path, Exception):
        if not is_zipfile(path):
            with path.open("rb") as file:
                return {"": _array(file, path)}
        with ZipFile(path) as archive:
            names = archive.namelist()
            check_memory(sum(_size(archive.open(n), path) for n in names), path)
            return {n.removesuffix(".npy"): _array(archive.open(n), path) for n in names}


def _array(file: IO[bytes], path: Path) -> np.ndarray:
    """An array in NumPy's own format."""
    check_memory(_size(file, path), path)
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _size(file: IO[bytes], path: Path) -> int:
    """The bytes that an array takes."""
    shape, _, dtype = _header(file, path)
    return math.prod(shape) * dtype.itemsize


def _header(file: IO[bytes], path: Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran's order and type of an array, if it need not be unpickled."""
    first = np.lib.format.read_magic(file) == (1, 0)
    header = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(file)
    if dtype.hasobject:
        raise InputError(
            f"Expected arrays of numbers in {path}, got Python objects, which are never unpickled; "
            f"save np.asarray(x, dtype=np.float32) instead."
        )
    return shape, fortran, dtype


def check_memory(size: int, path: Path) -> None:
    """Refuse before reading what does not fit: a small file may inflate to a thousand times."""
    if size > (limit := physical_memory()):
        raise InputError(
            f"Expected data that fit into the {limit / 2**30:.3g} GB of memory here, got {path} "
            f"with arrays of {size / 2**30:.3g} GB: load a part of them."
        )


def roles(arrays: Mapping[str, np.ndarray], path: Path) -> list[tuple[str, str]]:
    """The names of data and labels, split by split; ``""`` where there are no labels."""
    if "x_train" in arrays and "x_test" in arrays:
        splits = [s for s in ("train", "valid", "test") if f"x_{s}" in arrays]
        labels = {name for name in arrays if name.startswith("y_")}
        wanted = {f"y_{s}" for s in splits}
        if labels and labels != wanted:
            raise InputError(
                f"Expected labels {sorted(wanted)} in {path} or none, got {sorted(labels)}."
            )
        return [(f"x_{s}", f"y_{s}" if labels else "") for s in splits]
    if "x" in arrays:
        return [("x", next((name for name in ("y", "labels") if name in arrays), ""))]
    if len(arrays) == 1:
        return [(next(iter(arrays)), "")]
    raise InputError(
        f"Expected x (and y), or x_train and x_test, or a single array in {path}, "
        f"got {sorted(arrays) or 'no array'}; name them in np.savez(file, x=..., y=...)."
    )


def _rows(x: np.ndarray, title: str, missing: str) -> np.ndarray:
    """Data ``[N, ...]`` as uint8 or finite float32, with NaN if that is to be masked."""
    if x.dtype.kind not in "biuf":
        raise InputError(f"Expected real numbers in {title}, got dtype {x.dtype}.")
    if not 2 <= x.ndim <= 4:
        mend = "; reshape it to [N, 1] if it is one number a datum" if x.ndim == 1 else ""
        raise InputError(
            f"Expected [N, D], [N, H, W] or [N, C, H, W] in {title}, got {list(x.shape)}{mend}."
        )
    if x.size == 0:
        what = "rows" if len(x) == 0 else "columns"
        raise InputError(f"Expected data in {title}, got no {what}: shape {list(x.shape)}.")
    return x if x.dtype == np.uint8 else finite(x, title, missing)


def checked_labels(y: np.ndarray, rows: int, title: str) -> np.ndarray:
    """Labels ``[N]`` as int64, finite float32 or strings."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape != (rows,):
        raise InputError(f"Expected {rows} labels in {title}, one a row, got {list(y.shape)}.")
    if y.dtype.kind not in "biufUS":
        raise InputError(f"Expected numbers or words in {title}, got dtype {y.dtype}.")
    if y.dtype.kind in "biu":
        if y.max() > np.iinfo(np.int64).max:
            raise InputError(f"Expected labels below 2^63 in {title}, got {y.max()}.")
        return y.astype(np.int64)
    return finite(y, title) if y.dtype.kind == "f" else y.astype(str)


def _warn_of_rounding(wide: np.ndarray, x: np.ndarray, title: str) -> None:
    """Warn where float32 merges values of a column, as it does those of Unix times."""
    if wide.ndim != 2 or wide.dtype.itemsize <= 4 or not len(wide):
        return
    with warnings.catch_warnings(action="ignore"):  # of columns without a value
        loc, spread = np.nanmean(wide, axis=0), np.nanstd(wide, axis=0, dtype=np.float64)
        off = np.nanmax(np.abs(wide - x.astype(np.float64)), axis=0)
    # The mean of equal numbers is rounded.
    lost = (off > COARSE * spread) & (spread > 1e-12 * np.abs(loc))
    if columns := np.flatnonzero(lost).tolist():
        where = f" in columns {columns[:5]} (counting from 0)" if wide.shape[1] > 1 else ""
        warn(
            f"float32 has no room for the values of {title}{where}: what tells them apart is "
            f"rounded away. Subtract their mean first."
        )


def finite(x: np.ndarray, title: str, missing: str = "", first: int | None = None) -> np.ndarray:
    """float32; ``missing`` says what NaN is in data, and nothing in labels.

    Of a part of all rows, ``first`` is the number of its first.
    """
    with np.errstate(over="ignore"):
        wide, x = x, x.astype(np.float32)
    bad = np.isinf(x) if missing == "mask" else ~np.isfinite(x)
    if bad.any():
        row = int(bad.reshape(len(x), -1).any(1).argmax()) + (first or 0)
        more = "" if first is None else " or more"
        mend = ", or take missing='mask' (--missing mask)" if missing == "refuse" else ""
        kind = "infinite" if missing == "mask" else "NaN or infinite"
        raise InputError(
            f"Expected finite float32 numbers in {title}, got {int(bad.sum())}{more} {kind}, "
            f"the first in row {row} (counting from 0); drop or fill these rows{mend}."
        )
    _warn_of_rounding(wide[:ROUNDED], x[:ROUNDED], title)
    return x


def _join(parts: list[np.ndarray], path: Path) -> np.ndarray:
    kinds = {(str(part.dtype), part.shape[1:]) for part in parts}
    if len(kinds) > 1:
        found = ", ".join(f"{part.dtype} {list(part.shape)}" for part in parts)
        raise InputError(f"Expected splits of one type and one event shape in {path}, got {found}.")
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def encoded(parts: list[np.ndarray], path: Path) -> tuple[np.ndarray | None, list[str] | None]:
    """The labels of all splits as one array, words as their place in the sorted list of words."""
    if not parts:
        return None, None
    if len({part.dtype.kind for part in parts}) > 1:
        raise InputError(
            f"Expected labels of one type in {path}, got {[str(part.dtype) for part in parts]}."
        )
    y = np.concatenate(parts)
    if y.dtype.kind != "U":
        return y, None
    classes, codes = np.unique(y, return_inverse=True)
    return codes.astype(np.int64), classes.tolist()


def title_of(path: Path, name: str) -> str:
    """What to call an array of a file."""
    return f"{name!r} of {path}" if name else str(path)


@contextmanager
def _readable(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Say of which file it is, where reading it ends in an error of these kinds."""
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        raise InputError(
            f"Expected a readable {path.suffix} file at {path}, got one that is truncated, damaged "
            f"or of another kind ({one_line(error)})."
        ) from error


def one_line(error: Exception) -> str:
    """What an error says, or else its name, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
