"""Tables of mixed columns: from a frame, a .csv or an .arff file to numbers with a schema."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from pyrovae._tools import InputError, did_you_mean, warn
from pyrovae.nn import UNITS

if TYPE_CHECKING:
    import pandas as pd

# What context calls the labels, whatever their column is called.
LABELLED = ("labels",)
LABELS = ("label", "labels", "y", "target", "class")
KINDS = ("real", "positive", "count", "binary", "categorical", "ordinal")
# Bytes of a compressed column of Parquet that are read at once.
BUFFER = 2**18
# Rows by which a header is told from a datum.
TOP_ROWS = 100


class Column(NamedTuple):
    """One column of a table.

    ``kind`` is one of :data:`KINDS`; ``categories`` are what the codes 0, 1, … of a binary,
    categorical or ordinal column stand for. ``loc`` and ``scale`` are mean and standard deviation
    of the observed training values, as they are in a real column, as ln x in a positive one and as
    ln(1 + x) in one of counts; 0 and 1 for codes.
    """

    name: str
    kind: str
    categories: tuple[str, ...] = ()
    loc: float = 0.0
    scale: float = 1.0


Schema = tuple[Column, ...]
# Columns that programs take beside x, by name, and what the codes of a column stand for.
Context = dict[str, tuple[np.ndarray, tuple[str, ...]]]


class Table(NamedTuple):
    """The numbers of a frame ``[N, D]``, NaN where there are none, its labels and its columns."""

    x: np.ndarray
    y: np.ndarray | None
    columns: Schema


def read_csv(path: Path) -> pd.DataFrame:
    """The frame of a ``.csv`` file, with or without a header."""
    import pandas as pd

    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        top = pd.read_csv(path, header=None, nrows=TOP_ROWS, dtype=str)
        header = 0 if _is_header(top, path) else None
        frame = pd.read_csv(path, header=header, index_col=False, low_memory=False)
    if header == 0 and top.iloc[0].isna().any():
        raise InputError(
            f"Expected a name for every column of {path}, got {int(top.iloc[0].isna().sum())} "
            "without; leave a row index out with DataFrame.to_csv(index=False)."
        )
    return frame


def read_arff(path: Path) -> pd.DataFrame:
    """The frame of an ``.arff`` file: numeric columns, and nominal ones as categories."""
    import pandas as pd
    from scipy.io import arff

    found, about = arff.loadarff(path)
    columns = {}
    for name in about.names():
        kind, values = about[name]
        if kind == "nominal":
            # A value that is none of those declared, as "?" is, becomes a gap.
            words = np.char.decode(found[name].astype(bytes), "utf-8")
            columns[name] = pd.Series(pd.Categorical(words, categories=list(values)))
        else:
            columns[name] = pd.Series(found[name])
    return pd.DataFrame(columns)


def read_parquet(path: Path) -> pd.DataFrame:
    """The frame of a ``.parquet`` file, or of a folder of some."""
    import pandas as pd

    frames = [each.read().to_pandas() for each in parquet_files(path)]
    return pd.concat(frames, ignore_index=True)


def parquet_files(path: Path) -> list[Any]:
    """A Parquet file, or those of a folder in the order of their names; no rows are read yet."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise lacking("pyarrow", "parquet") from error
    # Read on demand: a whole column of a row group may be more than memory has.
    parts = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    files = [parquet.ParquetFile(part, buffer_size=BUFFER, pre_buffer=False) for part in parts]
    if not files or any(each.schema_arrow.names != files[0].schema_arrow.names for each in files):
        what = "files of the same columns" if files else "a file that ends in .parquet"
        raise InputError(f"Expected {what} in {path}, got {'others' if files else 'none'}.")
    return files


def lacking(package: str, name: str) -> InputError:
    """What to say where a package is missing that one of the extras brings."""
    return InputError(f"Expected {package}, which reads .{name}: pip install 'pyrovae[{name}]'.")


def to_pandas(frame: Any) -> pd.DataFrame:
    """A frame of pandas as it is, and one of polars column by column, the order of an Enum kept."""
    import pandas as pd

    if isinstance(frame, pd.DataFrame):
        return frame
    columns = {}
    for name in frame.columns:
        column = frame[name]
        values = column.to_list()
        kind = type(column.dtype).__name__
        if kind in ("Enum", "Categorical"):
            # Since polars 2, a Categorical has no categories but the words that it holds.
            known = column.dtype.categories.to_list() if kind == "Enum" else None
            columns[name] = pd.Series(pd.Categorical(values, categories=known))
        else:
            columns[name] = pd.Series(column.to_numpy() if column.dtype.is_numeric() else values)
    return pd.DataFrame(columns)


def take_context(
    frame: pd.DataFrame, names: Sequence[str], title: str
) -> tuple[pd.DataFrame, Context]:
    """Take some columns out of a frame, as further arguments of both programs.

    Returns:
        The other columns, and by name: whole numbers and truth values as int64 ``[N]``, categories
        and words as their codes with what they stand for, all else as float32 ``[N]``.
    """
    from pandas.api import types

    frame = frame.set_axis([str(name) for name in frame.columns], axis=1)
    found: Context = {}
    named_columns(names, list(frame.columns), title)
    for name in names:
        column = frame[name]
        if column.isna().any():
            row = int(column.isna().to_numpy().argmax())
            raise InputError(
                f"Expected a value in every row of {name!r} of {title}, which is context, got none "
                f"in row {row}: fill it, or leave it among the data with missing='mask'."
            )
        if types.is_integer_dtype(column) or types.is_bool_dtype(column):
            found[name] = column.to_numpy(np.int64), ()
        elif types.is_numeric_dtype(column):
            found[name] = column.to_numpy(np.float32), ()
        else:
            category = column.astype("category").cat
            words = tuple(str(each) for each in category.categories)
            found[name] = category.codes.to_numpy(np.int64), words
    return frame.drop(columns=list(names)), found


def named_columns(names: Sequence[str], known: Sequence[str], title: str) -> None:
    """Refuse names of context that are no columns."""
    for name in names:
        if name not in known:
            raise InputError(
                f"Expected a column of {title} for context, got {name!r}"
                f"{did_you_mean(name, [*known, *LABELLED])}; it has {', '.join(known)}."
            )


def read_table(
    frame: pd.DataFrame, title: str, kinds: Mapping[str, str] | None = None, *, words: bool = True
) -> Table:
    """The numbers, labels and columns of a frame.

    Args:
        frame: One datum a row; a column called label, labels, y, target or class holds the labels.
        title: What to call it.
        kinds: The kind of columns by name. Other columns are told by their dtype: floating point
            is real; whole numbers are counts, or real if there is one below 0 or they vary by less
            than their mean, as no counts do; two values of any other type are binary; ordered
            categories are ordinal, and others, or words, categorical.
        words: Whether words make a column categorical, or are refused where no kind is given.
    """
    frame = frame.set_axis([str(name) for name in frame.columns], axis=1)
    labels, kinds = [name for name in frame.columns if is_label(name)], kinds or {}
    check_columns(list(frame.columns), kinds, title)
    y = labels_of(frame[labels[0]], title) if labels else None
    frame = frame.drop(columns=labels)
    columns, values = [], []
    for name in frame.columns:
        column, numbers = read_column(frame[name], kinds.get(name), title, words)
        columns.append(column)
        values.append(numbers)
    return Table(np.stack(values, 1) if values else np.empty((len(frame), 0)), y, tuple(columns))


def is_label(name: str) -> bool:
    """Whether a column of this name holds the labels."""
    return name.strip().lower() in LABELS


def check_columns(names: Sequence[str], kinds: Mapping[str, str], title: str) -> None:
    """Refuse names that cannot be told apart, and kinds of no column or that are none."""
    labels = [name for name in names if is_label(name)]
    if len(labels) > 1 or len({*names}) < len(names):
        what = "at most one column of labels" if len(labels) > 1 else "columns of different names"
        raise InputError(f"Expected {what} in {title}, got {labels or [*names]}.")
    known = [name for name in names if name not in labels]
    for name, kind in kinds.items():
        if name not in known or kind not in KINDS:
            near = (kind, KINDS) if name in known else (name, known)
            raise InputError(
                f"Expected a column and its kind, one of {', '.join(KINDS)}, got {name}={kind} for "
                f"{title}{did_you_mean(*near)}."
            )


def measured(columns: Schema, x: Tensor, mask: Tensor | None) -> Schema:
    """The columns with mean and standard deviation of the training data ``[N, D]``."""
    found = []
    for j, column in enumerate(columns):
        seen = x[:, j] if mask is None else x[mask[:, j], j]
        if column.kind in UNITS and len(seen):
            values = UNITS[column.kind](seen.double())
            loc, scale = values.mean().item(), values.std(correction=0).item()
            # The mean of equal numbers is rounded, and then they are not quite equal to it.
            constant = scale <= 1e-12 * abs(loc)
            column = column._replace(loc=loc, scale=1.0 if constant else scale)
        found.append(column)
    return tuple(found)


def _is_header(top: pd.DataFrame, path: Path) -> bool:
    """Whether the first of some rows names the columns: by words, or by 0, 1, 2, … as pandas does.

    A row that may as well be a datum is refused, so that none is lost and none is made up.
    """
    from pandas import to_numeric

    fields, below = top.iloc[0].dropna().str.strip(), top.iloc[1:]
    numbers = fields[to_numeric(fields, errors="coerce").notna()].tolist()
    if not any(numbers == [str(i + j) for j in range(len(numbers))] for i in (0, 1)):
        return False
    if len(numbers) < len(fields):
        return True
    # pandas writes a point into every number of a column of fractions, so 0 is none of those.
    if len(below) and below.apply(lambda column: column.str.contains(".", regex=False)).all(None):
        return True
    if len(numbers) > 2:
        raise InputError(
            f"Expected names or data in the first row of {path}, got {','.join(numbers)}, which "
            f"may be either: give the columns names, or leave them out with "
            f"DataFrame.to_csv(header=False)."
        )
    # One or two counting numbers, as in "0,1", are more likely to be a first datum.
    return False


def labels_of(column: pd.Series, title: str) -> np.ndarray:
    """Labels: numbers as they are, everything else as strings."""
    from pandas.api.types import is_numeric_dtype

    if is_numeric_dtype(column):
        return column.to_numpy()
    if column.isna().any():
        row = int(column.isna().to_numpy().argmax())
        raise InputError(f"Expected a label in every row of {title}, got none in row {row}.")
    return column.astype(str).to_numpy(dtype=str)


def read_column(
    values: pd.Series, kind: str | None, title: str, words: bool = True
) -> tuple[Column, np.ndarray]:
    """A column with its numbers, float64 ``[N]`` with NaN for gaps."""
    import pandas as pd
    from pandas.api import types

    name, plain = str(values.name), types.is_numeric_dtype(values)
    if values.dtype.kind in "mM":
        raise InputError(
            f"Expected numbers or categories in column {name!r} of {title}, got times: make it a "
            f"number, such as the days since some date, or drop it."
        )
    if types.is_bool_dtype(values):
        kind = kind or "binary"
    if not plain and not isinstance(values.dtype, pd.CategoricalDtype) and kind is None:
        numbers = pd.to_numeric(values, errors="coerce")
        wrong = numbers.isna() & values.notna()
        if wrong.any() and not words:
            raise InputError(
                f"Expected numbers in column {name!r} of {title}, got {values[wrong].iloc[0]!r}; "
                f"call the column 'label' if it holds labels, say columns={{{name!r}: "
                f"'categorical'}} (--columns {name}=categorical) if it holds words, and separate "
                f"columns by commas."
            )
        if not wrong.any():
            values, plain = numbers, True
    if kind is None and plain:
        kind = _numeric_kind(values)
    if kind in ("real", "positive", "count"):
        return Column(name, kind), _numbers(values, kind, name, title)
    told = isinstance(values.dtype, pd.CategoricalDtype)
    values = values if told else values.astype("category")
    if kind is None:
        few = "binary" if len(values.cat.categories) == 2 else "categorical"
        kind = "ordinal" if values.cat.ordered else few
    categories = tuple(str(each) for each in values.cat.categories)
    if len(categories) > 2 if kind == "binary" else len(categories) < 2:
        needed = "two values at most" if kind == "binary" else "two values at least"
        raise InputError(
            f"Expected {needed} in the {kind} column {name!r} of {title}, got {len(categories)}: "
            f"choose its kind by columns={{{name!r}: ...}} (--columns {name}=...), or drop it."
        )
    if kind == "ordinal" and not (told or plain):
        warn(
            f"The words of the ordinal column {name!r} of {title} are ordered as they are sorted, "
            f"{' < '.join(categories)}: give ordered categories, or numbers, for another order."
        )
    codes = values.cat.codes.to_numpy(np.float64)
    return Column(name, kind, categories), np.where(codes < 0, np.nan, codes)


def _numeric_kind(values: pd.Series) -> str:
    from pandas.api.types import is_float_dtype

    seen = values.dropna().to_numpy(np.float64)
    # pandas makes whole numbers floating-point ones where there are gaps among them.
    if is_float_dtype(values) and not (len(seen) < len(values) and (seen == np.round(seen)).all()):
        return "real"
    if len(seen) and set(np.unique(seen[:1000])) == {0.0, 1.0} == set(np.unique(seen)):
        return "binary"
    return "count" if len(seen) and seen.min() >= 0 and seen.var() >= seen.mean() else "real"


def _numbers(values: pd.Series, kind: str, name: str, title: str) -> np.ndarray:
    from pandas import to_numeric

    found = to_numeric(values, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    if (np.isnan(found) & values.notna().to_numpy()).any():
        raise InputError(f"Expected numbers in the {kind} column {name!r} of {title}, got words.")
    seen = found[~np.isnan(found)]
    outside = seen <= 0 if kind == "positive" else (seen < 0) | (seen != np.round(seen))
    if kind != "real" and outside.any():
        what = "numbers above 0" if kind == "positive" else "whole numbers from 0"
        raise InputError(
            f"Expected {what} in the {kind} column {name!r} of {title}, got "
            f"{seen[outside][0]:g}: choose another kind for it."
        )
    return found
