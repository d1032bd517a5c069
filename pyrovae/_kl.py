r"""The divergences between Gaussians that neither torch nor Pyro knows.

Importing this module registers, with :func:`torch.distributions.kl_divergence`, the pairs of a
diagonal normal, ``Normal(…).to_event(1)``, with a multivariate normal of full or low rank, so
that :class:`~pyro.infer.TraceMeanField_ELBO` stays analytic for them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
)
from torch.distributions.kl import register_kl

from pyrovae._tools import InputError

__all__ = ["kl_standard_normal"]


def kl_standard_normal(loc: Tensor, scale: Tensor) -> Tensor:
    r"""The divergence of a diagonal normal from N(0, I), in nats, summed over the last dimension.

    .. math:: \mathrm{KL} = \tfrac12 \sum_d (\mu_d^2 + \sigma_d^2 - 1 - \ln \sigma_d^2)

    Args:
        loc: The mean μ, ``[..., D]``.
        scale: The standard deviation σ, which broadcasts against it.

    References:
        Kingma and Welling, Auto-Encoding Variational Bayes (arXiv 1312.6114), appendix B.
    """
    return 0.5 * (loc.square() + scale.square() - 1 - 2 * scale.log()).sum(-1)


@register_kl(MultivariateNormal, Independent)
@register_kl(LowRankMultivariateNormal, Independent)
def _kl_multivariate_diagonal(p: Distribution, q: Independent) -> Tensor:
    return _kl_gaussian(p, q, _normal(q).scale.square().reciprocal())


@register_kl(Independent, LowRankMultivariateNormal)
def _kl_diagonal_lowrank(p: Independent, q: LowRankMultivariateNormal) -> Tensor:
    _normal(p)
    return _kl_gaussian(p, q, _precision_diagonal(q))


def _kl_gaussian(p: Distribution, q: Distribution, precision: Tensor) -> Tensor:
    r"""The divergence where one covariance is diagonal, so that only diagonals meet.

    .. math:: \mathrm{KL}(p \| q) = \underbrace{\tfrac12 \mathrm{tr}(\Sigma_q^{-1} \Sigma_p)
              - \ln q(\mu_p)}_{H(p, q)} - H(p)
    """
    if p.event_shape != q.event_shape:
        raise InputError(
            f"Expected Gaussians of one event shape, got {list(p.event_shape)} and "
            f"{list(q.event_shape)}."
        )
    return 0.5 * (p.variance * precision).sum(-1) - q.log_prob(p.mean) - p.entropy()


def _precision_diagonal(q: LowRankMultivariateNormal) -> Tensor:
    r"""The diagonal of :math:`(W W^\top + D)^{-1}`, ``[..., D]``, by the inversion lemma."""
    scaled = q.cov_factor.mT / q.cov_diag.unsqueeze(-2)
    capacitance = scaled @ q.cov_factor
    eye = torch.eye(capacitance.shape[-1], dtype=scaled.dtype, device=scaled.device)
    tril = torch.linalg.cholesky(eye + capacitance)
    inner = torch.linalg.solve_triangular(tril, scaled, upper=False)
    return q.cov_diag.reciprocal() - inner.square().sum(-2)


def _normal(d: Independent) -> Normal:
    if isinstance(d.base_dist, Normal) and d.reinterpreted_batch_ndims == 1:
        return d.base_dist
    raise NotImplementedError
