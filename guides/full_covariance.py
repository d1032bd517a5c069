"""A normal posterior with a full covariance matrix."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyrovae.nn import MLP

__all__ = ["FullCovariance"]


class FullCovariance(PyroModule):
    r"""The multivariate normal guide.

    .. math:: q(z \mid x) = \mathcal{N}\bigl(\mu(x), L(x) L(x)^\top\bigr), \qquad
              L(x) = \mathrm{diag}\,\sigma(x) \, \bigl(I + T(x)\bigr)

    T is strictly lower triangular and zero at first, so that training starts from a mean-field
    guide.

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimension of z.
        hidden: The widths of the encoder's hidden layers.
        activation: The name of a :mod:`torch.nn` activation.

    References:
        Kingma and Welling, An Introduction to Variational Autoencoders (arXiv 1906.02691),
        section 2.5.1.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        hidden: Sequence[int] = (400,),
        activation: str = "ReLU",
    ) -> None:
        super().__init__()
        self.encoder = MLP(shape, (1 + latent, latent), hidden, activation)
        torch.nn.init.zeros_(self.encoder.last.weight[latent:])
        torch.nn.init.zeros_(self.encoder.last.bias[latent:])

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` given ``x`` and ``mask`` ``[N, *shape]``."""
        with pyro.plate("data", len(x)):
            out = self.encoder(x, mask)
            loc, raw = out[..., 0, :], out[..., 1:, :]
            scale = raw.diagonal(dim1=-2, dim2=-1).exp()
            scale_tril = torch.diag_embed(scale) + scale.unsqueeze(-1) * raw.tril(-1)
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale_tril))
