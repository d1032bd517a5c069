"""The tables of docs/sequences.md."""

from __future__ import annotations

import json
from pathlib import Path

from tables import markdown

__all__ = ["PUBLISHED", "TABLES"]

RESULTS = Path(__file__).resolve().parent / "results" / "sequences.json"
LOOP = "Pyro's, the tutorial's network"
PUBLISHED = {
    "the paper's bound": -6.93,
    "bound of Pyro's tutorial": -6.87,
    "the same, one flow": -6.82,
    "the same, two flows": -6.80,
}


def sequences() -> str:
    """What was reached on the test chorales, beside what was published."""
    found = _results("train")
    rows = [
        [f"bound, after {found['epochs']} epochs", f"{found['bound']:.3f}"],
        [f"log p(x), K = {found['samples']:,}", f"≥ {found['log p']:.3f}"],
        *([name, f"{number:.2f}"] for name, number in PUBLISHED.items()),
    ]
    return markdown(["test chorales", "nats per quarter"], rows)


def sequences_time() -> str:
    """CPU seconds of an epoch, beside a loop of sample statements."""
    found = _results("time")
    rows = [
        ["`sequence` × `sequence`, compiled", f"{found['CPU seconds an epoch']:.1f}"],
        ["a sample statement for each step, the tutorial's sizes", f"{found[LOOP]:.1f}"],
    ]
    return markdown(["229 chorales", "CPU seconds an epoch"], rows)


def _results(part: str) -> dict:
    return json.loads(RESULTS.read_text(encoding="utf-8"))[part]


TABLES = {table.__name__: table for table in (sequences, sequences_time)}
