"""Objectives by name: what SVI descends.

``make_objective("iwae", particles=50)`` makes one, for :class:`pyrovae.SVI` or
:func:`pyrovae.fit`. They are for training: what a run reports of itself is the ELBO at β = 1 and
log p(x).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import effectful
from torch import Tensor

from pyrovae._tools import InputError, InputTypeError, at_least, did_you_mean, plain_numbers
from pyrovae._tools.seeding import seeded
from pyrovae.objectives.base import Estimate, Objective
from pyrovae.objectives.beta import BetaELBO
from pyrovae.objectives.elbo import ANALYTIC, GENERIC, elbo_estimate, score_elbo, total
from pyrovae.objectives.importance_weighted import ImportanceWeighted
from pyrovae.objectives.wake_sleep import WakeSleep
from pyrovae.pairs.contract import check_factors, inspect_pair
from pyrovae.pairs.enumeration import exact_terms
from pyrovae.pairs.pair import Pair

__all__ = [
    "OBJECTIVES",
    "BetaELBO",
    "Estimate",
    "ImportanceWeighted",
    "Objective",
    "WakeSleep",
    "estimate",
    "is_differentiable",
    "make_objective",
    "per_datum",
    "summed",
]


def _pyro(kind: type[ELBO], particles: int = 1) -> ELBO:
    return kind(num_particles=particles, vectorize_particles=particles > 1)


# A Pyro ELBO, an Objective, or a function (model, guide, x, *context) to differentiate. Pyro's own
# base class declares neither loss_and_grads nor differentiable_loss (1.9.2), hence Any.
Loss = Any

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


@plain_numbers
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
    at_least({"particles": 1}, 1 if particles is None else particles)
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


def estimate(loss: Loss, pair: Pair, *args: Any, **kwargs: Any) -> Estimate:
    """Evaluate an objective without reading anything back from the device.

    ``Trace_ELBO``, ``TraceMeanField_ELBO`` and ``TraceEnum_ELBO`` give the value and the gradient
    that Pyro's own methods give, minus their ``.item()`` per site. Other ELBOs run their own code.

    Raises:
        ValueError: If a ``RenyiELBO`` meets a scaled or subsampled site, where it is no bound.
    """
    model, guide = pair.run_model, pair.run_guide
    if isinstance(loss, Objective):
        return loss.estimate(pair, *args, **kwargs)
    if isinstance(loss, ELBO) and loss.vectorize_particles and pair.folds:
        # Pyro's plate of particles is one that such a pair does not take.
        loss = copy(loss)
        loss.vectorize_particles = False
    if type(loss) in GENERIC + ANALYTIC:
        return elbo_estimate(loss, model, guide, args, kwargs)
    if type(loss) is TraceEnum_ELBO:
        return _enumerated(loss, model, guide, args, kwargs)
    if isinstance(loss, RenyiELBO):
        model, guide = _NoScale()(model), _NoScale()(guide)
    if not is_differentiable(loss):
        value = loss.loss_and_grads(_with_statement(model, pair), guide, *args, **kwargs)
        return summed(value)
    pyro_loss: Any = loss
    differentiable = pyro_loss.differentiable_loss if isinstance(loss, ELBO) else loss
    surrogate = differentiable(model, guide, *args, **kwargs)
    if isinstance(surrogate, float | int):
        # Pyro's ELBOs of programs without a site are numbers.
        surrogate = torch.as_tensor(float(surrogate))
    if not isinstance(surrogate, Tensor):
        raise InputTypeError(
            f"Expected a loss that is a tensor to differentiate, got {surrogate!r}."
        )
    return Estimate(surrogate.detach(), surrogate, {})


def _enumerated(
    loss: TraceEnum_ELBO, model: Callable, guide: Callable, args: tuple, kwargs: dict
) -> Estimate:
    found: dict[str, Tensor] = {}
    surrogates: list[Tensor] = []
    for traces in loss._get_traces(model, guide, args, kwargs):
        for name, term in exact_terms(*traces).items():
            surrogates.append(-term / loss.num_particles)
            found[name] = found.get(name, 0.0) + term.detach() / loss.num_particles
    surrogate = total(surrogates)
    return Estimate(surrogate.detach(), surrogate, found)


def per_datum(loss: Loss, pair: Pair, x: Tensor, *context: Tensor) -> Tensor:
    """What an objective makes of each datum before any scale, ``[N]`` in nats, without a gradient.

    Where an objective's own code sums over the batch, each datum is a batch of its own.
    """
    if isinstance(loss, Objective):
        return loss.per_datum(pair, x, *context)
    with torch.no_grad():
        if type(loss) in GENERIC + ANALYTIC:
            with seeded(0, pair.device):
                check_factors(inspect_pair(pair, x, *context))
            analytic = type(loss) in ANALYTIC
            parts = score_elbo(pair, (x, *context), loss.num_particles, analytic=analytic)
            return parts[0] - parts[1]
        rows = zip(*(tensor.split(1) for tensor in (x, *context)), strict=True)
        with _Unscaled():
            return torch.stack([-estimate(loss, pair, *row).loss for row in rows])


def is_differentiable(loss: Loss) -> bool:
    """Whether an objective leaves the backward pass to its caller."""
    if not isinstance(loss, ELBO):
        return True
    kind: Any = type(loss)
    # A subclass with a loss_and_grads of its own is to be run as it is written.
    written = getattr(kind.loss_and_grads, "__module__", "")
    return hasattr(loss, "differentiable_loss") and written.startswith("pyro.")


def summed(value: Any) -> Estimate:
    """The estimate of a loss that has been propagated, or of several."""
    if isinstance(value, tuple):
        parts = tuple(torch.as_tensor(part).detach() for part in value)
        return Estimate(total(parts), None, {}, parts)
    return Estimate(torch.as_tensor(value).detach(), None, {})


def _with_statement(model: Callable, pair: Pair) -> Callable:
    """Some of Pyro's losses differentiate only if a trace shows a parameter: show them all."""

    def program(*args: Any, **kwargs: Any) -> Any:
        for name, leaf in pair.named().items():
            effectful(lambda leaf=leaf: leaf, type="param")(name=f"pyrovae.{name}")
        return model(*args, **kwargs)

    return program


class _Unscaled(Messenger):
    """Takes every scale for one."""

    def _pyro_post_sample(self, msg: dict) -> None:
        # Messengers outside of a trace come first, so it keeps this.
        msg["scale"] = 1.0


class _NoScale(Messenger):
    """Refuses scaled sites, for a loss that would put the scale where it does not belong."""

    def _pyro_post_sample(self, msg: dict) -> None:
        scale = msg["scale"]
        if isinstance(scale, Tensor) or scale != 1.0:
            raise InputError(
                f"RenyiELBO puts the scale of site {msg['name']!r} inside its log-sum-exp, where "
                f"it is no bound on log p(x): drop poutine.scale or the subsampling plate."
            )
