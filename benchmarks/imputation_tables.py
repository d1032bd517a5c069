"""The tables of docs/imputation.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

from tables import markdown

RESULTS = Path(__file__).resolve().parent / "results" / "imputation.json"
# Means over five seeds, of the paper's table of UCI data.
PAPER = {"MIWAE (the paper's)": "0.28", "missForest (the paper's)": "0.29"}


def imputation_cancer() -> str:
    rows = _results()["cancer"]["rows"]
    names = ("pyrovae", "IterativeImputer", "KNNImputer", "mean")
    body = []
    for name in names:
        found = [row[name] for row in rows]
        shown = "`gaussian` × `mean_field`, `impute`" if name == "pyrovae" else name
        body.append([shown, f"{mean(found):.3f} ± {stdev(found) / len(found) ** 0.5:.3f}"])
    body += [[name, value] for name, value in PAPER.items()]
    return markdown(["imputed by", f"mean square error, {len(rows)} seeds"], body)


def imputation_exact() -> str:
    rows = _results()["exact"]["rows"]
    head = ["number", "mean square of error / stated error", "largest"]
    body = [[row["of"], f"{row['mean square']:.2f}", f"{row['largest']:.1f}"] for row in rows]
    return markdown(head, body)


def _results() -> dict:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table for table in (imputation_cancer, imputation_exact)
}
