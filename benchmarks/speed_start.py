"""What a program costs before its first step: imports, compilation, memory.

    python benchmarks/speed_start.py CONTENDER cpu|cuda

measures one contender in a process of its own and prints JSON; :func:`measure` starts such
processes.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

__all__ = ["imports", "measure"]

STEPS = 20
COMPILED = ("compiled", "loss", "step")
LIKELIHOOD = "log p(x), "


def measure(names: list[str], device: str) -> list[dict]:
    """Seconds to the end of the first 20 steps, and peak memory, each in a fresh process."""
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as cache:
            cold = _in_process(name, device, cache)
            again = name.endswith(COMPILED) and "error" not in cold
            warm = _in_process(name, device, cache) if again else {}
        row = {"contender": name} | cold
        if warm:
            row["again, s"] = warm["first, s"]
        rows.append(row)
    return rows


def imports(modules: tuple[str, ...], rounds: int) -> dict[str, float]:
    """Seconds to import each, in fresh processes that take turns; the median."""
    found: dict[str, list[float]] = {module: [] for module in modules}
    code = "import time; s = time.perf_counter(); import {}; print(time.perf_counter() - s)"
    for _ in range(rounds):
        for module, seconds in found.items():
            seconds.append(float(_output([sys.executable, "-c", code.format(module)])))
    return {module: median(seconds) for module, seconds in found.items()}


def _in_process(name: str, device: str, cache: str) -> dict:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
    command = [sys.executable, str(Path(__file__).resolve()), name, device]
    return json.loads(_output(command, env=environment).splitlines()[-1])


def _output(command: list[str], **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def _first_steps(name: str, device: str) -> dict:
    import torch
    from speed_contenders import enter
    from speed_problem import IMAGES, Problem, make_images
    from speed_race import synchronize

    problem, images = Problem("784-400-20", 128, device=device), make_images(device)
    index = torch.randint(IMAGES, (STEPS, problem.batch), device=device)
    before, started = _peak(device), time.perf_counter()
    races, absent = enter([name], problem, images)
    if absent:
        return {"error": absent[name]}
    races[name](index)
    synchronize()
    return {
        "first, s": time.perf_counter() - started,
        "before, MiB": before,
        "peak, MiB": _peak(device),
    }


def _log_likelihood(name: str, device: str) -> dict:
    from speed_likelihood import K, estimate
    from speed_problem import Problem, make_images

    problem, images = Problem("784-400-20", 128, device=device), make_images(device)
    before, started = _peak(device), time.perf_counter()
    estimate(problem, images[: int(name.removeprefix(LIKELIHOOD).split()[0])], K)
    return {
        "first, s": time.perf_counter() - started,
        "before, MiB": before,
        "peak, MiB": _peak(device),
    }


def _peak(device: str) -> float:
    """The most memory so far: of the process, or of its tensors on the GPU."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    name, device = sys.argv[1:]
    run = _log_likelihood if name.startswith(LIKELIHOOD) else _first_steps
    print(json.dumps(run(name, device)))
