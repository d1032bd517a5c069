"""Read data sets from scikit-learn, torchvision, a file or a folder, and choose their splits."""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrovae._tools import InputError, InputTypeError, did_you_mean
from pyrovae.data.annotated import split_layer
from pyrovae.data.files import (
    SUFFIXES,
    Arrays,
    as_events,
    checked,
    matrix_arrays,
    one_line,
    read_arrays,
    table_arrays,
)
from pyrovae.data.given import as_tensors, dense, package_of
from pyrovae.data.images import draw_shapes, read_folder
from pyrovae.data.sequences import read_chorales
from pyrovae.data.tables import Schema, read_table, take_context, to_pandas

# Fixed, so that every run on a data set holds the same rows back, whatever its own seed.
SPLIT_SEED = 0

DATASETS = {
    "digits": "1,797 handwritten digits, 8×8, 17 grey levels (scikit-learn, no download)",
    "mnist": "70,000 handwritten digits, 28×28 (torchvision)",
    "fashion_mnist": "70,000 articles of clothing, 28×28 (torchvision)",
    "kmnist": "70,000 cursive Japanese characters, 28×28 (torchvision)",
    "cifar10": "60,000 colour photographs of ten classes, 3×32×32 (torchvision)",
    "svhn": "99,289 colour photographs of house numbers, 3×32×32 (torchvision)",
    "jsb": "382 chorales by Bach, up to 160 quarters of 88 keys, padded and masked (PYROVAE_DATA)",
    "shapes": "3,000 coloured discs, squares and triangles, 3×16×16 (drawn here, no download)",
}
_KINDS = ("images-idx3", "labels-idx1")
_IDX = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in _KINDS]
_CIFAR = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
IMAGES = {
    "mnist": ("MNIST", [f"MNIST/raw/{file}" for file in _IDX]),
    "fashion_mnist": ("FashionMNIST", [f"FashionMNIST/raw/{file}" for file in _IDX]),
    "kmnist": ("KMNIST", [f"KMNIST/raw/{file}" for file in _IDX]),
    "cifar10": ("CIFAR10", [f"cifar-10-batches-py/{file}" for file in _CIFAR]),
    "svhn": ("SVHN", ["train_32x32.mat", "test_32x32.mat"]),
}


class Source(NamedTuple):
    """Arrays as they were found, and how to read them: intensities are ``x / scale``."""

    name: str
    arrays: Arrays
    scale: float
    scaling: str
    origin: dict[str, str]


def find_source(
    name: Any,
    root: str | Path | None = None,
    missing: str = "refuse",
    kinds: Mapping[str, str] | None = None,
    context: Sequence[str] = (),
    shape: Sequence[int] | None = None,
) -> Source:
    """Read what a name stands for, as events of a shape, or else ``[D]`` or ``[C, H, W]``."""
    source = _read(name, root, missing, kinds, context)
    for each, (values, _) in (source.arrays.context or {}).items():
        if len(values) != len(source.arrays.x):
            raise InputError(
                f"Expected {len(source.arrays.x)} values of {each!r} in {source.name}, one a row, "
                f"got {len(values)}."
            )
    x, mask = source.arrays.x, source.arrays.mask
    if missing == "mask" and mask is None:
        mask = np.ones(x.shape, bool)
    columns = columns_left(source.arrays.columns, kinds, shape, x.shape[1:])
    if shape is None and source.arrays.sequences:
        shape = x.shape[1:]
    x = np.ascontiguousarray(as_events(x, shape, source.name))
    if mask is not None:
        mask = np.ascontiguousarray(as_events(mask, shape, source.name))
    return source._replace(arrays=source.arrays._replace(x=x, mask=mask, columns=columns))


def columns_left(
    columns: Schema | None,
    kinds: Mapping[str, str] | None,
    shape: Sequence[int] | None,
    row: tuple[int, ...],
) -> Schema | None:
    """The columns of a table, whose rows have one shape, unless it is to have another."""
    if not columns or shape is None or tuple(shape) == row:
        return columns
    if kinds:
        raise InputError(
            f"Expected a table for columns={dict(kinds)}, got shape={tuple(shape)}: leave one "
            f"of them out."
        )
    return None


def _read(
    name: Any,
    root: str | Path | None,
    missing: str,
    kinds: Mapping[str, str] | None,
    context: Sequence[str],
) -> Source:
    if not isinstance(name, str | os.PathLike):
        return _in_memory(name, missing, kinds, context)
    if kinds and str(name) in DATASETS:
        raise InputError(f"Expected a table for columns={dict(kinds)}, got {name}.")
    path = Path(name).expanduser()
    suffix = split_layer(str(path))[0].suffix.lower()
    if context and (str(name) in DATASETS or (path.is_dir() and suffix not in SUFFIXES)):
        raise no_columns(context, str(name))
    if str(name) == "digits":
        from sklearn.datasets import load_digits

        found = load_digits()
        arrays = Arrays(found.images.astype(np.uint8), found.target.astype(np.int64))
        origin = {"source": f"scikit-learn {version('scikit-learn')}"}
        return Source("digits", arrays, 16.0, "/ 16", origin)
    if str(name) == "shapes":
        return Source("shapes", draw_shapes(), 255.0, "uint8 / 255", {"source": "drawn, seed 0"})
    if str(name) == "jsb":
        arrays = read_chorales(root)
        return Source("jsb", arrays, 1.0, "none", {"source": "jsb-chorales-quarter.json"})
    if str(name) in DATASETS:
        origin = {"source": f"torchvision {version('torchvision')}"}
        return Source(str(name), _images(str(name), root), 255.0, "uint8 / 255", origin)
    if path.is_dir() and suffix not in SUFFIXES:
        return _folder(path, kinds)
    if suffix not in SUFFIXES:
        files = f"or a file that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise InputError(
            unknown("the data set", str(name), [*DATASETS, "a folder of images", files])
        )
    arrays = read_arrays(path, missing, kinds, context)
    origin = {"source": path.name, "sha256": _file_digest(split_layer(str(path))[0])}
    return _scaled(path.stem, arrays, origin)


def _file_digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and digests of the files of a folder."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    parts = sorted(each for each in path.rglob("*") if each.is_file())
    names = [f"{each.relative_to(path).as_posix()} {_file_digest(each)}" for each in parts]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _in_memory(
    data: Any, missing: str, kinds: Mapping[str, str] | None, context: Sequence[str]
) -> Source:
    """Read what somebody has at hand: a frame, an AnnData, an array or a torch data set."""
    kind, where = package_of(data), Path(f"the {type(data).__name__}")
    title = type_name(data)
    if kind in ("pandas", "polars") and hasattr(data, "columns"):
        frame, taken = take_context(to_pandas(data), context, "the frame")
        arrays = table_arrays(read_table(frame, "the frame", kinds), Path("the frame"), missing)
        return _hashed("frame", arrays._replace(context=taken), title)
    if kinds:
        raise InputError(f"Expected a table for columns={dict(kinds)}, got {title}.")
    if kind == "anndata":
        data = data.to_memory() if data.isbacked else data
        x = data.X if isinstance(data.X, np.ndarray) else dense(data.X)
        return _hashed("anndata", matrix_arrays(x, data.obs, where, missing, context), title)
    if context:
        raise no_columns(context, title)
    if isinstance(data, np.ndarray):
        return _hashed("array", checked({"x": data}, where, missing), title)
    x, *more = as_tensors(data)
    if not isinstance(x, Tensor) or len(more) > 1:
        what = "more than x and a label in a datum of " if isinstance(x, Tensor) else ""
        raise InputTypeError(
            f"Expected the name of a data set, a file, a frame, an array or a torch data set, got "
            f"{what}{type(data).__name__}; give pyrovae.fit a tuple (x, *context) of tensors."
        )
    named = {name: each.numpy(force=True) for name, each in zip("xy", (x, *more), strict=False)}
    return _hashed("data", checked(named, where, missing), title)


def type_name(data: Any) -> str:
    """Where data come from that have no file."""
    return f"{type(data).__module__.partition('.')[0]}.{type(data).__name__}"


def _hashed(name: str, arrays: Arrays, title: str) -> Source:
    """What was in memory, known by a digest of it."""
    digest, context = hashlib.sha256(), arrays.context or {}
    parts = arrays.x, arrays.y, arrays.mask, *(values for values, _ in context.values())
    for part in parts:
        digest.update(b"" if part is None else np.ascontiguousarray(part).data)
    return _scaled(name, arrays, {"source": title, "sha256": digest.hexdigest()})


def _scaled(name: str, arrays: Arrays, origin: dict[str, str]) -> Source:
    grey = arrays.x.dtype == np.uint8 and arrays.x.max() > 1
    scale, scaling = (255.0, "uint8 / 255") if grey else (1.0, "none")
    return Source(name, arrays, scale, scaling, origin)


def no_columns(context: Sequence[str], name: str) -> InputError:
    """What to say where names of columns are asked of data that have none."""
    return InputError(
        f"Expected a table, a .npz, .zarr or .h5ad file for context={','.join(context)!r}, which "
        f"names columns, got {name}."
    )


def _folder(path: Path, kinds: Mapping[str, str] | None) -> Source:
    if kinds:
        raise InputError(f"Expected a table for columns={dict(kinds)}, got the folder {path}.")
    arrays, digest = read_folder(path)
    name = path.resolve().name
    origin = {"source": f"{name}/, {len(arrays.x):,} images", "sha256": digest}
    return Source(name, arrays, 255.0, "uint8 / 255", origin)


def _images(name: str, root: str | Path | None) -> Arrays:
    """One of torchvision's image sets, uint8 ``[N, ...]``, the official test set last."""
    kind, files = IMAGES[name]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "pyrovae" / "data"
    folder = Path(root or os.environ.get("PYROVAE_DATA") or cache).expanduser()
    missing = not all((folder / file).is_file() for file in files)
    try:
        with redirect_stdout(sys.stderr):
            parts = [_part(kind, folder, part, download=missing) for part in ("train", "test")]
    except Exception as error:
        if missing:
            raise FileNotFoundError(
                f"Expected {', '.join(files)} in {folder}, and could not download them "
                f"({one_line(error)}); put them there, or name another folder with --data-root, "
                "root= or the environment variable PYROVAE_DATA."
            ) from error
        raise InputError(
            f"Expected the files of {name} in {folder}, got ones that are truncated or damaged "
            f"({one_line(error)}); delete {', '.join(files)} there and load again."
        ) from error
    x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Arrays(x, y, (len(parts[0][0]), 0, len(parts[1][0])))


def _part(kind: str, folder: Path, part: str, download: bool) -> tuple[np.ndarray, np.ndarray]:
    from torchvision import datasets

    which = {"split": part} if kind == "SVHN" else {"train": part == "train"}
    with warnings.catch_warnings(action="ignore"):
        found = getattr(datasets, kind)(folder, download=download, **which)
    x = np.asarray(found.data)
    y = np.asarray(found.labels if kind == "SVHN" else found.targets, dtype=np.int64)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} images and {len(y)} labels")
    return x, y


def split_rows(
    rows: int, sizes: tuple[int, int, int] | None, name: str
) -> tuple[tuple[Tensor, ...], dict[str, str | int | None]]:
    """The row numbers of each split, and the rule that chose them.

    ``sizes`` says how many leading rows are given as each split, if any are.
    """
    if sizes is None:
        _check_rows(rows, 3, f"rows in {name}")
        valid, test = max(1, round(rows / 10)), max(1, round(rows / 5))
        index = _permutation(rows).split([rows - valid - test, valid, test])
        return index, {"split": "70/10/20, permuted", "split_seed": SPLIT_SEED}
    if sizes[1]:
        index = torch.arange(rows).split(list(sizes))
        return index, {"split": "as given", "split_seed": None}
    train = sizes[0]
    _check_rows(train, 2, f"training rows in {name}")
    valid = max(1, train // 6)
    index = *_permutation(train).split([train - valid, valid]), torch.arange(train, rows)
    rule = "test as given, one in six of train for valid, permuted"
    return index, {"split": rule, "split_seed": SPLIT_SEED}


def split_end(rows: int, name: str) -> tuple[list[int], dict[str, str | int | None]]:
    """How many rows are train, valid and test where they cannot be permuted, and the rule."""
    _check_rows(rows, 3, f"rows in {name}")
    valid, test = min(10_000, max(1, rows // 10)), min(20_000, max(1, rows // 5))
    rule = "the last rows, at most 10,000 and 20,000, for valid and test"
    return [rows - valid - test, valid, test], {"split": rule, "split_seed": None}


def _permutation(rows: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(SPLIT_SEED).permutation(rows))


def _check_rows(rows: int, needed: int, what: str) -> None:
    if rows < needed:
        raise InputError(f"Expected at least {needed} {what}, one for each split, got {rows}.")


def unknown(what: str, got: str, known: Collection[str]) -> str:
    """A sentence on a name that is none of the known ones, with the nearest of them."""
    names, near = ", ".join(known), did_you_mean(got, known)
    return f"Expected {what} to be one of {names}, got {got!r}{near}."
