"""A standard normal prior and continuous Bernoulli pixels, decoded by convolutions."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyrovae.nn import ConvDecoder

__all__ = ["ConvolutionalContinuous"]


class ConvolutionalContinuous(PyroModule):
    r"""A VAE for images of values in [0, 1] with a convolutional decoder.

    .. math:: z \sim \mathcal{N}(0, I), \qquad
              p(x_d \mid z) = \frac{\lambda_d e^{\lambda_d x_d}}{e^{\lambda_d} - 1}, \quad
              |\lambda_d| < \text{limit}

    It is a density, so that log p(x) may be positive; without a limit on λ = f(z) it would grow
    without bound at pixels that are exactly 0 or 1, so that log p(x) is to be compared at the same
    limit alone.

    Args:
        shape: The event shape of the data, ``[C, H, W]``.
        latent: The dimension of z.
        channels: The channels of the convolutions, from the image inwards; each doubles the size.
        hidden: The widths of the hidden layers before them.
        activation: The name of a :mod:`torch.nn` activation.
        blocks: The number of residual blocks at each size.
        limit: The largest λ in size, up to which float32 holds the density.

    Raises:
        ValueError: If ``limit`` is not positive.

    References:
        Loaiza-Ganem and Cunningham, The continuous Bernoulli (arXiv 1907.06845).
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        channels: Sequence[int] = (32, 64),
        hidden: Sequence[int] = (256,),
        activation: str = "ReLU",
        blocks: int = 0,
        limit: float = 10.0,
    ) -> None:
        super().__init__()
        if limit <= 0:
            raise ValueError(f"Expected limit > 0, got {limit!r}.")
        self.limit = limit
        self.decoder = ConvDecoder(latent, shape, channels, hidden, activation, blocks)
        self.register_buffer("zero", torch.zeros(latent), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` and observe ``x`` ``[N, *shape]`` where ``mask`` is true."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.zero, 1.0).to_event(1))
            logits = self.limit * torch.tanh(self.decoder(z) / self.limit)
            likelihood = dist.ContinuousBernoulli(logits=logits)
            pyro.sample("x", likelihood.mask(mask).to_event(x.dim() - 1), obs=x)
