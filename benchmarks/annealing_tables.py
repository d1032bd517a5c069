"""The table of what annealing costs in docs/evaluation.md, from results/annealing.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tables import markdown

__all__ = ["TABLES"]

RESULTS = Path(__file__).resolve().parent / "results" / "annealing.json"


def costs() -> str:
    """A row for each pair: the estimate, how tight it is, and its time against its products."""
    head = [
        "pair",
        "T",
        "log p(x)",
        "median ESS",
        "bidirectional gap",
        "CPU s",
        "products",
        "ratio",
    ]
    body = [
        [
            row["pair"],
            f"{row['temperatures']}",
            f"{row['log p(x)']:.2f} ± {row['±']:.3f}",
            f"{row['median ESS']:.1f}",
            f"{row['gap']:.2f} ± {row['± of it']:.2f}",
            f"{row['CPU seconds']:.0f}",
            f"{row['products']:.0f}",
            f"{row['ratio']:.2f}",
        ]
        for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    ]
    return markdown(head, body)


TABLES: dict[str, Callable[[], str]] = {"annealing_costs": costs}
