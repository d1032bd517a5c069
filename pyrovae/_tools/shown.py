"""How a result shows itself: the few numbers that matter, as text and as a table in a notebook."""

from __future__ import annotations

import textwrap
from html import escape
from importlib import import_module
from typing import Any, NamedTuple

from pyrovae._tools import standard_error

WIDTH = 100
# What float64 leaves of zero in sums of thousands of nats: no error worth telling.
ROUNDING = 1e-9
MOST = 7  # rows; with the title and two lines of verdict a text has ten lines at most


class Told(NamedTuple):
    """What a result shows: a title, rows of a name and a value with its unit, and a verdict."""

    title: str
    rows: list[tuple[str, str]]
    verdict: str = ""


class Shown:
    """Shows what ``_told()`` says, in place of every tensor that the object holds."""

    def _told(self) -> Told:
        raise NotImplementedError

    def __repr__(self) -> str:
        return text(self)

    def _repr_html_(self) -> str:
        return html(self)


def text(result: Any) -> str:
    """At most ten lines."""
    told = _of(result)
    rows, more = told.rows[:MOST], len(told.rows) - MOST
    if more > 0:
        rows = [*rows[:-1], ("…", f"and {more + 1} more")]
    wide = max((len(name) for name, _ in rows), default=0)
    body = [f"  {name:<{wide}}  {_short(value, WIDTH - wide - 4)}" for name, value in rows]
    verdict = textwrap.wrap(told.verdict, WIDTH, max_lines=2, placeholder=" …")
    return "\n".join([told.title, *body, *verdict])


def html(result: Any) -> str:
    """The same as a table, all rows and the whole verdict."""
    told = _of(result)
    rows = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th>'
        f'<td style="text-align:left">{escape(value)}</td></tr>'
        for name, value in told.rows
    )
    verdict = f"<p>{escape(told.verdict)}</p>" if told.verdict else ""
    return f"<div><strong>{escape(told.title)}</strong><table>{rows}</table>{verdict}</div>"


def figures() -> Any:
    """What draws results; it stands on them all, so that it is imported by its name."""
    return import_module("pyrovae.reporting.posterior_figures")


def number(value: float | None) -> str:
    """Three decimals, or three digits where decimals would hide or bury it."""
    if value is None or value != value:
        return "unknown"
    if ROUNDING < abs(value) < 1e-3 or abs(value) >= 1e6:
        return f"{value:.3g}"
    return f"{0.0 if abs(value) < ROUNDING else value:.3f}"


def counted(count: int, one: str) -> str:
    """How many of something, ``1 epoch`` or ``2 epochs``."""
    return f"{count:,} {one}{'' if count == 1 else 's'}"


def plus_minus(error: float | None, kind: str = "") -> str:
    """`` ± 0.012 (kind)``; nothing where an error is unknown, or what rounding leaves."""
    if error is None or not error > ROUNDING:
        return ""
    return f" ± {number(error)}" + (f" ({kind})" if kind else "")


def mean(values: Any) -> str:
    """The mean over data of ``[N]`` nats, with its standard error if it has one."""
    values = values.double()
    return number(values.mean().item()) + plus_minus(standard_error(values).item())


def _of(result: Any) -> Told:
    """What a result says of itself; of a tuple of values ``[N]`` in nats, their means."""
    if hasattr(result, "_told"):
        return result._told()
    rows = [(name, f"{mean(getattr(result, name))} nats per datum") for name in result._fields]
    return Told(f"{type(result).__name__} of {len(result[0])} data (± over data)", rows)


def _short(value: str, width: int) -> str:
    return textwrap.shorten(value, width, placeholder=" …") if len(value) > width else value
