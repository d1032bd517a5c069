"""The run directory: what a run is on disk.

========================= =====================================================================
``config.json``           everything that the run was asked to do, resolved
``programs/``             copies of the user's own model and guide files
``checkpoint.pt``         where training goes on from; read with ``weights_only=True``
``weights.safetensors``   the trained weights, with a checksum in the file's metadata
``metrics.csv``           one row an epoch
``results.json``          what evaluations found, by split
``figures/``              PNG pictures
``report.html``           the one-page report
========================= =====================================================================

Every write is atomic: a temporary file is written, synced and renamed. Nothing is unpickled.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import pickle
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Run", "write_atomic"]


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file's content, or leave it as it was.

    Raises:
        OSError: If the disk is full or the folder cannot be written; the old file stays.
    """
    try:
        _replace(path, content)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"{path} cannot be written, and stays as it was: {reason}.") from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _replace(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class Run:
    """A run directory, new or existing.

    Args:
        path: The directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """An existing run.

        Raises:
            ValueError: If the directory holds no run, or a damaged one.
        """
        run = cls(path)
        if not run.exists():
            raise ValueError(f"{run.path} holds no run: expected a config.json in it.")
        return run

    def exists(self) -> bool:
        """Whether the directory holds a run."""
        return (self.path / "config.json").is_file()

    def require_new(self) -> None:
        """Refuse a directory that is in use.

        Raises:
            ValueError: If there is anything in it.
        """
        if self.exists():
            raise ValueError(
                f"{self.path} holds another run: choose another --out, or go on with --resume."
            )
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(f"{self.path} exists and is not empty: choose another --out.")

    def create(self, config: dict[str, Any], files: dict[str, Path]) -> None:
        """Write the configuration and copy the user's program files.

        Args:
            config: Ready for JSON.
            files: The user's files by their name under ``programs/``.
        """
        (self.path / "figures").mkdir(parents=True, exist_ok=True)
        for name, file in files.items():
            (self.path / "programs").mkdir(exist_ok=True)
            write_atomic(self.path / "programs" / name, file.read_bytes())
        self.write_json("config.json", config)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        return self.read_json("config.json")

    @property
    def results(self) -> dict[str, Any]:
        """What evaluations have found so far, by split."""
        return self.read_json("results.json") if (self.path / "results.json").exists() else {}

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a dictionary as JSON."""
        write_atomic(self.path / name, (json.dumps(content, indent=2) + "\n").encode())

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a dictionary written as JSON.

        Raises:
            ValueError: If the file is missing or damaged.
        """
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.path / name} is damaged or missing: {error}.") from error

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write where training goes on from, and the metrics so far."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(self.path / "checkpoint.pt", buffer.getvalue())
        table = io.StringIO()
        writer = csv.DictWriter(table, state["history"][0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(state["history"])
        write_atomic(self.path / "metrics.csv", table.getvalue().encode())

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Read where training goes on from; None if no epoch was finished.

        Raises:
            ValueError: If the file is truncated, altered, or asks for more than plain data.
        """
        path = self.path / "checkpoint.pt"
        if not path.exists():
            return None
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken is None:
                return torch.load(path, map_location="cpu", weights_only=True)
        except (zipfile.BadZipFile, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"{path} is damaged and was not loaded: {_line(error)}") from error
        raise ValueError(f"{path} is damaged and was not loaded: bad checksum in {broken}.")

    def save_weights(self, weights: dict[str, Tensor]) -> None:
        """Write the trained weights."""
        from safetensors.torch import save

        weights = {name: value.cpu().contiguous() for name, value in weights.items()}
        write_atomic(self.path / "weights.safetensors", save(weights, {"sha256": _digest(weights)}))

    def load_weights(self) -> dict[str, Tensor]:
        """Read the trained weights; those of the last checkpoint while training is unfinished.

        Raises:
            ValueError: If there are none, or the file is truncated or altered.
        """
        from safetensors import SafetensorError, safe_open

        path = self.path / "weights.safetensors"
        if not path.exists():
            checkpoint = self.load_checkpoint()
            if checkpoint is None:
                raise ValueError(f"{self.path} has no weights yet: go on with --resume.")
            return checkpoint["weights"]
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                names = file.keys()
                weights = {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged and was not loaded: {error}.") from error
        if metadata.get("sha256") != _digest(weights):
            raise ValueError(f"{path} is damaged and was not loaded: its checksum is wrong.")
        return weights

    def begin_again(self) -> None:
        """Make the checkpoint, not the weights of an earlier end, what the run stands at."""
        (self.path / "weights.safetensors").unlink(missing_ok=True)

    def save_figure(self, name: str, png: bytes) -> Path:
        """Write a picture as ``figures/<name>.png``."""
        (self.path / "figures").mkdir(exist_ok=True)
        path = self.path / "figures" / f"{name}.png"
        write_atomic(path, png)
        return path

    def figures(self) -> dict[str, bytes]:
        """Every picture of the run by name."""
        found = sorted((self.path / "figures").glob("*.png"))
        return {path.stem: path.read_bytes() for path in found}

    def history(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.csv`` as numbers; empty fields are None."""
        path = self.path / "metrics.csv"
        if not path.exists():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return [
            {n: int(v) if n == "epoch" else float(v) if v else None for n, v in row.items()}
            for row in rows
        ]


def _digest(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _line(error: Exception) -> str:
    return f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
