"""Figures of what the posterior does: rate and distortion, KL by dimension, calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyrovae._tools import InputError
from pyrovae.report.figure_style import BLUE, DPI, GREY, INK, PALETTE, panel, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["calibration_curves", "kl_by_dimension", "rate_distortion"]

ACTIVE = 0.01


@styled
def rate_distortion(
    points: Mapping[str, Mapping[str, Any]],
    paths: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    joined: bool = False,
) -> Figure:
    r"""Draw rate and distortion, in nats per datum, with lines of constant ELBO.

    .. math:: \mathrm{ELBO} = -(\text{rate} + \text{distortion})

    Args:
        points: Where each run ended: ``rate`` and ``distortion``, each a mean with a standard
            error, by what the run is called.
        paths: The rows of its training by the same names: ``valid_kl`` and
            ``valid_reconstruction``, or else ``train_kl`` and ``train_reconstruction``.
        joined: Join the points of all runs: they lie on one curve over β.

    References:
        Alemi et al., Fixing a Broken ELBO (arXiv 1711.00464).
    """
    title, ends = "Rate and distortion", []
    figure, axes = panel(title, "rate, KL(q(z|x) ‖ p(z)), nats", "distortion, nats", 3.4)
    for i, (name, point) in enumerate(points.items()):
        colour = PALETTE[i % len(PALETTE)]
        if (path := _path(paths.get(name, ()))) is not None:
            axes.plot(*path.T, "-", color=colour, alpha=0.45, lw=1)
            axes.scatter(*path.T, 5, colour, alpha=0.45, linewidths=0)
            ends.append(_late(path))
        (x, dx), (y, dy) = (_interval(point[key]) for key in ("rate", "distortion"))
        axes.errorbar(x, y, dy, dx, "o", color=colour, capsize=2, ms=5, label=name, zorder=4)
        ends.append(np.array([[x, y]]))
    if joined:
        ordered = sorted((p["rate"]["mean"], p["distortion"]["mean"]) for p in points.values())
        axes.plot(*zip(*ordered, strict=True), "--", color=INK, lw=0.8, zorder=3)
    _levels(axes, np.concatenate(ends))
    if len(points) > 1:
        figure.legend(frameon=False, loc="outside lower center", ncols=3)
    return figure


@styled
def kl_by_dimension(sites: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw the KL of each latent dimension, sorted, in nats per datum; active ones are blue.

    Args:
        sites: By latent site ``kl`` and ``posterior_mean_variance``, each a list over dimensions;
            a KL of one number is the site's, where it is no sum over dimensions.

    Raises:
        ValueError: If no site has a KL.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import FixedLocator, MaxNLocator

    drawn = {name: site for name, site in sites.items() if site.get("kl")}
    if not drawn:
        raise InputError("Expected a latent site with a KL, got none.")
    figure = Figure((4.8, 0.6 + 2.4 * len(drawn)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(drawn), 1, squeeze=False)[:, 0]
    for axes, (name, site) in zip(panels, drawn.items(), strict=True):
        kl = np.array([np.nan if each is None else each for each in site["kl"]], float)
        order = np.argsort(-np.nan_to_num(kl))
        active = _active(site, len(kl))[order]
        colours = np.where(active, BLUE, GREY)
        axes.bar(np.arange(1, len(kl) + 1), np.nan_to_num(kl[order]), 0.8, color=colours)
        axes.set(ylabel="KL, nats per datum", xlabel="dimension, by its KL")
        count = site.get("active_units", int(active.sum())), site.get("units", len(kl))
        note = "" if site.get("factorized", True) else "; its KL has no parts"
        axes.set_title(f"{name}: {count[0]} of {count[1]} dimensions active{note}")
        axes.set_xlim(0.3, max(len(kl), 5) + 0.7)
        few = range(1, len(kl) + 1) if len(kl) <= 10 else None
        axes.xaxis.set_major_locator(FixedLocator(few) if few else MaxNLocator(integer=True))
        axes.grid(True, axis="y")
    if len(panels):
        names = {BLUE: f"active: its mean varies by more than {ACTIVE}", GREY: "not active"}
        handles = [Patch(color=colour, label=text) for colour, text in names.items()]
        panels[0].legend(handles=handles, frameon=False, fontsize=8, loc="upper right")
    return figure


@styled
def calibration_curves(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw how many data lie in the central intervals of p(x|z), z ~ q(z|x).

    Args:
        found: ``levels`` asked for, ``coverage`` found and its ``standard_error``, lists of one
            length, by what they are of.
    """
    title = "Calibration of predictive intervals"
    figure, axes = panel(title, "nominal coverage", "share of values inside")
    axes.plot([0, 1], [0, 1], color=INK, lw=0.8, ls="--", label="calibrated")
    for (name, each), colour in zip(found.items(), PALETTE * len(found), strict=False):
        error = 2 * np.array(each["standard_error"], float)
        axes.errorbar(each["levels"], each["coverage"], error, fmt=".-", color=colour, label=name)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(frameon=False, loc="upper left")
    return figure


def _interval(estimate: Mapping[str, float | None]) -> tuple[float, float]:
    return estimate["mean"], 2 * (estimate.get("standard_error") or 0.0)


def _active(site: Mapping[str, Any], count: int) -> np.ndarray:
    variance = site.get("posterior_mean_variance") or [0.0] * count
    active = np.array([each or 0.0 for each in variance], float) > ACTIVE
    return active if len(active) == count else np.full(count, active.any())


def _path(rows: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """Rate and distortion after each epoch, ``[E, 2]``; None where the training has no such."""
    for split in ("valid", "train"):
        names = f"{split}_kl", f"{split}_reconstruction"
        found = [[row.get(n) for n in names] for row in rows]
        found = [each for each in found if None not in each]
        if found:
            return np.array(found, float) * [1, -1]
    return None


def _late(path: np.ndarray) -> np.ndarray:
    """The part of a path to show: all but a first descent that would dwarf the rest."""
    total = path.sum(1)
    return path[total <= total[-1] + 4 * max(total[-1] - total.min(), 0.05 * abs(total[-1]), 1.0)]


def _levels(axes, points: np.ndarray) -> None:
    """Lines of constant ELBO, five or so in the window around some points."""
    from matplotlib.ticker import MaxNLocator

    (left, low), (right, high) = points.min(0), points.max(0)
    pad = 0.12 * np.maximum([right - left, high - low], [1e-6, 1e-6]) + 0.4
    left, right, low, high = left - pad[0], right + pad[0], low - pad[1], high + pad[1]
    axes.set(xlim=(left, right), ylim=(low, high))
    for total in MaxNLocator(6).tick_values(left + low, right + high):
        ends = [max(left, total - high), min(right, total - low)]
        if ends[1] - ends[0] < 0.08 * (right - left):
            continue
        axes.plot(ends, [total - x for x in ends], color=GREY, lw=0.7, zorder=0)
        x = ends[0] + 0.1 * (right - left)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        text = {"ha": "center", "va": "center", "fontsize": 7, "color": "#666666", "bbox": box}
        if x < min(ends[1], right - 0.08 * (right - left)):
            axes.text(x, total - x, f"ELBO {-total:g}", zorder=0.5, clip_on=True, **text)
