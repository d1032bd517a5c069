"""A standard normal prior and Bernoulli pixels, decoded by convolutions."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyrovae.nn import ConvDecoder

__all__ = ["Convolutional"]


class Convolutional(PyroModule):
    r"""A VAE for binary images with a convolutional decoder.

    .. math:: z \sim \mathcal{N}(0, I), \qquad
              x_d \mid z \sim \mathrm{Bernoulli}(\mathrm{sigmoid}(f_d(z)))

    Args:
        shape: The event shape of the data, ``[C, H, W]``.
        latent: The dimension of z.
        channels: The channels of the convolutions, from the image inwards; each doubles the size.
        hidden: The widths of the hidden layers before them.
        activation: The name of a :mod:`torch.nn` activation.

    References:
        Salimans, Kingma and Welling, Markov Chain Monte Carlo and Variational Inference
        (arXiv 1410.6460); Radford, Metz and Chintala (arXiv 1511.06434), for the strides.
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
        self.decoder = ConvDecoder(latent, shape, channels, hidden, activation)
        self.register_buffer("zero", torch.zeros(latent), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` and observe ``x`` ``[N, *shape]`` where ``mask`` is true."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.zero, 1.0).to_event(1))
            logits = self.decoder(z)
            pyro.sample("x", dist.Bernoulli(logits=logits).mask(mask).to_event(x.dim() - 1), obs=x)
