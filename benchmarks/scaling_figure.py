"""The figure of scaling.py: time and memory of each sweep, and what processes make of a step."""

from __future__ import annotations

from pathlib import Path

from elbo_figure import GREY, STYLE
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

__all__ = ["draw"]

TIME, MEMORY = "#1f5fa8", "#d1700f"


def draw(results: dict, path: Path) -> None:
    """Write the figure as PNG, with what has been measured so far."""
    shared = [found for name, found in results.items() if name.startswith("processes")]
    sweeps = {n: found for n, found in results.items() if not n.startswith("processes")}
    with style.context(["default", STYLE]):
        figure = Figure((13, 9), dpi=150, layout="constrained")
        axes = iter(figure.subplots(3, 3).flat)
        for name, found in sweeps.items():
            _sweep(next(axes), name, found)
        if shared:
            _processes(next(axes), [row for found in shared for row in found["rows"]])
        for empty in axes:
            empty.set_axis_off()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _sweep(axes: Axes, name: str, found: dict) -> None:
    other = axes.twinx()
    other.grid(visible=False)
    for contender in dict.fromkeys(row["contender"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["contender"] == contender]
        x, y = [row["value"] for row in rows], [row["ms"] for row in rows]
        spread = [[m - row["low"] for m, row in zip(y, rows, strict=True)]]
        spread += [[row["high"] - m for m, row in zip(y, rows, strict=True)]]
        ours = "hand" not in contender
        told = found["exponents"][f"{contender}, ms"]
        label = f"CPU ms: {told['all']:.2f}, larger half {told['larger half']:.2f}"
        axes.errorbar(
            x, y, spread, fmt="o-" if ours else "D--", color=TIME if ours else GREY, ms=4, lw=1.2,
            label=label if ours else "by hand, compiled",
        )  # fmt: skip
        if ours:
            told = found["exponents"][f"{contender}, MiB"]
            label = f"MiB: {told['all']:.2f}, larger half {told['larger half']:.2f}"
            other.plot(x, [r["MiB"] for r in rows], "s:", color=MEMORY, ms=3, lw=1, label=label)
    axes.set(xscale="log", yscale="log")
    other.set(xscale="log", yscale="log")
    axes.tick_params(axis="y", colors=TIME)
    other.tick_params(axis="y", colors=MEMORY)
    lines = [*axes.get_legend_handles_labels()[0], *other.get_legend_handles_labels()[0]]
    axes.legend(lines, [line.get_label() for line in lines], loc="upper left")
    axes.set_ylim(top=axes.get_ylim()[1] * 8)
    low, high = other.get_ylim()
    other.set_ylim(min(low, high / 10), high * 2)
    for axis in (axes.xaxis, axes.yaxis, other.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.set_title(f"{name}: {found['unit'].replace('`', '')}")


def _processes(axes: Axes, rows: list[dict]) -> None:
    for place, row in enumerate(rows):
        axes.barh(place, row["ms"], color=TIME if row["step"] == "compiled" else GREY)
        axes.text(row["ms"], place, f" {row['efficiency']:.0%}", va="center", fontsize=8)
    labels = [f"{r['ranks']}, M = {r['batch']}" for r in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_xlim(right=1.2 * max(row["ms"] for row in rows))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_title("processes: ms a step, efficiency (eager: grey)")
