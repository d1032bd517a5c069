r"""Objectives: what SVI descends, and the same bound per datum for reporting.

Two estimators of :math:`\mathcal{L}(x) = \ln p(x) - \mathrm{KL}(q(z|x) \,\|\, p(z|x))`, both from
Auto-Encoding Variational Bayes (arXiv 1312.6114):

- A, equation 6, Pyro's ``Trace_ELBO``: :math:`E_q[\ln p(x, z) - \ln q(z|x)]`;
- B, equation 7, Pyro's ``TraceMeanField_ELBO``: :math:`E_q[\ln p(x|z)] - \mathrm{KL}(q \,\|\, p)`,
  the divergence in closed form where one is registered.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import (
    ELBO,
    JitTrace_ELBO,
    JitTraceMeanField_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceMeanField_ELBO,
)
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import effectful
from torch import Tensor
from torch.distributions import kl_divergence

from pyrovae.contract import inspect_pair
from pyrovae.params import Parameters
from pyrovae.seeding import seeded
from pyrovae.traces import Layout, reduce_to, trace_pair, unscale

__all__ = [
    "OBJECTIVES",
    "ElboResult",
    "Estimate",
    "elbo",
    "estimate",
    "is_differentiable",
    "make_objective",
    "site_terms",
    "summed",
]

GENERIC, ANALYTIC = (Trace_ELBO, JitTrace_ELBO), (TraceMeanField_ELBO, JitTraceMeanField_ELBO)
OBJECTIVES = {
    "trace_elbo": (Trace_ELBO, "estimator A: Monte Carlo for every term"),
    "trace_mean_field_elbo": (TraceMeanField_ELBO, "estimator B: analytic KL where there is one"),
}


class Estimate(NamedTuple):
    """One evaluation of an objective over a batch, in nats summed over the batch.

    ``loss`` is the value to report and ``surrogate`` the scalar whose gradient is the estimator's
    (None if it has already been propagated). ``terms`` splits the ELBO by site, where the
    objective has such a split: ln p for an observed site, ln p − ln q or −KL for a latent. An
    objective of several losses has them in ``parts``.
    """

    loss: Tensor
    surrogate: Tensor | None
    terms: dict[str, Tensor]
    parts: tuple[Tensor, ...] = ()


def make_objective(objective: str | ELBO | Callable, particles: int = 1) -> ELBO | Callable:
    """An objective from its name; Pyro's ELBO objects and functions pass through.

    Args:
        objective: A name in ``OBJECTIVES``, a :class:`pyro.infer.ELBO`, or a function
            ``(model, guide, x, *context)`` that returns a loss to differentiate.
        particles: The number of samples L of a named objective, drawn as one vectorized plate.

    Raises:
        ValueError: If the name is unknown or ``particles`` is not positive.
    """
    if particles < 1:
        raise ValueError(f"Expected particles >= 1, got {particles}.")
    if not isinstance(objective, str):
        if not callable(objective):
            raise TypeError(f"Expected an objective's name, an ELBO or a function: {objective!r}.")
        return objective
    if objective not in OBJECTIVES:
        near = difflib.get_close_matches(objective, OBJECTIVES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"No objective {objective!r}; there are {sorted(OBJECTIVES)}{hint}")
    return OBJECTIVES[objective][0](num_particles=particles, vectorize_particles=particles > 1)


def estimate(loss: ELBO | Callable, parameters: Parameters, *args: Any, **kwargs: Any) -> Estimate:
    """Evaluate an objective without reading anything back from the device.

    ``Trace_ELBO`` and ``TraceMeanField_ELBO`` give the value and the gradient that Pyro's own
    methods give, minus their ``.item()`` per site. Other ELBOs run their own code.

    Raises:
        ValueError: If a ``RenyiELBO`` meets a scaled or subsampled site, where it is no bound.
    """
    model, guide = parameters.run_model, parameters.run_guide
    if type(loss) in GENERIC + ANALYTIC:
        return _elbo_estimate(loss, model, guide, args, kwargs)
    if isinstance(loss, RenyiELBO):
        model, guide = _NoScale()(model), _NoScale()(guide)
    if not is_differentiable(loss):
        value = loss.loss_and_grads(_with_statement(model, parameters), guide, *args, **kwargs)
        return summed(value)
    differentiable = loss.differentiable_loss if isinstance(loss, ELBO) else loss
    surrogate = differentiable(model, guide, *args, **kwargs)
    if not isinstance(surrogate, Tensor):
        raise TypeError(f"Expected a loss that is a tensor to differentiate, got {surrogate!r}.")
    return Estimate(surrogate.detach(), surrogate, {})


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


def _latent_term(site: dict, guide_site: dict, analytic: bool) -> Tensor:
    if analytic:
        try:
            kl = kl_divergence(guide_site["fn"], site["fn"])
        except NotImplementedError:
            return site["log_prob"] - guide_site["log_prob"]
        kl = scale_and_mask(kl, scale=guide_site["scale"], mask=guide_site["mask"])
        return -kl.expand(guide_site["fn"].batch_shape)
    return site["log_prob"] - guide_site["log_prob"]


def _elbo_estimate(
    loss: ELBO, model: Callable, guide: Callable, args: tuple, kwargs: dict
) -> Estimate:
    analytic = type(loss) in ANALYTIC
    total: dict[str, Tensor] = {}
    surrogate = 0.0
    for model_trace, guide_trace in loss._get_traces(model, guide, args, kwargs):
        terms = {
            n: t.sum() / loss.num_particles
            for n, t in site_terms(model_trace, guide_trace, analytic).items()
        }
        if all(s["fn"].has_rsample for s in guide_trace.nodes.values() if s["type"] == "sample"):
            surrogate = surrogate - sum(terms.values())
        else:
            _, particle = loss._differentiable_loss_particle(model_trace, guide_trace)
            surrogate = surrogate + particle / loss.num_particles
        for name, term in terms.items():
            total[name] = total.get(name, 0.0) + term.detach()
    return Estimate(-sum(total.values()), surrogate, total)


def _with_statement(model: Callable, parameters: Parameters) -> Callable:
    """Some of Pyro's losses differentiate only if a trace shows a parameter: show them all."""

    def program(*args: Any, **kwargs: Any) -> Any:
        for name, leaf in parameters.named().items():
            effectful(lambda leaf=leaf: leaf, type="param")(name=f"pyrovae.{name}")
        return model(*args, **kwargs)

    return program


class _NoScale(Messenger):
    """Refuses scaled sites, for a loss that would put the scale where it does not belong."""

    def _pyro_post_sample(self, msg: dict) -> None:
        scale = msg["scale"]
        if isinstance(scale, Tensor) or scale != 1.0:
            raise ValueError(
                f"RenyiELBO puts the scale of site {msg['name']!r} inside its log-sum-exp, where "
                f"it is no bound on log p(x): drop poutine.scale or the subsampling plate."
            )


class ElboResult(NamedTuple):
    """The ELBO of each datum in nats, with its two parts, ``[N]`` each.

    ``elbo = reconstruction - kl``; ``kl`` is a Monte Carlo estimate under estimator A.
    """

    elbo: Tensor
    reconstruction: Tensor
    kl: Tensor

    @property
    def mean(self) -> float:
        """The mean over data, nats per datum."""
        return self.elbo.double().mean().item()

    @property
    def standard_error(self) -> float:
        """The standard error of that mean over data."""
        return (self.elbo.double().std() / len(self.elbo) ** 0.5).item()


@torch.no_grad()
def elbo(
    model: Callable,
    guide: Callable,
    x: Tensor,
    *context: Tensor,
    objective: str = "trace_elbo",
    particles: int = 1,
    batch_size: int = 512,
    seed: int | None = None,
) -> ElboResult:
    r"""The ELBO of every datum at β = 1, by estimator A or B.

    .. math:: \hat{\mathcal{L}}_A = \tfrac1L \sum_l \ln p(x, z_l) - \ln q(z_l | x), \qquad
              \hat{\mathcal{L}}_B = \tfrac1L \sum_l \ln p(x | z_l) - \mathrm{KL}(q \,\|\, p)

    Args:
        model: The model program.
        guide: The guide program.
        x: Data ``[N, ...]``; ``context`` are further arguments of both programs, ``[N, ...]``.
        objective: ``"trace_elbo"`` (A) or ``"trace_mean_field_elbo"`` (B).
        particles: The number of samples L.
        batch_size: How many data are scored at a time.
        seed: Seeds the draws; None continues torch's global stream.

    Returns:
        Nats per datum, ``[N]``, whatever :func:`pyro.poutine.scale` or a subsampled plate makes
        of them in training; modules are in eval mode meanwhile.

    Raises:
        ValueError: If the pair breaks the contract, or the objective has another name.

    References:
        Kingma and Welling (arXiv 1312.6114), equations 6 and 7.
    """
    analytic = type(make_objective(objective, particles)) is TraceMeanField_ELBO
    parameters = Parameters(model, guide)
    x, *context = (tensor.to(parameters.device) for tensor in (x, *context))
    parts = []
    with parameters.mode(training=False), seeded(seed, x.device):
        layout = inspect_pair(parameters, x[:batch_size], *(c[:batch_size] for c in context))
        for rows in zip(*(tensor.split(batch_size) for tensor in (x, *context)), strict=True):
            parts.append(_elbo_batch(parameters, layout, rows, analytic, particles))
    reconstruction, kl = (torch.cat(part) for part in zip(*parts, strict=True))
    return ElboResult(reconstruction - kl, reconstruction, kl)


def _elbo_batch(
    parameters: Parameters, layout: Layout, rows: tuple, analytic: bool, particles: int
) -> tuple[Tensor, Tensor]:
    model_trace, guide_trace = trace_pair(parameters, *rows, particles=particles, layout=layout)
    for trace in (model_trace, guide_trace):
        unscale(trace, layout)
        trace.compute_log_prob()
    observed, latent = 0.0, 0.0
    for name, term in site_terms(model_trace, guide_trace, analytic).items():
        term = reduce_to(term, layout, particles, len(rows[0])).mean(0)
        site = model_trace.nodes.get(name)
        if site is not None and site["is_observed"]:
            observed = observed + term
        else:
            latent = latent + term
    return observed, -latent
