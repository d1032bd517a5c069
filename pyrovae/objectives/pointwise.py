r"""The ELBO of each datum, for reporting: always at β = 1, by one of two estimators.

Both are from Auto-Encoding Variational Bayes (arXiv 1312.6114):

- A, equation 6, Pyro's ``Trace_ELBO``: :math:`E_q[\ln p(x, z) - \ln q(z|x)]`;
- B, equation 7, Pyro's ``TraceMeanField_ELBO``: :math:`E_q[\ln p(x|z)] - \mathrm{KL}(q \,\|\, p)`,
  the divergence in closed form where one is registered, and where the guide samples its latents
  in the model's order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyrovae._tools import InputError, standard_error
from pyrovae._tools.seeding import seeded
from pyrovae.objectives.elbo import in_one_order, site_terms
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import Layout, reduce_to, unscaled

__all__ = ["ESTIMATORS", "ElboResult", "elbo", "score_elbo"]

ESTIMATORS = ("trace_elbo", "trace_mean_field_elbo")


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
        return standard_error(self.elbo.double()).item()


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
    if particles < 1:
        raise InputError(f"Expected particles >= 1, got {particles}.")
    analytic = objective == "trace_mean_field_elbo"
    pair = Pair(model, guide)
    x, *context = (tensor.to(pair.device) for tensor in (x, *context))
    parts = []
    with pair.mode(training=False), seeded(seed, x.device):
        layout = inspect_pair(pair, x[:batch_size], *(c[:batch_size] for c in context))
        for rows in zip(*(tensor.split(batch_size) for tensor in (x, *context)), strict=True):
            parts.append(score_elbo(pair, layout, rows, analytic, particles))
    reconstruction, kl = (torch.cat(part) for part in zip(*parts, strict=True))
    return ElboResult(reconstruction - kl, reconstruction, kl)


def score_elbo(
    pair: Pair, layout: Layout, rows: tuple, analytic: bool, particles: int
) -> tuple[Tensor, Tensor]:
    """The two parts of a batch's ELBO, reconstruction and KL, ``[N]`` each, in nats.

    Args:
        pair: The pair.
        layout: What :func:`pyrovae.pairs.contract.inspect_pair` said of the pair.
        rows: The batch, with the programs' further arguments.
        analytic: Estimator B instead of A.
        particles: The number of samples L.
    """
    model_trace, guide_trace = pair.trace(*rows, particles=particles)
    unscaled(layout, model_trace, guide_trace)
    analytic = analytic and in_one_order(model_trace, guide_trace)
    observed, latent = 0.0, 0.0
    for name, term in site_terms(model_trace, guide_trace, analytic).items():
        term = reduce_to(term, layout, particles, len(rows[0])).mean(0)
        site = model_trace.nodes.get(name)
        if site is not None and site["is_observed"]:
            observed = observed + term
        else:
            latent = latent + term
    return observed, -latent
