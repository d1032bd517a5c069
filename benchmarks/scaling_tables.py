"""What the documents quote from results/scaling.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tables import markdown

__all__ = ["TABLES"]

RESULTS = Path(__file__).resolve().parent / "results" / "scaling.json"


def scaling() -> str:
    """The exponents of time and memory for each size."""
    body = []
    for name, found in _results().items():
        if name.startswith("processes"):
            continue
        rows = [row for row in found["rows"] if "hand" not in row["contender"]]
        contender, ends = rows[0]["contender"], (rows[0], rows[-1])
        exponents = [found["exponents"][f"{contender}, {what}"] for what in ("ms", "MiB")]
        body.append([
            f"{name}, {found['unit']}",
            " to ".join(f"{row['value']:,}" for row in ends),
            " to ".join(_short(row["ms"]) for row in ends),
            *(f"{exponents[0][part]:.2f}" for part in ("all", "larger half")),
            " to ".join(f"{row['MiB']:.3g}" for row in ends),
            *(f"{exponents[1][part]:.2f}" for part in ("all", "larger half")),
        ])  # fmt: skip
    head = ["varied, and what is timed", "from, to", "CPU ms", "exponent", "of the larger half"]
    about = found["about"]
    told = f"{about['processor']}, 1 thread, torch {about['versions']['torch']}:\n\n"
    return told + markdown([*head, "peak MiB", "exponent", "of the larger half"], body)


def scaling_sites() -> str:
    """A step with many latent sites, beside the compiled one by hand."""
    rows = _results()["latent sites"]["rows"]
    body = []
    for value in dict.fromkeys(row["value"] for row in rows):
        ours, hand = (row for row in rows if row["value"] == value)
        each = sorted(a / b for a, b in zip(ours["turns"], hand["turns"], strict=True))
        body.append([
            str(value), f"{ours['ms']:.3g}", f"{hand['ms']:.3g}", f"{each[len(each) // 2]:.2f}"
        ])  # fmt: skip
    return markdown(["latent sites", "CPU ms a step", "by hand, compiled", "ratio"], body)


def scaling_processes() -> str:
    """What sharing a step among processes brings."""
    parts = [found for name, found in _results().items() if name.startswith("processes")]
    rows = [row for found in parts for row in found["rows"]]
    body = [
        [
            f"{row['step']}, {row['ranks']} of one thread",
            {"one": "–", "strong": "shared batch", "weak": "a batch each"}[row["scaling"]],
            str(row["batch"]),
            f"{row['ms']:.0f}",
            f"{row['efficiency']:.0%}",
        ]
        for row in rows
    ]
    head = [
        f"{parts[0]['networks']}, processes",
        "scaling",
        "rows a step",
        "ms a step",
        "efficiency",
    ]
    return markdown(head, body)


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table for table in (scaling, scaling_sites, scaling_processes)
}


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _results() -> dict:
    return json.loads(RESULTS.read_text(encoding="utf-8"))
