"""Files written whole or not at all, and tensors in safetensors files with a checksum."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from pyrovae._tools import InputError


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file's content, or leave it as it was and raise an OSError that names the file."""
    try:
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
        # The new name is safe once its folder is on the disk as well.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}.") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say of which file it is, where what it holds is not what it should be."""
    try:
        yield
    except (InputError, PermissionError):
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(f"{path} is damaged and was not loaded: {reason}.") from error


def pack_tensors(tensors: dict[str, Tensor], about: dict[str, str] | None = None) -> bytes:
    """The content of a file that holds tensors and, beside them, words about them."""
    from safetensors.torch import save

    about = about or {}
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    return save(tensors, about | {"sha256": checksum(tensors, about)})


def unpack_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and the words about them; a file that was altered is refused."""
    from safetensors import safe_open

    with reading(path):
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        if about.pop("sha256", None) != checksum(tensors, about):
            raise ValueError("its checksum is wrong")
    return tensors, about


def checksum(tensors: dict[str, Tensor], about: dict[str, str] | None = None) -> str:
    """The SHA-256 of tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    if about:
        digest.update(json.dumps(about, sort_keys=True).encode())
    return digest.hexdigest()
