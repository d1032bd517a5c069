"""Whether the stated errors of log p(x) are right, where log p(x) is known."""

from __future__ import annotations

from collections.abc import Callable

import torch
from oracles import ORACLES, linear_gaussian
from torch import Tensor, nn

import pyrovae

__all__ = ["coverage"]

REPEATS = 200
CASES = {
    "linear-Gaussian, 4 latents": lambda: linear_gaussian(stretch=1.3),
    "linear-Gaussian, 50 latents": ORACLES["fifty_latents"],
    "mixture prior, linear decoder": ORACLES["mixture_prior"],
    "curved decoder, quadrature": ORACLES["curved"],
    "latents on (0, ∞) and (0, 1), quadrature": ORACLES["constrained"],
}


def importance(model: nn.Module, guide: nn.Module, x: Tensor, seed: int) -> pyrovae.LogLikelihood:
    """K = 1000 from the guide."""
    return pyrovae.log_likelihood(model, guide, x, num_samples=1000, seed=seed)


def annealing(model: nn.Module, guide: nn.Module, x: Tensor, seed: int) -> pyrovae.LogLikelihood:
    """64 chains of 20 temperatures."""
    how = {"num_chains": 64, "num_temperatures": 20, "num_steps": 3, "seed": seed}
    return pyrovae.annealed_log_likelihood(model, guide, x, **how)


ESTIMATES: dict[str, Callable] = {"importance sampling": importance, "annealing": annealing}


def coverage() -> dict:
    """Each of three data 200 times: the mean error, its spread, and how often it is as stated.

    Returns:
        ``rows``: by oracle and estimate, nats; ``within 1`` and ``within 2`` are the shares of
        estimates whose error is at most so many stated standard errors, 68% and 95% if the
        errors were normal.
    """
    rows = []
    for case, make in CASES.items():
        model, guide, x, exact = make()
        for name, estimate in ESTIMATES.items():
            found = [
                estimate(model, guide, x[n : n + 1].expand(REPEATS, *x.shape[1:]), seed=n)
                for n in range(3)
            ]
            error = torch.stack([ll.log_prob - exact[n] for n, ll in enumerate(found)])
            stated = torch.stack([ll.standard_error for ll in found])
            z = (error / stated).abs()
            rows.append(
                {
                    "oracle": case,
                    "estimate": name,
                    "mean error": error.mean().item(),
                    "spread": error.std(1).square().mean().sqrt().item(),
                    "stated": stated.square().mean().sqrt().item(),
                    "within 1": (z < 1).double().mean().item(),
                    "within 2": (z < 2).double().mean().item(),
                    "k-hat > 0.7": sum((ll.khat > 0.7).double().mean().item() for ll in found) / 3,
                }
            )
    return {"repeats": REPEATS, "data": 3, "rows": rows}
