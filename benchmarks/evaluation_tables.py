"""The tables of docs/evaluation.md, from results/evaluation.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tables import markdown

__all__ = ["TABLES"]

RESULTS = Path(__file__).resolve().parent / "results" / "evaluation.json"
NAMES = ("VAE", "IWAE")


def estimates() -> str:
    """One row an estimate, the two models side by side."""
    parts = _parts()
    kinds = {name.partition("/")[2] for name in parts if name.startswith(f"{NAMES[0]}/")}
    head = ["estimate"]
    for name in NAMES:
        head += [f"{name}: log p(x)", "k-hat > 0.7", "CPU s"]
    body = [
        [_label(kind, parts), *(cell for name in NAMES for cell in _cells(parts[f"{name}/{kind}"]))]
        for kind in sorted(kinds, key=lambda kind: (kind[0] != "K", len(kind), kind))
        if kind not in ("training", "sandwich") and all(f"{n}/{kind}" in parts for n in NAMES)
    ]
    return markdown(head, body)


def gaps() -> str:
    """What amortization costs, and how far annealing may be from log p(x)."""
    parts = _parts()
    head = ["nats per datum", *NAMES]
    rows = {
        "ELBO of all 10,000 test images": lambda n: f"{parts[f'{n}/training']['test ELBO']:.2f}",
        "amortization gap": lambda n: _pm(parts[f"{n}/refined"], "amortization gap", "± of it"),
        "best normal's gap to log p(x) (annealing)": lambda n: (
            f"{parts[f'{n}/annealed']['log p(x)'] - parts[f'{n}/refined']['refined ELBO']:.2f}"
        ),
        "bidirectional gap of annealing": lambda n: _pm(parts[f"{n}/sandwich"], "gap", "±"),
        "its CPU seconds": lambda n: f"{parts[f'{n}/sandwich']['CPU seconds']:.0f}",
    }
    return markdown(head, [[label, *map(cell, NAMES)] for label, cell in rows.items()])


def coverage() -> str:
    """Stated errors against those made, on oracles."""
    head = ["oracle", "estimate", "mean error", "spread", "stated", "within 1", "within 2",
            "k-hat > 0.7"]  # fmt: skip
    body = [
        [
            row["oracle"],
            row["estimate"],
            *(f"{row[key]:.4f}" for key in ("mean error", "spread", "stated")),
            *(f"{row[key]:.0%}" for key in ("within 1", "within 2", "k-hat > 0.7")),
        ]
        for row in _parts()["coverage"]["rows"]
    ]
    return markdown(head, body)


def _cells(part: dict) -> list[str]:
    share = f"{part['k-hat > 0.7']:.0%}" if "k-hat > 0.7" in part else "–"
    return [f"{part['log p(x)']:.2f} ± {part['±']:.3f}", share, f"{part['CPU seconds']:.0f}"]


def _label(kind: str, parts: dict) -> str:
    if kind == "refined":
        return f"K = {parts[f'{NAMES[0]}/{kind}']['samples']}, guide refined for each image"
    if kind == "annealed":
        return f"annealing, {parts[f'{NAMES[0]}/{kind}']['samples']} chains"
    return kind


def _pm(part: dict, key: str, error: str) -> str:
    return f"{part[key]:.2f} ± {part[error]:.2f}"


def _parts() -> dict[str, dict]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))["parts"]


TABLES: dict[str, Callable[[], str]] = {
    f"evaluation_{table.__name__}": table for table in (estimates, gaps, coverage)
}
