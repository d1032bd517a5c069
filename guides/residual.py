"""A diagonal normal posterior with a residual encoder."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Tensor

from pyrovae.nn import ConvEncoder

__all__ = ["Residual"]


class Residual(PyroModule):
    r"""The diagonal normal guide with an encoder of residual blocks.

    .. math:: q(z \mid x) = \mathcal{N}\bigl(\mu(x), \mathrm{diag}\,\sigma^2(x)\bigr)

    Args:
        shape: The event shape of the data, ``[C, H, W]``.
        latent: The dimension of z.
        channels: The channels of the convolutions, from the image inwards; each halves the size.
        hidden: The widths of the hidden layers after them.
        activation: The name of a :mod:`torch.nn` activation.
        blocks: The number of residual blocks at each size.

    References:
        Kingma et al., Improving Variational Inference with Inverse Autoregressive Flow
        (arXiv 1606.04934); He et al. (arXiv 1603.05027), for the blocks.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 32,
        channels: Sequence[int] = (32, 64),
        hidden: Sequence[int] = (256,),
        activation: str = "SiLU",
        blocks: int = 1,
    ) -> None:
        super().__init__()
        self.encoder = ConvEncoder(shape, (2, latent), channels, hidden, activation, blocks)

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` given ``x`` and ``mask`` ``[N, *shape]``."""
        with pyro.plate("data", len(x)):
            # Centred; what is missing stays at zero, for the mask comes after.
            loc, log_scale = self.encoder(2 * x - 1, mask).unbind(-2)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
