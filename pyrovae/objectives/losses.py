"""Evaluate an objective, whoever wrote it, without reading anything back from the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import ELBO, RenyiELBO, TraceEnum_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import effectful
from torch import Tensor

from pyrovae._tools import InputError, InputTypeError
from pyrovae._tools.seeding import seeded
from pyrovae.objectives.base import Estimate, Objective
from pyrovae.objectives.elbo import ANALYTIC, GENERIC, elbo_estimate
from pyrovae.objectives.enumerated import enum_estimate
from pyrovae.objectives.pointwise import score_elbo
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.pair import Pair

__all__ = ["estimate", "is_differentiable", "per_datum", "summed"]


def estimate(loss: ELBO | Objective | Callable, pair: Pair, *args: Any, **kwargs: Any) -> Estimate:
    """Evaluate an objective without reading anything back from the device.

    ``Trace_ELBO``, ``TraceMeanField_ELBO`` and ``TraceEnum_ELBO`` give the value and the gradient
    that Pyro's own methods give, minus their ``.item()`` per site. Other ELBOs run their own code.

    Raises:
        ValueError: If a ``RenyiELBO`` meets a scaled or subsampled site, where it is no bound.
    """
    model, guide = pair.run_model, pair.run_guide
    if isinstance(loss, Objective):
        return loss.estimate(pair, *args, **kwargs)
    if type(loss) in GENERIC + ANALYTIC:
        return elbo_estimate(loss, model, guide, args, kwargs)
    if type(loss) is TraceEnum_ELBO:
        return enum_estimate(loss, model, guide, args, kwargs)
    if isinstance(loss, RenyiELBO):
        model, guide = _NoScale()(model), _NoScale()(guide)
    if not is_differentiable(loss):
        value = loss.loss_and_grads(_with_statement(model, pair), guide, *args, **kwargs)
        return summed(value)
    differentiable = loss.differentiable_loss if isinstance(loss, ELBO) else loss
    surrogate = differentiable(model, guide, *args, **kwargs)
    if not isinstance(surrogate, Tensor):
        raise InputTypeError(
            f"Expected a loss that is a tensor to differentiate, got {surrogate!r}."
        )
    return Estimate(surrogate.detach(), surrogate, {})


def per_datum(loss: ELBO | Objective | Callable, pair: Pair, x: Tensor, *context: Tensor) -> Tensor:
    """What an objective makes of each datum, before any reduction or scale.

    Args:
        loss: The objective.
        pair: The pair.
        x: A batch ``[N, ...]``, with further arguments of the programs in ``context``.

    Returns:
        Nats per datum, ``[N]``, better when higher, without a gradient. Where an objective's own
        code sums over the batch, each datum is a batch of its own.
    """
    if isinstance(loss, Objective):
        return loss.per_datum(pair, x, *context)
    with torch.no_grad():
        if type(loss) in GENERIC + ANALYTIC:
            with seeded(0, pair.device):
                layout = inspect_pair(pair, x, *context)
            analytic = type(loss) in ANALYTIC
            parts = score_elbo(pair, layout, (x, *context), analytic, loss.num_particles)
            return parts[0] - parts[1]
        rows = zip(*(tensor.split(1) for tensor in (x, *context)), strict=True)
        return torch.stack([-estimate(loss, pair, *row).loss for row in rows])


def is_differentiable(loss: ELBO | Callable) -> bool:
    """Whether an objective leaves the backward pass to its caller.

    Pyro's ELBOs with a ``differentiable_loss`` do, unless a subclass has its own
    ``loss_and_grads``.
    """
    if not isinstance(loss, ELBO):
        return True
    written = getattr(type(loss).loss_and_grads, "__module__", "")
    return hasattr(loss, "differentiable_loss") and written.startswith("pyro.")


def summed(value: Any) -> Estimate:
    """The estimate of a loss that has been propagated, or of several."""
    if isinstance(value, tuple):
        parts = tuple(torch.as_tensor(part).detach() for part in value)
        return Estimate(sum(parts), None, {}, parts)
    return Estimate(torch.as_tensor(value).detach(), None, {})


def _with_statement(model: Callable, pair: Pair) -> Callable:
    """Some of Pyro's losses differentiate only if a trace shows a parameter: show them all."""

    def program(*args: Any, **kwargs: Any) -> Any:
        for name, leaf in pair.named().items():
            effectful(lambda leaf=leaf: leaf, type="param")(name=f"pyrovae.{name}")
        return model(*args, **kwargs)

    return program


class _NoScale(Messenger):
    """Refuses scaled sites, for a loss that would put the scale where it does not belong."""

    def _pyro_post_sample(self, msg: dict) -> None:
        scale = msg["scale"]
        if isinstance(scale, Tensor) or scale != 1.0:
            raise InputError(
                f"RenyiELBO puts the scale of site {msg['name']!r} inside its log-sum-exp, where "
                f"it is no bound on log p(x): drop poutine.scale or the subsampling plate."
            )
