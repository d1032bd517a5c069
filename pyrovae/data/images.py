"""Image sets through torchvision's own classes: found in a folder, or downloaded into it."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np

from pyrovae._tools import InputError
from pyrovae.data.files import Arrays

__all__ = ["read_images"]

_IDX = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]
_CIFAR = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
_SETS = {
    "mnist": ("MNIST", [f"MNIST/raw/{file}" for file in _IDX]),
    "fashion_mnist": ("FashionMNIST", [f"FashionMNIST/raw/{file}" for file in _IDX]),
    "kmnist": ("KMNIST", [f"KMNIST/raw/{file}" for file in _IDX]),
    "cifar10": ("CIFAR10", [f"cifar-10-batches-py/{file}" for file in _CIFAR]),
    "svhn": ("SVHN", ["train_32x32.mat", "test_32x32.mat"]),
}


def read_images(name: str, root: str | Path | None = None) -> Arrays:
    """Read one of torchvision's image sets, uint8 ``[N, ...]``, the official test set last.

    Args:
        name: ``"mnist"``, ``"fashion_mnist"``, ``"kmnist"``, ``"cifar10"`` or ``"svhn"``.
        root: The folder that holds torchvision's sets; by default ``PYROVAE_DATA``, or else
            ``pyrovae/data`` in the user's cache. It is written to only if files are missing.

    Raises:
        FileNotFoundError: If files are missing and cannot be downloaded.
        ValueError: If files are truncated or damaged.
    """
    kind, files = _SETS[name]
    folder = Path(root or os.environ.get("PYROVAE_DATA") or _cache()).expanduser()
    if not all((folder / file).is_file() for file in files):
        try:
            with redirect_stdout(sys.stderr):
                _part(kind, folder, "train", download=True)
                _part(kind, folder, "test", download=True)
        except Exception as error:
            raise FileNotFoundError(
                f"Expected {', '.join(files)} in {folder}, and could not download them "
                f"({_line(error)}); put them there, or name another folder with --data-root, "
                "root= or the environment variable PYROVAE_DATA."
            ) from error
    try:
        parts = [_part(kind, folder, part) for part in ("train", "test")]
    except Exception as error:
        raise InputError(
            f"Expected the files of {name} in {folder}, got ones that are truncated or damaged "
            f"({_line(error)}); delete {', '.join(files)} there and load again."
        ) from error
    x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Arrays(x, y, (len(parts[0][0]), 0, len(parts[1][0])))


def _part(
    kind: str, folder: Path, part: str, download: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    from torchvision import datasets

    which = {"split": part} if kind == "SVHN" else {"train": part == "train"}
    with warnings.catch_warnings(action="ignore"):
        found = getattr(datasets, kind)(folder, download=download, **which)
    x = np.asarray(found.data)
    y = np.asarray(found.labels if kind == "SVHN" else found.targets, dtype=np.int64)
    if len(x) != len(y):
        raise InputError(f"{len(x)} images and {len(y)} labels")
    return x, y


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "pyrovae" / "data"


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
