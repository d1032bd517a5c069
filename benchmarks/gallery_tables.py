"""The tables of docs/models.md, from results/gallery.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gallery_rows import GROUPS, ROWS, Row
from tables import markdown

__all__ = ["TABLES", "protocol"]

RESULTS = Path(__file__).resolve().parent / "results" / "gallery.json"


def group_table(group: str) -> str:
    """One row a program: its two lines, its paper, its numbers, its samples."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    rows = [row for row in ROWS if row.group == group and row.name in found]
    head = ["program", "prior or likelihood; posterior", "paper", "ELBO", "log p(x)", "samples"]
    if any("difference" in found[row.name] for row in rows):
        head.insert(5, "against the first row")
    body = [_cells(row, found[row.name], len(head) == 7) for row in rows]
    return markdown(head, body)


def protocol() -> str:
    """What all rows have in common, and the heavier ones have of their own."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    about = found["about"]["protocol"]
    common = {"epochs": about["epochs"], "test images": about["images"]}
    own = [
        f"{name}: {row['epochs']} epochs on {row['training images']:,} images"
        f"{_rate(row)}, log p(x) of {row['test images']} with K = {row['samples']}"
        for name, row in found["rows"].items()
        if row["samples"] != about["samples"] or any(row[k] != v for k, v in common.items())
    ]
    text = (
        f"{about['epochs']} epochs, log p(x) of the first {about['images']:,} test images with "
        f"K = {about['samples']:,}."
    )
    return "  \n".join([text, *(f"But {line}." for line in own)])


def _rate(found: dict) -> str:
    rate = found.get("lr", 1e-3)
    return "" if rate == 1e-3 else f" at a rate of {rate:g}"


def _cells(row: Row, found: dict, compared: bool) -> list[str]:
    objective = "" if row.objective == "trace_elbo" else f", trained by `{row.objective}`"
    particles = f" with {row.particles} particles" if row.particles > 1 else ""
    bits = found["bits per dimension"]
    value = f"{found['log p(x)']:.2f}" + ("" if bits is None else f" ({bits:.2f} bits/dim)")
    width = 360 if row.group == "colour" else 120
    cells = [
        f"`{row.model}` × `{row.guide}`{objective}{particles}",
        "; ".join(row.lines).replace("|", "\\|"),
        row.paper,
        f"{found['ELBO']:.2f}",
        value,
        f'<img src="figures/gallery/{row.name}.png" width="{width}" alt="samples of {row.name}">',
    ]
    if compared:
        difference = found.get("difference")
        error = found.get("± of it")
        than = " to the row above" if row.base else ""
        cells.insert(5, "–" if difference is None else f"{difference:+.2f} ± {error:.2f}{than}")
    return cells


TABLES: dict[str, Callable[[], str]] = {
    f"gallery_{group}": partial(group_table, group) for group in GROUPS
} | {"gallery_protocol": protocol}
