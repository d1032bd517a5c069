"""Figures of an evaluation: log p(x) and how far to trust it, and what the posterior does.

Those of one result are what its ``plot()`` draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from math import ceil
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from pyrovae._tools import InputError, standard_error
from pyrovae._tools.shown import number, plus_minus
from pyrovae.diagnostics.result import ACTIVE, Diagnosis
from pyrovae.diagnostics.simulation import draw_curves
from pyrovae.evidence.imputation import Imputation
from pyrovae.evidence.result import Comparison, LogLikelihood
from pyrovae.evidence.sandwich import Bidirectional
from pyrovae.reporting.figures import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    PALETTE,
    blank,
    is_picture,
    learning_curves,
    mosaic,
    panel,
    styled,
)
from pyrovae.runs.results import Finding, Results, Site

__all__ = [
    "bound_curves",
    "bounds",
    "calibration_curves",
    "differences",
    "draw_findings",
    "estimate",
    "guide_calibration",
    "imputed",
    "khat_curves",
    "kl_by_dimension",
    "latent_kl",
    "learning_curves",
    "rate_distortion",
]

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FINDING_PICTURES = (
    "bound_curve",
    "khat",
    "rate_distortion",
    "kl_by_dimension",
    "calibration",
    "guide_calibration",
)
# k-hat above which importance weights have no variance, and above which no error can be trusted
# (Vehtari et al., Pareto smoothed importance sampling, arXiv 1507.02646).
THRESHOLDS = {0.5: "0.5: infinite\nvariance", 0.7: "0.7: not to\nbe trusted"}
# Columns with missing entries, entries of each, images with gaps, and draws of them that are drawn.
COLUMNS, ENTRIES, IMAGES, DRAWS = 6, 20, 8, 3
# The colour of missing pixels, which no grey image has: red, green and blue.
HOLE = 0.96, 0.72, 0.45


def draw_findings(findings: Mapping[str, Finding], *, joined: bool = False) -> dict[str, Figure]:
    """Draw what there is to draw of evaluations on the same data, by the runs' names.

    The KL by dimension and the ranks of a guide are drawn for one alone, and so is an annealed
    estimate of all its data.
    Runs that lie on one curve over β have the ends of their paths ``joined``.
    """
    drawn = (
        bound_curves(findings),
        khat_curves(findings),
        rate_distortion(findings, joined=joined),
        kl_by_dimension(findings),
        calibration_curves(findings),
        guide_calibration(findings),
    )
    return {name: each for name, each in zip(FINDING_PICTURES, drawn, strict=True) if each}


def _level(findings: Mapping[str, Finding]) -> LogLikelihood | None:
    (first, *others) = findings.values()
    if others or first.annealed is None:
        return None
    same = len(first.annealed.log_prob) == len(first.log_likelihood.log_prob)
    return first.annealed if same else None


@styled
def bound_curves(findings: Mapping[str, Finding], within: Axes | None = None) -> Figure | None:
    """Draw the bound by number of samples, the annealed estimate being a level to reach.

    The last point, the estimate, has two Monte Carlo standard errors around it.
    """
    estimates = {name: f.log_likelihood for name, f in findings.items()}
    curves = {name: (ll, ll.curve.mean) for name, ll in estimates.items() if ll.curve is not None}
    if not curves:
        return None
    title = "The bound by number of samples"
    figure, axes = panel(title, "samples K", "nats per datum", within=within)
    for (name, (ll, curve)), colour in zip(curves.items(), cycle(PALETTE), strict=False):
        k, bound = list(curve), list(curve.values())
        axes.plot(k, bound, ".-", color=colour, label=name if len(curves) > 1 else None)
        if k[-1] == ll.num_samples and np.isfinite(ll.mean_standard_error):
            axes.errorbar(k[-1], ll.mean, 2 * ll.mean_standard_error, color=colour, capsize=3)
        if len(curves) == 1:
            _label_rises(axes, k, bound)
    if (annealed := _level(findings)) is not None:
        low, high = (annealed.mean + s * annealed.mean_standard_error for s in (-2, 2))
        axes.axhspan(low, high, color=ORANGE, alpha=0.25, lw=0)
        axes.axhline(annealed.mean, color=ORANGE, lw=1, label="annealed importance sampling")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda k, _: f"{k:,.0f}")
    axes.margins(0.1, 0.16)
    if len(curves) > 1 or annealed is not None:
        figure.legend(frameon=False, loc="outside lower center", ncols=3)
    return figure


@styled
def khat_curves(findings: Mapping[str, Finding], within: Axes | None = None) -> Figure | None:
    """Draw the Pareto shape of each datum, sorted, with the values above which errors fail."""
    shapes = {n: f.log_likelihood.khat.double().cpu().numpy() for n, f in findings.items()}
    shapes = {n: v for n, k in shapes.items() if (v := np.sort(k[np.isfinite(k)])).size}
    if not shapes:
        return None
    title = "k-hat of each datum, sorted"
    figure, axes = panel(title, "share of the data", "Pareto k-hat", within=within)
    for level, text in THRESHOLDS.items():
        axes.axhline(level, color=INK, lw=0.8, ls="--", zorder=1)
        _beside(axes, text, (1, level))
    for (name, k), colour in zip(shapes.items(), cycle(PALETTE), strict=False):
        share = (np.arange(k.size) + 0.5) / k.size
        label = f"{name + ': ' if len(shapes) > 1 else ''}{np.mean(k > 0.7):.1%} above 0.7"
        axes.plot(share, k, color=colour, lw=1.8, label=label)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    low = min(float(k[0]) for k in shapes.values())
    high = max(float(k[-1]) for k in shapes.values())
    axes.set(xlim=(0, 1), ylim=(min(low, 0.0) - 0.08, max(high, 0.8) + 0.08))
    axes.legend(frameon=False, loc="lower right")
    return figure


@styled
def rate_distortion(findings: Mapping[str, Finding], *, joined: bool = False) -> Figure | None:
    r"""Draw rate and distortion, in nats per datum, with lines of constant ELBO.

    .. math:: \mathrm{ELBO} = -(\text{rate} + \text{distortion})

    A point is where a run ended, and its path the rows of its training. See Alemi et al., Fixing
    a Broken ELBO (arXiv 1711.00464).
    """
    points = {n: (f.results.rate, f.results.distortion) for n, f in findings.items()}
    points = {n: point for n, point in points.items() if None not in (each.mean for each in point)}
    if not points:
        return None
    title, ends = "Rate and distortion", []
    figure, axes = panel(title, "rate, KL(q(z|x) ‖ p(z)), nats", "distortion, nats", (4.8, 3.4))
    for (name, point), colour in zip(points.items(), cycle(PALETTE), strict=False):
        if (path := _path(findings[name].history)) is not None:
            axes.plot(*path.T, "-", color=colour, alpha=0.45, lw=1)
            axes.scatter(path[:, 0], path[:, 1], 5, colour, alpha=0.45, linewidths=0)
            ends.append(_late(path))
        x, y = (each.mean or 0.0 for each in point)
        dx, dy = (2 * (each.standard_error or 0.0) for each in point)
        axes.errorbar(x, y, dy, dx, "o", color=colour, capsize=2, ms=5, label=name, zorder=4)
        ends.append(np.array([[x, y]]))
    if joined:
        ordered = sorted((rate.mean, distortion.mean) for rate, distortion in points.values())
        axes.plot(*zip(*ordered, strict=True), "--", color=INK, lw=0.8, zorder=3)
    _levels(axes, np.concatenate(ends))
    if len(points) > 1:
        figure.legend(frameon=False, loc="outside lower center", ncols=3)
    return figure


@styled
def kl_by_dimension(findings: Mapping[str, Finding]) -> Figure | None:
    """Draw the KL of each latent dimension, sorted, in nats per datum; active ones are blue."""
    seen = [each for f in findings.values() if (each := f.results.diagnostics)]
    sites = seen[0].sites if len(seen) == len(findings) == 1 else {}
    return _bars(sites)


def _bars(sites: Mapping[str, Site]) -> Figure | None:
    from matplotlib.colors import to_hex
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    drawn = {name: site for name, site in sites.items() if site.kl}
    if not drawn:
        return None
    figure = blank(4.8, 0.6 + 2.4 * len(drawn))
    panels = figure.subplots(len(drawn), 1, squeeze=False)[:, 0]
    for axes, (name, site) in zip(panels, drawn.items(), strict=True):
        kl = np.array([np.nan if each is None else each for each in site.kl], float)
        order = np.argsort(-np.nan_to_num(kl))
        active = _active(site, len(kl))[order]
        colours = np.where(active, BLUE, GREY)
        axes.bar(np.arange(1, len(kl) + 1), np.nan_to_num(kl[order]), 0.8, color=colours)
        axes.set(ylabel="KL, nats per datum", xlabel="dimension, by its KL")
        note = "" if site.factorized else "; its KL has no parts"
        axes.set_title(f"{name}: {site.active_units} of {site.units} dimensions active{note}")
        axes.set_xlim(0.3, max(len(kl), 5) + 0.7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(kl) <= 10:
            axes.set_xticks(range(1, len(kl) + 1))
        axes.grid(True, axis="y")
    names = {BLUE: f"active: its mean varies by more than {ACTIVE}", GREY: "not active"}
    shown = {to_hex(bar.get_facecolor()) for each in panels for bar in each.patches}
    handles = [Patch(color=c, label=text) for c, text in names.items() if c in shown]
    white: dict[str, Any] = {"framealpha": 1, "edgecolor": "white"}  # the grid runs behind it
    panels[0].legend(handles=handles, fontsize=8, loc="upper right", **white)
    return figure


@styled
def calibration_curves(findings: Mapping[str, Finding]) -> Figure | None:
    """Draw how many data lie in the central intervals of p(x|z), z ~ q(z|x)."""
    seen = {name: f.results.diagnostics for name, f in findings.items()}
    found = {name: each.calibration for name, each in seen.items() if each and each.calibration}
    if not found:
        return None
    title = "Calibration of predictive intervals"
    figure, axes = panel(title, "nominal coverage", "share of values inside")
    axes.plot([0, 1], [0, 1], color=INK, lw=0.8, ls="--", label="calibrated")
    for (name, each), colour in zip(found.items(), cycle(PALETTE), strict=False):
        error = 2 * np.array(each.standard_error, float)
        share = np.array(each.coverage, float)
        axes.errorbar(each.levels, share, error, fmt=".-", color=colour, label=name)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(frameon=False, loc="upper left")
    return figure


@styled
def guide_calibration(findings: Mapping[str, Finding]) -> Figure | None:
    """Draw how the ranks of true latents among a guide's draws are distributed, for one run."""
    known = [each.results.calibration for each in findings.values()]
    found = known[0] if len(known) == 1 else None
    if not found or not found.curves:
        return None
    figure = blank(3.6 * len(found.curves), 3.2)
    panels = figure.subplots(1, len(found.curves), squeeze=False)[0]
    for (title, curves), axes in zip(found.curves.items(), panels, strict=True):
        draw_curves(axes, curves, found.num_data, found.num_samples)
        axes.set_title(title)
    figure.suptitle("Ranks of true latents", x=0.01, ha="left")
    return figure


@styled
def estimate(found: LogLikelihood) -> Figure:
    """Draw the bound by number of samples and k-hat, or log p(x) where there is neither."""
    about = {"": Finding(Results(), (), found, None, found.log_prob)}
    known = (
        (bound_curves, found.curve is not None and len(found.curve.num_samples) > 1),
        (khat_curves, bool(found.khat.isfinite().any())),
    )
    drawn = [draw for draw, there in known if there]
    figure = blank(4.8 * max(len(drawn), 1), 3.2)
    panels = figure.subplots(1, max(len(drawn), 1), squeeze=False)[0]
    for draw, axes in zip(drawn, panels, strict=False):
        draw(about, axes)
    if not drawn:
        _histogram(panels[0], found.log_prob, "log p(x) of each datum")
    return figure


@styled
def differences(found: Comparison) -> Figure:
    """Draw what one estimate has over another of each datum."""
    figure = blank(4.8, 3.2)
    title = "log p(x), the first less the second"
    _histogram(figure.add_subplot(), found.each, title, zero=True)
    return figure


@styled
def bounds(found: Bidirectional) -> Figure:
    """Draw the two bounds of each datum, sorted, and the gaps between them."""
    figure = blank(9.6, 3.2)
    left, right = figure.subplots(1, 2)
    low, high = (t.double().cpu().numpy() for t in (found.lower.log_prob, found.upper))
    order, place = np.argsort(low, kind="stable"), np.arange(1, len(low) + 1)
    panel("Bounds of log p(x) of each datum", "datum, by its lower bound", "nats", within=left)
    left.vlines(place, low[order], high[order], color=GREY, lw=1)
    for name, values, colour in (("upper", high, ORANGE), ("lower", low, BLUE)):
        left.plot(place, values[order], ".", color=colour, ms=4, label=f"{name} bound")
    left.legend(frameon=False, loc="lower right")
    _histogram(right, found.gap, "Upper less lower bound", zero=True)
    return figure


@styled
def latent_kl(found: Diagnosis) -> Figure:
    """Draw the KL of each latent dimension as :func:`kl_by_dimension`."""
    drawn = _bars(msgspec.convert(found.summary()["sites"], dict[str, Site]))
    if drawn is None:
        raise InputError("Expected a latent to draw, got a guide that samples none.")
    return drawn


@styled
def imputed(found: Imputation) -> Figure:
    """Draw images as they are filled in, or the intervals of other data's missing entries."""
    missing = (~found.mask).flatten(1)
    if not bool(missing.any()):
        raise InputError("Expected missing entries to draw, got data without any.")
    if not is_picture(found.filled.shape[1:]):
        return _intervals(found, missing)
    rows = missing.any(1).nonzero()[:IMAGES, 0]
    known, filled = found.mask[rows].cpu(), found.filled[rows].double().cpu()
    low, high = min(filled.min().item(), 0.0), max(filled.max().item(), 1.0)
    hole = low + (high - low) * torch.tensor(HOLE, dtype=filled.dtype)[:, None, None]
    cells = {"observed": torch.where(known, filled, hole), "filled in": filled}
    cells |= {f"draw {n + 1}": each[rows].double() for n, each in enumerate(found.draws[:DRAWS])}
    shown = [each.cpu().expand_as(cells["observed"]) for each in cells.values()]
    title = "Missing entries, filled in and drawn"
    return mosaic(torch.stack(shown).numpy(), title, rows=[*cells])


def _intervals(found: Imputation, missing: Tensor) -> Figure:
    """The columns with most missing entries, a panel each; grey is where others are observed."""
    count = missing.sum(0)
    columns = count.argsort(descending=True, stable=True)[: min(COLUMNS, int((count > 0).sum()))]
    across = min(3, len(columns))
    down = ceil(len(columns) / across)
    figure = blank(2.6 * across + 0.4, 2.0 * down + 0.8)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes in panels[len(columns) :]:
        axes.remove()
    filled, *others = (
        each.flatten(each.dim() - found.filled.dim() + 1).double().cpu()
        for each in (found.filled, found.quantiles, found.draws)
    )
    ends = sorted(range(len(found.levels)), key=lambda i: found.levels[i])
    for axes, j in zip(panels, columns.tolist(), strict=False):
        rows = missing[:, j].nonzero()[:ENTRIES, 0].cpu()
        place, (quantiles, draws) = np.arange(1, len(rows) + 1), (t[:, rows, j] for t in others)
        if len(seen := filled[~missing[:, j].cpu(), j]):
            low, high = seen.quantile(seen.new_tensor([0.05, 0.95])).tolist()
            axes.axhspan(low, high, color="#eeeeee", lw=0, label="90% of what is observed")
        for n, each in enumerate(draws):
            axes.plot(place, each, ".", color=ORANGE, ms=2, label=None if n else "draws")
        if len(ends) > 1:
            name = " to ".join(f"{found.levels[i]:.0%}" for i in (ends[0], ends[-1]))
            box = quantiles[ends[0]], quantiles[ends[-1]]
            axes.vlines(place, *box, color=BLUE, alpha=0.4, lw=2, label=name)
        axes.plot(place, filled[rows, j], "o", color=BLUE, ms=3, label="filled in")
        index = np.unravel_index(j, found.filled.shape[1:] or (1,))
        name = found.columns[j] if found.columns else f"x[{', '.join(map(str, index))}]"
        axes.set(title=f"{name}, {int(count[j])} missing")
        axes.set_xticks([])
        axes.grid(True, axis="y")
    figure.supxlabel(
        f"missing entries of a column, at most {ENTRIES}, in the data's order", fontsize=9
    )
    handles: dict[str, Any] = {}
    for axes in panels[: len(columns)]:
        handles |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend([*handles.values()], [*handles], frameon=False, loc="outside upper left", ncols=4)
    return figure


def _histogram(axes: Axes, values: Tensor, title: str, zero: bool = False) -> None:
    """Draw numbers of data in nats, and their mean with two standard errors over data."""
    each = values.double().cpu()
    middle, error = each.mean().item(), standard_error(each).item()
    told = f"nats; mean {number(middle)}{plus_minus(error)}, two errors shaded"
    panel(title, told if error == error else "nats", "number of data", within=axes)
    edges = np.histogram_bin_edges(each.numpy(), min(40, ceil(len(each) ** 0.5)))
    axes.hist(each.numpy(), edges.tolist(), color=BLUE)
    if zero:
        axes.axvline(0, color=INK, lw=0.8, ls="--")
    if error == error:
        axes.axvspan(middle - 2 * error, middle + 2 * error, color=ORANGE, alpha=0.35, lw=0)
    axes.axvline(middle, color=ORANGE, lw=1.5)


def _active(site: Site, count: int) -> np.ndarray:
    variance = site.posterior_mean_variance or [0.0] * count
    active = np.array([each or 0.0 for each in variance], float) > ACTIVE
    return active if len(active) == count else np.full(count, active.any())


def _path(rows: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """Rate and distortion after each epoch, ``[E, 2]``; None where the training has no such."""
    for split in ("valid", "train"):
        pairs = [(row.get(f"{split}_kl"), row.get(f"{split}_reconstruction")) for row in rows]
        if found := [pair for pair in pairs if None not in pair]:
            return np.array(found, float) * [1, -1]
    return None


def _late(path: np.ndarray) -> np.ndarray:
    """The part of a path to show: all but a first descent that would dwarf the rest."""
    total = path.sum(1)
    return path[total <= total[-1] + 4 * max(total[-1] - total.min(), 0.05 * abs(total[-1]), 1.0)]


def _levels(axes: Axes, points: np.ndarray) -> None:
    """Lines of constant ELBO, five or so in the window around some points."""
    from matplotlib.ticker import MaxNLocator

    low, high = points.min(0), points.max(0)
    pad = 0.12 * np.maximum(high - low, 1e-6) + 0.4
    (left, right), (bottom, top) = zip(low - pad, high + pad, strict=True)
    left = max(left, 0.0) if low[0] >= 0 else left  # a rate is a divergence
    axes.set(xlim=(left, right), ylim=(bottom, top))
    rate, distortion = np.meshgrid(np.linspace(left, right), np.linspace(bottom, top))
    levels = MaxNLocator(6).tick_values(-right - top, -left - bottom)
    grey: dict[str, Any] = {"colors": GREY, "linestyles": "solid", "linewidths": 0.7}
    drawn = axes.contour(rate, distortion, -rate - distortion, levels, zorder=0, **grey)
    axes.set_title(axes.get_title(loc="left"), pad=16)
    # Where a line leaves the window, and not on it: there the path and the grid run through.
    for level in drawn.levels:
        name = f"ELBO {level:g}".replace("-", "−")
        if bottom <= -level - right <= top:
            _beside(axes, name, (right, -level - right))
        elif left <= -level - top < right:
            _beside(axes, name, (-level - top, top), above=True)


def _beside(axes: Axes, text: str, at: tuple[float, float], above: bool = False) -> None:
    """Write outside of a window, right of a point on its edge, or above it."""
    place: dict[str, Any] = {"xytext": (4, 0), "va": "center"}
    place = {"xytext": (0, 3), "ha": "center", "va": "bottom"} if above else place
    axes.annotate(text, at, fontsize=7.5, color=INK, textcoords="offset points", **place)


def _label_rises(axes: Axes, k: Sequence[float], bound: Sequence[float]) -> None:
    """Write at each point what it has over the one before, below the curve where points crowd."""
    for i in range(1, len(k)):
        crowded = k[i] < 5 * k[i - 1] and i > 1
        place: dict[str, Any] = {"xytext": (3, -14), "ha": "center"} if crowded else {}
        place = {"xytext": (-3, 6), "ha": "right", "textcoords": "offset points"} | place
        rise, end = f"{bound[i] - bound[i - 1]:+.2g}", (k[i], bound[i])
        axes.annotate(rise, end, fontsize=8, color=INK, **place)
