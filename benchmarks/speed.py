"""Time of a training step, and of log p(x), against everything else that computes the same.

    python benchmarks/speed.py [--device cpu|cuda] [--rounds 10] [--threads 2] [--only steps ...]

Every contender goes from uint8 images to updated weights: gather, binarize, estimator B, Adam at
1e-3. All are first trained from the same weights and must reach the same loss; then they take
turns, and a ratio is the median over rounds of two turns of one round, so that what else the
machine does falls on all alike. NumPyro and Pythae take part where they are installed. Each
section is written to results/speed.json when it is finished; --resume leaves those that stand
there under the same conditions. Draws docs/figures/speed.png.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from speed_contenders import BEST, FLOOR, OURS, variants
from speed_figure import draw
from speed_fit import fits
from speed_fit import sizes as trained
from speed_likelihood import crews, likelihood
from speed_likelihood_race import precisions, race
from speed_problem import Problem, make_images
from speed_pyro import audit
from speed_race import compare, floor_of, ratio
from speed_start import imports, measure, phases
from speed_sweeps import SIZES, SWEEPS, sweep
from tables import machine, show, write

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "speed.json"
FIGURE = HERE.parent / "docs" / "figures" / "speed.png"
IMAGES = {"cpu": 1024, "cuda": 10_000}
STARTED = [f"{BEST}: loss", f"{BEST}: step", "Pyro SVI", "Pyro SVI, JIT", "NumPyro, jit", OURS]
BOUNDED = ["log p(x), 64 images", "log p(x), 256 images"]
RIVALS = ("hand-written", BEST, "Pyro SVI", "Pyro SVI, JIT", "NumPyro, jit", "Pythae", FLOOR)


def main() -> None:
    options = parse()
    use_cores(options.threads)
    about, images = conditions(options), make_images(options.device)
    results = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    found = results.setdefault(options.device, {})
    planned = sections(options, images)
    for name, run in planned.items():
        if options.only and not name.startswith(tuple(options.only)):
            continue
        if options.resume and found.get(name, {}).get("about") == about:
            continue
        print(f"\n{name}", flush=True)
        started = time.perf_counter()
        section = run()
        found[name] = {"about": about, "took, s": time.perf_counter() - started} | section
        found = results[options.device] = {n: found[n] for n in (*planned, *found) if n in found}
        write(options.out, results)
    draw(found, options.figure)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="+", help="the beginnings of the sections' names")
    parser.add_argument("--resume", action="store_true", help="leave what is already measured")
    parser.add_argument("--images", type=int, help="how many for log p(x), scaled to 10,000")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args()
    options.images = options.images or IMAGES[options.device]
    return options


def use_cores(threads: int) -> None:
    """Keep every library to so many cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)


def conditions(options: argparse.Namespace) -> dict:
    """Where and how the numbers are measured, and with what."""
    about = machine() | {"rounds": options.rounds, "dtype": "float32"}
    for name in ("numpyro", "jax", "pythae"):
        try:
            about["versions"][name] = version(name)
        except PackageNotFoundError:
            about["versions"][name] = "not installed"
    if options.device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    return about


def sections(options: argparse.Namespace, images: torch.Tensor) -> dict[str, Callable[[], dict]]:
    """What can be measured, by name."""
    device, rounds = options.device, options.rounds
    fewer = max(2, rounds // 2)
    base, known = Problem("784-400-20", 128, device=device), {}
    sizes = {
        f"steps/{networks}/{batch}": Problem(networks, batch, device=device)
        for networks, batch in SIZES
    }
    return {
        **{name: lambda p=p: steps(p, images, rounds, known) for name, p in sizes.items()},
        **{
            f"fit/{options.threads}/{p.networks}/{p.batch}/{'drawn' if p.binarize else 'as is'}": (
                lambda p=p: fits(p, images, rounds)
            )
            for p in trained(device)
        },
        **{f"sweep/{n}": lambda n=n: swept(n, images, device, fewer, known) for n in SWEEPS},
        **{
            f"likelihood/{p.networks}": lambda p=p: likelihood(p, images[: options.images], fewer)
            for p in (base, Problem("784-200-200-50", 100, device=device))
        },
        **({"crew": lambda: crews(base, images[:128], fewer)} if device == "cpu" else {}),
        **{
            f"rivals/{p.networks}": lambda p=p: race(p, images[:320], max(3, rounds // 2))
            for p in (base, Problem("784-200-200-50", 100, device=device))
        },
        "precision/784-400-20": lambda: precisions(base),
        "start": lambda: {"rows": measure(STARTED + BOUNDED, device)},
        "phases": lambda: {"rows": phases(max(1, rounds // 4), device)},
        "import": lambda: {"seconds to import": imports(("pyro", "pyrovae"), fewer)},
    }


def steps(problem: Problem, images: torch.Tensor, rounds: int, known: dict) -> dict:
    """One size of the table: times, and ratios to each rival."""
    found = known[problem] = compare(variants(problem.device), problem, images, rounds)
    show([{"contender": n, "ms": row["ms"]} for n, row in found.items() if "ms" in row], ".2f")
    ratios = {f"{OURS} / {rival}": ratio(found, OURS, rival) for rival in RIVALS}
    ratios["pyrovae, eager / hand-written"] = ratio(found, "pyrovae, eager", "hand-written")
    size = {"networks": problem.networks, "batch": problem.batch}
    checks = {"audit, ms": audit(problem, images)}
    return (
        size | {"contenders": found, "ratios": ratios, "floor": floor_of(problem, images)} | checks
    )


def swept(name: str, images: torch.Tensor, device: str, rounds: int, known: dict) -> dict:
    """One sweep, and the ratio at each of its points."""
    rows = sweep(name, images, device, rounds, known)
    times = [
        {name: row[name]} | {c: found["ms"] for c, found in row.items() if isinstance(found, dict)}
        for row in rows
    ]
    show(times, ".2f")
    return {"rows": [row | {"ratio": ratio(row, OURS, BEST)} for row in rows]}


if __name__ == "__main__":
    main()
