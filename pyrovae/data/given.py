"""Data as people have them, as the tensors that programs take."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyrovae._tools import (
    InputError,
    InputTypeError,
    physical_memory,
    plain_numbers,
    require_memory,
)
from pyrovae.data.disk import mapped, written
from pyrovae.data.tables import Schema, read_table, to_pandas

if TYPE_CHECKING:
    import pandas as pd
    from torch.utils.data import DataLoader

P = ParamSpec("P")
T = TypeVar("T")
# Whole numbers up to here are exact in float32.
EXACT = 2**24
# Data of a torch data set that are read at once where no loader says how many.
AT_ONCE = 256
# How to fix data that memory cannot hold.
TO_DISK = "pyrovae.load_data(..., memory=) keeps them on disk"


def as_tensors(x: Any, *context: Any) -> tuple[Any, ...]:
    """The arguments ``(x, *context)`` of both programs as tensors ``[N, ...]``.

    Args:
        x: A tensor; a NumPy array, or one of Zarr, h5py or xarray; a pandas or polars frame, or an
            Arrow table, of numbers and categories, whose codes count from 0; a SciPy sparse matrix;
            an AnnData, whose ``X`` is taken; a torch ``Dataset`` with a length, any other object
            with a length whose items are data, or a ``DataLoader`` of one. Items that are tuples or
            dicts give x first, or the one that is called x, and context after it. Every datum is
            read once, in the order of its number, as the loader's ``collate_fn`` and workers have
            it; what takes more than half of the machine's memory goes to a temporary file.
        context: Further arguments, likewise; numbers with a fraction become float32, others int64.

    Returns:
        float32 x and its context. A tensor is itself, and so is what is none of these.

    Raises:
        InputError: If they are no real numbers, whole numbers that float32 does not have, words,
            or more than memory or, for a torch data set, the disk can hold.
    """
    if is_torch_data(x):
        x, *more = (each if isinstance(each, Tensor) else mapped(each) for each in read_items(x))
        context = (*more, *context)
    return _numbers(x, first=True), *(_numbers(each, first=False) for each in context)


def takes_data(function: Callable[P, T]) -> Callable[P, T]:
    """A function ``(*programs, x, *context, ...)`` that takes data as :func:`as_tensors` does.

    One of a guide alone may be given the model before it, in the order of the other functions, and
    one that takes ``columns`` is told what a frame's are called.
    """
    names = inspect.signature(function).parameters
    programs = [name for name in ("model", "guide") if name in names]
    first = "like" if "like" in names else "x"

    @plain_numbers
    @functools.wraps(function)
    def taking(*args: P.args, **kwargs: P.kwargs) -> T:
        leading = next((i for i, arg in enumerate(args) if not callable(arg)), len(args))
        extra = programs == ["guide"] and leading > 1
        count = len(programs) or leading
        for i, arg in enumerate(args):
            if arg is not None and callable(arg) != (i < count + extra):
                raise InputTypeError(
                    f"Expected {function.__name__}({', '.join([*programs, first])}, ...), got "
                    f"{type(arg).__name__} as argument {i + 1}: {first} comes after the "
                    f"{programs[-1] if programs else 'guide'}, and no program after {first}."
                )
        own: Any = args[extra:]
        given = own[count:]
        if "columns" in names and kwargs.get("columns") is None:
            kwargs["columns"] = column_names(given[0] if given else kwargs.get(first))
        if not given and first in kwargs:
            kwargs[first], *context = data_tensors(kwargs[first])
            # Where a datum holds context too, the programs' arguments are told by their places.
            given = (kwargs.pop(first), *context) if context else ()
        take = data_tensors if first in names else as_tensors
        changed = (*own[:count], *take(*given)) if given else own
        return function(*changed, **kwargs)

    return taking


def data_tensors(x: Any, *context: Any) -> tuple[Any, ...]:
    """What :func:`as_tensors` gives, where x has to be data."""
    found = as_tensors(x, *context)
    if not isinstance(found[0], Tensor) or found[0].dim() == 0:
        raise InputTypeError(
            f"Expected data [N, ...] as a tensor, an array, a frame or a torch data set, got "
            f"{type(x).__name__}: a Dataset's are .train, .valid and .test, and with their context "
            f"*data.split('test')."
        )
    return found


def package_of(value: Any) -> str:
    """The package that a value's type is of or stands on, of those that are known here."""
    known = ("pandas", "polars", "scipy", "anndata", "numpy", "datasets", "pyarrow")
    packages = (base.__module__.partition(".")[0] for base in type(value).__mro__)
    return next((name for name in packages if name in known), "")


def column_names(value: Any) -> Sequence[str] | None:
    """What the columns of a frame, a table or an AnnData are called; None for other data."""
    package = package_of(value)
    if package == "anndata":
        return [*map(str, value.var_names)]
    if package == "pyarrow" and hasattr(value, "column_names"):
        return value.column_names
    framed = package in ("pandas", "polars") and hasattr(value, "columns")
    return [*map(str, value.columns)] if framed else None


def frame_schema(frame: Any) -> tuple[np.ndarray, Schema]:
    """The numbers ``[N, D]`` of a frame and its columns; words are refused."""
    table = read_table(wordless(frame), "the frame")
    return table.x, table.columns


def wordless(frame: Any) -> pd.DataFrame:
    """A frame of pandas, without words."""
    found = to_pandas(frame)
    for dtype, (_, column) in zip(frame.dtypes, found.items(), strict=True):
        _refuse_words(dtype, column)
    return found


def _refuse_words(dtype: Any, column: pd.Series) -> None:
    """Refuse a column of words; ``dtype`` is what it had before it was one of pandas."""
    from pandas.api import types

    plain = types.is_numeric_dtype(column) or column.dtype.name == "category"
    # A Categorical of polars has no categories of its own: of a part of it there are fewer.
    if type(dtype).__name__ == "Categorical" or not plain:
        raise InputError(
            f"Expected numbers or categories in column {column.name!r} of the frame, got words, "
            f"which another frame may number otherwise: make it a pandas.Categorical or a "
            f"polars.Enum, or load the frame with pyrovae.load_data."
        )


def _numbers(value: Any, first: bool) -> Any:
    """A value as a tensor, if it is known how."""
    if isinstance(value, Tensor):
        return value
    package = package_of(value)
    if package == "anndata":
        value = value.to_memory() if value.isbacked else value
        value, package = value.X, package_of(value.X)
    if package == "pyarrow" and hasattr(value, "to_pandas"):
        value, package = value.to_pandas(), "pandas"
    if package in ("pandas", "polars"):
        if hasattr(value, "columns"):
            return _array(frame_schema(value)[0], first)
        return _array(_column(value), first)
    if package == "scipy" and hasattr(value, "toarray"):
        return _array(dense(value), first)
    if hasattr(value, "__array__") and not isinstance(value, np.ndarray) and value.shape:
        # Of zarr, h5py, xarray, …: it may be on disk.
        like = torch.empty(value.shape[1:], device="meta")
        what = f"The {type(value).__name__} of shape {[*value.shape]}"
        require_memory(what, like, value.shape[0], TO_DISK)
        value = np.asarray(value)
    return _array(value, first) if isinstance(value, np.ndarray) else value


def dense(matrix: Any) -> np.ndarray:
    """A sparse matrix as float32 ``[N, D]``, if that fits into memory."""
    like = torch.empty(matrix.shape[1], dtype=torch.float32, device="meta")
    what = f"A sparse matrix of shape {list(matrix.shape)}, made dense,"
    require_memory(what, like, matrix.shape[0], TO_DISK)
    return matrix.astype(np.float32).toarray()


def _column(series: Any) -> np.ndarray:
    """The numbers or codes of one column."""
    column = to_pandas(series.to_frame()).iloc[:, 0]
    _refuse_words(series.dtype, column)
    return (column.cat.codes if column.dtype.name == "category" else column).to_numpy()


def _array(x: np.ndarray, first: bool) -> Tensor:
    """An array as float32, where it is data; context keeps whole numbers and truth values."""
    kind = x.dtype.kind
    if kind not in "biuf":
        raise InputTypeError(f"Expected real numbers, got an array of dtype {x.dtype}.")
    if first and x.dtype == np.uint8:
        raise InputTypeError(
            "Expected real numbers or counts, got uint8, which may be grey levels: give "
            "x.astype(numpy.float32), divided by 255 where they are."
        )
    if first and kind in "iu" and x.size and max(abs(int(x.max())), abs(int(x.min()))) > EXACT:
        raise InputError(
            f"Expected whole numbers up to 2^24, which float32 has exactly, got "
            f"{max(int(x.max()), -int(x.min()))}: rescale them, or give floating-point numbers."
        )
    if kind == "f" or first:
        x = np.ascontiguousarray(x, dtype=np.float32)
    elif kind in "iu":
        x = np.ascontiguousarray(x, dtype=np.int64)
    with warnings.catch_warnings(action="ignore"):  # of a read-only array; nothing writes to x
        return torch.from_numpy(np.ascontiguousarray(x))


def is_torch_data(value: Any) -> bool:
    """Whether it is a torch data set or loader, or a data set that follows their protocol."""
    from torch.utils.data import DataLoader, Dataset

    if isinstance(value, DataLoader | Dataset) or package_of(value) == "datasets":
        return True
    # All that torch's loader asks for; what else has these is no data set.
    follows = all(hasattr(type(value), name) for name in ("__len__", "__getitem__"))
    known = isinstance(value, str | bytes | Sequence | Mapping) or hasattr(value, "__array__")
    return follows and not known and not callable(value) and not package_of(value)


def as_loader(data: Any) -> DataLoader:
    """What reads every datum of a torch data set, or of a loader of one, in order."""
    from torch.utils.data import (
        BatchSampler,
        DataLoader,
        IterableDataset,
        RandomSampler,
        SequentialSampler,
    )

    given: DataLoader | None = data if isinstance(data, DataLoader) else None
    source = data if given is None else given.dataset
    if isinstance(source, IterableDataset) or not hasattr(source, "__len__"):
        raise InputTypeError(
            f"Expected data with a length that are read by number, got {type(source).__name__}: "
            f"an epoch is a pass over every datum; give the data set a __len__ and a __getitem__."
        )
    if given is None and package_of(source) == "datasets" and hasattr(source, "with_format"):
        source = source.with_format("torch")  # or else numbers come as lists
    how: dict[str, Any] = {"batch_size": AT_ONCE, "generator": torch.Generator()}
    if given is not None:
        order: Any = given.batch_sampler
        order = order.sampler if type(order) is BatchSampler else order
        if not isinstance(order, RandomSampler | SequentialSampler) or getattr(
            order, "replacement", False
        ):
            what = "batch_size=None" if order is None else type(order).__name__
            raise InputTypeError(
                f"Expected a DataLoader that takes each datum once, got {what}: fit makes batches "
                f"in an order of its own; give the data set in place of its loader."
            )
        kept = "collate_fn", "num_workers", "worker_init_fn", "multiprocessing_context"
        how |= {name: getattr(given, name) for name in kept}
    return DataLoader(source, **how)


def exceeds(data: Any, most: int) -> bool:
    """Whether all data of a torch data set take more than so many bytes, and are not mapped yet."""
    from torch.utils.data import TensorDataset

    if isinstance(data, TensorDataset):
        return False
    loader = as_loader(data)
    return _size(next(_parts(loader), ()), loader) > most


def read_items(data: Any, most: int | None = None) -> tuple[Any, ...]:
    """All data of a torch data set ``(x, *context)``, each ``[N, ...]``.

    Args:
        data: The data set, or a loader of one.
        most: The bytes beyond which they are written to a temporary file, as they are read, and
            are memmaps; by default half of the machine's memory.
    """
    from torch.utils.data import TensorDataset

    if isinstance(data, TensorDataset):
        return data.tensors
    loader = as_loader(data)
    parts = _parts(loader)
    first = next(parts, None)
    if first is None:
        raise InputError("Expected at least one datum, got an empty data set.")
    parts = chain([first], parts)
    if _size(first, loader) > (physical_memory() // 2 if most is None else most):
        arrays = ([each.numpy() for each in rows] for rows in parts)
        title = f"the {type(loader.dataset).__name__}"
        return tuple(written(arrays, len(loader.dataset), title))  # type: ignore[arg-type]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _size(rows: tuple[Tensor, ...], loader: DataLoader) -> int:
    """The bytes that all data take, by some of them."""
    each = sum(row[:1].numel() * row.element_size() for row in rows)
    return each * len(loader.dataset)  # type: ignore[arg-type]


def _parts(loader: DataLoader) -> Iterator[tuple[Tensor, ...]]:
    """The tensors of each batch, all of whose data are alike."""
    first: list[tuple] = []
    for rows in map(_named, loader):
        alike = [(row.shape[1:], row.dtype) for row in rows]
        if alike != (first := first or alike):
            told = [" and ".join(f"{t} {list(s)}" for s, t in each) for each in (first, alike)]
            raise InputError(
                f"Expected data of one shape and type from a data set and its collate_fn, got "
                f"{told[0]}, and then {told[1]}: pad or convert them there."
            )
        yield rows


def _named(batch: Any) -> tuple[Tensor, ...]:
    """The tensors of a batch, x first."""
    if isinstance(batch, dict):
        names = sorted(batch, key=lambda name: name != "x")
        batch = tuple(batch[name] for name in names)
    rows = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    for row in rows:
        if not isinstance(row, Tensor):
            raise InputTypeError(
                f"Expected tensors or numbers in each datum of the data set, got "
                f"{type(row).__name__}: leave the rest out, or turn it into numbers."
            )
    return rows
