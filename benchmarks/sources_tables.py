"""The table of docs/benchmarks.md on data that stay on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

from tables import markdown

__all__ = ["TABLES"]

RESULTS = Path(__file__).resolve().parent / "results" / "sources.json"


def sources_memory() -> str:
    """The peak of memory, and what of it is the order of an epoch's rows."""
    head = ["`memory=`", "file", "peak above that of 8,192 rows", "order of the rows", "all else"]
    body = []
    for row in _rows("memory"):
        order, more = row["order of an epoch, GiB"], row["difference, GiB"]
        sizes = row["memory=, GiB"], row["file GiB"], more, order, more - order
        body.append([f"{size:.3f} GiB" for size in sizes])
    return markdown(head, body)


def sources_epochs() -> str:
    """Processor time of an epoch from disk, and its ratio to one of the same rows in memory."""
    names = [f"{how} / memory, {kind}" for how in ("disk", "cold disk") for kind in ("CPU", "time")]
    head = ["source", "rows", "load_data, CPU s", "an epoch in memory, CPU s"]
    body = []
    for row in _rows("epochs"):
        ratios = [f"{row[name]:.2f}" if name in row else "–" for name in names]
        size, lone = f"{row['rows']:,} × {row['columns']}", median(row["memory, CPU s"])
        seconds = f"{row['load_data, CPU s']:.1f}", f"{lone:.1f}"
        body.append([f"`{row['source']}`", size, *seconds, *ratios])
    return markdown([*head, *(name.replace(" / ", " ÷ ") for name in names)], body)


def sources_first() -> str:
    """When an evaluation shows its bar, and when its first data are done."""
    names = [f"{what}, {unit}" for what in ("bar", "first data") for unit in ("CPU s", "s")]
    rows = _rows("first")
    cells = [f"{median(row[name] for row in rows):.1f}" for name in names]
    return markdown(["rows", *names], [[f"{rows[0]['rows']:,}", *cells]])


def _rows(part: str) -> list[dict]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))[part]["rows"]


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table for table in (sources_memory, sources_epochs, sources_first)
}
