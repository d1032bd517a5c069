"""The figure of literature.py: cost, learning curves, and what 5,000 draws hide.

    python benchmarks/literature_figure.py

Reads results/literature.json and writes docs/figures/literature.png.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from elbo_figure import GREY, STYLE
from literature_rows import ROWS
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

__all__ = ["draw"]

HOME = Path(__file__).resolve().parent
FIGURE = HOME.parent / "docs" / "figures" / "literature.png"


def main() -> None:
    text = (HOME / "results" / "literature.json").read_text(encoding="utf-8")
    draw(json.loads(text)["rows"], FIGURE)


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the figure as PNG."""
    order = [row.name for row in ROWS]
    rows = dict(sorted(found.items(), key=lambda item: order.index(item[0].partition("/")[0])))
    with style.context(["default", STYLE]):
        figure = Figure((14, 4.6), dpi=150, layout="constrained")
        cost, learning, hidden = figure.subplots(1, 3)
        for key, row in rows.items():
            name = key.partition("/")[0]
            color = f"C{order.index(name)}"
            hours, nll = row["CPU hours"], row["NLL"]
            cost.plot([hours, hours], [nll, row["published"]], color=color, linewidth=1)
            cost.plot(hours, nll, "o", color=color, label=_once(name, cost))
            cost.plot(hours, row["published"], "o", color=color, fillstyle="none")
            curve = row["curve of training"]
            learning.plot(curve["epoch"], curve["train_loss"], color=color)
            draws = row["curve"]["samples"]
            over = [each - nll for each in row["curve"]["NLL"]]
            hidden.plot(draws, over, color=color)
            annealed = row["annealed NLL"] - row["NLL of these images"]
            hidden.plot(2 * draws[-1], annealed, "_", color=color, markersize=14)
        cost.set(xscale="log", xlabel="hours of one core, training", ylabel="test NLL, nats")
        cost.xaxis.set_major_formatter(FuncFormatter(lambda hours, _: f"{hours:g}"))
        cost.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        cost.xaxis.set_minor_formatter(NullFormatter())
        cost.set_title("Reached (dot) and published (ring)")
        # Room for the legend.
        cost.set_xlim(left=min(row["CPU hours"] for row in rows.values()) / 2.5)
        cost.legend(loc="lower left")
        learning.set(xlabel="epoch", ylabel="loss in training, nats", ylim=(80, 105))
        learning.set_title("Loss of each row's objective, the KL at its weight")
        hidden.axhline(0, color=GREY, linewidth=1)
        hidden.set(xscale="log", xlabel="draws K", ylabel="NLL less that of 5,000 draws, nats")
        hidden.set_title("What K draws hide; bars: annealing")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _once(name: str, axes: Axes) -> str | None:
    """A row's name for the legend, if none of its other seeds is in it."""
    return None if name in axes.get_legend_handles_labels()[1] else name


if __name__ == "__main__":
    main()
