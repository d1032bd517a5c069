"""The figure of ablation.py: what each variant is worth beside the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elbo_figure import GREY, STYLE
from matplotlib import style
from matplotlib.figure import Figure

__all__ = ["draw"]

BETTER, WORSE = "#1f5fa8", "#c0392b"


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the figure as PNG: paired differences with errors, and the ELBO over the epochs."""
    rows = {key: row for key, row in found["rows"].items() if key.endswith("/0")}
    with style.context(["default", STYLE]):
        figure = Figure((11, 4.6), dpi=150, layout="constrained")
        worth, curves = figure.subplots(1, 2, width_ratios=(3, 2))
        compared = {k: row for k, row in rows.items() if row.get("±", 0.0) > 0}
        noise = 2 * 2**0.5 * found["seed sd"]
        worth.axvspan(-noise, noise, color="0.93", label="twice the noise of the seed")
        worth.axvline(0, color=GREY, linewidth=1)
        order = sorted(compared.values(), key=lambda row: -row["less the recipe"])
        for place, row in enumerate(order):
            value = row["less the recipe"]
            worth.errorbar(value, place, xerr=2 * row["±"], fmt="o", capsize=2,
                           color=BETTER if value < 0 else WORSE)  # fmt: skip
        worth.set_yticks(range(len(order)), [row["title"] for row in order])
        low, high = worth.get_xlim()
        if max(-low, high) > 5:
            # Linear within a nat: one variant may be twenty off, and others a few tenths.
            worth.set_xscale("symlog", linthresh=1)
            ticks = [-10, -3, -1, -0.5, 0, 0.5, 1, 3, 10, 30]
            shown = [tick for tick in ticks if low <= tick <= high]
            worth.set_xticks(shown, [f"{tick:g}" for tick in shown])
        worth.set(xlabel="validation NLL less the recipe's, nats (± 2 standard errors, paired)")
        budget = f"{found['epochs']} epochs at {found['learning rate']:g}"
        worth.set_title(f"After {budget}: to the left is better")
        worth.legend(loc="upper right")
        for key, row in rows.items():
            curve = row["curve"]
            base = key.startswith("recipe/")
            curves.plot(range(1, len(curve) + 1), curve, color="black" if base else None,
                        linewidth=2 if base else 1, label=key.partition("/")[0])  # fmt: skip
        levels = [value for row in rows.values() for value in row["curve"]]
        curves.set(
            xlabel="epoch", ylabel="validation ELBO, nats", ylim=(max(levels) - 15, max(levels) + 5)
        )
        curves.legend(ncols=3, loc="upper left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
