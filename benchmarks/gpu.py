"""All that a GPU has to show, in parts of at most ten minutes each.

    PYROVAE_DATA=folder python benchmarks/gpu.py [--device cuda] [--only PART ...] [--out FOLDER]

Each part is a process of its own with a time limit, prints as it goes and leaves what it has
measured when it is stopped: what the host waits for in an epoch, the time of training steps and to
log p(x), each test on the device for all pairs, and, longest and last, rows of the table of the
literature. A part that has ended well is left on a second call, so that fifteen minutes do what
fits into them. gpu.json in the folder says how each ended.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from tables import machine, show, write
from torch.profiler import ProfilerActivity, profile

import pyrovae
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.bernoulli import Bernoulli

HERE = Path(__file__).resolve().parent
# Below the ten minutes after which a command may be ended from outside, before it has written.
LIMIT = 540
STEPS = "steps/784-400-20/128", "steps/784-200-200-50/20", "steps/784-200-200-50/1000"
# What makes a host wait for a GPU, by the names that torch's profiler gives it.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::item")
# Triton's kernels are launched by the driver.
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel")
ROWS = ("vae", "gated-vae", "iwae-50")
TESTS = HERE.parent / "tests" / "device" / "test_on_device.py"


def main() -> None:
    options = _options().parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.epoch:
        return write(options.out / "epoch.json", epoch(options.device, options.small))
    record = options.out / "gpu.json"
    ended = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    about = machine() | {"device": _named(options.device)}
    for name, command in parts(options).items():
        if options.only and name not in options.only:
            continue
        if ended.get(name, {}).get("ended") == "well":
            continue
        print(f"\n{name}: {' '.join(map(str, command))}", flush=True)
        started = time.perf_counter()
        ended[name] = {"ended": _run(command, options.limit)}
        ended[name] |= {"seconds": time.perf_counter() - started, "machine": about}
        write(record, ended)
    show([{"part": n, "ended": e["ended"], "s": e["seconds"]} for n, e in ended.items()], ".0f")
    return None


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--only", nargs="+", metavar="PART")
    parser.add_argument("--out", type=Path, default=HERE.parent / "runs" / "gpu")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for each part")
    parser.add_argument("--small", action="store_true", help="a trial of every part, in a minute")
    parser.add_argument("--epoch", action="store_true", help=argparse.SUPPRESS)
    return parser


def parts(options: argparse.Namespace) -> dict[str, list]:
    """The command of each part by name."""
    python, device, small = sys.executable, options.device, options.small
    tests = [python, "-m", "pytest", "-q", "-m", "gpu", "--device", device, TESTS]
    names = re.findall(r"^def (test_\w+)", TESTS.read_text(encoding="utf-8"), re.M)
    speed = [python, HERE / "speed.py", "--device", device, "--resume"]
    sizes = STEPS[: 1 if small else len(STEPS)]
    speed += ["--out", options.out / "speed.json", "--figure", options.out / "speed.png"]
    rows = [python, HERE / "literature.py", "--device", device]
    rows += ["--runs", options.out / "literature", "--out", options.out / "literature.json"]
    itself = [python, HERE / "gpu.py", "--epoch", "--device", device, "--out", options.out]
    trial = ["--small", "--epochs", "1", "--test", "4", "--samples", "8", "--images", "2"]
    trial += ["--simulated", "2", "--chains", "2", "--temperatures", "2"]
    return {
        "epoch": [*itself, *(["--small"] if small else [])],
        "steps": [*speed, "--rounds", "1" if small else "10", "--only", *sizes],
        "log p(x)": [*speed, "--rounds", "4", "--only", "import" if small else "likelihood"],
        **{
            f"tests, {name}": [*tests, "-k", f"{name} and linear" if small else name]
            for name in (names[:1] if small else names)
        },
        **{
            f"literature, {row}, seed {seed}": [
                *rows, "--only", row, "--seed", str(seed), *(trial if small else []),
            ]
            for row in (ROWS[:1] if small else ROWS)
            for seed in range(1 if small else 3)
        },
    }  # fmt: skip


def epoch(device: str, small: bool) -> dict:
    """A compiled training: who waits, and how often, by a profile of its second epoch."""
    count, batch = (256, 64) if small else (50_000, 128)
    x = (torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    model, guide = Bernoulli((1, 28, 28), 20), MeanField((1, 28, 28), 20)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    seen = profile(activities=kinds, acc_events=True)

    def between(fit: pyrovae.Fit) -> None:
        {1: seen.start, 2: seen.stop}.get(len(fit.history), lambda: None)()

    found = pyrovae.fit(
        model, guide, x, epochs=4, batch_size=batch, compile=True, device=device, seed=0,
        on_epoch=between,
    )  # fmt: skip
    counts = {event.key: event.count for event in seen.key_averages()}
    steps, last = -(-count // batch), found.history[-1]
    return {
        "steps": steps,
        "ms a step": 1e3 * last["seconds"] / steps,
        "waits": {name: counts.get(name, 0) for name in WAITS},
        "CUDA graphs launched": counts.get("cudaGraphLaunch", 0),
        "kernels launched": sum(n for key, n in counts.items() if key.startswith(LAUNCHES)),
    }


def _run(command: Iterable, limit: float) -> str:
    """How a command ended."""
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    how: dict = {"env": environment, "cwd": HERE.parent, "start_new_session": True}
    with subprocess.Popen([*map(str, command)], **how) as process:
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            return f"stopped after {limit:g} s"
    return "well" if code == 0 else f"with code {code}"


def _named(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


if __name__ == "__main__":
    main()
