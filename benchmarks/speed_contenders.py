"""Who takes part, by name, and who cannot here."""

from __future__ import annotations

from collections.abc import Callable

from speed_floor import floor
from speed_hand import compiled_loss, compiled_step, eager, graphed
from speed_numpyro import by_numpyro
from speed_problem import Problem, Race
from speed_pyro import by_pyro, by_pyro_jit, graph_alone, ours, ours_compiled
from speed_pythae import by_pythae
from torch import Tensor

__all__ = ["ALONE", "BEST", "CONTENDERS", "FLOOR", "OURS", "enter", "variants"]

BEST, FLOOR, OURS = "hand-written, compiled", "matrix products alone", "pyrovae, compiled"
ALONE = "pyrovae, the graph alone"

CONTENDERS: dict[str, Callable[[Problem, Tensor], Race]] = {
    "hand-written": eager,
    f"{BEST}: loss": compiled_loss,
    f"{BEST}: step": compiled_step,
    f"{BEST}: CUDA graph": graphed,
    "Pyro SVI": by_pyro,
    "Pyro SVI, JIT": by_pyro_jit,
    "NumPyro, jit": by_numpyro,
    "Pythae": by_pythae,
    "pyrovae, eager": ours,
    OURS: ours_compiled,
    ALONE: graph_alone,
    FLOOR: floor,
}


def variants(device: str) -> list[str]:
    """The contenders on a device; of the compiled ones by hand, the fastest will count."""
    names = [name for name in CONTENDERS if name != ALONE]
    return [name for name in names if device == "cuda" or "CUDA" not in name]


def enter(
    names: list[str], problem: Problem, images: Tensor
) -> tuple[dict[str, Race], dict[str, str]]:
    """The contenders that can run, ready to, and why the others cannot."""
    races, absent = {}, {}
    for name in names:
        try:
            races[name] = CONTENDERS[name](problem, images)
        except ImportError as error:
            absent[name] = str(error)
    return races, absent
