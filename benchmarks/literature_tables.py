"""The tables of docs/literature.md and of the README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from literature_rows import ROWS
from tables import markdown

__all__ = ["TABLES"]

RESULTS = Path(__file__).resolve().parent / "results" / "literature.json"


def literature() -> str:
    """Every row: what was published, and what was reached, if it was trained to its end."""
    found: dict[str, dict] = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    head = [
        "model", "published", "NLL, K = 5,000", "ELBO", "annealed less sampled", "images",
        "gap", "k-hat > 0.7", "epochs", "CPU hours",
    ]  # fmt: skip
    body = []
    for row in ROWS:
        runs = [found[key] for key in found if key.partition("/")[0] == row.name]
        each = runs or [None]
        published = f"[{row.published:.2f}]({row.source.partition('(')[2]}"
        body += [
            [_title(run, found) if run else row.title, published, *_reached(run)] for run in each
        ]
    return markdown(head, body)


def literature_trained() -> str:
    """The rows that were trained, in few words: for the README."""
    found: dict[str, dict] = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    order = {row.name: number for number, row in enumerate(ROWS)}
    body = []
    for key in sorted(found, key=lambda key: order[key.partition("/")[0]]):
        run = found[key]
        hidden = run["NLL of these images"] - run["annealed NLL"]
        body.append(
            [
                _title(run, found),
                f"{run['published']:.2f}",
                f"≤ {run['NLL']:.2f} ± {run['± over data']:.2f}{_of(run)}",
                f"{hidden:.2f}",
                f"{run['annealed images']:,}",
                f"{run['steps']:,}",
                f"{run['CPU hours']:.2f}",
            ]
        )
    head = [
        "model", "published", "NLL, K = 5,000", "annealing: less by", "on images", "steps",
        "CPU hours",
    ]  # fmt: skip
    return markdown(head, body)


def literature_posterior() -> str:
    """What the guide of each row does: the two parts of its ELBO, and the latents that are used."""
    found: dict[str, dict] = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    head = [
        "model", "rate", "distortion", "active units", "refined less own ELBO", "parameters",
        "steps",
    ]  # fmt: skip
    body = [
        [
            _title(run, found),
            f"{run['rate']:.2f}",
            f"{run['distortion']:.2f}",
            ", ".join(f"{name} {units}" for name, units in run["active units"].items()),
            f"{run['amortization gap']:+.2f} ± {run['amortization gap ±']:.2f}",
            f"{run['parameters']:,}",
            f"{run['steps']:,}",
        ]
        for run in found.values()
    ]
    return markdown(head, body)


def _reached(run: dict[str, Any] | None) -> list[str]:
    if run is None:
        return ["not trained", *["–"] * 7]
    # Epochs of the row whose networks this one begins with, if it does.
    epochs = [*run.get("epochs before", []), run["epochs"]]
    return [
        f"≤ {run['NLL']:.2f} ± {run['±']:.3f} ± {run['± over data']:.2f}{_of(run)}",
        f"{run['ELBO']:.2f}",
        f"{run['annealed NLL'] - run['NLL of these images']:+.2f} ± {run['annealed ±']:.3f}",
        f"{run['annealed images']:,}",
        f"{run['bidirectional gap']:.2f} ± {run['bidirectional gap ±']:.2f}",
        f"{run['k-hat > 0.7']:.0%}",
        " + ".join(map(str, epochs)),
        f"{run['CPU hours']:.2f}",
    ]


def _title(run: dict[str, Any], found: dict[str, dict]) -> str:
    """A row's title, with the seed where it was trained from several."""
    several = sum(run["title"] == each["title"] for each in found.values()) > 1
    return f"{run['title']}, seed {run['seed']}" if several else run["title"]


def _of(run: dict[str, Any]) -> str:
    """How many test images a row was measured on, if not on all."""
    return "" if run["test images"] == 10_000 else f" ({run['test images']:,} images)"


TABLES = {table.__name__: table for table in (literature, literature_trained, literature_posterior)}
