"""What the documents quote from results/speed.json: one block for each device measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tables import markdown

__all__ = ["TABLES"]

RESULTS = Path(__file__).resolve().parent / "results" / "speed.json"
BEST, OURS, FLOOR = "hand-written, compiled", "pyrovae, compiled", "matrix products alone"
COLUMNS = {
    "hand-written": "by hand",
    BEST: "by hand, compiled",
    "Pyro SVI": "Pyro SVI",
    "Pyro SVI, JIT": "Pyro SVI, JIT",
    "NumPyro, jit": "NumPyro, jit",
    "Pythae": "Pythae",
    "pyrovae, eager": "pyrovae, eager",
    OURS: "pyrovae, compiled",
    FLOOR: "products alone",
}
RATIOS = {
    f"{OURS} / {BEST}": ("compiled / by hand, compiled", "1.0"),
    f"{OURS} / hand-written": ("compiled / by hand", "0.6"),
    f"{OURS} / Pyro SVI": ("compiled / Pyro SVI", "0.4"),
    f"{OURS} / NumPyro, jit": ("compiled / NumPyro, jit", "1.0"),
    "pyrovae, eager / hand-written": ("eager / by hand", "1.15"),
    f"{OURS} / {FLOOR}": ("compiled / products alone", "–"),
}
FITTED = {
    "fit": "`fit`",
    "NumPyro, jit": "NumPyro, whole epochs",
    f"{BEST}: step": "by hand, compiled",
    "Pyro SVI": "Pyro SVI",
    "fit, eager": "`fit`, eager",
    OURS: "`SVI.update`",
    "pyrovae, the graph alone": "its graph alone",
}
AIMS = {
    "NumPyro, jit": "≤ 0.95", f"{BEST}: step": "≤ 0.95",
    "pyrovae, the graph alone": "≤ 1.05",
}  # fmt: skip
SWEPT = ("hand-written", BEST, "Pyro SVI", "pyrovae, eager", OURS)


def speed() -> str:
    """Milliseconds a step, and the rate of the floor."""

    def block(found: dict) -> tuple[list[str], list[list[str]]]:
        sizes = _sizes(found)
        names = [n for n in COLUMNS if any(n in s["contenders"] for s in sizes)]
        head = ["networks, batch", *(COLUMNS[n] for n in names), "GFLOP/s of products"]
        body = [
            [_size(size), *(_milliseconds(size["contenders"].get(n)) for n in names), _rate(size)]
            for size in sizes
        ]
        return head, body

    return _blocks("steps/", block)


def speed_ratios() -> str:
    """What was asked for, and what is measured."""

    def block(found: dict) -> tuple[list[str], list[list[str]]]:
        head = ["networks, batch", *(title for title, _ in RATIOS.values()), "checks add"]
        aims = ["aim", *("≤ " * (aim != "–") + aim for _, aim in RATIOS.values()), "–"]
        body = [
            [_size(size), *(_ratio(size["ratios"].get(name)) for name in RATIOS), _checks(size)]
            for size in _sizes(found)
        ]
        return head, [aims, *body]

    return _blocks("steps/", block)


def speed_fit() -> str:
    """CPU milliseconds a step of an epoch of ``fit`` beside whatever else trains the same."""

    def row(part: dict) -> list[str]:
        pixels = "drawn anew" if part["binarize"] else "as they are"
        found = (part["contenders"].get(name) for name in FITTED)
        each = ("–" if row is None else f"{row['cpu, ms']:#.3g}" for row in found)
        return [_size(part), pixels, *each]

    head = ["networks, batch", "pixels", *FITTED.values()]
    return _by_threads(lambda found: (head, [row(part) for part in found]))


def speed_fit_ratios() -> str:
    """The CPU time of an epoch of ``fit`` over that of each other, and wall-clock times."""

    def row(part: dict) -> list[str]:
        pixels = "drawn anew" if part["binarize"] else "as they are"
        wall, cpu = part["ratios"], part["ratios of CPU time"]
        each = []
        for name in (f"fit / {other}" for other in others):
            if name not in cpu:
                each.append("–")
                continue
            middle, low, high = cpu[name]
            each.append(f"{middle:.2f} ({low:.2f} to {high:.2f}), {wall[name][0]:.2f}")
        return [_size(part), pixels, *each]

    others = [name for name in FITTED if name != "fit"]
    head = ["networks, batch", "pixels", *(f"`fit` / {FITTED[name]}" for name in others)]
    aims = ["aim", "", *(AIMS.get(name, "–") for name in others)]
    return _by_threads(lambda found: (head, [aims, *(row(part) for part in found)]))


def _by_threads(block: Callable[[list[dict]], tuple[list[str], list[list[str]]]]) -> str:
    """A block for each number of threads with which epochs are timed."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    threads = {n.split("/")[1] for f in results.values() for n in f if n.startswith("fit/")}
    return "\n\n".join(
        _blocks(start, lambda f, s=start: block([p for n, p in f.items() if n.startswith(s)]))
        for start in (f"fit/{each}/" for each in sorted(threads, key=int, reverse=True))
    )


def speed_sweeps() -> str:
    """Milliseconds a step of 784-400-20 as one size is varied."""

    def block(found: dict) -> tuple[list[str], list[list[str]]]:
        head = ["varied", *(COLUMNS[name] for name in SWEPT), "compiled / by hand, compiled"]
        body = []
        for name, section in found.items():
            if name.startswith("sweep/"):
                varied = name.removeprefix("sweep/")
                body += [
                    [
                        f"{varied} {row[varied]}",
                        *(_milliseconds(row.get(contender)) for contender in SWEPT),
                        _ratio(row["ratio"]),
                    ]
                    for row in section["rows"]
                ]
        return head, body

    return _blocks("sweep/", block)


def speed_likelihood() -> str:
    """Seconds to log p(x) of 10,000 images."""

    def block(found: dict) -> tuple[list[str], list[list[str]]]:
        parts = {n.partition("/")[2]: p for n, p in found.items() if n.startswith("likelihood/")}
        rows = {
            "`log_likelihood`, s": lambda p: f"{p['seconds']:.4g}",
            "of it capture and compilation, s": lambda p: f"{max(0.0, p['seconds fixed']):.2g}",
            "products alone, s": lambda p: f"{p['seconds of products']:.4g}",
            "products alone, GFLOP/s": lambda p: f"{p['gigaflop/s of products']:.0f}",
            "measured on so many images": lambda p: f"{p['images']:,}",
            "ratio (aim ≤ 1.25)": lambda p: f"{p['ratio']:.2f}",
        }
        head = ["log p(x), K = 5000, of 10,000 images", *parts]
        return head, [[label, *map(cell, parts.values())] for label, cell in rows.items()]

    return _blocks("likelihood", block)


def speed_crew() -> str:
    """Milliseconds of an image's log p(x), by a thread for each tile and by all for one."""

    def block(found: dict) -> tuple[list[str], list[list[str]]]:
        ways = "a tile a thread", "tile by tile"
        head = ["ms an image, 784-400-20, K = 5000", *ways, "ratio"]
        rows = found["crew"]["rows"].items()
        return head, [
            [name, *(f"{row[way]:.1f}" for way in ways), f"{row['ratio']:.2f}"]
            for name, row in rows
        ]

    return _blocks("crew", block)


def speed_rivals() -> str:
    """Milliseconds of an image's log p(x), by contender, and the ratios to each."""

    def block(found: dict) -> tuple[list[str], list[list[str]]]:
        parts = [p for n, p in found.items() if n.startswith("rivals/")]
        names = list(parts[0]["contenders"])
        networks = [n.partition("/")[2] for n in found if n.startswith("rivals/")]
        head = ["log p(x), K = 5000", *(f"{n}: ms an image (CPU ms)" for n in networks)]
        head += [f"{n}: time of ours over it (CPU time)" for n in networks]
        ours = names[0]
        body = []
        for name in names:
            each = [part["contenders"][name] for part in parts]
            ratios = [part["ratios"].get(f"{ours} / {name}") for part in parts]
            body.append(
                [
                    name,
                    *(f"{row['ms']:.1f} ({row['cpu, ms']:.1f})" for row in each),
                    *("–" if r is None else f"{r['wall']:.2f} ({r['cpu']:.2f})" for r in ratios),
                ]
            )
        return head, body

    return _blocks("rivals", block)


def speed_precision() -> str:
    """How far log p(x) moves with the rounding of its products."""

    def block(found: dict) -> tuple[list[str], list[list[str]]]:
        (part,) = (p for n, p in found.items() if n.startswith("precision/"))
        head = ["factors in", "mean difference", "sd over images", "largest", "on this machine"]
        body = [
            [
                name,
                f"{row['mean']:+.4f}",
                *(f"{row[what]:.4f}" for what in ("sd", "largest")),
                "rounds so" if row["here"] else "refused: no such units",
            ]
            for name, row in part["rows"].items()
        ]
        return head, body

    return _blocks("precision", block)


def speed_start() -> str:
    """Seconds and memory before and during the first steps, and of imports."""

    def block(found: dict) -> tuple[list[str], list[list[str]]]:
        head = ["784-400-20, batch 128", "s", "s, compiled before", "peak MiB", "of it at start"]
        body = [
            [row["contender"], row.get("error", "–"), "–", "–", "–"]
            if "error" in row
            else [
                row["contender"],
                f"{row['first, s']:.1f}",
                f"{row['again, s']:.1f}" if "again, s" in row else "–",
                f"{row['peak, MiB']:.0f}",
                f"{row['before, MiB']:.0f}",
            ]
            for row in found["start"]["rows"]
        ]
        return head, body

    return _blocks("start", block)


def speed_phases() -> str:
    """Where the start of a compiled step goes."""

    def block(found: dict) -> tuple[list[str], list[list[str]]]:
        rows = found["phases"]["rows"]
        names = list(dict.fromkeys(name for row in rows for name in row if name != "start"))
        head = ["processor time, s, + compilers (by the clock)", *(row["start"] for row in rows)]
        return head, [[name, *(_spent(row.get(name)) for row in rows)] for name in names]

    return _blocks("phases", block)


def speed_import() -> str:
    """Seconds to import, in fresh processes."""

    def block(found: dict) -> tuple[list[str], list[list[str]]]:
        seconds = found["import"]["seconds to import"]
        head = [*(f"`import {name}`" for name in seconds), "ratio (aim ≤ 1.1)"]
        ratio = seconds["pyrovae"] / seconds["pyro"]
        return head, [[*(f"{value:.2f} s" for value in seconds.values()), f"{ratio:.2f}"]]

    return _blocks("import", block)


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        speed,
        speed_ratios,
        speed_fit,
        speed_fit_ratios,
        speed_sweeps,
        speed_likelihood,
        speed_crew,
        speed_rivals,
        speed_precision,
        speed_start,
        speed_phases,
        speed_import,
    )
}


def _blocks(section: str, block: Callable[[dict], tuple[list[str], list[list[str]]]]) -> str:
    """The tables of all devices on which a section is measured, each under its conditions."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    return "\n\n".join(
        f"{_conditions(found, section)}:\n\n{markdown(*block(found))}"
        for found in results.values()
        if any(name.startswith(section) for name in found)
    )


def _conditions(found: dict, section: str) -> str:
    parts = [part["about"] for name, part in found.items() if name.startswith(section)]
    about, counts = parts[0], sorted({part["rounds"] for part in parts})
    versions = about["versions"]
    others = [f"{n} {v}" for n, v in versions.items() if n in ("torch", "jax", "pythae")]
    threads = f"{about['threads']} thread{'s' * (about['threads'] > 1)}"
    span = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    rounds = f"{span} round{'s' * (counts[-1] > 1)}"
    where = about.get("gpu", f"{about['processor']}, {threads}")
    return f"{where}, {about['dtype']}, {rounds}, {', '.join(others)}"


def _sizes(found: dict) -> list[dict]:
    return [section for name, section in found.items() if name.startswith("steps/")]


def _spent(seconds: list[float] | None) -> str:
    if seconds is None:
        return "–"
    clock, here, elsewhere = seconds
    compilers = f" + {elsewhere:.1f}" if elsewhere > 0.05 else ""
    return f"{here:.1f}{compilers} ({clock:.0f})"


def _checks(size: dict) -> str:
    """The share of time that goes into holding one step in 500 against the eager one."""
    return f"{size['audit, ms'] / 500 / size['contenders'][OURS]['ms']:.1%}"


def _size(size: dict) -> str:
    return f"{size['networks']}, {size['batch']}"


def _milliseconds(found: dict | None) -> str:
    if found is None:
        return "–"
    return f"{found['ms']:.0f}" if found["ms"] >= 100 else f"{found['ms']:#.3g}"


def _rate(size: dict) -> str:
    return f"{1e3 * size['floor']['gigaflop'] / size['contenders'][FLOOR]['ms']:.0f}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
