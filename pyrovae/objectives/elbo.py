r"""The two estimators of the ELBO, site by site, with the gradient of sites that need a score.

Where a latent is not reparameterized, the gradient is Pyro's: with :math:`f` the sum of the terms,

.. math:: \nabla E_q[f] = E_q\bigl[\nabla f + \sum_s \bar f_s \, \nabla \ln q(z_s)\bigr]

where :math:`\bar f_s` leaves out the plates that site s is not in (no baseline is subtracted).
"""

from __future__ import annotations

from collections.abc import Callable

from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import (
    ELBO,
    JitTrace_ELBO,
    JitTraceMeanField_ELBO,
    Trace_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.util import MultiFrameTensor, get_plate_stacks
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from pyrovae._tools import InputError
from pyrovae.objectives.base import Estimate
from pyrovae.pairs.traces import samples

__all__ = [
    "ANALYTIC",
    "GENERIC",
    "elbo_estimate",
    "in_one_order",
    "site_terms",
    "surrogate_elbo",
]

GENERIC, ANALYTIC = (Trace_ELBO, JitTrace_ELBO), (TraceMeanField_ELBO, JitTraceMeanField_ELBO)


def site_terms(model_trace: Trace, guide_trace: Trace, analytic: bool) -> dict[str, Tensor]:
    r"""The ELBO split by site, before any sum.

    Args:
        model_trace: The replayed model's trace, with log-probabilities computed.
        guide_trace: The guide's trace, with log-probabilities computed.
        analytic: Use :math:`-\mathrm{KL}(q \| p)` in closed form where torch knows one.

    Returns:
        Nats per site; a site's tensor is broadcastable to its plates.
    """
    terms = {}
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample":
            continue
        if site["is_observed"] or name not in guide_trace.nodes:
            terms[name] = site["log_prob"]
        else:
            terms[name] = _latent_term(site, guide_trace.nodes[name], analytic)
    for name, site in guide_trace.nodes.items():
        if site["type"] == "sample" and name not in model_trace.nodes:
            terms[name] = -site["log_prob"]
    return terms


def in_one_order(model_trace: Trace, guide_trace: Trace) -> bool:
    """Whether both programs sample their latents in one order, so that closed forms are exact.

    A divergence in closed form averages over its own latent alone, which is wrong where the model
    puts it below a latent that the guide draws from it.
    """
    model, guide = samples(model_trace), samples(guide_trace)
    return [name for name in model if name in guide] == [name for name in guide if name in model]


def _latent_term(site: dict, guide_site: dict, analytic: bool) -> Tensor:
    kl = _divergence(site, guide_site) if analytic else None
    return site["log_prob"] - guide_site["log_prob"] if kl is None else -kl


def _divergence(site: dict, guide_site: dict) -> Tensor | None:
    try:
        kl = kl_divergence(guide_site["fn"], site["fn"])
    except NotImplementedError:
        return None
    kl = scale_and_mask(kl, scale=guide_site["scale"], mask=guide_site["mask"])
    return kl.expand(guide_site["fn"].batch_shape)


def surrogate_elbo(
    model_trace: Trace,
    guide_trace: Trace,
    terms: dict[str, Tensor],
    analytic: bool,
    coefficients: dict[str, Tensor | float] | None = None,
) -> Tensor:
    r"""A scalar whose gradient estimates that of :math:`E_q[\sum_s c_s f_s]`.

    Args:
        model_trace: The replayed model's trace.
        guide_trace: The guide's trace, with score parts computed.
        terms: What :func:`site_terms` made of both, in nats.
        analytic: Whether in closed form.
        coefficients: The numbers c by site, without a gradient; 1 for a site without one.

    Returns:
        Nats summed over plates and particles; the gradient counts, not the value.
    """
    coefficients = coefficients or {}
    nodes = samples(guide_trace)
    scored = {
        name: site["score_parts"].score_function
        for name, site in nodes.items()
        if not is_identically_zero(site["score_parts"].score_function)
    }
    total = 0.0
    for name, term in terms.items():
        if name in scored and not (analytic and _is_closed(name, model_trace, guide_trace)):
            term = term + (nodes[name]["log_prob"] - nodes[name]["score_parts"].entropy_term)
        total = total + coefficients.get(name, 1.0) * term.sum()
    if scored:
        stacks = get_plate_stacks(guide_trace) | get_plate_stacks(model_trace)
        costs = MultiFrameTensor()
        for name, term in terms.items():
            costs.add((stacks[name], coefficients.get(name, 1.0) * term.detach()))
        for name, score in scored.items():
            total = total + (costs.sum_to(nodes[name]["cond_indep_stack"]) * score).sum()
    return total


def _is_closed(name: str, model_trace: Trace, guide_trace: Trace) -> bool:
    site = model_trace.nodes.get(name)
    return site is not None and _divergence(site, guide_trace.nodes[name]) is not None


def elbo_estimate(
    loss: ELBO, model: Callable, guide: Callable, args: tuple, kwargs: dict
) -> Estimate:
    """The value and gradient of ``Trace_ELBO`` or ``TraceMeanField_ELBO``, nothing read back.

    Where the programs sample their latents in different orders, closed forms would be wrong, and
    both estimators sample.

    Raises:
        ValueError: If estimator B meets a latent that is not reparameterized.
    """
    total: dict[str, Tensor] = {}
    surrogate = 0.0
    for model_trace, guide_trace in loss._get_traces(model, guide, args, kwargs):
        analytic = type(loss) in ANALYTIC
        if analytic:
            _refuse_scores(guide_trace)
        analytic = analytic and in_one_order(model_trace, guide_trace)
        terms = site_terms(model_trace, guide_trace, analytic)
        found = surrogate_elbo(model_trace, guide_trace, terms, analytic)
        surrogate = surrogate - found / loss.num_particles
        for name, term in terms.items():
            mean = term.detach().sum() / loss.num_particles
            total[name] = total.get(name, 0.0) + mean
    return Estimate(-sum(total.values()), surrogate, total)


def _refuse_scores(guide_trace: Trace) -> None:
    for name, site in samples(guide_trace).items():
        if not site["fn"].has_rsample and not site["is_observed"]:
            raise InputError(
                f"TraceMeanField_ELBO takes reparameterized latents alone, and the guide draws "
                f"{name!r} from a {type(site['fn']).__name__}: train with trace_elbo, or "
                f"enumerate the site and train with trace_enum_elbo."
            )
