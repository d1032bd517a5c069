"""Time and memory as the work grows: one size at a time, and shared among processes.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--rounds 5] [--only "data N" width ...]

Each point of a sweep is warmed up, which compiles it, and timed by CPU seconds, the median over
rounds. Memory is counted: the tensors that a step holds (data, weights, moments) and the most that
it allocates beside them. An exponent is the slope of a line through the logarithms, over all points
and over the larger half of them. Processes are ranks of one thread each, started by torchrun, that
train by `fit`: the same batch shared by all (strong), or as many rows for each (weak). Writes
results/scaling.json and docs/figures/scaling.png; what is not asked for stays as it is there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import quantiles

from scaling_figure import draw
from scaling_processes import processes
from scaling_sweeps import SWEEPS, Sweep, Task
from tables import machine, show, write
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "scaling.json"
FIGURE = HERE.parent / "docs" / "figures" / "scaling.png"
PROCESSES = {f"processes, {mode}": mode for mode in ("eager", "compiled")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=(*SWEEPS, *PROCESSES))
    parser.add_argument("--smallest", action="store_true", help="two values of each, a trial")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args()
    results = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    for name in options.only or (*SWEEPS, *PROCESSES):
        started = time.process_time(), time.perf_counter()
        if name in PROCESSES:
            found = processes(PROCESSES[name], options.rounds, options.smallest)
        else:
            sweep = SWEEPS[name]
            values = sweep.values[: 2 if options.smallest else None]
            found = measured(sweep._replace(values=values), options.rounds)
        print(f"\n{name}", flush=True)
        show(found["rows"], ".4g")
        took = {"CPU": time.process_time() - started[0], "wall": time.perf_counter() - started[1]}
        results[name] = {"about": machine() | {"rounds": options.rounds}, "took, s": took} | found
        write(options.out, results)
    draw(results, options.figure)


def measured(sweep: Sweep, rounds: int) -> dict:
    """A row for each value and contender, and the exponents of time and memory."""
    rows = []
    for value in sweep.values:
        tasks = dict(sweep.tasks(value))
        for task in tasks.values():
            # The first step makes the optimizer, the second is compiled.
            task.run()
            task.run()
        times = {name: [] for name in tasks}
        for _ in range(rounds):
            for name, task in tasks.items():
                times[name].append(1e3 * cpu_seconds(task.run) / task.steps)
        for name, each in times.items():
            low, middle, high = quantiles(each, n=4)
            rows.append({
                "value": value, "contender": name, "ms": middle, "low": low, "high": high,
                "MiB": peak_bytes(tasks[name]) / 2**20, "turns": each,
            })  # fmt: skip
    found: dict = {"unit": sweep.unit, "rows": rows, "exponents": {}}
    for name in dict.fromkeys(row["contender"] for row in rows):
        own = [row for row in rows if row["contender"] == name]
        for what in ("ms", "MiB"):
            points = [(row["value"], row[what]) for row in own]
            found["exponents"][f"{name}, {what}"] = {
                "all": slope(points), "larger half": slope(points[-max(2, len(points) // 2) :]),
            }  # fmt: skip
    return found


def cpu_seconds(run: Callable[[], object]) -> float:
    """The CPU time of all threads."""
    started = time.process_time()
    run()
    return time.process_time() - started


def slope(points: Iterable[tuple[float, float]]) -> float:
    """The exponent: of a line through logarithms, by least squares."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    centre = [sum(each) / len(logs) for each in zip(*logs, strict=True)]
    above = sum((x - centre[0]) * (y - centre[1]) for x, y in logs)
    return above / sum((x - centre[0]) ** 2 for x, _ in logs)


def peak_bytes(task: Task) -> int:
    """What the task's tensors take, and the most that a run of it allocates beside them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        (task.alike or task.run)()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most + held_bytes(task.held())


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of the storages that tensors lie in."""
    found = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}
    return sum(storage.nbytes() for storage in found.values())


if __name__ == "__main__":
    main()
