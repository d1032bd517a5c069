"""How far the stochastic ELBO and its gradient spread, and whether A and B have one expectation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from handwritten import VAE

__all__ = ["scaling", "spread", "standard_error"]


def spread(
    vae: VAE, batch: Callable[[], Tensor], particles: int, pairs: int
) -> dict[str, np.ndarray]:
    """Unbiased, independent estimates of variances and of A − B, one from each pair of draws.

    Half the squared distance of two draws has the variance as its mean (summed over the entries of
    a gradient); the inner product of two independent differences A − B has as its mean the squared
    norm of their expectation.

    Args:
        vae: What is evaluated.
        batch: Gives the minibatch of a draw.
        particles: L.
        pairs: How many pairs.
    """
    rows = []
    for _ in range(pairs):
        (one_a, one_b), (two_a, two_b) = (_draw(vae, batch(), particles) for _ in range(2))
        row = {
            "value A": (one_a[0] - two_a[0]).square() / 2,
            "value B": (one_b[0] - two_b[0]).square() / 2,
            "value A - B": (one_a[0] - one_b[0] + two_a[0] - two_b[0]) / 2,
            "gradient A": (one_a[1] - two_a[1]).square().sum() / 2,
            "gradient B": (one_b[1] - two_b[1]).square().sum() / 2,
            "gradient A - B": (one_a[1] - one_b[1]) @ (two_a[1] - two_b[1]),
        }
        rows.append({name: number.item() for name, number in row.items()})
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _draw(vae: VAE, x: Tensor, particles: int) -> list[tuple[Tensor, Tensor]]:
    """A minibatch's mean ELBO and its gradient, by A and by B from the same noise."""
    noise, found = vae.noise(x, particles), []
    for estimator in ("A", "B"):
        value = vae.elbo(x, noise, estimator).mean()
        gradients = torch.autograd.grad(value, list(vae.parameters()))
        found.append((value.detach(), torch.cat([g.flatten() for g in gradients])))
    return found


def scaling(spreads: dict[int, dict[str, np.ndarray]], of: str) -> dict:
    """How the standard errors fall with size, and A − B over the sizes.

    Args:
        spreads: What :func:`spread` gave at each size.
        of: ``"value"`` or ``"gradient"``.

    Returns:
        The errors of A and B at each size, the slopes of ln(error) on ln(size) with their standard
        errors, and the A − B farthest from 0, in its standard errors.
    """
    sizes = list(spreads)
    found = {"sizes": sizes}
    for estimator in ("A", "B"):
        draws = np.array([spreads[n][f"{of} {estimator}"] for n in sizes])
        mean, error = draws.mean(1), standard_error(draws)
        fit = {"deg": 1, "w": 2 * mean / error, "cov": "unscaled"}
        (slope, _), covariance = np.polyfit(np.log(sizes), np.log(mean) / 2, **fit)
        found[f"errors {estimator}"] = np.sqrt(mean).tolist()
        found |= {f"slope {estimator}": slope, f"± {estimator}": math.sqrt(covariance[0, 0])}
    apart = np.array([spreads[n][f"{of} A - B"] for n in sizes])
    return found | {"A - B": max(apart.mean(1) / standard_error(apart), key=abs)}


def standard_error(draws: np.ndarray) -> np.ndarray:
    """The standard error of the mean over the last dimension."""
    return draws.std(-1, ddof=1) / math.sqrt(draws.shape[-1])
