"""The table of docs/benchmarks.md on data that stay on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tables import markdown

__all__ = ["TABLES"]

RESULTS = Path(__file__).resolve().parent / "results" / "sources.json"


def sources_memory() -> str:
    """The peak of memory, and what of it is the order of an epoch's rows."""
    head = ["`memory=`", "file", "peak above that of 2,000 rows", "order of the rows", "all else"]
    body = []
    for row in _rows("memory"):
        order, more = row["order of an epoch, GiB"], row["difference, GiB"]
        sizes = row["memory=, GiB"], row["file GiB"], more, order, more - order
        body.append([f"{size:.3f} GiB" for size in sizes])
    return markdown(head, body)


def _rows(part: str) -> list[dict]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))[part]["rows"]


TABLES: dict[str, Callable[[], str]] = {"sources_memory": sources_memory}
