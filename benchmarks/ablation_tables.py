"""The table of what each part of a recipe is worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tables import markdown

__all__ = ["TABLES"]

RESULTS = Path(__file__).resolve().parent / "results"


def ablation() -> str:
    """Every variant beside the recipe, after 12 epochs."""
    return _table("ablation.json")


def ablation_long() -> str:
    """Some variants beside the recipe, after 100 epochs."""
    return _table("ablation_long.json")


def _table(name: str) -> str:
    """Variants beside the recipe on validation images; on test images as far as measured."""
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    tested = any("test NLL" in row for row in found["rows"].values())
    head = ["variant", "parameters", "validation NLL", "less the recipe's", "ELBO"]
    head += ["test NLL", "less the recipe's"] if tested else []
    body = []
    for key, row in found["rows"].items():
        cells = [
            row["title"],
            f"{row['parameters']:,}",
            f"{row['validation NLL']:.2f} ± {row['± over data']:.2f}",
            _less(row, key, ""),
            f"{row['validation ELBO']:.2f}",
        ]
        if tested:
            known = "test NLL" in row
            cells += [f"{row['test NLL']:.2f}", _less(row, key, "test: ")] if known else ["–", "–"]
        body.append(cells)
    return markdown(head, body)


def _less(row: dict[str, Any], key: str, prefix: str) -> str:
    if key.startswith("recipe/"):
        return "0"
    if f"{prefix}±" not in row:
        return "–"
    return f"{row[f'{prefix}less the recipe']:+.2f} ± {row[f'{prefix}±']:.2f}"


TABLES = {table.__name__: table for table in (ablation, ablation_long)}
