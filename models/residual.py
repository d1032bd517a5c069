"""A standard normal prior and discretized logistics for colour images, by residual blocks."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

from pyrovae import distributions
from pyrovae.nn import ConvDecoder

__all__ = ["Residual"]


class Residual(PyroModule):
    r"""A VAE for 8-bit images in colour with a residual decoder.

    .. math:: z \sim \mathcal{N}(0, I), \qquad
              x_d \mid z \sim \mathrm{Logistic}(f_d(z), s_c) \text{ rounded to the levels}

    with one scale s for each channel c, learned from 0.1 on. (Scales that depend on z hide the
    hues: where an object's colour is unknown they grow until half of a pixel's mass lies on either
    end, and there the means learn nothing.) The data are on the grid k / (L - 1): 8-bit images over
    255. The log-likelihood is of the whole numbers k, nothing is added to them, and
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
        (arXiv 1606.04934); He et al. (arXiv 1603.05027), for the blocks; Rybkin, Daniilidis and
        Levine (arXiv 2006.13202), for learned scales that z does not set.
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
        self.decoder = ConvDecoder(latent, shape, channels, hidden, activation, blocks)
        self.register_buffer("zero", torch.zeros(latent), persistent=False)
        # Pyro gives a PyroParam back as a tensor that satisfies its constraint.
        self.scale: Tensor = PyroParam(  # type: ignore[assignment]
            torch.full((shape[0], 1, 1), 0.1), constraint=constraints.positive
        )

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` and observe ``x`` ``[N, *shape]`` where ``mask`` is true."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.zero, 1.0).to_event(1))
            loc = 0.5 + self.decoder(z)  # at first mid-grey
            likelihood = distributions.DiscretizedLogistic(loc, self.scale, self.levels)
            pyro.sample("x", likelihood.mask(mask).to_event(x.dim() - 1), obs=x)
