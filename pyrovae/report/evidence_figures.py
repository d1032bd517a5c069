"""Figures of an estimate of log p(x): how it rises with the samples, and where it is doubtful."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from pyrovae._tools import InputError
from pyrovae.evidence.result import LogLikelihood
from pyrovae.report.figure_style import INK, ORANGE, PALETTE, panel, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["bound_curves", "khat_curves"]

THRESHOLDS = {0.5: "0.5: infinite variance", 0.7: "0.7: not to be trusted"}


@styled
def bound_curves(
    estimates: Mapping[str, LogLikelihood], annealed: LogLikelihood | None = None
) -> Figure:
    """Draw the bound of each estimate, in nats per datum, against the number of samples.

    Where a curve is flat at its end, the samples are enough. The last point, the estimate, has two
    Monte Carlo standard errors around it.

    Args:
        estimates: Estimates of the same data, by what they are of.
        annealed: A level to reach, of the same data.

    Raises:
        ValueError: If no estimate has a curve.
    """
    drawn = {name: ll for name, ll in estimates.items() if ll.curve is not None}
    if not drawn:
        raise InputError("Expected an estimate with a curve, got none.")
    figure, axes = panel("The bound by number of samples", "samples K", "nats per datum")
    for (name, ll), colour in zip(drawn.items(), _colours(drawn), strict=True):
        k, bound = zip(*ll.curve.mean.items(), strict=True)
        axes.plot(k, bound, ".-", color=colour, label=name if len(drawn) > 1 else None)
        if k[-1] == ll.num_samples and np.isfinite(ll.mean_standard_error):
            axes.errorbar(k[-1], ll.mean, 2 * ll.mean_standard_error, color=colour, capsize=3)
        if len(drawn) == 1:
            _label(axes, k, bound)
    if annealed is not None:
        low, high = (annealed.mean + s * annealed.mean_standard_error for s in (-2, 2))
        axes.axhspan(low, high, color=ORANGE, alpha=0.25, lw=0)
        axes.axhline(annealed.mean, color=ORANGE, lw=1, label="annealed importance sampling")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda k, _: f"{k:,.0f}")
    axes.margins(0.1, 0.16)
    if len(drawn) > 1 or annealed is not None:
        figure.legend(frameon=False, loc="outside lower center", ncols=3)
    return figure


@styled
def khat_curves(estimates: Mapping[str, LogLikelihood]) -> Figure:
    """Draw the Pareto shape of each datum, sorted, with the values above which errors fail.

    Args:
        estimates: Estimates by what they are of.

    Raises:
        ValueError: If no estimate has a k-hat.
    """
    shapes = {name: ll.khat.double().cpu().numpy() for name, ll in estimates.items()}
    shapes = {n: v for n, k in shapes.items() if (v := np.sort(k[np.isfinite(k)])).size}
    if not shapes:
        raise InputError("Expected an estimate with a k-hat, got none: K is too small.")
    figure, axes = panel("k-hat of each datum, sorted", "share of the data", "Pareto k-hat")
    for level, text in THRESHOLDS.items():
        axes.axhline(level, color=INK, lw=0.8, ls="--", zorder=1)
        axes.text(0.01, level + 0.015, text, fontsize=7.5, color=INK)
    for (name, k), colour in zip(shapes.items(), _colours(shapes), strict=True):
        share = (np.arange(k.size) + 0.5) / k.size
        label = f"{name + ': ' if len(shapes) > 1 else ''}{np.mean(k > 0.7):.1%} above 0.7"
        axes.plot(share, k, color=colour, lw=1.8, label=label)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    low = min(float(k[0]) for k in shapes.values())
    high = max(float(k[-1]) for k in shapes.values())
    axes.set(xlim=(0, 1), ylim=(min(low, 0.0) - 0.08, max(high, 0.8) + 0.08))
    axes.legend(frameon=False, loc="lower right")
    return figure


def _colours(names: Mapping) -> list[str]:
    return [PALETTE[i % len(PALETTE)] for i in range(len(names))]


def _label(axes, k, bound) -> None:
    """Write above each point what it has over the one before."""
    for i in range(1, len(k)):
        rise = f"{bound[i] - bound[i - 1]:+.2g}"
        where = {"xytext": (-3, 6), "textcoords": "offset points", "ha": "right"}
        axes.annotate(rise, (k[i], bound[i]), fontsize=8, color=INK, **where)
