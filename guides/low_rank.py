"""A normal posterior whose covariance is diagonal plus low rank."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyrovae.nn import MLP

__all__ = ["LowRank"]


class LowRank(PyroModule):
    r"""The normal guide whose covariance is diagonal plus low rank.

    .. math:: q(z \mid x) = \mathcal{N}\bigl(\mu(x), \; W(x) W(x)^\top
              + \mathrm{diag}\,\sigma^2(x)\bigr), \qquad
              W(x) = \mathrm{diag}\,\sigma(x) \, V(x), \quad
              V \in \mathbb{R}^{\text{latent} \times R}

    V is small at first, so that training starts close to the mean-field guide.

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimension of z.
        hidden: The widths of the encoder's hidden layers.
        activation: The name of a :mod:`torch.nn` activation.
        rank: The number R of directions.

    References:
        Rezende, Mohamed and Wierstra, Stochastic Backpropagation (arXiv 1401.4082), with one
        direction.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        hidden: Sequence[int] = (400,),
        activation: str = "ReLU",
        rank: int = 4,
    ) -> None:
        super().__init__()
        self.encoder = MLP(shape, (2 + rank, latent), hidden, activation)
        with torch.no_grad():
            self.encoder.last.weight[2 * latent :] *= 0.1

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` given ``x`` and ``mask`` ``[N, *shape]``."""
        with pyro.plate("data", len(x)):
            out = self.encoder(x, mask)
            loc, scale, raw = out[..., 0, :], out[..., 1, :].exp(), out[..., 2:, :].mT
            factor = scale.unsqueeze(-1) * raw
            # The constant keeps the covariance positive definite in float32.
            pyro.sample("z", dist.LowRankMultivariateNormal(loc, factor, scale.square() + 1e-5))
