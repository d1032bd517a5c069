"""The figure of elbo.py: six panels, two for its first and last table and one for each axis."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["draw"]

COLOURS = {"A": "#1f5fa8", "B": "#d1700f"}
RACERS = ("#1f5fa8", "#d1700f", "#3a8f5c", "#7a4fa3")
GREY = "#b4b4b4"
SMALLEST = 1e-17
STYLE = {
    "font.size": 9,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e8e8e8",
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def draw(results: dict, path: Path) -> None:
    """Write the figure of the results as PNG."""
    with style.context(["default", STYLE]):
        figure = Figure((12, 7), dpi=150, layout="constrained")
        axes = figure.subplots(2, 3).flat
        _exact(axes[0], results["exact"])
        _scaling(axes[1], results["variance"], "L", "samples L per datum (16 fixed data)")
        _scaling(axes[2], results["variance"], "M", "minibatch M (drawn anew, L = 1)")
        _races(axes[3], results["races"])
        _losses(axes[4], results["curves"])
        _differences(axes[5], results["curves"])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _exact(axes: Axes, table: list[dict]) -> None:
    cases = list(dict.fromkeys((r["decoder"], r["estimator"]) for r in table))
    for dtype, colour in (("float32", GREY), ("float64", "#333333")):
        for of, marker, shift in (("value", "o", -0.12), ("gradient", "D", 0.12)):
            rows = [r for r in table if r["dtype"] == dtype]
            x = [max(r[f"{of} rel"], SMALLEST) for r in rows]
            y = [cases.index((r["decoder"], r["estimator"])) + shift for r in rows]
            axes.plot(x, y, marker, color=colour, ms=5, mew=0, label=f"{of}, {dtype}")
    axes.plot([1e-10] * 2, [-0.8, len(cases) - 0.5], color="#b03030", lw=1, ls="--")
    axes.text(2e-10, -0.55, "bound for float64", color="#b03030", fontsize=8, va="center")
    axes.set(xscale="log", xlim=(SMALLEST / 3, 1e-4), ylim=(len(cases) + 0.4, -0.8))
    axes.set_xticks([10.0**n for n in range(-17, -4, 3)])
    axes.minorticks_off()
    axes.set_yticks(range(len(cases)), [f"{decoder}, {e}" for decoder, e in cases])
    axes.set(title="Hand-written against Pyro, same noise")
    axes.set_xlabel("relative difference (0 drawn at the left edge)")
    axes.legend(loc="lower center", ncols=2)


def _scaling(axes: Axes, table: list[dict], against: str, label: str) -> None:
    for r in table:
        if (r["decoder"], r["weights"], r["against"]) != ("bernoulli", "trained", against):
            continue
        sizes = np.array(r["sizes"])
        for estimator, colour in COLOURS.items():
            errors = np.array(r[f"errors {estimator}"])
            slope, error = r[f"slope {estimator}"], r[f"± {estimator}"]
            name = f"{r['of']} {estimator}: {slope:.3f} ± {error:.3f}"
            marker = "o" if r["of"] == "value" else "D"
            axes.plot(sizes, errors, marker, color=colour, ms=5, mew=0, label=name)
            level = np.exp(np.mean(np.log(errors * np.sqrt(sizes))))
            axes.plot(sizes, level / np.sqrt(sizes), color=colour, lw=1, alpha=0.6)
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="standard error (gradient: norm)")
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.minorticks_off()
    axes.set_ylim(axes.get_ylim()[0] / 8)
    axes.set_title(f"Errors fall as 1/√{against} (lines): Bernoulli, trained")
    axes.legend(loc="lower left", title="slope of ln(error)", title_fontsize=8, alignment="left")


def _races(axes: Axes, table: list[dict]) -> None:
    for r, colour in zip(table, RACERS, strict=False):
        traces = np.array(r["elbo"])
        label = f"L = {r['L']}, M = {r['M']}: {r['test ELBO']:.2f} ± {r['±']:.2f}"
        line = "-" if r["rows a step"] == table[0]["rows a step"] else "--"
        axes.plot(r["steps"], traces.mean(0), line, color=colour, label=label)
        axes.fill_between(r["steps"], traces.min(0), traces.max(0), color=colour, alpha=0.2, lw=0)
    last = np.concatenate([np.array(r["elbo"])[:, 2:].ravel() for r in table])
    axes.set_ylim(last.min(), last.max() + 0.05 * (last.max() - last.min()))
    axes.set(title="Equal cost, L M = 128; dashed: L M = 1280", xlabel="step")
    axes.set_ylabel("test ELBO, nats per datum")
    axes.legend(loc="lower right")


def _losses(axes: Axes, table: list[dict]) -> None:
    for r in table:
        if (r["decoder"], r["dtype"]) != ("bernoulli", "float64"):
            continue
        colour = COLOURS[r["estimator"]]
        label = f"{r['estimator']}, hand-written"
        axes.plot(r["steps"], r["loss hand-written"], color=colour, lw=5, alpha=0.3, label=label)
        axes.plot(
            r["steps"],
            r["loss pyrovae"],
            color=colour,
            lw=1,
            label=f"{r['estimator']}, pyrovae.SVI",
        )
    axes.set(
        title="Same weights, same noise: the same training",
        xlabel="step",
        ylabel="loss, nats per datum",
    )
    axes.legend()


def _differences(axes: Axes, table: list[dict]) -> None:
    for r in table:
        for name, line in (("pyro", ":"), ("pyrovae", "-")):
            apart = np.array(r[f"apart {name}"])
            apart[apart == 0] = np.nan
            colour, label = COLOURS[r["estimator"]], None
            if (r["decoder"], r["dtype"]) == ("bernoulli", "float64"):
                label = f"{r['estimator']}, {name}.SVI"
            axes.plot(r["steps"], apart, line, marker=".", ms=3, color=colour, lw=1, label=label)
    axes.set(yscale="log", title="Their difference, both decoders", xlabel="step")
    axes.set_ylabel("|loss - hand-written|, nats per datum")
    axes.text(0, 1e-7, "float32", fontsize=8)
    axes.text(0, 1e-12, "float64", fontsize=8)
    axes.legend(loc="center right")
