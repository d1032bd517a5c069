r"""The ELBO by the two estimators of Auto-Encoding Variational Bayes (arXiv 1312.6114).

- A, equation 6, Pyro's ``Trace_ELBO``: :math:`E_q[\ln p(x, z) - \ln q(z|x)]`;
- B, equation 7, Pyro's ``TraceMeanField_ELBO``: :math:`E_q[\ln p(x|z)] - \mathrm{KL}(q \,\|\, p)`,
  in closed form where one is registered and the guide samples its latents in the model's order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import pyro
import torch
from pyro.distributions.util import is_identically_zero
from pyro.infer import ELBO, JitTrace_ELBO, JitTraceMeanField_ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.util import MultiFrameTensor, get_plate_stacks, is_validation_enabled
from pyro.poutine import Trace
from torch import Tensor

from pyrovae._tools import InputError, at_least, shown, standard_error
from pyrovae._tools.precision import matmul_precision
from pyrovae._tools.seeding import seeded
from pyrovae.data.given import takes_data
from pyrovae.objectives.base import Estimate
from pyrovae.objectives.scores import Analytic, score
from pyrovae.pairs.contract import check_support, inspect_evidence, kind_of
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.support import within_bounds
from pyrovae.pairs.traces import reduce_to, samples, unscaled, without_factors

ESTIMATORS = ("trace_elbo", "trace_mean_field_elbo")
GENERIC, ANALYTIC = (Trace_ELBO, JitTrace_ELBO), (TraceMeanField_ELBO, JitTraceMeanField_ELBO)


def site_terms(model_trace: Trace, guide_trace: Trace) -> dict[str, Tensor]:
    """The ELBO of scored traces split by site, before any sum: nats, with the site's plates."""
    model, guide = samples(model_trace), samples(guide_trace)
    terms: dict[str, Tensor] = {}
    for name, site in model.items():
        if site["is_observed"] or name not in guide:
            terms[name] = site["log_prob"]
        elif "kl" in guide[name]:
            terms[name] = -guide[name]["kl"]
        else:
            terms[name] = site["log_prob"] - guide[name]["log_prob"]
    return terms | {name: -site["log_prob"] for name, site in guide.items() if name not in model}


def terms_by_datum(
    pair: Pair, traces: tuple[Trace, Trace], size: tuple[int, int], analytic: bool
) -> dict[str, Tensor]:
    """The terms of :func:`site_terms` of densities alone, unscaled, summed to ``[K, N]``.

    A latent outside of the prior's support, which training refuses, has a term of -inf.
    """
    traces = traces[0], without_factors(traces[1])
    unscaled(pair.known, *traces)
    score(*traces, analytic=analytic)
    model = samples(traces[0])
    given = {n: s["log_prob"] for n in pair.known.bounded if "log_prob" in (s := model[n])}
    for name, log_prob in within_bounds(given, model, tuple(given)).items():
        model[name]["log_prob"] = log_prob
    terms = site_terms(*traces)
    return {name: reduce_to(term, pair.known, *size) for name, term in terms.items()}


def total(scores: Iterable[Tensor]) -> Tensor:
    """The sum of scores; a zero of none."""
    first, *rest = [*scores] or [torch.zeros(())]
    return sum(rest, first)


def surrogate_elbo(
    model_trace: Trace,
    guide_trace: Trace,
    terms: dict[str, Tensor],
    coefficients: Mapping[str, Tensor | float] | None = None,
) -> Tensor:
    r"""A scalar whose gradient is Pyro's estimate of that of :math:`E_q[f]`, its value no matter.

    .. math:: \nabla E_q[f] = E_q\bigl[\nabla f + \sum_s \bar f_s \, \nabla \ln q(z_s)\bigr], \quad
              f = \sum_s c_s f_s

    The sum is over latents that are not reparameterized, and :math:`\bar f_s` leaves out plates
    that s is not in. ``terms`` are the f, ``coefficients`` the c without a gradient, or 1.
    """
    coefficients = coefficients or {}
    nodes = samples(guide_trace)
    scored = {
        name: site["score_parts"].score_function
        for name, site in nodes.items()
        if not is_identically_zero(site["score_parts"].score_function)
    }
    parts = []
    for name, term in terms.items():
        if name in scored and "kl" not in nodes[name]:
            term = term + (nodes[name]["log_prob"] - nodes[name]["score_parts"].entropy_term)
        parts.append(coefficients.get(name, 1.0) * term.sum())
    if scored:
        stacks = get_plate_stacks(guide_trace) | get_plate_stacks(model_trace)
        costs = MultiFrameTensor()
        for name, term in terms.items():
            costs.add((stacks[name], coefficients.get(name, 1.0) * term.detach()))
        for name, score in scored.items():
            parts.append((costs.sum_to(nodes[name]["cond_indep_stack"]) * score).sum())
    return total(parts)


def elbo_estimate(
    loss: ELBO, model: Callable, guide: Callable, args: tuple, kwargs: dict
) -> Estimate:
    """The value and gradient of ``Trace_ELBO`` or ``TraceMeanField_ELBO``, nothing read back."""
    analytic = type(loss) in ANALYTIC
    sums: dict[str, Tensor] = {}
    surrogates = []
    asked = Analytic.like(loss) if analytic else loss
    for model_trace, guide_trace in asked._get_traces(model, guide, args, kwargs):
        for name, site in samples(guide_trace).items():
            if analytic and not site["fn"].has_rsample and not site["is_observed"]:
                raise InputError(
                    f"TraceMeanField_ELBO takes reparameterized latents alone, and the guide draws "
                    f"{name!r} from a {kind_of(site['fn'])}: train with trace_elbo, or "
                    f"enumerate the site and train with trace_enum_elbo."
                )
        terms = site_terms(model_trace, guide_trace)
        found = surrogate_elbo(model_trace, guide_trace, terms)
        surrogates.append(-found / loss.num_particles)
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + term.detach().sum() / loss.num_particles
    return Estimate(-total(sums.values()), total(surrogates), sums)


class ElboResult(NamedTuple):
    """The ELBO of each datum in nats, with its two parts, ``[N]`` each.

    ``elbo = reconstruction - kl``; ``kl`` is a Monte Carlo estimate under estimator A.
    """

    elbo: Tensor
    reconstruction: Tensor
    kl: Tensor
    __repr__, _repr_html_ = shown.text, shown.html  # type: ignore[misc]  # methods, no fields

    @property
    def mean(self) -> float:
        """The mean over data, nats per datum."""
        return self.elbo.double().mean().item()

    @property
    def standard_error(self) -> float:
        """The standard error of that mean over data."""
        return standard_error(self.elbo.double()).item()


@takes_data
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
    if objective not in ESTIMATORS:
        raise InputError(f"Expected an estimator of the ELBO, {ESTIMATORS}, got {objective!r}.")
    at_least({"particles": 1}, particles)
    pair, analytic = Pair(model, guide), objective == "trace_mean_field_elbo"
    every = tuple(tensor.to(pair.device) for tensor in (x, *context))
    batches = zip(*(tensor.split(batch_size) for tensor in every), strict=True)
    with pair.mode(training=False), matmul_precision("float32"), seeded(seed, every[0].device):
        inspect_evidence(pair, *(tensor[:batch_size] for tensor in every))
        bounded = bool(pair.known.bounded)
        if bounded and len(x) > batch_size:
            check_support(pair, *every, batch_size=batch_size, first=batch_size)
        # The guide may draw what the prior refuses.
        with pyro.validation_enabled(is_validation_enabled() and not bounded):
            parts = [score_elbo(pair, rows, particles, analytic=analytic) for rows in batches]
    reconstruction, kl = (torch.cat(part) for part in zip(*parts, strict=True))
    return ElboResult(reconstruction - kl, reconstruction, kl)


def score_elbo(pair: Pair, rows: tuple, particles: int, *, analytic: bool) -> tuple[Tensor, Tensor]:
    """Reconstruction and KL of a batch that has been inspected, ``[N]`` each, in nats."""
    traces = pair.trace(*rows, particles=particles)
    found = terms_by_datum(pair, traces, (particles, len(rows[0])), analytic)
    terms = {name: term.mean(0) for name, term in found.items()}
    # Of this batch: a loop over a part of a datum's columns observes others each time.
    observed = [terms.pop(n) for n in [*terms] if traces[0].nodes.get(n, {}).get("is_observed")]
    zero = torch.zeros(len(rows[0]), device=rows[0].device)  # where nothing is seen, or hidden
    return total(observed or [zero]), total([-term for term in terms.values()] or [zero])
