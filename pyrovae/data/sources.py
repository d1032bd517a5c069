"""Where data come from: shipped sets and files, as arrays with their scale and their origin."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pyrovae._tools import InputError, InputTypeError, did_you_mean
from pyrovae.data.files import SUFFIXES, Arrays, read_arrays
from pyrovae.data.images import read_images

__all__ = ["DATASETS", "Source", "find_source", "unknown"]

DATASETS = {
    "digits": "1,797 handwritten digits, 8×8, 17 grey levels (scikit-learn, no download)",
    "mnist": "70,000 handwritten digits, 28×28 (torchvision)",
    "fashion_mnist": "70,000 articles of clothing, 28×28 (torchvision)",
    "kmnist": "70,000 cursive Japanese characters, 28×28 (torchvision)",
    "cifar10": "60,000 colour photographs of ten classes, 3×32×32 (torchvision)",
    "svhn": "99,289 colour photographs of house numbers, 3×32×32 (torchvision)",
}


class Source(NamedTuple):
    """Arrays as they were found, and how to read them: intensities are ``x / scale``."""

    name: str
    arrays: Arrays
    scale: float
    scaling: str
    origin: dict[str, str]


def find_source(name: str | Path, root: str | Path | None = None) -> Source:
    """Read a shipped data set, or a file, as events of shape ``[D]`` or ``[C, H, W]``.

    Args:
        name: One of :data:`DATASETS`, or a ``.npy``, ``.npz`` or ``.csv`` file.
        root: The folder of the torchvision sets, as :func:`pyrovae.data.images.read_images`
            takes it.

    Raises:
        TypeError: If ``name`` is no name.
        ValueError: If there is no such data set, or its arrays cannot be used.
        FileNotFoundError: If a file is missing and cannot be downloaded.
    """
    if not isinstance(name, str | os.PathLike):
        raise InputTypeError(
            f"Expected the name of a data set or a file, got {type(name).__name__}; save an array "
            "with numpy.save, or give tensors to pyrovae.data.Dataset."
        )
    source = _read(name, root)
    return source._replace(arrays=source.arrays._replace(x=_channels_first(source.arrays.x)))


def _read(name: str | Path, root: str | Path | None) -> Source:
    if str(name) == "digits":
        return _digits()
    if str(name) in DATASETS:
        origin = {"source": f"torchvision {version('torchvision')}"}
        return Source(str(name), read_images(str(name), root), 255.0, "uint8 / 255", origin)
    path = Path(name).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        files = f"or a file that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise InputError(unknown("the data set", str(name), [*DATASETS, files]))
    return _file(path)


def _digits() -> Source:
    from sklearn.datasets import load_digits

    found = load_digits()
    arrays = Arrays(found.images.astype(np.uint8), found.target.astype(np.int64))
    origin = {"source": f"scikit-learn {version('scikit-learn')}"}
    return Source("digits", arrays, 16.0, "/ 16", origin)


def _file(path: Path) -> Source:
    arrays = read_arrays(path)
    with path.open("rb") as file:
        origin = {"source": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    grey = arrays.x.dtype == np.uint8 and arrays.x.max() > 1
    scale, scaling = (255.0, "uint8 / 255") if grey else (1.0, "none")
    return Source(path.stem, arrays, scale, scaling, origin)


def _channels_first(x: np.ndarray) -> np.ndarray:
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[-1] in (1, 3):
        x = np.moveaxis(x, -1, 1)
    return np.ascontiguousarray(x)


def unknown(what: str, got: str, known: Iterable[str]) -> str:
    """A sentence on a name that is none of the known ones, with the nearest of them."""
    known = list(known)
    return (
        f"Expected {what} to be one of {', '.join(known)}, got {got!r}{did_you_mean(got, known)}."
    )
