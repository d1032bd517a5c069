"""Read annotated matrices: an AnnData, or the ``.h5ad`` file of one."""

from __future__ import annotations

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
    import h5py
    import pandas as pd

    with h5py.File(path) as file:
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
        columns = {name: _annotation(file["obs"][name]) for name in _columns(file["obs"])}
        x = _matrix(file[layers[layer]], f"{layer} of {path}")
        return x, pd.DataFrame(columns, index=range(len(x)))


def _columns(obs: Any) -> list[str]:
    """The columns in their order, without the row names."""
    return [str(name) for name in obs.attrs.get("column-order", list(obs))]


def _matrix(found: Any, title: str) -> np.ndarray:
    kind = str(found.attrs.get("encoding-type", "array"))
    if kind == "array":
        return np.asarray(found[()])
    if kind not in ("csr_matrix", "csc_matrix"):
        raise InputError(f"Expected an array or a sparse matrix in {title}, got {kind}.")
    import torch
    from scipy import sparse

    rows, columns = (int(n) for n in found.attrs["shape"])
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
