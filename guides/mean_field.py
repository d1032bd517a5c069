"""A diagonal normal posterior, the usual guide of a VAE."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Tensor

from pyrovae.nn import MLP

__all__ = ["MeanField"]


class MeanField(PyroModule):
    r"""The diagonal normal guide of the VAE.

    .. math:: q(z \mid x) = \mathcal{N}\bigl(\mu(x), \mathrm{diag}\,\sigma^2(x)\bigr)

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimension of z.
        hidden: The widths of the encoder's hidden layers.
        activation: The name of a :mod:`torch.nn` activation.

    References:
        Kingma and Welling, Auto-Encoding Variational Bayes (arXiv 1312.6114), equation 9.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        hidden: Sequence[int] = (400,),
        activation: str = "ReLU",
    ) -> None:
        super().__init__()
        self.encoder = MLP(shape, (2, latent), hidden, activation)

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` given ``x`` and ``mask`` ``[N, *shape]``."""
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x, mask).unbind(-2)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
