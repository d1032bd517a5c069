"""Work on data a tile at a time: in bounded memory, and with a file to resume from."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrovae._tools import InputError
from pyrovae._tools.files import write_atomic

__all__ = [
    "DATA_TILE",
    "Checkpoint",
    "digest",
    "finished_tiles",
    "read_about",
    "run_tiles",
    "tile_rows",
]

DATA_TILE = 64
SAVE_AFTER = 2.0

Found = dict[str, Tensor]


def tile_rows(rows: tuple) -> list[tuple]:
    """Data ``[N, ...]`` in tiles of 64, the last of several filled up with rows of its own.

    So all tiles have one shape, and what is drawn for a datum depends on its place and not on N.
    """
    tiles = list(zip(*(tensor.split(DATA_TILE) for tensor in rows), strict=True))
    missing = DATA_TILE - len(tiles[-1][0])
    if len(tiles) > 1 and missing:
        tiles[-1] = tuple(torch.cat([t, t[:1].expand(missing, *t.shape[1:])]) for t in tiles[-1])
    return tiles


def run_tiles(
    work: Callable[[int, tuple], Found],
    rows: tuple,
    checkpoint: Checkpoint | None = None,
    part: tuple[int, int] = (0, 1),
) -> Found:
    """Work on each tile of data and put the results together.

    Args:
        work: Takes a tile's number and its rows, and returns tensors ``[n, ...]`` by name.
        rows: Data ``[N, ...]``.
        checkpoint: Where finished tiles are kept, and found again.
        part: This process's number, and that of all of them; each takes every such tile, and
            all get all results.

    Returns:
        Tensors ``[N, ...]`` by name.
    """
    tiles, num_data = tile_rows(rows), len(rows[0])
    mine = range(part[0], len(tiles), part[1])
    done = checkpoint.load(rows[0].device) if checkpoint else {}
    first = finished_tiles(checkpoint.path) if checkpoint else 0
    found = [{n: v.split(DATA_TILE)[i] for n, v in done.items()} for i in range(first)]
    try:
        for index in mine[first:]:
            left = num_data - index * DATA_TILE
            found.append({n: v[:left] for n, v in work(index, tiles[index]).items()})
            if checkpoint:
                checkpoint.offer(found)
    finally:
        if checkpoint and found:
            checkpoint.save(found)
    return _join(found if part[1] == 1 else _exchange(found, part[1]))


class Checkpoint:
    """A file of the finished data of one evaluation.

    Args:
        path: The file; its folder must exist.
        about: What the evaluation is, for another one to be refused; tensors by their digests.

    Raises:
        ValueError: If the file is of another evaluation, or damaged.
    """

    def __init__(self, path: str | Path, about: dict[str, Any]) -> None:
        self.path, self.about = Path(path), about
        self.saved = time.monotonic()
        if self.path.exists():
            self._require_same(read_about(self.path))

    def load(self, device: torch.device) -> Found:
        """The finished data's results, if there are any."""
        if not self.path.exists():
            return {}
        from safetensors.torch import load_file

        return load_file(self.path, device=str(device))

    def offer(self, found: list[Found]) -> None:
        """Save, if the last time is more than two seconds ago."""
        if time.monotonic() - self.saved > SAVE_AFTER:
            self.save(found)

    def save(self, found: list[Found]) -> None:
        """Replace the file by one of these results: all of it, or nothing."""
        from safetensors.torch import save

        tensors = {name: value.contiguous().cpu() for name, value in _join(found).items()}
        content = save(tensors, {"about": json.dumps(self.about)})
        write_atomic(self.path, content)
        self.saved = time.monotonic()

    def _require_same(self, before: dict[str, Any]) -> None:
        for key in sorted(before.keys() | self.about.keys()):
            if before.get(key) != self.about.get(key):
                raise InputError(
                    f"The checkpoint {self.path} was made with {key} = {before.get(key)}, and "
                    f"this evaluation has {self.about.get(key)}: choose another file, or remove it."
                )


def read_about(path: Path) -> dict[str, Any]:
    """What the evaluation of a checkpoint is.

    Raises:
        ValueError: If the file is no checkpoint.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})["about"])
    except (SafetensorError, KeyError, OSError) as error:
        raise InputError(
            f"{path} is no checkpoint of an evaluation, or a damaged one ({error}): choose "
            f"another file, or remove it."
        ) from error


def finished_tiles(path: Path | None) -> int:
    """How many tiles of data a checkpoint holds; none if there is no such file."""
    if path is None or not path.exists():
        return 0
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return math.ceil(file.get_slice("log_prob").get_shape()[0] / DATA_TILE)


def digest(*tensors: Tensor) -> str:
    """A short name for tensors: equal for equal numbers, types and shapes."""
    total = hashlib.blake2b(digest_size=12)
    for tensor in tensors:
        total.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total.update(flat.numpy())
    return total.hexdigest()


def _exchange(found: list[Found], size: int) -> list[Found]:
    """All processes' tiles in their order; what has been a CPU tensor or a CUDA tensor stays so."""
    parts: list = [None] * size
    try:
        torch.distributed.all_gather_object(parts, found)
    except RuntimeError as error:
        raise ConnectionError(f"another process is gone or does not answer ({error})") from error
    return [tile for tiles in zip_longest(*parts) for tile in tiles if tile is not None]


def _join(found: list[Found]) -> Found:
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}
