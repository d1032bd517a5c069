"""Damage the files of a run, or of data, in ways that disks and people find.

A file is spoilt as bytes, or as what it holds: JSON, tensors, a checkpoint, a table. That is sealed
again half of the time, as a forger would do, so that the types behind the seal are reached.
"""

import io
import json
import random
import zipfile
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from commands import rewrite

from pyrovae._tools.files import pack_tensors, sealed, unpack_tensors

VALUES = [
    None, True, -1, 0, 3, 2**70, -0.5, 1e308, "", "x", "<script>alert(1)</script>", "ä" * 300,
    [], [None], [1, 2, 3], {}, {"a": 1}, {"": {"b": [None]}},
]  # fmt: skip
CELLS = [
    "",
    "x",
    "nan",
    "-inf",
    "1e999",
    "9" * 200_000,
    '"',
    "1,2",
    "\x00",
    "ä",
    "18446744073709551615",
]


def spoil_bytes(path: Path, rng: random.Random) -> None:
    """Flip, cut, double, insert or replace bytes."""
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content) or 1)
    how = rng.randrange(6)
    if how == 0 and content:
        for _ in range(rng.choice([1, 1, 8])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == 1:
        content = content[:at]
    elif how == 2:
        content[at:at] = content[at : at + rng.randrange(1, 64)]
    elif how == 3:
        content[at:at] = rng.randbytes(rng.randrange(1, 64))
    elif how == 4:
        content = bytearray(rng.choice([b"", b"[" * 50_000, b'{"a":' * 50_000, b"null", b"\xff"]))
    else:
        content[at:] = rng.randbytes(len(content) - at)
    path.write_bytes(content)


def spoil_value(content, rng: random.Random):
    """The same nested value with one part of it dropped, renamed or replaced by another."""
    content = deepcopy(content)
    where, key = [content], 0
    while isinstance(where[key], dict | list) and where[key] and rng.random() < 0.9:
        where = where[key]
        key = rng.choice([*where]) if isinstance(where, dict) else rng.randrange(len(where))
    how = rng.random()
    if where is content or not isinstance(where, dict) or how < 0.6:
        where[key] = deepcopy(rng.choice(VALUES))
    elif how < 0.85:
        del where[key]
    else:
        where[rng.choice(["x", "<b>", "sha256", "verdict"])] = where.pop(key)
    return content


def spoil_config(path: Path, rng: random.Random) -> None:
    """A configuration, signed again or not."""
    content = spoil_value(json.loads(path.read_text()), rng)
    if isinstance(content, dict) and rng.random() < 0.5:
        rewrite(path.parent, content)
    else:
        path.write_text(json.dumps(content))


def spoil_results(path: Path, rng: random.Random) -> None:
    """Results, each split sealed again or not."""
    content = spoil_value(json.loads(path.read_text()), rng)
    if isinstance(content, dict) and rng.random() < 0.7:
        content = {k: sealed(v) if isinstance(v, dict) else v for k, v in content.items()}
    path.write_text(json.dumps(content))


def spoil_tensor(value: torch.Tensor, rng: random.Random):
    """A tensor of another shape or type, or with other numbers."""
    return rng.choice([
        lambda: value[:0], lambda: torch.cat([value, value]) if value.dim() else value[None],
        lambda: value.double(), lambda: (value * 0).long(), lambda: value * torch.nan,
        lambda: value.flatten()[:3], lambda: torch.zeros(()), lambda: value + 100,
    ])()  # fmt: skip


def spoil_tensors(path: Path, rng: random.Random) -> None:
    """Tensors and the words about them, with a right checksum."""
    tensors, about = unpack_tensors(path)
    name = rng.choice([*tensors])
    how = rng.randrange(4)
    if how == 0:
        tensors.pop(name)
    elif how == 1:
        tensors["x"] = tensors.pop(name)
    elif how == 2 and about:
        about[rng.choice([*about])] = rng.choice(["", "x", "[1, 2]", "null", "1e999", "{}"])
    else:
        tensors[name] = spoil_tensor(tensors[name], rng)
    signed = rng.choice(["", path.name])
    path.write_bytes(pack_tensors({n: v.clone() for n, v in tensors.items()}, about, signed))


def spoil_checkpoint(path: Path, rng: random.Random) -> None:
    """A checkpoint whose state is that of no training, saved as one."""
    state = torch.load(path, weights_only=True)
    if rng.random() < 0.4:
        part = rng.choice(["weights", "best_state"])
        if state[part]:
            name = rng.choice([*state[part]])
            state[part][name] = spoil_tensor(state[part][name], rng)
    else:
        state = spoil_value(state, rng)
    torch.save(state, path)


def spoil_table(path: Path, rng: random.Random) -> None:
    """A table with another cell, or a line more or less."""
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    cells = lines[at].split(",")
    how = rng.randrange(4)
    if how == 0:
        lines.pop(at)
    elif how == 1:
        lines.insert(at, rng.choice([lines[at], "", "a,b", ",".join(["1"] * 50)]))
    else:
        cells[rng.randrange(len(cells))] = rng.choice(CELLS)
        lines[at] = ",".join(cells)
    path.write_text("\n".join(lines) + "\n")


def spoil_array(path: Path, rng: random.Random) -> None:
    """An array of another shape or type, or another member of an archive."""
    x = np.load("whole.npy")
    if path.suffix == ".npy":
        other = [x[0], x[None, None, None], x.astype(complex), x.astype("U3"), x[:2], x * np.nan,
                 x.astype(np.uint64) + 2**63, x[:, :0], x.astype(bool), np.array(3)]  # fmt: skip
        np.save(path, rng.choice(other))
        return
    members = {"x": x, "y": np.arange(len(x)) % 3}
    name = rng.choice([*members])
    how = rng.randrange(4)
    if how == 0:
        members["z"] = x
    elif how == 1:
        members[name] = members[name][: rng.randrange(len(x))]
    elif how == 2:
        members[name] = members[name].astype(rng.choice(["U3", "complex64", "float16", "M8[s]"]))
    buffer = io.BytesIO()
    np.savez(buffer, **members)
    path.write_bytes(buffer.getvalue())
    if how == 3:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(rng.choice(["a.txt", "x/y.npy", "../z.npy", "y.npy"]), b"foreign")


SPOILERS = {
    "config.json": spoil_config,
    "results.json": spoil_results,
    "checkpoint.pt": spoil_checkpoint,
    "weights.safetensors": spoil_tensors,
    "metrics.csv": spoil_table,
    "evaluation/test.safetensors": spoil_tensors,
    "evaluation/*.checkpoint": spoil_tensors,
    "x.csv": spoil_table,
    "x.npy": spoil_array,
    "x.npz": spoil_array,
}
