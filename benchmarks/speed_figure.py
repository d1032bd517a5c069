"""The figure of speed.py: every contender at every size, and four sizes varied one at a time."""

from __future__ import annotations

from pathlib import Path

from elbo_figure import GREY, STYLE
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, ScalarFormatter
from speed_contenders import BEST, FLOOR, OURS
from speed_sweeps import SWEEPS

__all__ = ["draw"]

LOOKS = {
    "hand-written": ("#8a8a8a", "s"),
    BEST: ("#333333", "D"),
    "Pyro SVI": ("#3a8f5c", "v"),
    "Pyro SVI, JIT": ("#9ccbae", "^"),
    "NumPyro, jit": ("#7a4fa3", "P"),
    "Pythae": ("#c9a227", "X"),
    "pyrovae, eager": ("#8fb4dc", "o"),
    OURS: ("#1f5fa8", "o"),
    FLOOR: ("#b03030", "|"),
}
TITLES = {
    "batch": "batch M",
    "width": "hidden width",
    "particles": "particles L",
    "sites": "latent sites",
}


def draw(results: dict, path: Path) -> None:
    """Write the figure of one device's results as PNG, with what has been measured so far."""
    sizes = [section for name, section in results.items() if name.startswith("steps/")]
    sweeps = {n: results[f"sweep/{n}"] for n in SWEEPS if f"sweep/{n}" in results}
    if not sizes and not sweeps:
        return
    with style.context(["default", STYLE]):
        figure = Figure((12, 7), dpi=150, layout="constrained")
        grid = figure.add_gridspec(2, 4)
        _sizes(figure.add_subplot(grid[:, :2]), sizes)
        for index, (name, section) in enumerate(sweeps.items()):
            _sweep(figure.add_subplot(grid[index // 2, 2 + index % 2]), name, section["rows"])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _sizes(axes: Axes, sizes: list[dict]) -> None:
    for name, (colour, marker) in LOOKS.items():
        points = [
            (found[name]["ms"] / found[OURS]["ms"], row)
            for row, found in enumerate(size["contenders"] for size in sizes)
            if name in found
        ]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, marker, color=colour, ms=8, mew=2 * (marker == "|"), label=name)
    labels = [
        f"{size['networks']}, {size['batch']}\n{size['contenders'][OURS]['ms']:.3g} ms"
        for size in sizes
    ]
    axes.axvline(1, color=GREY, lw=1, zorder=0)
    axes.set(xscale="log", xlabel="time of a step / pyrovae, compiled")
    axes.set_ylim(len(sizes) - 0.5, -0.25 * len(sizes) - 0.2)
    axes.set_yticks(range(len(sizes)), labels)
    _plain(axes)
    axes.set_title("Networks and batch, with the time of a compiled step")
    axes.legend(ncols=3, loc="upper left")


def _sweep(axes: Axes, name: str, rows: list[dict]) -> None:
    for contender, (colour, marker) in LOOKS.items():
        points = [(row[name], row[contender]["ms"]) for row in rows if contender in row]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, f"{marker}-", color=colour, ms=5, lw=1.2, label=contender)
    values = [row[name] for row in rows]
    axes.set(xscale="log", yscale="log", ylabel="ms a step")
    axes.set_xticks(values, [str(value) for value in values])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.set_title(TITLES[name])


def _plain(axes: Axes) -> None:
    low, high = axes.get_xlim()
    ticks = [t for t in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= t <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
