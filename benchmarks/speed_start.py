"""What a program costs before its first step: imports, compilation, memory.

    python benchmarks/speed_start.py CONTENDER cpu|cuda

measures one contender in a process of its own and prints JSON; :func:`measure` starts such
processes. With the name ``phases``, where the start of a compiled step goes: seconds by the clock,
and seconds of processor time in the process and in the compilers that it starts. In ``phases
eager`` the step is not compiled.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

__all__ = ["imports", "measure", "phases"]

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


def phases(rounds: int, device: str) -> list[dict]:
    """By phase of the first 40 steps, medians over fresh processes that take turns.

    Of each round the first process has an empty compiler cache, the second what that left behind,
    and the third runs eagerly.
    """
    kinds: dict[str, list[dict]] = {"empty cache": [], "compiled before": [], "eager": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for kind, found in kinds.items():
                name = "phases eager" if kind == "eager" else "phases"
                found.append(_in_process(name, device, cache))
    return [
        {"start": kind} | {n: [median(t) for t in zip(*(f[n] for f in found), strict=True)]
                           for n in found[0]}
        for kind, found in kinds.items()
    ]  # fmt: skip


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


def _phases(name: str, device: str) -> dict[str, list[float]]:
    import torch
    from speed_problem import IMAGES, Problem, make_images
    from speed_pyro import ours

    import pyrovae.compiling.graph
    import pyrovae.compiling.step

    problem, images = Problem("784-400-20", 128, device=device), make_images(device)
    index = torch.randint(IMAGES, (2 * STEPS, problem.batch), device=device)
    run = ours(problem, images, compile=name == "phases")
    found: dict[str, list[float]] = {}
    run(index[:1])
    with _added(found, "in all"):
        if name == "phases":
            with _added(found, "import of Inductor"):
                import torch._inductor.compile_fx
            graph, capture = pyrovae.compiling.graph, pyrovae.compiling.step.Capture
            _watch(graph, "record", found, "recording")
            _watch(graph, "_compile", found, "Inductor and C++ compiler")
            _watch(capture, "_audit", found, "audits")
        run(index[1:])
    with _added(found, f"{STEPS} steps afterwards"):
        run(index[:STEPS])
    return found


def _watch(owner: object, name: str, found: dict[str, list[float]], phase: str) -> None:
    function = getattr(owner, name)

    def watched(*args: object) -> object:
        with _added(found, phase):
            return function(*args)

    setattr(owner, name, watched)


@contextmanager
def _added(found: dict[str, list[float]], phase: str) -> Iterator[None]:
    """Add to a phase what a block takes: by the clock, here, in processes started here."""
    before = _times()
    yield
    spent = [now - then for now, then in zip(_times(), before, strict=True)]
    found[phase] = [a + b for a, b in zip(found.get(phase, [0.0] * 3), spent, strict=True)]


def _times() -> list[float]:
    kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    used = [each.ru_utime + each.ru_stime for each in map(resource.getrusage, kinds)]
    return [time.perf_counter(), *used]


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
    measured = {LIKELIHOOD: _log_likelihood, "phases": _phases}
    run = next((run for n, run in measured.items() if name.startswith(n)), _first_steps)
    print(json.dumps(run(name, device)))
