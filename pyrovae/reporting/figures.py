"""Figures of a run: each function takes tensors and returns a matplotlib ``Figure``.

Events ``[1, H, W]`` and ``[3, H, W]`` are drawn as pictures, a pixel being a whole number of dots;
``[1]`` as one pixel, ``[2]`` as points in the plane, sequences ``[T, D]`` as a piano roll or lines,
and all others as line profiles. Every figure has the same style, whatever matplotlib's own settings
are.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from math import ceil
from textwrap import fill
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyrovae._tools import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
F = TypeVar("F", bound="Figure | None")
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
PLANE = ("x[0]", "x[1]")
TERMS = {"elbo": "ELBO", "reconstruction": "E_q[ln p(x|z)]", "kl": "KL(q(z|x) ‖ p(z))"}


def styled(draw: Callable[P, F]) -> Callable[P, F]:
    """Draw a figure, or None, in this style, with nothing of the surrounding settings in it."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> F:
        from matplotlib import style

        with style.context(["default", STYLE]):
            figure = draw(*args, **kwargs)
            for axes in figure.axes if figure is not None else ():
                axes.spines[["top", "right"]].set_visible(False)
                for axis in (axes.xaxis, axes.yaxis):
                    size = axis.get_tick_params().get("labelsize", 8)
                    axis.set_tick_params(labelsize=size, color=GREY, labelcolor=INK)
            return figure

    return drawn


def blank(width: float, height: float) -> Figure:
    """A figure of a size in inches, narrow enough to be read on a telephone."""
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=DPI, layout="constrained")


def panel(
    title: str,
    xlabel: str,
    ylabel: str,
    size: tuple[float, float] = (4.8, 3.2),
    within: Axes | None = None,
) -> tuple[Figure, Axes]:
    """A figure of one pair of axes with a grid, or those ``within`` a figure that there is."""
    figure: Any = blank(*size) if within is None else within.figure
    axes = figure.add_subplot() if within is None else within
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(True)
    return figure, axes


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


@styled
def learning_curves(history: Sequence[dict]) -> Figure:
    """Draw the ELBO and its two terms, in nats per datum, against the epoch.

    A row holds ``epoch``, and ``train_*`` and ``valid_*`` for ``elbo``, ``reconstruction``, ``kl``.
    """
    from matplotlib.ticker import MaxNLocator

    terms = {name: curves for name in TERMS if (curves := _curves(history, name))}
    if not terms:  # as where sites are scaled differently, and nothing is held out
        terms = {"loss": _curves(history, "loss")}
    if not any(terms.values()):
        raise InputError("Expected a history with an ELBO, one of its terms or a loss, got none.")
    first, *others = terms
    layout: list[Any] = [[first] * len(others), others] if others else [[first]]
    figure = blank(5.4, 2.4 * len(layout))
    for name, axes in figure.subplot_mosaic(layout).items():
        for split, (epoch, value) in terms[name].items():
            colour, marker = BLUE if split == "train" else ORANGE, "." if len(epoch) < 12 else ""
            axes.plot(epoch, value, marker=marker, color=colour, label=split)
            if (name, split) == ("elbo", "validation") and np.isfinite(value).any():
                best = np.nanargmax(value)
                label = f"best: {value[best]:.2f} at epoch {epoch[best]:g}"
                axes.plot(epoch[best], value[best], "o", color=colour, mfc="none", label=label)
        axes.set(title=TERMS.get(name, name), xlabel="epoch", ylabel="nats per datum")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        axes.grid(True)
        if name == first:
            axes.legend(frameon=False)
    return figure


@styled
def image_grid(images: Tensor, *, title: str) -> Figure:
    """Draw events ``[n, C, H, W]`` or ``[n, D]`` in about as many rows as columns."""
    x = _events(images, 1)
    if x[0].size <= 2:
        return _points(x, PLANE[: x[0].size], title)
    return mosaic(_rows(x, ceil(len(x) ** 0.5)), title)


@styled
def reconstructions(x: Tensor, xhat: Tensor) -> Figure:
    """Draw data ``[n, *shape]`` above their reconstructions ``[n, *shape]``, ten in a row.

    Both share the data's range, and a profile is drawn over the one it reconstructs.
    """
    data, found = _events(x, 1), _events(xhat, 1)
    if data.shape != found.shape:
        raise InputError(f"Expected reconstructions {list(x.shape)}, got {list(xhat.shape)}.")
    title = "Test data and reconstructions E[x | z], z ~ q(z | x)"
    names = ("data", "reconstruction")
    if data[0].size == 2:
        pairs, labels = np.stack([data, found], 1), np.tile(names, len(data))
        return _points(pairs, PLANE, title, labels, paths=pairs)
    data, found = _rows(data, 10), _rows(found, 10)
    cells = np.stack([data, found], 1).reshape(-1, *data.shape[1:])
    return mosaic(cells, title, rows=names * len(data), behind=np.repeat(data, 2, 0))


@styled
def latent_space(z: Tensor, labels: Tensor | None, *, site: str = "z") -> Figure:
    """Draw posterior means ``[N, d]``, coloured by ``labels`` ``[N]``.

    One dimension is a histogram, two are drawn as they are, and more are projected on their two
    principal components, whose shares of the variance the axes state. Integer labels of at most
    20 classes have a legend, all others a colour bar.
    """
    points = _events(z, 1).reshape(len(z), -1)
    classes = None if labels is None else torch.as_tensor(labels).detach().cpu().numpy()
    if not np.isfinite(points).all():
        raise InputError("Expected finite posterior means, got NaN or infinity.")
    if classes is not None and classes.shape != points.shape[:1]:
        raise InputError(f"Expected labels of shape [{len(z)}], got {list(classes.shape)}.")
    names = [f"{site}[{i}], posterior mean" for i in range(points.shape[1])]
    if len(names) > 2:
        centred = torch.from_numpy(points - points.mean(0))
        axes, share = principal_axes(centred)
        points = (centred @ axes.mT).numpy()
        names = [f"principal component {i + 1} ({share[i]:.1%} of variance)" for i in range(2)]
    return _points(points, names, f"Posterior means of {site}", classes, "label", equal=True)


@styled
def manifold(grid: Tensor, extent: tuple[float, float]) -> Figure:
    """Draw events ``[r, c, *shape]`` decoded over a square of a two-dimensional latent space.

    ``grid[i, j]`` is decoded at the i-th value of ``z[1]``, which grows upwards, and the j-th of
    ``z[0]``, both equally spaced over ``extent``, in standard deviations of the prior.
    """
    x, title = _events(grid, 2), "Events decoded over the latent plane"
    if x[0, 0].size == 2:
        return _points(x, PLANE, title, paths=[*x, *x.swapaxes(0, 1)])
    names = [f"z[{i}]" for i in range(2)]
    return mosaic(x[::-1], title, x=extent, y=extent[::-1], names=names)


@styled
def interpolations(rows: Tensor) -> Figure:
    """Draw paths ``[r, s, *shape]``, each a row from weight 0 (one datum) to 1 (another)."""
    title, name = "Between the encodings of two test data, E[x | z]", "mixing weight"
    x = _events(rows, 2)
    if x[0, 0].size == 2:
        return _points(x, PLANE, title, np.tile(np.linspace(0, 1, x.shape[1]), len(x)), name, x)
    return mosaic(x, title, x=(0.0, 1.0), names=[name, ""])


@styled
def responses(
    values: Tensor, curves: Tensor, columns: Sequence[str] = (), site: str = "z"
) -> Figure:
    """Draw how columns respond to each latent dimension, a panel each.

    ``curves[i, t]`` ``[D]`` are the columns, in standard deviations of the data, where dimension i
    is at ``values[i, t]``. The six columns that move most have a colour and a name.
    """
    x, y = _events(values, 1), _events(curves, 2)
    if y.shape[:2] != x.shape:
        raise InputError(f"Expected curves {[*x.shape, 'D']}, got {list(y.shape)}.")
    names = columns or [f"x[{i}]" for i in range(y.shape[2])]
    most = np.argsort(-np.ptp(y, 1).max(0), kind="stable")
    colours = dict(zip(most.tolist(), PALETTE, strict=False))
    across = min(3, len(x))
    down = ceil(len(x) / across)
    figure = blank(1.9 * across + 1.6, 1.9 * down + 0.5)
    panels = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
    for axes in panels[len(x) :]:
        axes.remove()
    for i, (axes, place, lines) in enumerate(zip(panels, x, y, strict=False)):
        # Grey ones first, so that they lie below.
        for j in most[::-1]:
            label = names[j] if j in colours else None
            axes.plot(place, lines[:, j], color=colours.get(j, GREY), lw=1.2, label=label)
        axes.set(title=f"{site}[{i}]")
        axes.grid(True)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], frameon=False, loc="outside right upper")
    figure.supylabel("standard deviations of the column", fontsize=9)
    return figure


@styled
def sequences(rows: Mapping[str, Tensor]) -> Figure:
    """Draw sequences ``[n, T, D]`` side by side, a row of panels for each name; NaN is no value.

    Steps go to the right. Binary sequences, as those under the first name tell, are drawn as a
    piano roll, the darker the likelier a one; others as lines, of which the six dimensions that
    vary most have a colour.
    """
    from matplotlib.ticker import MaxNLocator

    shown = {name: _events(x, 1) for name, x in rows.items()}
    if any(x.ndim != 3 for x in shown.values()):
        raise InputError(f"Expected sequences [n, T, D], got {[x.shape for x in shown.values()]}.")
    first = next(iter(shown.values()))
    width, size = max(map(len, shown.values())), first.shape[2]
    lasts = [np.flatnonzero(~np.isnan(x).all((0, 2))).max(initial=0) for x in shown.values()]
    steps = max(lasts) + 1
    shown = {name: x[:, :steps] for name, x in shown.items()}
    binary = bool(np.isin(first[~np.isnan(first)], (0, 1)).all())
    figure = blank(5.4, (1.5 if len(shown) < 4 else 1.0) * len(shown) + 0.6)
    panels = figure.subplots(len(shown), width, squeeze=False, sharex=True, sharey=True)
    most = np.argsort(-np.nanstd(first.reshape(-1, size), 0), kind="stable")
    played = np.flatnonzero(np.nanmax(np.concatenate([*shown.values()]), (0, 1)) > 0.1)
    for line, (name, found) in zip(panels, shown.items(), strict=True):
        line[0].set_ylabel(name, fontsize=8)
        for axes in line[len(found) :]:
            axes.remove()
        for axes, x in zip(line, found, strict=False):
            there = ~np.isnan(x).all(1)
            axes.axvspan(np.flatnonzero(there).max(initial=-1) + 1, steps, color="#eeeeee", lw=0)
            if binary:
                box = (0, steps, -0.5, size - 0.5)
                how = {"extent": box, "vmin": 0, "vmax": 1, "interpolation": "nearest"}
                axes.imshow(x.T, "Greys", origin="lower", aspect="auto", **how)
                axes.set_ylim(played.min(initial=size) - 1.5, played.max(initial=0) + 1.5)
            else:
                for place, j in [*enumerate(most)][::-1]:
                    colour = PALETTE[place] if place < len(PALETTE) else GREY
                    axes.plot(np.arange(steps) + 0.5, x[:, j], color=colour, lw=1)
                axes.grid(True)
            axes.set_xlim(0, steps)
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=binary))
    figure.supxlabel("step; grey is behind a sequence's end", fontsize=9)
    figure.supylabel("dimension of x" if binary else "x", fontsize=9)
    return figure


def _curves(history: Sequence[dict], name: str) -> dict[str, np.ndarray]:
    curves = {}
    for key, split in (("train", "train"), ("valid", "validation")):
        if rows := [row for row in history if row.get(f"{key}_{name}") not in (None, "")]:
            curves[split] = np.array([[r["epoch"], r[f"{key}_{name}"]] for r in rows], float).T
    return curves


def _events(x: Tensor, batch: int) -> np.ndarray:
    events = torch.as_tensor(x).detach().cpu().double().numpy()
    if events.ndim <= batch or events.size == 0:
        raise InputError(f"Expected events of some shape, got a tensor {list(events.shape)}.")
    return events


def _rows(x: np.ndarray, columns: int) -> np.ndarray:
    """Events in rows of so many columns, or of as many as there are."""
    columns = min(columns, len(x))
    empty = np.full((-len(x) % columns, *x.shape[1:]), np.nan)
    return np.concatenate([x, empty]).reshape(-1, columns, *x.shape[1:])


def principal_axes(centred: Tensor) -> tuple[Tensor, Tensor]:
    """The two leading axes ``[2, d]`` of points ``[N, d]``, and their shares of the variance."""
    variance, axes = torch.linalg.eigh(centred.double().mT @ centred.double())
    axes = axes.flip(-1)[:, :2].mT
    # Either sign is an eigenvector: the largest entry is positive, whatever the library chose.
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    total = variance.sum().clamp(min=torch.finfo(variance.dtype).tiny)
    return axes, variance.flip(-1)[:2].clamp(min=0) / total


def _limits(x: np.ndarray, tail: float) -> tuple[float, float]:
    x = x[np.isfinite(x)]
    if x.size == 0 or (x.min() >= 0 and x.max() <= 1):
        return 0.0, 1.0
    low, high = np.quantile(x, [tail, 1 - tail])
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _edges(ends: Sequence[float], n: int, margin: float) -> tuple[float, float]:
    first, last = ends or (0, n - 1)
    step = (last - first) / (n - 1) if n > 1 else 1.0
    return first - margin * step, last + margin * step


def _points(
    points: np.ndarray,
    names: Sequence[str],
    title: str,
    labels: np.ndarray | None = None,
    label: str = "",
    paths: Iterable[np.ndarray] = (),
    equal: bool = False,
) -> Figure:
    """Draw points ``[..., 1 or 2]``, coloured by class or scale, over the lines joining them."""
    points, (xlabel, ylabel) = points.reshape(-1, len(names)), [*names, "count"][:2]
    figure, axes = panel(fill(title, 70), xlabel, ylabel, (5.4, 4.2))
    classes = _classes(labels)
    if len(names) == 1:
        edges = np.histogram_bin_edges(points, min(60, ceil(len(points) ** 0.5))).tolist()
        parts = [points[labels == each, 0] for each in classes] or [points[:, 0]]
        axes.hist(parts, edges, stacked=True, color=[*classes.values()] or [BLUE])
    else:
        for path in paths:
            axes.plot(*path.reshape(-1, 2).T, color=GREY, lw=0.7, zorder=1)
        colours = BLUE if labels is None else [classes.get(each, each) for each in labels.tolist()]
        area = np.clip(12000 / len(points), 2, 18)
        drawn = axes.scatter(points[:, 0], points[:, 1], area, colours, linewidths=0)
        axes.set_aspect("equal" if equal else "auto", adjustable="datalim")
        if labels is not None and not classes:
            figure.colorbar(drawn, label=label)
    for each, colour in classes.items():
        axes.plot([], [], "o", ms=4, color=colour, label=each)
    if classes:
        axes.legend(title=label, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _classes(labels: np.ndarray | None) -> dict[Any, Any]:
    """Colours of at most 20 classes; none for real values, or more than there are colours."""
    from matplotlib import color_sequences

    names = [] if labels is None or labels.dtype.kind == "f" else np.unique(labels).tolist()
    palette = color_sequences["tab10" if len(names) <= 10 else "tab20"]
    return dict(zip(names, palette, strict=False)) if len(names) <= 20 else {}


def mosaic(
    cells: np.ndarray,
    title: str,
    *,
    x: Sequence[float] = (),
    y: Sequence[float] = (),
    names: Sequence[str] = ("", ""),
    rows: Sequence[str] = (),
    behind: np.ndarray | None = None,
) -> Figure:
    """Draw cells ``[r, c, *shape]``, the centres of the first and last column being at ``x``."""
    (r, c), shape, dims = cells.shape[:2], cells.shape[2:], cells[0, 0].size
    picture = dims == 1 or is_picture(shape)
    behind = cells if behind is None else behind
    low, high = _limits(behind if picture else cells, 0.005 * picture)
    gap, size = int(picture and dims > 1), (r, c)
    if picture:
        cells = cells.reshape(r, c, *(shape if len(shape) == 3 else (1, 1, 1)))
        canvas = _tile((cells - low) / (high - low) if shape[0] == 3 else cells, gap)
        size = canvas.shape[:2]
        dots = int(min(1200 / max(size), 240 * r / size[0], 240 * c / size[1]))
        scale = dots or min(1, 4000 / max(size))
        height, width = (round(n * scale) for n in size)
    else:
        width, height = min(480 * c, 1200), round(min(336 * r, 840 * r / c, 4000))
    bar = picture and shape[0] != 3 and ((low, high) != (0, 1) or dims == 1)
    note = "" if picture else f"each panel: dimension 0 to {dims - 1}, "
    note += "" if picture and (bar or (low, high) == (0, 1)) else f"x from {low:.3g} to {high:.3g}"
    xlabel = "\n".join(filter(None, [names[0], note]))
    left, right = 30 + 110 * bool(names[1]) + 310 * bool(rows), 30 + 170 * bar
    below = 30 + 40 * bool(x) + 40 * len(xlabel.splitlines())
    figure, axes = _panel_of_size(width, height, title, around=(left, right, below))
    axes.set(xlabel=xlabel, ylabel=names[1])
    across = _edges(x, c, 0.5 + 0.5 * gap * c / (size[1] - gap))
    down = _edges(y, r, 0.5 + 0.5 * gap * r / (size[0] - gap))
    if picture:
        drawn = axes.imshow(canvas, "gray", vmin=low, vmax=high, interpolation="nearest")
        drawn.set_extent((*across, *down[::-1]))
    else:
        _profiles(axes, cells, behind, low, high)
    axes.set(xlim=across, ylim=down[::-1], aspect="auto")
    if not x:
        axes.set_xticks([])
    if not y:
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(axis="y", labelsize=11)  # pages show wide figures smaller
    axes.spines[:].set_visible(False)
    if bar:
        box = axes.get_position()
        bar_width = 30 * box.width / width
        beside = figure.add_axes((box.x1 + bar_width, box.y0, bar_width, box.height))
        figure.colorbar(drawn, cax=beside, label="x")
    return figure


def _panel_of_size(
    width: int, height: int, title: str, *, around: tuple[int, int, int]
) -> tuple[Figure, Axes]:
    """A figure with axes of a whole number of dots, and some left, right and below for labels.

    No layout of matplotlib's does that, and a pixel of the data has to be a whole number of dots.
    """
    from matplotlib.figure import Figure

    left, right, below = around
    full = max(left + width + right, 900)
    title = fill(title, (full - left) // 18)
    tall = below + height + 76 + 36 * title.count("\n")
    # The hundredth of a dot keeps inches times dots per inch from being rounded down.
    figure = Figure(((full + 0.01) / DPI, (tall + 0.01) / DPI), dpi=DPI)
    box = left / full, below / tall, width / full, height / tall
    return figure, figure.add_axes(box, title=title)


def is_picture(shape: Sequence[int]) -> bool:
    """Whether events of a shape are drawn as pictures."""
    return len(shape) == 3 and shape[0] in (1, 3)


def _tile(cells: np.ndarray, gap: int) -> np.ndarray:
    """Lay cells ``[r, c, C, H, W]`` out as one picture, grey or RGB, with white between them."""
    r, c, channels, *size = cells.shape
    white: dict[str, Any] = {"constant_values": np.nan}
    framed = np.pad(cells, [(0, 0)] * 3 + [(gap, 0)] * 2, **white).transpose(0, 3, 1, 4, 2)
    canvas = framed.reshape(r * (size[0] + gap), c * (size[1] + gap), channels)
    canvas = np.pad(canvas, [(0, gap), (0, gap), (0, 0)], **white)
    return canvas[..., 0] if channels == 1 else np.nan_to_num(canvas, nan=1.0).clip(0, 1)


def _profiles(axes: Axes, cells: np.ndarray, behind: np.ndarray, low: float, high: float) -> None:
    r, c = cells.shape[:2]
    across = (np.arange(c)[:, None] + np.linspace(0.08, 0.92, cells[0, 0].size)) / c
    for part, colour in ((behind, GREY), (cells, BLUE)):
        up = 0.1 + 0.8 * (part.reshape(r, c, -1) - low) / (high - low)
        pairs = np.broadcast_arrays(across, (np.arange(r)[::-1, None, None] + up) / r)
        lines = [each.reshape(r * c, -1).T for each in pairs]
        axes.plot(*lines, color=colour, lw=0.8, transform=axes.transAxes)
    axes.set_facecolor("#f4f4f4")
    for rule, n in ((axes.vlines, c), (axes.hlines, r)):
        at = np.arange(n + 1) / n
        rule(at, 0, 1, transform=axes.transAxes, color="white", lw=3, zorder=1)
