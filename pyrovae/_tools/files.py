"""Files written whole or not at all, read against a type, and locked; tensors with a checksum."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from torch import Tensor

from pyrovae._tools import InputError, trust

T = TypeVar("T")
# What a sealed JSON object has beside what the seal is of.
SEALS = ("sha256", "signature")


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file's content, or leave it as it was and raise an OSError that names the file."""
    try:
        remove_temporary(path.parent, path.name)
        temporary, handle = _temporary(path)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        # The new name is safe once its folder is on the disk as well.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}.") from error


def _temporary(path: Path) -> tuple[Path, int]:
    """A new file beside a path, with the permissions that the user gives to new files, locked."""
    while True:
        temporary = path.with_name(f".{path.name[:80]}.{secrets.token_hex(4)}.tmp")
        # A writer that has gone before it had the lock is taken for a killed one.
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if _lock(handle) and os.fstat(handle).st_nlink:
            return temporary, handle
        os.close(handle)


def remove_temporary(folder: Path, name: str = "") -> None:
    """Remove what killed writers of a name, or of any, left in a folder: it is locked by none."""
    with suppress(FileNotFoundError, NotADirectoryError):
        for entry in os.scandir(folder):
            ours = entry.name.startswith(f".{name[:80]}") and entry.name.endswith(".tmp")
            if ours and entry.is_file(follow_symlinks=False):
                with suppress(OSError):
                    handle = os.open(entry.path, os.O_RDWR | os.O_NOFOLLOW)
                    try:
                        if _lock(handle):
                            os.unlink(entry.path)
                    finally:
                        os.close(handle)


@contextmanager
def locked(path: Path, held: str, *, wait: bool = False) -> Iterator[None]:
    """Run a block while no other process runs one with this lock file, which it then removes.

    The system gives the lock back when a process ends, however it ends.

    Args:
        path: The lock file.
        held: The sentence for where another process has the lock.
        wait: Wait for it instead.

    Raises:
        InputError: If another process has it.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            if not _lock(handle, wait):
                raise InputError(held)
            # The one before removed the file that this one has waited for: take the new one.
            if not os.fstat(handle).st_nlink:
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(handle)


def _lock(handle: int, wait: bool = False) -> bool:
    """Whether the lock is had; where a file system has none, nothing can be held."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def require_file(path: Path, kind: int = stat.S_IFREG) -> None:
    """Refuse a path that is there and is no plain file (or no folder): links, pipes, devices."""
    with suppress(FileNotFoundError, NotADirectoryError):
        if stat.S_IFMT(path.lstat().st_mode) != kind:
            what = "plain file" if kind == stat.S_IFREG else "folder of its own"
            raise InputError(f"{path} is no {what} but a link, a pipe or the like: remove it.")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say of which file it is, where what it holds is not what it should be."""
    try:
        yield
    except (InputError, PermissionError):
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(
            f"{path} is damaged and was not loaded: {reason}. Put back a copy, or make it anew."
        ) from error


def table_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows of the same names as a CSV file."""
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue().encode()


def plain_json(value: Any) -> Any:
    """A record as JSON gives it back: mappings, lists, and None for NaN and infinity."""
    return msgspec.json.decode(msgspec.json.encode(value))


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the checksum of all that is in it."""
    return {**content, "sha256": _seal(content)}


def typed(content: Any, kind: type[T]) -> T:
    """A decoded JSON object as a record, if it fits and its checksum, if it has one, is right."""
    found = msgspec.convert(content, kind, str_keys=True)
    if content.get("sha256") not in (None, "", _seal(content)):
        raise ValueError("its checksum is wrong, it was changed since it was written")
    return found


def _seal(content: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in content.items() if name not in SEALS}
    return hashlib.sha256(msgspec.json.encode(rest, order="sorted")).hexdigest()


def pack_tensors(
    tensors: dict[str, Tensor], about: dict[str, str] | None = None, signed: str = ""
) -> bytes:
    """The content of a file that holds tensors and, beside them, words about them.

    ``signed`` is the file's name, if the user's key is to sign that it has this content.
    """
    from safetensors.torch import save

    about = about or {}
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    seals = {"sha256": checksum(tensors, about)}
    if signed:
        seals["signature"] = trust.sign(f"{signed} {seals['sha256']}")
    return save(tensors, about | seals)


def unpack_tensors(path: Path, signed: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and the words about them; a file that was altered is refused.

    ``signed`` refuses one that this user has not written under this name, too.
    """
    from safetensors import safe_open

    require_file(path)
    with reading(path):
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        seal, signature = (about.pop(name, "") for name in SEALS)
        if seal != checksum(tensors, about):
            raise ValueError("its checksum is wrong")
        if signed and not trust.is_own(f"{path.name} {seal}", signature):
            raise ValueError("it was not written here by you, or under another name")
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
