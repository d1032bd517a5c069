"""Time per step against one size at a time."""

from __future__ import annotations

from collections.abc import Callable

from speed_contenders import BEST, OURS
from speed_problem import Problem
from speed_race import compare
from torch import Tensor

__all__ = ["SIZES", "SWEEPS", "sweep"]

SIZES = (
    ("784-400-20", 128),
    ("784-400-20", 512),
    ("784-200-200-50", 20),
    ("784-200-200-50", 100),
    ("784-200-200-50", 1000),
    ("convolutional", 128),
)
SWEEPS: dict[str, tuple[tuple[int, ...], Callable[[int], dict]]] = {
    "batch": ((32, 128, 512, 2048), lambda n: {"networks": "784-400-20", "batch": n}),
    "width": ((100, 400, 1600), lambda n: {"networks": f"784-{n}-20", "batch": 128}),
    "particles": (
        (1, 5, 50),
        lambda n: {"networks": "784-400-20", "batch": 128, "particles": n},
    ),
    "sites": ((1, 4, 20), lambda n: {"networks": "784-400-20", "batch": 128, "sites": n}),
}
SWEPT = ("hand-written", f"{BEST}: step", "Pyro SVI", "pyrovae, eager", OURS)


def sweep(
    name: str, images: Tensor, device: str, rounds: int, known: dict[Problem, dict]
) -> list[dict]:
    """One row for each value, as :func:`speed_race.compare` gives it.

    Args:
        name: What is varied, of :data:`SWEEPS`.
        images: uint8.
        device: Where.
        rounds: How many turns each contender takes.
        known: What has been measured in this process already; it is added to.
    """
    values, size = SWEEPS[name]
    rows = []
    for n in values:
        problem = Problem(**size(n), device=device)
        if problem not in known:
            known[problem] = compare(list(SWEPT), problem, images, rounds)
        rows.append({name: n} | {c: known[problem][c] for c in (*SWEPT, BEST)})
    return rows
