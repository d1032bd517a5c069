"""Contenders taking turns: the same training, then time for time."""

from __future__ import annotations

import time
from statistics import median, quantiles

import torch
from speed_contenders import BEST, FLOOR, enter
from speed_floor import fastest, flops, products
from speed_problem import CONVOLUTIONAL, IMAGES, Problem, Race
from torch import Tensor

from pyrovae._tools.seeding import seeded

__all__ = ["check", "compare", "floor_of", "ratio", "synchronize"]

TRAINING = {"cpu": 60, "cuda": 400}
HEAVY = 8
"""How much more work a step of the convolutional pair is than one of the others."""
TOLERANCE = 0.03


def compare(
    names: list[str], problem: Problem, images: Tensor, rounds: int
) -> dict[str, dict | str]:
    """Train every contender from the same weights, then time them in turns.

    Returns:
        By contender: the median of its turns and their first and ninth decile, in milliseconds a
        step; each turn, as they came; the seconds to the end of the first turn, with whatever it
        compiles; and the loss at the end of the training, in nats per datum.

    Raises:
        SystemExit: If they have not reached the same loss.
    """
    # Else torch.compile gives up on a contender that it has compiled for eight problems before.
    torch.compiler.reset()
    races, absent = enter(names, problem, images)
    found: dict[str, dict] = {name: {} for name in races}
    for name, run in races.items():
        found[name] |= _train(name, run, problem)
    check({name: row["loss"] for name, row in found.items() if name != FLOOR})
    turns: dict[str, list[float]] = {name: [] for name in races}
    for number in range(rounds):
        for name, run in races.items():
            index = _rows(problem, _turn(problem), seed=1000 + number)
            turns[name].append(1e3 * _timed(run, index) / len(index))
    for name, times in turns.items():
        low, *_, high = quantiles(times, n=10) if len(times) > 1 else times * 2
        found[name] |= {"ms": median(times), "deciles": [low, high], "turns": times}
    return found | {"absent": absent} | _best(found)


def ratio(found: dict, ours: str, theirs: str) -> float | None:
    """The median over rounds of one contender's time over another's in the same round."""
    if ours not in found or theirs not in found:
        return None
    pairs = zip(found[ours]["turns"], found[theirs]["turns"], strict=True)
    return median(a / b for a, b in pairs)


def floor_of(problem: Problem, images: Tensor) -> dict:
    """What the matrix products of a step are, and which kernels are fastest."""
    made = products(problem, images)
    return {"gigaflop": flops(made) / 1e9, "kernels": fastest(made)[1]}


def synchronize() -> None:
    """Wait until the device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _best(found: dict) -> dict:
    """The fastest of what is written by hand and compiled."""
    times = {name: row["ms"] for name, row in found.items() if name.startswith(BEST)}
    if not times:
        return {}
    fastest = min(times, key=times.get)
    return {BEST: found[fastest] | {"variant": fastest.removeprefix(f"{BEST}: ")}}


def _train(name: str, run: Race, problem: Problem) -> dict:
    turn, losses, seconds = _turn(problem), [], []
    steps = turn if name == FLOOR else _training(problem)
    with seeded(1, problem.device):
        for number in range(steps // turn):
            index = _rows(problem, turn, seed=number)
            started = time.perf_counter()
            losses += [float(loss) / problem.batch for loss in run(index)]
            seconds.append(time.perf_counter() - started)
    last = losses[-len(losses) // 3 :]
    return {"first turn, s": seconds[0], "loss": sum(last) / len(last)}


def _training(problem: Problem) -> int:
    """How many steps the losses are compared after."""
    halved = problem.device == "cpu" and problem.networks == CONVOLUTIONAL
    return TRAINING[problem.device] // (2 if halved else 1)


def _turn(problem: Problem) -> int:
    """How many steps a turn has."""
    if problem.device == "cuda":
        return 100
    work = problem.batch * problem.particles * (HEAVY if problem.networks == CONVOLUTIONAL else 1)
    return 20 if work <= 128 else 10 if work <= 512 else 5


def _rows(problem: Problem, steps: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(IMAGES, (steps, problem.batch), generator=generator)
    return index.to(problem.device)


def _timed(run: Race, index: Tensor) -> float:
    synchronize()
    started = time.perf_counter()
    run(index)
    synchronize()
    return time.perf_counter() - started


def check(losses: dict[str, float]) -> None:
    """End where contenders have not come to the same loss."""
    low, high = min(losses.values()), max(losses.values())
    if not high - low <= TOLERANCE * abs(low):
        raise SystemExit(f"Not the same training, nats per datum: {losses}")
