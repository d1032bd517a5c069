"""Read data sets from scikit-learn, torchvision, a file or a folder, and choose their splits."""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Collection, Mapping
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrovae._tools import InputError, InputTypeError, did_you_mean
from pyrovae.data.files import SUFFIXES, Arrays, one_line, read_arrays, table_arrays
from pyrovae.data.images import draw_shapes, read_folder
from pyrovae.data.tables import read_table

if TYPE_CHECKING:
    import pandas as pd

# Fixed, so that every run on a data set holds the same rows back, whatever its own seed.
SPLIT_SEED = 0

DATASETS = {
    "digits": "1,797 handwritten digits, 8×8, 17 grey levels (scikit-learn, no download)",
    "mnist": "70,000 handwritten digits, 28×28 (torchvision)",
    "fashion_mnist": "70,000 articles of clothing, 28×28 (torchvision)",
    "kmnist": "70,000 cursive Japanese characters, 28×28 (torchvision)",
    "cifar10": "60,000 colour photographs of ten classes, 3×32×32 (torchvision)",
    "svhn": "99,289 colour photographs of house numbers, 3×32×32 (torchvision)",
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
    name: str | Path | pd.DataFrame,
    root: str | Path | None = None,
    missing: str = "refuse",
    kinds: Mapping[str, str] | None = None,
) -> Source:
    """Read what a name stands for, as events of shape ``[D]`` or ``[C, H, W]``."""
    source = _read(name, root, missing, kinds)
    x, mask = source.arrays.x, source.arrays.mask
    if missing == "mask" and mask is None:
        mask = np.ones(x.shape, bool)
    mask = None if mask is None else _channels_first(mask)
    return source._replace(arrays=source.arrays._replace(x=_channels_first(x), mask=mask))


def _read(
    name: str | Path | pd.DataFrame,
    root: str | Path | None,
    missing: str,
    kinds: Mapping[str, str] | None,
) -> Source:
    # A frame is known by its module, so that pandas is imported by those alone who have one.
    if type(name).__module__.partition(".")[0] == "pandas" and hasattr(name, "columns"):
        return _frame(name, missing, kinds)
    if not isinstance(name, str | os.PathLike):
        raise InputTypeError(
            f"Expected the name of a data set, a file or a frame, got {type(name).__name__}; save "
            "an array with numpy.save, or give tensors to pyrovae.data.Dataset."
        )
    if kinds and str(name) in DATASETS:
        raise InputError(f"Expected a table for columns={dict(kinds)}, got {name}.")
    if str(name) == "digits":
        from sklearn.datasets import load_digits

        found = load_digits()
        arrays = Arrays(found.images.astype(np.uint8), found.target.astype(np.int64))
        origin = {"source": f"scikit-learn {version('scikit-learn')}"}
        return Source("digits", arrays, 16.0, "/ 16", origin)
    if str(name) == "shapes":
        return Source("shapes", draw_shapes(), 255.0, "uint8 / 255", {"source": "drawn, seed 0"})
    if str(name) in DATASETS:
        origin = {"source": f"torchvision {version('torchvision')}"}
        return Source(str(name), _images(str(name), root), 255.0, "uint8 / 255", origin)
    path = Path(name).expanduser()
    if path.is_dir() and path.suffix.lower() not in SUFFIXES:
        return _folder(path, kinds)
    if path.suffix.lower() not in SUFFIXES:
        files = f"or a file that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise InputError(
            unknown("the data set", str(name), [*DATASETS, "a folder of images", files])
        )
    arrays = read_arrays(path, missing, kinds)
    with path.open("rb") as file:
        origin = {"source": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    grey = arrays.x.dtype == np.uint8 and arrays.x.max() > 1
    scale, scaling = (255.0, "uint8 / 255") if grey else (1.0, "none")
    return Source(path.stem, arrays, scale, scaling, origin)


def _frame(frame: Any, missing: str, kinds: Mapping[str, str] | None) -> Source:
    arrays = table_arrays(read_table(frame, "the frame", kinds), Path("the frame"), missing)
    digest = hashlib.sha256()
    for part in (arrays.x, arrays.y, arrays.mask):
        digest.update(b"" if part is None else np.ascontiguousarray(part).data)
    origin = {"source": "pandas.DataFrame", "sha256": digest.hexdigest()}
    return Source("frame", arrays, 1.0, "none", origin)


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


def _channels_first(x: np.ndarray) -> np.ndarray:
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[-1] in (1, 3):
        x = np.moveaxis(x, -1, 1)
    return np.ascontiguousarray(x)


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


def _permutation(rows: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(SPLIT_SEED).permutation(rows))


def _check_rows(rows: int, needed: int, what: str) -> None:
    if rows < needed:
        raise InputError(f"Expected at least {needed} {what}, one for each split, got {rows}.")


def unknown(what: str, got: str, known: Collection[str]) -> str:
    """A sentence on a name that is none of the known ones, with the nearest of them."""
    names, near = ", ".join(known), did_you_mean(got, known)
    return f"Expected {what} to be one of {names}, got {got!r}{near}."
