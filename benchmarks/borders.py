"""How often one training step and one log p(x) cross from a module of pyrovae into another.

    python benchmarks/borders.py

A call crosses a border where the nearest caller inside ``pyrovae/`` stands in another file:
frames of torch, Pyro and the programs between the two are looked through, so that a handler that
Pyro calls back counts too. Few crossings mean that a reader follows one thing through few files.
Counted with :func:`sys.setprofile`, warm, and written to ``results/borders.json``.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pyro
import torch
from tables import machine, show, write

import pyrovae
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.bernoulli import Bernoulli

__all__ = ["crossings", "likelihood_crossings", "step_crossings"]

HOME = os.path.dirname(pyrovae.__file__) + os.sep
RESULTS = Path(__file__).resolve().parent / "results" / "borders.json"
N, K = 64, 100
WARM = 3


def main() -> None:
    found = {"one eager step": step_crossings(), f"log p(x), K = {K}": likelihood_crossings()}
    table = [{"of": name, "borders": sum(count.values())} for name, count in found.items()]
    show(table, "d")
    borders = {
        name: [{"from": a, "to": b, "calls": n} for (a, b), n in count.most_common()]
        for name, count in found.items()
    }
    write(RESULTS, {"about": machine() | {"data": N}, "crossings": table, "borders": borders})


def step_crossings() -> Counter[tuple[str, str]]:
    """The borders that one eager step of :class:`pyrovae.SVI` crosses, with their calls."""
    model, guide, x = _pair()
    optimizer = pyro.optim.Adam({"lr": 1e-3})
    svi = pyrovae.SVI(model, guide, optimizer, loss=pyro.infer.Trace_ELBO(), compile=False)
    return crossings(lambda: svi.step(x))


def likelihood_crossings() -> Counter[tuple[str, str]]:
    """The same of one call of :func:`pyrovae.log_likelihood`."""
    model, guide, x = _pair()
    return crossings(lambda: pyrovae.log_likelihood(model, guide, x, num_samples=K, seed=0))


def crossings(run: Callable[[], object]) -> Counter[tuple[str, str]]:
    """Count the calls from one file of the package into another, once it has run a few times."""
    found: Counter[tuple[str, str]] = Counter()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and (callee := _file(frame)):
            caller = frame.f_back
            while caller is not None and not _file(caller):
                caller = caller.f_back
            if caller is not None and (from_ := _file(caller)) != callee:
                found[from_, callee] += 1

    for _ in range(WARM):  # what is set up once, at the first step, is no part of a step
        run()
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return found


def _file(frame: FrameType) -> str:
    """The file of a frame below ``pyrovae/``, or nothing for one from elsewhere."""
    name = frame.f_code.co_filename
    return name.removeprefix(HOME) if name.startswith(HOME) else ""


def _pair() -> tuple[Bernoulli, MeanField, torch.Tensor]:
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    x = (torch.rand(N, 1, 28, 28) > 0.5).float()
    return Bernoulli((1, 28, 28), latent=20), MeanField((1, 28, 28), latent=20), x


if __name__ == "__main__":
    main()
