"""The rate–distortion curve: what a pair can do with more nats about each datum, or fewer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from pyrovae._tools import InputError
from pyrovae._tools.seeding import draw_seed, seeded, subseed
from pyrovae.data import Dataset
from pyrovae.objectives import elbo, make_objective
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.pair import Pair
from pyrovae.training.arguments import as_dataset
from pyrovae.training.loop import fit

__all__ = ["CurvePoint", "rate_distortion_curve"]

PARTICLES = 4


class CurvePoint(NamedTuple):
    """A pair trained at one β and measured at β = 1: means over data, nats per datum.

    ``elbo = -rate - distortion``; the errors are standard errors over data.
    """

    beta: float
    rate: float
    distortion: float
    elbo: float
    rate_error: float
    distortion_error: float
    elbo_error: float


def rate_distortion_curve(
    model: Callable,
    guide: Callable,
    data: Dataset | Tensor,
    betas: Sequence[float],
    *,
    epochs: int,
    seed: int | None = None,
    **fit_options: Any,
) -> list[CurvePoint]:
    r"""Train a pair at several β and measure each at β = 1.

    .. math:: R = E_q[\ln q(z|x) - \ln p(z)], \qquad D = -E_q[\ln p(x|z)], \qquad
              \min_{\theta, \phi} D + \beta R

    Every training starts from the weights that the pair has now, and the pair ends with them.

    Args:
        model: The model program, untrained.
        guide: The guide program, untrained.
        data: As :func:`pyrovae.fit` takes them; the points are measured on the validation data,
            or on the training data where there are no others.
        betas: The weights β ≥ 0 of the rate, one training each.
        epochs: The number of epochs of each.
        seed: Seeds all draws, the same for every β; None draws a seed from torch's global stream.
        fit_options: Further arguments of :func:`pyrovae.fit`, but for the objective.

    Returns:
        One point for each β, in the order given.

    Raises:
        ValueError: If there is no β, one is negative, or an objective or a torch optimizer that
            has been made already is given.

    References:
        Alemi et al., Fixing a Broken ELBO (arXiv 1711.00464), section 3.
    """
    if "objective" in fit_options:
        raise InputError("Expected no objective: the curve is that of beta_elbo, one β a point.")
    if isinstance(fit_options.get("optimizer"), Optimizer):
        raise InputError(
            "Expected no torch optimizer, which would carry its state from one β to the next: give "
            "its class, or a function from parameters to one."
        )
    if not betas:
        raise InputError("Expected a β at least, got none: give betas such as (0.5, 1, 2, 4).")
    data, seed = as_dataset(data), draw_seed(seed)
    particles = fit_options.pop("particles", None)
    objectives = [make_objective("beta_elbo", particles, beta=beta) for beta in betas]
    rows, found = data.split("valid") or data.split("train"), []
    pair = Pair(model, guide)
    start = _state(pair, data, seed)
    try:
        for beta, objective in zip(betas, objectives, strict=True):
            pair.load_state_dict(start)
            options = {"progress": False, "seed": seed} | fit_options
            fit(model, guide, data, objective=objective, epochs=epochs, **options)
            found.append(_measure(model, guide, rows, float(beta), subseed(seed, 0)))
    finally:
        pair.load_state_dict(start)
    return found


def _state(pair: Pair, data: Dataset, seed: int) -> dict[str, Tensor]:
    """The weights as they are, those that exist once the programs have run among them."""
    first = [tensor[:16].to(pair.device) for tensor in data.split("train")]
    with seeded(subseed(seed, 0), pair.device), pair.mode(training=False):
        inspect_pair(pair, *first)
    return pair.state_dict()


def _measure(model: Callable, guide: Callable, rows: tuple, beta: float, seed: int) -> CurvePoint:
    bound = elbo(
        model, guide, *rows, objective="trace_mean_field_elbo", particles=PARTICLES, seed=seed
    )
    parts = [each.double() for each in (bound.kl, -bound.reconstruction, bound.elbo)]
    means = [each.mean().item() for each in parts]
    several = len(parts[0]) > 1
    errors = [(p.std() / math.sqrt(len(p))).item() if several else math.nan for p in parts]
    return CurvePoint(beta, *means, *errors)
