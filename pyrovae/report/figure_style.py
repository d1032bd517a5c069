"""How every figure looks, whatever matplotlib's own settings are."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["BLUE", "DPI", "GREY", "INK", "ORANGE", "PALETTE", "panel", "styled"]

DPI, INK, BLUE, ORANGE, GREY = 200, "#333333", "#1f5fa8", "#d1700f", "#b4b4b4"
PALETTE = (BLUE, ORANGE, "#2d8a4e", "#8b4fa0", "#b3261e", "#5f6b76")
STYLE = {
    "font.size": 9,
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "text.parse_math": False,
}


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw a figure in this style, with nothing of the surrounding settings in it."""

    @wraps(draw)
    def drawn(*args: object, **kwargs: object) -> Figure:
        from matplotlib import style

        with style.context(["default", STYLE]):
            figure = draw(*args, **kwargs)
            for axes in figure.axes:
                axes.spines[["top", "right"]].set_visible(False)
                axes.tick_params(labelsize=8, color=GREY, labelcolor=INK)
            return figure

    return drawn


def panel(title: str, xlabel: str, ylabel: str, height: float = 3.2) -> tuple[Figure, Axes]:
    """A figure of one pair of axes, narrow enough to be read on a telephone."""
    from matplotlib.figure import Figure

    figure = Figure((4.8, height), dpi=DPI, layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(True)
    return figure, axes
