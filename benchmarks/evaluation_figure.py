"""The figure of evaluation.py: how many samples are enough."""

from __future__ import annotations

from pathlib import Path

from elbo_figure import STYLE
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["draw"]

COLOURS = {"VAE": "#1f5fa8", "IWAE": "#c0392b"}


def draw(parts: dict[str, dict], path: Path) -> None:
    """Write the figure as PNG: each bound against its number of samples, and the weights' tails."""
    with style.context(["default", STYLE]):
        figure = Figure((11, 5), dpi=150, layout="constrained")
        bound, tails = figure.subplots(1, 2, width_ratios=(3, 2))
        for name, colour in COLOURS.items():
            _bound(bound, name, colour, parts)
            _tails(tails, name, colour, parts)
        bound.set(xscale="log", xlabel="samples K", ylabel="log p(x), nats per datum")
        bound.set_title("How far below log p(x) the bound with K samples is")
        bound.legend(frameon=False, loc="lower right")
        tails.set(xscale="log", ylim=(0, 1.03), xlabel="samples K", ylabel="share of the images")
        tails.set_title("Images with k-hat above 0.7")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _bound(axes: Axes, name: str, colour: str, parts: dict[str, dict]) -> None:
    longest = max((p for n, p in parts.items() if n.startswith(f"{name}/K")),
                  key=lambda p: p["samples"])  # fmt: skip
    axes.plot(longest["points"], longest["curve"], "o-", color=colour, markersize=3.5,
              label=f"{name}, from the guide")  # fmt: skip
    if refined := parts.get(f"{name}/refined"):
        axes.plot(refined["points"], refined["curve"], "s--", color=colour, markersize=3.5,
                  alpha=0.55, label=f"{name}, from a guide refined for each image")  # fmt: skip
    if annealed := parts.get(f"{name}/annealed"):
        level, gap = annealed["log p(x)"], parts.get(f"{name}/sandwich", {"gap": 0.0})["gap"]
        axes.axhline(level, color=colour, linewidth=1, linestyle=":")
        axes.axhspan(level, level + max(gap, 0.0), color=colour, alpha=0.18, linewidth=0,
                     label=f"{name}, annealing and its bidirectional gap")  # fmt: skip


def _tails(axes: Axes, name: str, colour: str, parts: dict[str, dict]) -> None:
    found = [p for n, p in parts.items() if n.startswith(f"{name}/K")]
    axes.plot([p["samples"] for p in found], [p["k-hat > 0.7"] for p in found], "o-",
              color=colour, label=name)  # fmt: skip
