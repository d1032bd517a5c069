"""A standard normal prior and Gaussian pixels, decoded by convolutions."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

from pyrovae.nn import ConvDecoder

__all__ = ["ConvolutionalGaussian"]


class ConvolutionalGaussian(PyroModule):
    r"""A VAE for real-valued images with a convolutional decoder.

    .. math:: z \sim \mathcal{N}(0, I), \qquad x_d \mid z \sim \mathcal{N}(f_d(z), \sigma_c^2)

    with one σ for each channel c, learned from 1 on, in the units of x.

    Args:
        shape: The event shape of the data, ``[C, H, W]``.
        latent: The dimension of z.
        channels: The channels of the convolutions, from the image inwards; each doubles the size.
        hidden: The widths of the hidden layers before them.
        activation: The name of a :mod:`torch.nn` activation.
        blocks: The number of residual blocks at each size.

    References:
        Kingma and Welling, Auto-Encoding Variational Bayes (arXiv 1312.6114), appendix C.2; Rybkin,
        Daniilidis and Levine (arXiv 2006.13202), for the learned σ.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        channels: Sequence[int] = (32, 64),
        hidden: Sequence[int] = (256,),
        activation: str = "ReLU",
        blocks: int = 0,
    ) -> None:
        super().__init__()
        self.decoder = ConvDecoder(latent, shape, channels, hidden, activation, blocks)
        self.register_buffer("zero", torch.zeros(latent), persistent=False)
        # Pyro gives a PyroParam back as a tensor that satisfies its constraint.
        self.scale: Tensor = PyroParam(  # type: ignore[assignment]
            torch.ones(shape[0], 1, 1), constraint=constraints.positive
        )

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` and observe ``x`` ``[N, *shape]`` where ``mask`` is true."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.zero, 1.0).to_event(1))
            likelihood = dist.Normal(self.decoder(z), self.scale)
            pyro.sample("x", likelihood.mask(mask).to_event(x.dim() - 1), obs=x)
