"""Data sets as tensors, with their splits, their labels and their provenance."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrovae.files import SUFFIXES, Arrays, read_arrays
from pyrovae.images import read_images
from pyrovae.seeding import subseed

__all__ = ["BINARIZE", "DATASETS", "SPLIT_SEED", "Dataset", "Splits", "load_data"]

BINARIZE = ("none", "threshold", "static", "dynamic")
DATASETS = {
    "digits": "1,797 handwritten digits, 8×8, 17 grey levels (scikit-learn, no download)",
    "mnist": "70,000 handwritten digits, 28×28 (torchvision)",
    "fashion_mnist": "70,000 articles of clothing, 28×28 (torchvision)",
    "kmnist": "70,000 cursive Japanese characters, 28×28 (torchvision)",
    "cifar10": "60,000 colour photographs of ten classes, 3×32×32 (torchvision)",
    "svhn": "99,289 colour photographs of house numbers, 3×32×32 (torchvision)",
}
SPLIT_SEED = 0


class Splits(NamedTuple):
    """One value for each split."""

    train: Any
    valid: Any
    test: Any


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Train, validation and test data in the form that the likelihood sees.

    Args:
        name: What to call it.
        shape: The event shape, ``[D]`` or ``[C, H, W]``.
        train, valid, test: float32 ``[N, *shape]``.
        labels: int64 ``[N]`` where they are classes, float32 otherwise, for each split.
        provenance: Where the numbers come from, ready for JSON.
        binarize: How grey levels became these numbers, one of :data:`BINARIZE`.
        intensities: What ``"dynamic"`` draws training batches from, ``[N, *shape]``, uint8 or
            float32; the probability of a one is ``intensities / scale``.
        scale: The intensity of a certain one.
    """

    name: str
    shape: torch.Size
    train: Tensor
    valid: Tensor
    test: Tensor
    labels: Splits | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    binarize: str = "none"
    intensities: Tensor | None = None
    scale: float = 1.0

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split}={len(getattr(self, split))}" for split in Splits._fields)
        return f"Dataset({self.name!r}, {list(self.shape)}, {sizes}, binarize={self.binarize!r})"

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        r"""The training rows ``index`` ``[M]`` as float32 ``[M, *shape]`` on the data's device.

        Under ``"dynamic"`` each call draws them anew,

        .. math:: x_d \sim \mathrm{Bernoulli}(\mathrm{intensity}_d),

        from ``generator`` (on the data's device), or else from torch's global one.
        """
        if self.intensities is None:
            return self.train[index]
        p = self.intensities[index].float() / self.scale
        uniform = torch.rand(p.shape, generator=generator, dtype=p.dtype, device=p.device)
        return (uniform < p).float()

    def to(self, device: torch.device | str | int | None) -> Dataset:
        """The same data on another device; None leaves it where it is."""
        if device is None:
            return self
        names = ("train", "valid", "test", "intensities")
        moved = {name: t.to(device) for name in names if (t := getattr(self, name)) is not None}
        labels = self.labels and Splits(*(y.to(device) for y in self.labels))
        return replace(self, labels=labels, **moved)


class _Source(NamedTuple):
    """Arrays as they were found, and how to read them: intensities are ``x / scale``."""

    name: str
    arrays: Arrays
    scale: float
    scaling: str
    origin: dict[str, str]


def load_data(
    name: str | Path,
    *,
    binarize: str = "none",
    root: str | Path | None = None,
    device: torch.device | str | int | None = None,
    seed: int = 0,
) -> Dataset:
    """Load a shipped data set or a file, split it, and binarize it as told.

    The official test set stays the test set, and one in six of the official training data, picked
    by a permutation with the fixed seed :data:`SPLIT_SEED`, is for validation. Data that come in
    one piece are permuted with the same seed and split 70/10/20. Splits never depend on ``seed``.

    Grey levels become binary data in one of four ways, recorded in ``provenance``: ``"none"``
    leaves them, ``"threshold"`` is x > 0.5, ``"static"`` draws x ~ Bernoulli(intensity) once, and
    ``"dynamic"`` draws once for ``.train``, ``.valid`` and ``.test`` and anew in every
    :meth:`Dataset.batch`. The fixed draws depend on ``seed`` and the split alone, on every device.

    Args:
        name: One of :data:`DATASETS`, or a ``.npy``, ``.npz`` or ``.csv`` file as
            :func:`pyrovae.files.read_arrays` describes it. In a file, uint8 are intensities over
            255 (or binary, where none is above 1), everything else is taken as it is;
            ``[N, H, W]`` become ``[N, 1, H, W]`` and ``[N, H, W, C]`` with one or three channels
            ``[N, C, H, W]``.
        binarize: One of :data:`BINARIZE`.
        root: The folder of the torchvision sets; by default ``PYROVAE_DATA``, or else
            ``pyrovae/data`` in the user's cache. What is missing there is downloaded into it.
        device: Where the tensors go.
        seed: The seed of the fixed draws.

    Raises:
        ValueError: If an argument or the data cannot be used; the message names the mend.
        FileNotFoundError: If a file is missing and cannot be downloaded.

    Example:
        >>> load_data("digits", binarize="dynamic")
        Dataset('digits', [1, 8, 8], train=1258, valid=180, test=359, binarize='dynamic')
    """
    if binarize not in BINARIZE:
        raise ValueError(_unknown("binarize", str(binarize), BINARIZE))
    source = _find(name, root)
    x = torch.from_numpy(_channels_first(source.arrays.x))
    if binarize != "none":
        _check_intensities(x, source.scale, binarize)
    index, split = _split(len(x), source.arrays.sizes, source.name)
    raw = Splits(*(x[rows] for rows in index))
    grey = [intensities.float() / source.scale for intensities in raw]
    seen = (_binarize(x, binarize, subseed(seed, i)) for i, x in enumerate(grey))
    labels, classes = _labels(source.arrays, index)
    drawn = binarize in ("static", "dynamic")
    provenance = {
        "name": source.name,
        **source.origin,
        "shape": list(x.shape[1:]),
        "sizes": {name: len(rows) for name, rows in index._asdict().items()},
        **split,
        "scaling": source.scaling,
        "binarize": binarize,
        "binarize_seed": seed if drawn else None,
        **classes,
    }
    data = Dataset(source.name, x.shape[1:], *seen, labels, provenance, binarize)
    if binarize == "dynamic":
        data = replace(data, intensities=raw.train, scale=source.scale)
    return data.to(device)


def _find(name: str | Path, root: str | Path | None) -> _Source:
    if not isinstance(name, str | os.PathLike):
        raise TypeError(
            f"Expected the name of a data set or a file, got {type(name).__name__}; save an array "
            "with numpy.save, or give tensors to pyrovae.data.Dataset."
        )
    if str(name) == "digits":
        return _digits()
    if str(name) in DATASETS:
        origin = {"source": f"torchvision {version('torchvision')}"}
        return _Source(str(name), read_images(str(name), root), 255.0, "uint8 / 255", origin)
    path = Path(name).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        files = f"or a file that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise ValueError(_unknown("the data set", str(name), [*DATASETS, files]))
    return _file(path)


def _digits() -> _Source:
    from sklearn.datasets import load_digits

    found = load_digits()
    arrays = Arrays(found.images.astype(np.uint8), found.target.astype(np.int64))
    origin = {"source": f"scikit-learn {version('scikit-learn')}"}
    return _Source("digits", arrays, 16.0, "/ 16", origin)


def _file(path: Path) -> _Source:
    arrays = read_arrays(path)
    with path.open("rb") as file:
        origin = {"source": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    grey = arrays.x.dtype == np.uint8 and arrays.x.max() > 1
    scale, scaling = (255.0, "uint8 / 255") if grey else (1.0, "none")
    return _Source(path.stem, arrays, scale, scaling, origin)


def _channels_first(x: np.ndarray) -> np.ndarray:
    """Events of shape ``[D]`` or ``[C, H, W]``."""
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[-1] in (1, 3):
        x = np.moveaxis(x, -1, 1)
    return np.ascontiguousarray(x)


def _split(
    rows: int, sizes: tuple[int, int, int] | None, name: str
) -> tuple[Splits, dict[str, str | int | None]]:
    """The row numbers of each split, and the rule that chose them."""
    if sizes is None:
        _check_rows(rows, 3, f"rows in {name}")
        valid, test = max(1, round(rows / 10)), max(1, round(rows / 5))
        index = _permutation(rows).split([rows - valid - test, valid, test])
        return Splits(*index), {"split": "70/10/20, permuted", "split_seed": SPLIT_SEED}
    if sizes[1]:
        index = torch.arange(rows).split(list(sizes))
        return Splits(*index), {"split": "as given", "split_seed": None}
    train = sizes[0]
    _check_rows(train, 2, f"training rows in {name}")
    valid = max(1, train // 6)
    index = *_permutation(train).split([train - valid, valid]), torch.arange(train, rows)
    rule = "test as given, one in six of train for valid, permuted"
    return Splits(*index), {"split": rule, "split_seed": SPLIT_SEED}


def _permutation(rows: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(SPLIT_SEED).permutation(rows))


def _check_rows(rows: int, needed: int, what: str) -> None:
    if rows < needed:
        raise ValueError(f"Expected at least {needed} {what}, one for each split, got {rows}.")


def _binarize(x: Tensor, how: str, seed: int) -> Tensor:
    if how == "none":
        return x
    if how == "threshold":
        return (x > 0.5).float()
    return torch.bernoulli(x, generator=torch.Generator().manual_seed(seed))


def _check_intensities(x: Tensor, scale: float, how: str) -> None:
    low, high = x.min().item() / scale, x.max().item() / scale
    if low < 0 or high > 1:
        raise ValueError(
            f"Expected intensities in [0, 1] for binarize={how!r}, got numbers from {low:g} to "
            f"{high:g}; rescale them, or take binarize='none'."
        )


def _labels(arrays: Arrays, index: Splits) -> tuple[Splits | None, dict[str, Any]]:
    if arrays.y is None:
        return None, {}
    y = torch.from_numpy(arrays.y)
    classes = {} if y.is_floating_point() else {"classes": len(y.unique())}
    names = {} if arrays.classes is None else {"class_names": arrays.classes}
    return Splits(*(y[i] for i in index)), classes | names


def _unknown(what: str, got: str, known: Iterable[str]) -> str:
    close = get_close_matches(got.lower().replace("-", "_"), known)
    guess = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    return f"Expected {what} to be one of {', '.join(known)}, got {got!r}{guess}"
