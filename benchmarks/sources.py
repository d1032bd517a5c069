"""Data larger than memory: the time of an epoch from disk, memory, and when evaluation begins.

    python benchmarks/sources.py [--parts epochs memory first] [--rows N] [--rounds 3]

An epoch of `gaussian` x `mean_field` over rows of 100 numbers, from a .npy file, a Parquet file and
a Zarr array on disk, half of whose rows memory= allows, each in turns with the same rows in memory;
before an epoch that is called cold, the file's pages are taken out of the system's cache. The peak
of memory (what the system calls the maximum resident set) of a process that trains on a memmap of
20 million rows, for several values of memory=, less that of the same process on 8,192 rows, in
batches of the same size. How long `pyrovae evaluate` takes on 400,000 rows until its bar shows, and
until the first data are done. Needs 8 GB of disk in --folder.
Writes results/sources.json; epochs of other sources and sizes stay in it.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import subprocess
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import torch
from tables import machine, show, write

import pyrovae
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.gaussian import Gaussian
from pyrovae.training.loop import _train
from pyrovae.training.monitor import Fit

HOME = Path(__file__).resolve().parent
RESULTS = HOME / "results" / "sources.json"
WIDTH, BATCH = 100, 512
# Two batches of the memmap's, whose activations are memory too.
FEW = 8192
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", default=["epochs", "memory", "first"])
    parser.add_argument("--rows", type=int, default=2_000_000, help="of an epoch")
    parser.add_argument("--many", type=int, default=20_000_000, help="rows of the memmap")
    parser.add_argument("--width", type=int, default=16, help="columns of the memmap")
    parser.add_argument("--sources", nargs="+", default=[*SAVERS], help="of an epoch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print(json.dumps(peak(Path(options.peak_of[0]), float(options.peak_of[1]))))
        return
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for part in options.parts:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            options.temporary = Path(folder)
            rows = {"epochs": epochs, "memory": memory, "first": first}[part](options)
            for row in rows:
                show([row], ".3f")
            if part == "epochs":
                known = [*results.get(part, {}).get("rows", ()), *rows]
                of = {(-row["rows"], row["source"]): row for row in known}
                rows = [of[key] for key in sorted(of)]
            results = results | {part: {"about": machine(), "rows": rows}}
            write(RESULTS, results)


def epochs(options) -> list[dict]:
    """The time of an epoch from each source, in turns with one of the same rows in memory."""
    x = np.random.default_rng(0).normal(size=(options.rows, WIDTH)).astype(np.float32)
    rows, in_memory = [], None
    for name in options.sources:
        save = SAVERS[name]
        path = options.temporary / f"x.{name}"
        save(path, x)
        start = time.perf_counter(), time.process_time()
        gib = x.nbytes / GIB / 2
        data = pyrovae.load_data(path, memory=gib)
        took = time.perf_counter() - start[0], time.process_time() - start[1]
        if data.disk is None:
            raise SystemExit(f"{path.name} was read into memory")
        row = {"source": f".{name}", "rows": len(x), "columns": WIDTH, "batch": BATCH}
        row |= {"memory=, GiB": gib, "file GB": _size(path) / 1e9}
        row |= {"load_data, s": took[0], "load_data, CPU s": took[1]}
        held = pyrovae.Dataset("x", data.shape, torch.from_numpy(x[: len(data.train)]))
        lone = pyrovae.Dataset("x", data.shape, data.train, disk=data.disk)
        in_memory = in_memory or (_fitted(held), held)
        ways = {"disk": (_fitted(lone), lone), "memory": in_memory}
        ways |= {"cold disk": ways["disk"]} if name == "npy" else {}
        found = {how: [] for how in ways}
        for round in range(options.rounds):
            for how, (fit, source) in ways.items():
                if how == "cold disk":
                    with path.open("rb") as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                found[how].append(_epoch(fit, source, 3 + round))
        for how, times in found.items():
            row |= {f"{how}, s": [t[0] for t in times], f"{how}, CPU s": [t[1] for t in times]}
        for i, kind in enumerate(("time", "CPU")):
            for how in found.keys() - {"memory"}:
                pairs = zip(found[how], found["memory"], strict=True)
                row[f"{how} / memory, {kind}"] = median(one[i] / two[i] for one, two in pairs)
        rows.append(row)
    return rows


def _npy(path: Path, x: np.ndarray) -> None:
    np.save(path, x)


def _parquet(path: Path, x: np.ndarray) -> None:
    frame = pd.DataFrame(x, columns=[f"c{j}" for j in range(x.shape[1])])
    frame.to_parquet(path, row_group_size=100_000)


def _zarr(path: Path, x: np.ndarray) -> None:
    import zarr

    root = zarr.create_array(path, shape=x.shape, chunks=(10_000, WIDTH), dtype=x.dtype)
    root[:] = x


SAVERS = {"npy": _npy, "parquet": _parquet, "zarr": _zarr}


def _size(path: Path) -> int:
    parts = path.rglob("*") if path.is_dir() else [path]
    return sum(part.stat().st_size for part in parts if part.is_file())


def _fitted(data: pyrovae.Dataset) -> Fit:
    """A training of two epochs, after which steps on these data are compiled."""
    torch.manual_seed(0)
    pair = Gaussian((WIDTH,), latent=20), MeanField((WIDTH,), latent=20)
    fit = pyrovae.fit(*pair, data, epochs=1, batch_size=BATCH, compile=True, seed=0, progress=False)
    # The loop of fit() is another caller of the compiled step, which is compiled for each.
    _train(fit, data, BATCH, 2)
    return fit


def _epoch(fit: Fit, data: pyrovae.Dataset, epoch: int) -> tuple[float, float]:
    """Seconds and processor seconds, of all threads, of one more epoch."""
    start = time.perf_counter(), time.process_time()
    _train(fit, data, BATCH, epoch)
    return time.perf_counter() - start[0], time.process_time() - start[1]


def memory(options) -> list[dict]:
    """The peak of resident memory of a training on many rows, by what memory= allows."""
    few, many = options.temporary / "few.npy", options.temporary / "many.npy"
    for path, count in ((few, FEW), (many, options.many)):
        shape = (count, options.width)
        array = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        rng = np.random.default_rng(0)
        for start in range(0, count, 10**5):
            stop = min(count, start + 10**5)
            array[start:stop] = rng.random((stop - start, options.width), np.float32)
        del array
    asked = [(few, 1e-6), (many, 0.125), (many, 0.5)]
    found = []
    for path, gib in asked:
        command = [sys.executable, __file__, "--peak-of", str(path), str(gib)]
        told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        found.append(json.loads(told.splitlines()[-1]))
    base, *peaks = found
    rows = []
    for (_, gib), peak in zip(asked[1:], peaks, strict=True):
        row = {"rows": options.many, "columns": options.width}
        row |= {"file GiB": many.stat().st_size / GIB, "memory=, GiB": gib}
        for name, bytes in peak.items():
            row |= {f"{name}, GiB": bytes / GIB, f"of {FEW:,} rows, {name}, GiB": base[name] / GIB}
        row["difference, GiB"] = (peak["VmHWM"] - base["VmHWM"]) / GIB
        row["order of an epoch, GiB"] = 8 * options.many / GIB
        rows.append(row)
    return rows


def peak(path: Path, gib: float) -> dict[str, int]:
    """Train for an epoch, and tell the largest resident memory: all, anonymous, and of files."""
    found, ended = {"RssAnon": 0, "RssFile": 0}, threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            found.update({name: max(most, _resident(name)) for name, most in found.items()})

    watching = threading.Thread(target=watch)
    watching.start()
    data = pyrovae.load_data(path, memory=gib)
    how = {"latent": 4, "hidden": (32,)}
    pair = Gaussian(data.shape, **how), MeanField(data.shape, **how)
    size = min(len(data.train), 4096)
    pyrovae.fit(*pair, data, epochs=1, batch_size=size, compile=False, seed=0, progress=False)
    ended.set()
    watching.join()
    # Not ru_maxrss, in which a process begins with the peak of the one that started it.
    return {"VmHWM": _resident("VmHWM"), **found}


def _resident(name: str) -> int:
    """Bytes of resident memory, as Linux has them under this name."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", status)[1])


def first(options) -> list[dict]:
    """Seconds until an evaluation shows its bar, and until its first data are done."""
    folder, count = options.temporary, 400_000
    x = np.random.default_rng(0).normal(size=(count, WIDTH)).astype(np.float32)
    np.savez(folder / "x.npz", x_train=x[:2000], x_valid=x[:1000], x_test=x)
    pyrovae_ = [sys.executable, "-m", "pyrovae"]
    pair = ["--model", "gaussian", "--guide", "mean_field", "--epochs", "1"]
    out = str(folder / "run")
    train = [*pyrovae_, "train", *pair, "--data", str(folder / "x.npz"), "--out", out]
    subprocess.run(train, check=True, capture_output=True)
    names = ("bar, s", "bar, CPU s", "first data, s", "first data, CPU s")
    command = [*pyrovae_, "evaluate", out, "--samples", "1000"]
    found = [_watch(command) for _ in range(options.rounds)]
    return [{"rows": count, **dict(zip(names, each, strict=True))} for each in found]


def _watch(command: list[str]) -> list[float]:
    """Start a command on a terminal, stop it when its bar has moved, and tell when what was."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))  # a bar without a width is not drawn
    start, text, found = time.perf_counter(), "", []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs)
    try:
        while len(found) < 4:
            text += os.read(ours, 4096).decode(errors="replace")
            done = [int(n) for n in re.findall(r"log p\(x\).*?(\d+)/\d+", text)]
            if (not found and done) or (found and any(done)):
                fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
                # Of the process and of its children that have ended, in clock ticks.
                ticks = sum(map(int, fields[11:15]))
                found += [time.perf_counter() - start, ticks / os.sysconf("SC_CLK_TCK")]
        return found
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)


if __name__ == "__main__":
    main()
