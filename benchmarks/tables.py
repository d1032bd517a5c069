"""What the scripts share: tables in text, numbers for JSON, and where they come from."""

from __future__ import annotations

import json
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import pyrovae

__all__ = ["machine", "markdown", "show", "write"]


def show(table: list[dict], spec: str) -> None:
    """Print the entries of a table that are no lists."""
    names = [name for name, value in table[0].items() if not isinstance(value, list)]
    cells = [names]
    for row in table:
        values = (row[name] for name in names)
        cells.append([format(v, spec) if isinstance(v, float) else str(v) for v in values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print()
    for line in cells:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def markdown(head: list[str], body: list[list[str]]) -> str:
    """A table as the documents have it."""
    rows = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def machine() -> dict:
    """The software and the processor that the numbers come from."""
    info = Path("/proc/cpuinfo")
    names = [s for s in info.read_text().splitlines() if "model name" in s] if info.exists() else []
    packages = ("torch", "pyro-ppl", "numpy")
    return {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages} | {"pyrovae": pyrovae.__version__},
        "processor": names[0].partition(":")[2].strip() if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def write(path: Path, results: dict) -> None:
    """Write results as JSON, floats with five digits and a list of numbers on one line."""
    text = json.dumps(_rounded(results), indent=1, ensure_ascii=False)
    text = re.sub(r"\[([^\[\]{}]*)\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
