"""A standard normal prior and discretized logistics for colour images, by residual blocks."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor
from torch.nn.functional import softplus

from pyrovae import distributions
from pyrovae.nn import ConvDecoder

__all__ = ["Residual"]


class Residual(PyroModule):
    r"""A VAE for 8-bit images in colour with a residual decoder.

    .. math:: z \sim \mathcal{N}(0, I), \qquad
              x_d \mid z \sim \mathrm{Logistic}(\mu_d, s_d) \text{ rounded to the levels}

    with μ and s read off f(z). The data are on the grid k / (L - 1): 8-bit images over 255. The
    log-likelihood is of the whole numbers k, nothing is added to them, and
    :math:`-\ln p(x) / (D \ln 2)` is in bits per dimension, D counting the channels. Channels are
    independent given z.

    Args:
        shape: The event shape of the data, ``[C, H, W]``, 3 channels in colour.
        latent: The dimension of z.
        channels: The channels of the convolutions, from the image inwards; each doubles the size.
        hidden: The widths of the hidden layers before them.
        activation: The name of a :mod:`torch.nn` activation.
        blocks: The number of residual blocks at each size.
        levels: The number of levels L of each channel.

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
        levels: int = 256,
    ) -> None:
        super().__init__()
        self.levels = levels
        wide = (2 * shape[0], *shape[1:])
        self.decoder = ConvDecoder(latent, wide, channels, hidden, activation, blocks)
        self.register_buffer("zero", torch.zeros(latent), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` and observe ``x`` ``[N, *shape]`` where ``mask`` is true."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.zero, 1.0).to_event(1))
            raw_loc, raw = self.decoder(z).chunk(2, -3)
            # At first mid-grey, an eighth of the range wide; the floor, half a level, keeps
            # the scale of a pixel that never varies from vanishing.
            loc, scale = 0.5 + raw_loc, softplus(raw - 2) + 0.5 / self.levels
            likelihood = distributions.DiscretizedLogistic(loc, scale, self.levels)
            pyro.sample("x", likelihood.mask(mask).to_event(x.dim() - 1), obs=x)
