"""Read annotated matrices: an AnnData, or the ``.h5ad`` file of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyrovae._tools import InputError, did_you_mean, require_memory

if TYPE_CHECKING:
    import pandas as pd


def split_layer(name: str) -> tuple[Path, str]:
    """The file and the layer of ``FILE.h5ad`` or ``FILE.h5ad:LAYER``; ``X`` if none is named."""
    stem, suffix, layer = name.partition(".h5ad")
    return Path(stem + suffix), layer.removeprefix(":") or "X"


def read_h5ad(path: Path, layer: str = "X") -> tuple[np.ndarray, pd.DataFrame]:
    """A matrix of a ``.h5ad`` file ``[N, D]``, and what is annotated of its rows.

    Args:
        path: The file, as anndata 0.8 and later write it; anndata is not needed.
        layer: ``X``, or the name of a layer.

    Raises:
        InputError: If the file has no such layer, or is of an earlier format.
    """
    found, obs = open_h5ad(path, layer)
    with found.file:
        return _matrix(found, f"{layer} of {path}"), read_obs(obs)


def open_h5ad(path: Path, layer: str) -> tuple[Any, Any]:
    """The matrix of :func:`read_h5ad` and obs as they are stored, while which the file is open."""
    import h5py

    file = h5py.File(path)
    layers = {"X": "X", **{name: f"layers/{name}" for name in file.get("layers", ())}}
    if layer not in layers or layers[layer] not in file:
        raise InputError(
            f"Expected a layer of {path}, one of {', '.join(layers)}, got {layer!r}"
            f"{did_you_mean(layer, layers)}."
        )
    if not isinstance(file.get("obs"), h5py.Group):
        raise InputError(
            f"Expected a file of anndata 0.8 or later, got {path} without a group obs: read it "
            f"and write it again with a later anndata."
        )
    return file[layers[layer]], file["obs"]


def read_obs(obs: Any) -> pd.DataFrame:
    """What is annotated of the rows."""
    import pandas as pd

    return pd.DataFrame({name: _annotation(obs[name]) for name in _columns(obs)})


def shape_of(found: Any) -> tuple[int, ...]:
    """The shape of a matrix, dense or sparse, as it is stored."""
    return tuple(int(n) for n in getattr(found, "shape", None) or found.attrs["shape"])


def row_reader(found: Any, title: str) -> Callable[[int, int], np.ndarray]:
    """What reads some rows of a matrix as it is stored, from one number to before another."""
    kind = _kind(found, title)
    if kind == "array":
        return lambda start, stop: found[start:stop]
    if kind == "csc_matrix":
        raise InputError(
            f"Expected an array or a csr_matrix in {title}, which stays on disk and is read by "
            f"rows, got a csc_matrix: write it as X.tocsr(), or give a larger memory."
        )
    from scipy.sparse import csr_matrix

    ends, columns = found["indptr"][()], shape_of(found)[1]

    def take(start: int, stop: int) -> np.ndarray:
        part = ends[start : stop + 1]
        values, places = (found[name][part[0] : part[-1]] for name in ("data", "indices"))
        block = csr_matrix((values, places, part - part[0]), shape=(stop - start, columns))
        return block.astype(np.float32).toarray()

    return take


def _columns(obs: Any) -> list[str]:
    """The columns in their order, without the row names."""
    return [str(name) for name in obs.attrs.get("column-order", list(obs))]


def _kind(found: Any, title: str) -> str:
    kind = str(found.attrs.get("encoding-type", "array"))
    if kind not in ("array", "csr_matrix", "csc_matrix"):
        raise InputError(f"Expected an array or a sparse matrix in {title}, got {kind}.")
    return kind


def _matrix(found: Any, title: str) -> np.ndarray:
    kind = _kind(found, title)
    if kind == "array":
        return np.asarray(found[()])
    import torch
    from scipy import sparse

    rows, columns = shape_of(found)
    like = torch.empty(columns, dtype=torch.float32, device="meta")
    require_memory(f"{title}, made dense,", like, rows)
    parts = tuple(found[name][()] for name in ("data", "indices", "indptr"))
    matrix = getattr(sparse, kind)(parts, shape=(rows, columns))
    return matrix.astype(np.float32).toarray()


def _annotation(found: Any) -> Any:
    """One column: categories, numbers with gaps, or an array."""
    import pandas as pd

    kind = str(found.attrs.get("encoding-type", "array"))
    if kind == "categorical":
        words = list(_annotation(found["categories"]))
        ordered = bool(found.attrs.get("ordered", False))
        return pd.Categorical.from_codes(found["codes"][()], words, ordered=ordered)
    if kind.startswith("nullable"):
        values, gaps = found["values"][()], found["mask"][()]
        return pd.Series(_plain(values)).mask(gaps)
    return _plain(found[()])


def _plain(values: np.ndarray) -> np.ndarray:
    """Words as str, which h5py reads as bytes."""
    if values.dtype.kind not in "OS":
        return values
    return np.array([v.decode() if isinstance(v, bytes) else v for v in values], dtype=object)
