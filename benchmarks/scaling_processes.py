"""Training by one process and by several, of one thread each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

__all__ = ["processes"]

RANKS, BATCH, HIDDEN = (1, 2), 512, 1024
SMALL = 32, 64
# Epochs before the ones that are timed, and the steps of each: within 32 steps a compiled one is
# held against the eager one at times.
UNTIMED, STEPS = 9, 4


def processes(mode: str, rounds: int, small: bool) -> dict:
    """Milliseconds a step by so many ranks, compiled or eager, strong and weak.

    Returns:
        A row for each case: the median over rounds, in which cases take turns, of the median over
        epochs; and the efficiency: for a shared batch (strong) the time of one rank over ranks
        times their time, for as many rows a rank (weak) the time of one rank over theirs.
    """
    cases = [("one", 1), *((kind, n) for n in RANKS[1:] for kind in ("strong", "weak"))]
    times: dict[tuple, list[float]] = {case: [] for case in cases}
    for _ in range(max(1, rounds // 2)):
        for kind, ranks in cases:
            times[kind, ranks].append(_run(kind, mode, ranks, small))
    rows = []
    for (kind, ranks), each in times.items():
        alone = times["one", 1]
        share = ranks if kind == "strong" else 1
        rows.append({
            "scaling": kind, "step": mode, "ranks": ranks,
            "batch": _batch(kind, ranks, small), "ms": median(each),
            "efficiency": median(a / b for a, b in zip(alone, each, strict=True)) / share,
            "turns": each,
        })  # fmt: skip
    return {"networks": "784-{0}-{0}-50".format(SMALL[0] if small else HIDDEN), "rows": rows}


def _batch(kind: str, ranks: int, small: bool) -> int:
    batch = SMALL[1] if small else BATCH
    return batch * ranks if kind == "weak" else batch


def _run(kind: str, mode: str, ranks: int, small: bool) -> float:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        given = [str(_batch(kind, ranks, small)), mode, "small" if small else "large", str(out)]
        done = subprocess.run(
            [*start, str(Path(__file__).resolve()), *given],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{kind}, {mode}, {ranks} failed:\n{done.stderr}")
        return json.loads(out.read_text(encoding="utf-8"))


def train(batch: int, mode: str, size: str, out: Path) -> None:
    """Train as one rank, and write milliseconds a step: the median over epochs."""
    import torch

    import pyrovae
    from pyrovae._tools.seeding import seeded
    from pyrovae.guides.mean_field import MeanField
    from pyrovae.models.bernoulli import Bernoulli

    hidden = (SMALL[0] if size == "small" else HIDDEN,) * 2
    with seeded(0):
        x = (torch.rand(batch * STEPS, 784) < 0.3).float()
        pair = Bernoulli((784,), 50, hidden), MeanField((784,), 50, hidden)
    fit = pyrovae.fit(
        *pair, x, objective="trace_mean_field_elbo", epochs=UNTIMED + 2, batch_size=batch,
        compile=mode == "compiled", seed=0, progress=False,
    )  # fmt: skip
    if fit.world.first:
        seconds = [row["seconds"] for row in fit.history[UNTIMED:]]
        out.write_text(json.dumps(1e3 * median(seconds) / STEPS), encoding="utf-8")


if __name__ == "__main__":
    train(int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
