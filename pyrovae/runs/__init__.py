"""The run directory: what a run is on disk.

========================= =====================================================================
``config.json``           everything that the run was asked to do, resolved
``programs/``             copies of the user's own model and guide files
``checkpoint.pt``         where training goes on from; read with ``weights_only=True``
``weights.safetensors``   the trained weights, with a checksum in the file's metadata
``metrics.csv``           one row an epoch
``results.json``          what evaluations found, by split
``evaluation/``           what they found of each datum, by split, and what stopped ones finished
``inference_<split>.nc``  posterior draws and predictions of 100 data, for ArviZ
``figures/``              PNG pictures
``report.html``           the one-page report
========================= =====================================================================

Every write is atomic: a temporary file is written, synced and renamed. No pickle is executed.
"""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrovae._tools import InputError
from pyrovae._tools.files import checksum, pack_tensors, reading, unpack_tensors, write_atomic

__all__ = ["Run"]

PROGRAM, DATA = {"name", "file", "settings"}, {"load", "root", "binarize"}
PARTS = {"model": PROGRAM, "guide": PROGRAM, "data": DATA}
STATE = {"weights": dict, "optimizer": dict, "history": list, "seed": int}


class Run:
    """A run directory, new or existing; what cannot be read of it raises an InputError.

    Args:
        path: The directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """An existing run."""
        run = cls(path)
        if not run.exists():
            raise InputError(f"{run.path} holds no run: expected a config.json in it.")
        return run

    def exists(self) -> bool:
        """Whether the directory holds a run."""
        return (self.path / "config.json").is_file()

    def require_new(self) -> None:
        """Refuse a directory that is in use, or that cannot be made."""
        if self.exists():
            raise InputError(
                f"{self.path} holds another run: choose another --out, or go on with --resume."
            )
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise InputError(f"{self.path} exists and is not empty: choose another --out.")
        path = self.path.absolute()
        found = next(folder for folder in (path, *path.parents) if folder.exists())
        if not (found.is_dir() and os.access(found, os.W_OK)):
            raise InputError(f"{self.path} cannot be made: {found} is no folder to write in.")

    def create(self, config: dict[str, Any], files: dict[str, bytes]) -> None:
        """Write the configuration and the user's program files ``programs/<name>``, or nothing."""
        fresh = not self.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                self.write(f"programs/{name}", content)
            self.write_json("config.json", config)
        except BaseException:
            if fresh:
                for name in ("config.json", *(f"programs/{name}" for name in files)):
                    (self.path / name).unlink(missing_ok=True)
                for folder in (self.path / "programs", self.path):
                    with suppress(OSError):
                        folder.rmdir()
            raise

    def write(self, name: str, content: bytes) -> Path:
        """Write a file of the run whole, in a folder that is made if it is missing."""
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, content)
        return path

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a dictionary as JSON."""
        self.write(name, (json.dumps(content, indent=2) + "\n").encode())

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a dictionary written as JSON."""
        with reading(self.path / name):
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise TypeError("it holds no JSON object")
        return content

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        config = self.read_json("config.json")
        whole = _holds(config, {*PARTS, "command", "epochs", "schedule", "device", "seed"})
        if not whole or not all(_holds(config[part], keys) for part, keys in PARTS.items()):
            raise InputError(f"{self.path / 'config.json'} is damaged: entries are missing.")
        return config

    @property
    def results(self) -> dict[str, Any]:
        """What evaluations have found so far, by split."""
        return self.read_json("results.json") if (self.path / "results.json").exists() else {}

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write where training goes on from, in place of the weights of an earlier end."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.write("checkpoint.pt", buffer.getvalue())
        (self.path / "weights.safetensors").unlink(missing_ok=True)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Read where training goes on from; None if no epoch was finished.

        A file that is truncated or altered is refused, or one that asks for more than plain data.
        """
        path = self.path / "checkpoint.pt"
        if not path.exists():
            return None
        with reading(path):
            with zipfile.ZipFile(path) as archive:
                if broken := archive.testzip():
                    raise zipfile.BadZipFile(f"bad checksum in {broken}")
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                raise InputError(
                    f"{path} was not loaded: it holds more than tensors and plain data, which is "
                    f"never executed."
                ) from error
        if not _is_state(state):
            raise InputError(f"{path} was not loaded: it is no checkpoint of a training.")
        return state

    def save_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write one row an epoch."""
        table = io.StringIO()
        writer = csv.DictWriter(table, history[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        self.write("metrics.csv", table.getvalue().encode())

    def history(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.csv`` as numbers; empty fields are None."""
        path = self.path / "metrics.csv"
        if not path.exists():
            return []
        with reading(path), path.open(newline="", encoding="utf-8") as file:
            return [
                {n: int(v) if n == "epoch" else float(v) if v else None for n, v in row.items()}
                for row in csv.DictReader(file)
            ]

    def save_weights(self, weights: dict[str, Tensor]) -> None:
        """Write the trained weights."""
        self.write("weights.safetensors", pack_tensors(weights))

    def load_weights(self) -> dict[str, Tensor]:
        """Read the trained weights; those of the last checkpoint while training is unfinished."""
        path = self.path / "weights.safetensors"
        if path.exists():
            return unpack_tensors(path)[0]
        checkpoint = self.load_checkpoint()
        if checkpoint is None:
            raise InputError(f"{self.path} has no weights yet: go on with --resume.")
        return checkpoint.get("average") or checkpoint["weights"]

    def weights_checksum(self) -> str:
        """A short name for the weights, by which an evaluation is known to be of them."""
        return checksum(self.load_weights())[:24]

    def save_values(self, split: str, values: dict[str, Tensor], about: dict[str, str]) -> Path:
        """Write what an evaluation found of each datum as ``evaluation/<split>.safetensors``."""
        return self.write(f"evaluation/{split}.safetensors", pack_tensors(values, about))

    def load_values(self, split: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Read what an evaluation found of each datum; None if there is no such evaluation."""
        path = self.path / "evaluation" / f"{split}.safetensors"
        return unpack_tensors(path) if path.exists() else None

    def figures(self) -> dict[str, bytes]:
        """Every picture of the run by name."""
        found = sorted((self.path / "figures").glob("*.png"))
        return {path.stem: path.read_bytes() for path in found}


def _holds(part: Any, keys: set[str]) -> bool:
    return isinstance(part, dict) and keys <= part.keys()


def _is_state(state: Any) -> bool:
    if not (_holds(state, {*STATE, "scheduler", "best_epoch", "best_state"}) and state["history"]):
        return False
    kinds = all(isinstance(state[name], kind) for name, kind in STATE.items())
    best = state["best_epoch"] is None or 1 <= state["best_epoch"] <= len(state["history"])
    return kinds and best and _holds(state["optimizer"], {"state", "param_groups"})
