"""The tables of docs/sequences.md."""

from __future__ import annotations

import json
from pathlib import Path

from tables import markdown

__all__ = ["PUBLISHED", "TABLES"]

RESULTS = Path(__file__).resolve().parent / "results" / "sequences.json"
LOOP = "Pyro's, the tutorial's network"
FLOWS = {0: "no flow", 1: "one flow", 2: "two flows"}
PUBLISHED = {
    "the paper's bound": -6.93,
    "bound of Pyro's tutorial": -6.87,
    "the same, one flow": -6.82,
    "the same, two flows": -6.80,
}


def sequences() -> str:
    """What was reached on the test chorales, beside what was published."""
    rows = [[name, f"{number:.2f}"] for name, number in PUBLISHED.items()]
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    for found in (results[name] for name in results if name.startswith("train")):
        flows, log_p = found["settings"].get("flows", 0), f"log p(x), K = {found['samples']:,}"
        after = f"after {found['epochs']} epochs"
        rows += [
            [f"ours, {FLOWS[flows]}, {after}: bound", f"{found['bound']:.3f}"],
            [f"the same, {log_p}", f"≥ {found['log p']:.3f}"],
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


def sequences_flows() -> str:
    """The validation bound of the guide without a flow and with one."""
    rows = [
        [str(row["settings"]["flows"]), f"{row['valid bound']:.3f}", f"{row['CPU seconds']:.0f}"]
        for row in _results("flows")["rows"]
    ]
    return markdown(["flows", "validation bound, nats per quarter", "CPU seconds"], rows)


def filtering() -> str:
    """Filters beside other estimates, on the chorales."""
    found = json.loads(RESULTS.with_name("filtering.json").read_text(encoding="utf-8"))
    keys, specs = ("CPU seconds", "log p", "sd"), (".1f", ".3f", ".2f")
    rows = [
        [row["estimate"], *(f"{row[k]:{s}}" for k, s in zip(keys, specs, strict=True))]
        for row in found["chorales"]["rows"]
    ]
    return markdown(["chorales", "CPU seconds", "nats per quarter", "sd over runs"], rows)


def filtering_exact() -> str:
    """The same where log p(x) is known."""
    found = json.loads(RESULTS.with_name("filtering.json").read_text(encoding="utf-8"))
    rows = found["linear"]["rows"]
    guides = list(dict.fromkeys(row["guide"] for row in rows))
    off = {(row["estimate"], row["guide"]): f"{row['off by']:.2f}" for row in rows}
    body = [
        [row["estimate"], f"{row['CPU seconds']:.2f}", *(off[row["estimate"], g] for g in guides)]
        for row in rows
        if row["guide"] == guides[0]
    ]
    head = ["walk of 100 steps", "CPU seconds", *(f"off by, guide {g}" for g in guides)]
    return markdown(head, body)


def _results(part: str) -> dict:
    return json.loads(RESULTS.read_text(encoding="utf-8"))[part]


TABLES = {
    table.__name__: table
    for table in (sequences, sequences_time, sequences_flows, filtering, filtering_exact)
}
