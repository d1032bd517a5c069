"""How far samples are from data: the Fréchet distance, precision and recall."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyrovae._tools import InputError

__all__ = ["Distances", "sample_distances"]

CHUNK, ROUNDING = 1024, 1e-6


class Distances(NamedTuple):
    """What sets samples apart from data, in the features that were chosen.

    Attributes:
        frechet: The squared Fréchet distance of the two normals with their moments, in squared
            units of the features; 0 for equal moments, and above it for few data.
        precision: The share of samples within a ball of the data, between 0 and 1.
        recall: The share of data within a ball of the samples, between 0 and 1.
        num_data: The number of data.
        num_samples: The number of samples.
        k: Which neighbour's distance is the radius of a ball.
    """

    frechet: float
    precision: float
    recall: float
    num_data: int
    num_samples: int
    k: int


@torch.no_grad()
def sample_distances(
    x: Tensor,
    samples: Tensor,
    *,
    features: Callable[[Tensor], Tensor] | None = None,
    k: int = 5,
) -> Distances:
    r"""Compare samples with data by moments and by neighbourhoods.

    .. math:: d^2 = \|\mu_1 - \mu_2\|^2 + \mathrm{tr}\bigl(\Sigma_1 + \Sigma_2
              - 2 (\Sigma_1 \Sigma_2)^{1/2}\bigr)

    On pixels, the default, these are no FID: that takes the features of one Inception network,
    and its numbers compare with none of these. Compare only numbers of the same features, the
    same data, and as many samples: the Fréchet distance is larger for fewer.

    Args:
        x: Data ``[N, ...]``.
        samples: Samples ``[M, ...]``.
        features: What to compare, a function from data ``[n, ...]`` to ``[n, ...]``; by default
            the data themselves, flattened.
        k: Balls reach to a point's k-th nearest neighbour among its own.

    Raises:
        ValueError: If there are not more than k data and k samples, or features are not finite or
            differ in size.

    References:
        Dowson and Landau (1982), The Fréchet distance between multivariate normal distributions;
        Kynkäänniemi et al., Improved Precision and Recall Metric for Assessing Generative Models
        (arXiv 1904.06991), equation 1.
    """
    real, made = (_features(each, features) for each in (x, samples))
    if real.shape[1] != made.shape[1]:
        raise InputError(
            f"Expected features of one size, got {real.shape[1]} of the data and {made.shape[1]} "
            f"of the samples: give both the same event shape."
        )
    if not isinstance(k, int) or not 1 <= k < min(len(real), len(made)):
        raise InputError(
            f"Expected 1 <= k < the number of data and of samples, got k={k!r}, {len(real)} data "
            f"and {len(made)} samples."
        )
    center = real.mean(0)
    real, made = real - center, made - center.to(made)
    return Distances(_frechet(real, made), *_covered(real, made, k), len(real), len(made), k)


def _features(data: Tensor, features: Callable[[Tensor], Tensor] | None) -> Tensor:
    found = torch.cat([features(part) for part in data.split(CHUNK)]) if features else data
    found = found.reshape(len(data), -1).double()
    if not bool(found.isfinite().all()):
        raise InputError("Expected finite features, got NaN or infinity: look at the samples.")
    return found


def _frechet(a: Tensor, b: Tensor) -> float:
    r"""With Σ = RᵀR, the trace of :math:`(\Sigma_1 \Sigma_2)^{1/2}` is that of the singular values
    of :math:`R_1 R_2^\top`: no root of a product that rounding made indefinite or singular."""
    roots = [_root(each) for each in (a, b)]
    cross = torch.linalg.svdvals(roots[0] @ roots[1].mT).sum()
    spread = sum(root.square().sum() for root in roots)
    shift = (a.mean(0) - b.mean(0)).square().sum()
    return (shift + spread - 2 * cross).clamp(min=0).item()


def _root(each: Tensor) -> Tensor:
    """R ``[min(N, D), D]`` with RᵀR the covariance."""
    return torch.linalg.qr(each - each.mean(0), mode="r").R / (len(each) - 1) ** 0.5


def _covered(real: Tensor, made: Tensor, k: int) -> tuple[float, float]:
    """Precision and recall: the share of points within any ball of the other set."""
    slack = ROUNDING * max(each.norm(dim=1).max().item() for each in (real, made))
    radii, reach = (_radii(each, k) + slack for each in (real, made))
    precise, recalled = [], torch.zeros_like(radii, dtype=torch.bool)
    for part, own in zip(made.split(CHUNK), reach.split(CHUNK), strict=True):
        distance = torch.cdist(part, real)
        precise.append((distance <= radii).any(1))
        recalled |= (distance <= own[:, None]).any(0)
    return torch.cat(precise).double().mean().item(), recalled.double().mean().item()


def _radii(points: Tensor, k: int) -> Tensor:
    """The distance of each point to its k-th neighbour."""
    parts = (torch.cdist(part, points) for part in points.split(CHUNK))
    return torch.cat([part.kthvalue(k + 1).values for part in parts])
