"""The tables of docs/imputation.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

from tables import markdown

RESULTS = Path(__file__).resolve().parent / "results" / "imputation.json"
# Means over five seeds, of the paper's table of UCI data.
KINDS = ("from the file", "stated")
RIVALS = ("IterativeImputer", "KNNImputer", "mean")
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


def imputation_table() -> str:
    """The held-out bound, and the errors of hidden cells with their spread over seeds."""
    found = _results()["flchain"]
    rows = {kinds: [r for r in found["rows"] if r["kinds"] == kinds] for kinds in KINDS}
    ways = {"pyrovae": "`impute`", **{name: name for name in RIVALS}}
    head = ["column", "kind", *ways.values(), "`impute`, kinds stated"]
    body = []
    for column, kind in found["kinds_of_file"].items():
        cells = [[r["cells"][way][column] for r in rows[KINDS[0]]] for way in ways]
        cells.append([r["cells"]["pyrovae"][column] for r in rows[KINDS[1]]])
        body.append([column, kind, *(f"{mean(c):.3f} ± {stdev(c):.3f}" for c in cells)])
    return markdown(head, body)


def imputation_log_p() -> str:
    found = _results()["flchain"]
    head = ["kinds", "seed", "log p(x observed), test", "k-hat > 0.7", "epochs", "CPU seconds"]
    body = [
        [
            row["kinds"],
            str(row["seed"]),
            f"{row['log p']:.3f} ± {row['±']:.3f} (± {row['± over data']:.2f} over rows)",
            f"{row['k-hat > 0.7']:.1%}",
            str(row["epochs"]),
            f"{row['seconds']:.0f}",
        ]
        for row in found["rows"]
    ]
    return markdown(head, body)


def imputation_exact() -> str:
    rows = _results()["exact"]["rows"]
    head = ["number", "mean square of error / stated error", "largest"]
    body = [[row["of"], f"{row['mean square']:.2f}", f"{row['largest']:.1f}"] for row in rows]
    return markdown(head, body)


def _results() -> dict:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (imputation_cancer, imputation_exact, imputation_table, imputation_log_p)
}
