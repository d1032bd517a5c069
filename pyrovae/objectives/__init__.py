"""Objectives by name: what SVI descends.

``make_objective("iwae", particles=50)`` makes one, for :class:`pyrovae.SVI` or
:func:`pyrovae.fit`. They are for training: what a run reports of itself is the ELBO at β = 1 and
log p(x).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO

from pyrovae._tools import InputError, InputTypeError, did_you_mean
from pyrovae.objectives.base import Estimate, Objective
from pyrovae.objectives.beta import BetaELBO
from pyrovae.objectives.elbo import site_terms
from pyrovae.objectives.importance_weighted import ImportanceWeighted
from pyrovae.objectives.losses import estimate, is_differentiable, per_datum, summed
from pyrovae.objectives.pointwise import ESTIMATORS, ElboResult, elbo
from pyrovae.objectives.wake_sleep import WakeSleep

__all__ = [
    "ESTIMATORS",
    "OBJECTIVES",
    "BetaELBO",
    "ElboResult",
    "Estimate",
    "ImportanceWeighted",
    "Objective",
    "WakeSleep",
    "elbo",
    "estimate",
    "is_differentiable",
    "make_objective",
    "per_datum",
    "site_terms",
    "summed",
]


def _pyro(kind: type[ELBO], particles: int = 1) -> ELBO:
    return kind(num_particles=particles, vectorize_particles=particles > 1)


OBJECTIVES: dict[str, tuple[Callable, str]] = {
    "trace_elbo": (partial(_pyro, Trace_ELBO), "estimator A: Monte Carlo for every term"),
    "trace_mean_field_elbo": (
        partial(_pyro, TraceMeanField_ELBO),
        "estimator B: analytic KL where there is one",
    ),
    "trace_enum_elbo": (
        partial(_pyro, TraceEnum_ELBO),
        "discrete latents marked for enumeration are summed exactly",
    ),
    "beta_elbo": (partial(BetaELBO, beta=4.0), "the ELBO with beta times its KL"),
    "warm_up_elbo": (partial(BetaELBO, warm_up=1000), "the KL's weight rises over warm_up steps"),
    "free_bits_elbo": (
        partial(BetaELBO, free_bits=0.5),
        "no gradient of a site's KL below free_bits nats per datum",
    ),
    "stl": (
        partial(ImportanceWeighted, particles=1, alpha=1.0, gradient="stl"),
        "the ELBO without the score of q in its gradient: sticking the landing",
    ),
    "iwae": (ImportanceWeighted, "the importance-weighted bound of K samples"),
    "iwae_stl": (partial(ImportanceWeighted, gradient="stl"), "iwae, sticking the landing; biased"),
    "iwae_dreg": (
        partial(ImportanceWeighted, gradient="dreg"),
        "iwae with doubly reparameterized gradients",
    ),
    "renyi": (partial(ImportanceWeighted, alpha=0.5), "the Renyi bound of order alpha"),
    "miwae": (partial(ImportanceWeighted, groups=5), "the mean of several iwae bounds (groups)"),
    "ciwae": (partial(ImportanceWeighted, beta=0.5), "beta of the ELBO and the rest of iwae"),
    "wake_sleep": (
        partial(WakeSleep, particles=1, insomnia=0.0),
        "the model learns awake, the guide from dreams",
    ),
    "reweighted_wake_sleep": (WakeSleep, "the model and the guide learn from weighted samples"),
}


def make_objective(
    objective: str | ELBO | Objective | Callable, particles: int | None = None, **options: Any
) -> ELBO | Objective | Callable:
    """An objective from its name; objects and functions pass through.

    Args:
        objective: A name in ``OBJECTIVES``, an :class:`Objective`, a :class:`pyro.infer.ELBO`, or
            a function ``(model, guide, x, *context)`` that returns a loss to differentiate.
        particles: The number of samples of a named objective, drawn as one vectorized plate (of
            each group, where there are groups); None is the objective's own default.
        options: Further arguments of a named objective, such as ``beta=4`` or ``warm_up=2000``.

    Raises:
        ValueError: If the name or an option is unknown, or a value is out of range.

    Example:
        >>> iwae = make_objective("iwae", particles=5)
        >>> fit = pyrovae.fit(model, guide, data, objective=iwae, epochs=1, seed=0)
        >>> print(f"{fit.history[-1]['train_elbo']:.2f} nats per datum, a bound on log p(x)")
        -2... nats per datum, a bound on log p(x)
    """
    if particles is not None and (not isinstance(particles, int) or particles < 1):
        raise InputError(f"Expected an integer particles >= 1, got {particles!r}.")
    if not isinstance(objective, str):
        if not callable(objective):
            raise InputTypeError(
                f"Expected an objective's name, an ELBO or a function: {objective!r}."
            )
        if options:
            raise InputError(f"Expected options {sorted(options)} with a name, got an object.")
        return objective
    if objective not in OBJECTIVES:
        raise InputError(
            f"No objective {objective!r}; there are {sorted(OBJECTIVES)}"
            f"{did_you_mean(objective, OBJECTIVES)}."
        )
    constructor = OBJECTIVES[objective][0]
    known = inspect.signature(constructor).parameters
    for name in options:
        if name not in known:
            raise InputError(
                f"The objective {objective!r} takes no option {name!r}; it takes "
                f"{', '.join(known)}{did_you_mean(name, known)}."
            )
    return constructor(**options if particles is None else options | {"particles": particles})
