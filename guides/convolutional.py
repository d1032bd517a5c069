"""A diagonal normal posterior with a convolutional encoder."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Tensor

from pyrovae.nn import ConvEncoder

__all__ = ["Convolutional"]


class Convolutional(PyroModule):
    r"""The diagonal normal guide with a convolutional encoder.

    .. math:: q(z \mid x) = \mathcal{N}\bigl(\mu(x), \mathrm{diag}\,\sigma^2(x)\bigr)

    Args:
        shape: The event shape of the data, ``[C, H, W]``.
        latent: The dimension of z.
        channels: The channels of the convolutions, from the image inwards; each halves the size.
        hidden: The widths of the hidden layers after them.
        activation: The name of a :mod:`torch.nn` activation.

    References:
        Salimans, Kingma and Welling, Markov Chain Monte Carlo and Variational Inference
        (arXiv 1410.6460).
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        channels: Sequence[int] = (32, 64),
        hidden: Sequence[int] = (256,),
        activation: str = "ReLU",
    ) -> None:
        super().__init__()
        self.encoder = ConvEncoder(shape, (2, latent), channels, hidden, activation)

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` given ``x`` and ``mask`` ``[N, *shape]``."""
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x, mask).unbind(-2)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
