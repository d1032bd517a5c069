"""The run directory: what a run is on disk.

========================= =====================================================================
``config.json``           everything that the run was asked to do, resolved, and its identity
``programs/``             copies of the user's own model and guide files, and of modules beside them
``checkpoint.pt``         where training goes on from; read with ``weights_only=True``
``weights.safetensors``   the trained weights, with a checksum in the file's metadata
``metrics.csv``           one row an epoch
``results.json``          what evaluations found, by split
``evaluation/``           what they found of each datum, by split, and what stopped ones finished
``inference_<split>.nc``  posterior draws and predictions of 100 data, for ArviZ
``figures/``              PNG pictures
``exports/``              programs of the pair for other tools
``explorer.safetensors``  what the report's latent explorer shows
``report.html``           the one-page report
========================= =====================================================================

Every write is atomic: a temporary file is written, synced and renamed. No pickle is executed, no
link is followed, and what is read has to be this run's and whole: each part carries the run's
identity and a checksum.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta, Struct
from torch import Tensor

from pyrovae._tools import InputError, trust
from pyrovae._tools.files import (
    checksum,
    locked,
    pack_tensors,
    plain_json,
    reading,
    remove_temporary,
    require_file,
    sealed,
    table_bytes,
    typed,
    unpack_tensors,
    write_atomic,
)
from pyrovae.runs.beside import Sources
from pyrovae.runs.config import Config
from pyrovae.runs.programs import KINDS

__all__ = ["Run"]

# Held while a run is trained. A folder that has it and no configuration is a beginning that was
# killed.
TRAINING = ".training.lock"
BEGUN = re.compile(rf"{re.escape(TRAINING)}|programs(/({'|'.join(KINDS)})(\.py|/.+)?)?")
EXPLORER = "explorer.safetensors"
# How the names of pictures begin that are drawn from the weights.
PICTURES = ("samples", "reconstructions", "interpolations", "manifold", "latent_space", "responses")


# What an optimizer may keep of a parameter.
KEPT = (Tensor, int, float, type(None))


class _Optimizer(Struct):
    """The ``state_dict()`` of an optimizer: what it keeps of each parameter is its own affair."""

    state: dict[int, dict[str, Any]]
    param_groups: list[dict[str, Any]]


class _Checkpoint(Struct):
    """A :meth:`pyrovae.Fit.state_dict`, as ``checkpoint.pt`` holds it with the run's identity."""

    weights: dict[str, Tensor]
    optimizer: _Optimizer
    scheduler: dict[str, Any] | None
    history: Annotated[list[dict[str, float | int | None]], Meta(min_length=1)]
    seed: int
    best_epoch: int | None
    best_state: dict[str, Tensor] | None
    average: dict[str, Tensor] | None = None
    stepped: list[str] | None = None
    run: str = ""


class Run:
    """A run directory, new or existing; what cannot be read of it raises an InputError.

    Args:
        path: The directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """An existing run."""
        run = cls(path)
        if not run.exists():
            raise InputError(f"{run.path} holds no run: expected a config.json in it.")
        return run

    def exists(self) -> bool:
        """Whether the directory holds a run."""
        return os.path.lexists(self.path / "config.json")

    def file(self, name: str) -> Path:
        """The path of a part, there or not; a link in place of it or of its folder is refused."""
        for folder in self._folders(name):
            require_file(folder, stat.S_IFDIR)
        require_file(self.path / name)
        return self.path / name

    def _folders(self, name: str) -> list[Path]:
        """The folders that a part is in, from the run's own on."""
        return [self.path / each for each in reversed(Path(name).parents[:-1])]

    def require_new(self) -> None:
        """Refuse a directory that is in use, or that cannot be made."""
        if self.exists():
            raise InputError(
                f"{self.path} holds another run: choose another --out, or go on with --resume."
            )
        if self.path.exists() and not (self.path.is_dir() and self._is_begun()):
            raise InputError(f"{self.path} exists and is not empty: choose another --out.")
        path = self.path.absolute()
        found = next(folder for folder in (path, *path.parents) if folder.exists())
        if not (found.is_dir() and os.access(found, os.W_OK)):
            raise InputError(f"{self.path} cannot be made: {found} is no folder to write in.")

    def _is_begun(self) -> bool:
        """Whether it holds nothing, or what a training leaves that was killed at its start."""
        found = {str(path.relative_to(self.path)) for path in self.path.rglob("*")}
        found = {name for name in found if not name.endswith(".tmp")}
        return not found or (TRAINING in found and all(map(BEGUN.fullmatch, found)))

    @contextmanager
    def training(self) -> Iterator[None]:
        """Train in a block, which no other process does meanwhile; without a run, nothing is left.

        What killed writers have left is removed.
        """
        missing = [each for each in (self.path, *self.path.parents) if not each.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with locked(self.path / TRAINING, f"{self.path} is being trained by another process."):
                copies = {file.parent for file in (self.path / "programs").rglob("*.tmp")}
                for folder in {self.path, self.path / "evaluation", self.path / "figures", *copies}:
                    remove_temporary(folder)
                try:
                    yield
                finally:
                    if not self.exists():
                        for kind in KINDS:
                            (self.path / "programs" / f"{kind}.py").unlink(missing_ok=True)
                            shutil.rmtree(self.path / "programs" / kind, ignore_errors=True)
                        with suppress(OSError):
                            (self.path / "programs").rmdir()
        finally:
            with suppress(OSError):
                for each in missing:
                    each.rmdir()

    def create(self, config: Config, files: Mapping[str, bytes]) -> None:
        """Write the user's program files ``programs/<name>`` and then the configuration."""
        fresh = not self.exists()
        try:
            for name, source in files.items():
                self.write(f"programs/{name}", source)
            content = sealed(plain_json(config))
            self.write_json("config.json", content | {"signature": trust.sign(content["sha256"])})
        except BaseException:
            if fresh:
                (self.path / "config.json").unlink(missing_ok=True)
            raise

    def write(self, name: str, content: bytes) -> Path:
        """Write a file of the run whole, in a folder that is made if it is missing."""
        path = self.file(name)
        for folder in self._folders(name):
            folder.mkdir(exist_ok=True)
        write_atomic(path, content)
        return path

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a dictionary as JSON."""
        self.write(name, (json.dumps(content, indent=2) + "\n").encode())

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a dictionary written as JSON."""
        path = self.file(name)
        with reading(path):
            return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])

    @property
    def config(self) -> Config:
        """The resolved configuration."""
        content = self.read_json("config.json")
        with reading(self.path / "config.json"):
            # msgspec leaves out the defaults of a dataclass; replace() goes through its __init__.
            config = replace(typed(content, Config))
            for kind in KINDS:
                if getattr(config, kind).file not in (None, f"programs/{kind}.py"):
                    raise ValueError(f"the {kind} of a run is programs/{kind}.py in it, or shipped")
            if bool(config.identity) != bool(config.sha256):
                raise ValueError("its checksum is missing")
        return config

    def sources(self, kind: str) -> Sources:
        """The copies of a program's files; one that was edited since is refused."""
        read: list[bytes] = []
        record = getattr(self.config, kind)
        for name, sha256 in record.copies.items():
            path = self.file(name)
            read.append(path.read_bytes())
            if sha256 not in (None, hashlib.sha256(read[-1]).hexdigest()):
                raise InputError(
                    f"{path} was edited since the run was made: put back what it was, or train "
                    f"the edited file into another --out."
                )
        modules = dict(zip(record.modules, read[1:], strict=True))
        programs = self.path / "programs"
        return Sources(read[0], programs / f"{kind}.py", modules, programs / kind)

    @property
    def identity(self) -> str:
        """What its parts carry to be known by; empty for a run of before there was such."""
        return self.config.identity if self.exists() else ""

    @property
    def is_own(self) -> bool:
        """Whether this user made the run, or trained it last, on this machine."""
        config = self.config
        return trust.is_own(config.sha256, config.signature)

    def require_own(self, path: Path, run: str, seal: str = "sealed") -> None:
        """Refuse a part that carries another identity, or none where the run has one."""
        identity = self.identity
        if run != identity:
            raise InputError(f"{path} is of another run: put back the file of this one.")
        if identity and not seal:
            raise InputError(f"{path} is damaged and was not loaded: its checksum is missing.")

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write where training goes on from, in place of the weights of an earlier end.

        The pictures of what that end decodes go as well.
        """
        buffer = io.BytesIO()
        torch.save(state | {"run": self.identity}, buffer)
        self.write("checkpoint.pt", buffer.getvalue())
        self.file("weights.safetensors").unlink(missing_ok=True)
        for path in self._figures():
            if path.stem.startswith(PICTURES):
                path.unlink()
        self.file(EXPLORER).unlink(missing_ok=True)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Read where training goes on from; None if no epoch was finished.

        A file that is truncated or altered is refused, or one that asks for more than plain data.
        """
        path = self.file("checkpoint.pt")
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
            found = msgspec.convert(state, _Checkpoint)
            # A tensor, or a number, as the count of steps may be, is what optimizers keep.
            for each in found.optimizer.state.values():
                if odd := [n for n, v in each.items() if not isinstance(v, KEPT)]:
                    raise ValueError(f"the state of its optimizer has an odd {odd[0]}")
            if len({tuple(row) for row in found.history}) > 1:
                raise ValueError("the rows of its history differ in their entries")
            if not 1 <= (found.best_epoch or 1) <= len(found.history):
                raise ValueError(f"its best epoch is {found.best_epoch} of {len(found.history)}")
        self.require_own(path, found.run)
        return state

    def save_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write one row an epoch."""
        self.write("metrics.csv", table_bytes(history))

    def history(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.csv`` as numbers; empty fields are None."""
        path = self.file("metrics.csv")
        if not path.exists():
            return []
        with reading(path), path.open(newline="", encoding="utf-8") as file:
            return [
                {n: int(v) if n == "epoch" else float(v) if v else None for n, v in row.items()}
                for row in csv.DictReader(file)
            ]

    def save_weights(self, weights: dict[str, Tensor]) -> None:
        """Write the trained weights, unless they are there."""
        path = self.file("weights.safetensors")
        with suppress(InputError):
            if path.exists() and checksum(self.load_weights()) == checksum(weights):
                return
        self.write("weights.safetensors", pack_tensors(weights, {"run": self.identity}))

    def load_weights(self) -> dict[str, Tensor]:
        """Read the trained weights; those of the last checkpoint while training is unfinished."""
        path = self.file("weights.safetensors")
        if path.exists():
            weights, about = unpack_tensors(path)
            self.require_own(path, about.get("run", ""))
            return weights
        checkpoint = self.load_checkpoint()
        if checkpoint is None:
            raise InputError(f"{self.path} has no weights yet: go on with --resume.")
        return checkpoint.get("average") or checkpoint["weights"]

    def weights_checksum(self) -> str:
        """A short name for the weights, by which an evaluation is known to be of them."""
        return checksum(self.load_weights())[:24]

    def save_values(self, split: str, values: dict[str, Tensor], about: dict[str, str]) -> Path:
        """Write what an evaluation found of each datum as ``evaluation/<split>.safetensors``."""
        about = about | {"run": self.identity}
        return self.write(f"evaluation/{split}.safetensors", pack_tensors(values, about))

    def load_values(self, split: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Read what an evaluation found of each datum; None if there is no such evaluation."""
        path = self.file(f"evaluation/{split}.safetensors")
        if not path.exists():
            return None
        values, about = unpack_tensors(path)
        self.require_own(path, about.pop("run", ""))
        return values, about

    def _figures(self) -> list[Path]:
        found = sorted((self.path / "figures").glob("*.png"))
        return [self.file(f"figures/{path.name}") for path in found]

    def figures(self) -> dict[str, bytes]:
        """Every picture of the run by name."""
        return {path.stem: path.read_bytes() for path in self._figures()}
