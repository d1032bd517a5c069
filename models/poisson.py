"""A standard normal prior and Poisson counts."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor
from torch.nn.functional import softplus

from pyrovae.nn import MLP

__all__ = ["Poisson"]


class Poisson(PyroModule):
    r"""A VAE for counts whose variance is their mean.

    .. math:: z \sim \mathcal{N}(0, I), \qquad
              x_d \mid z \sim \mathrm{Poisson}(\mathrm{softplus}(f_d(z)))

    The data are whole numbers from 0, stored as floating-point numbers. The guide ``counts`` is
    made for them.

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimension of z.
        hidden: The widths of the decoder's hidden layers.
        activation: The name of a :mod:`torch.nn` activation.

    References:
        Zhao et al., Variational Autoencoders for Sparse and Overdispersed Discrete Data
        (arXiv 1905.00616).
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        hidden: Sequence[int] = (400,),
        activation: str = "ReLU",
    ) -> None:
        super().__init__()
        self.decoder = MLP(latent, shape, hidden, activation)
        self.register_buffer("zero", torch.zeros(latent), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` and observe ``x`` ``[N, *shape]`` where ``mask`` is true."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.zero, 1.0).to_event(1))
            # The floor keeps ln(rate) finite where softplus underflows.
            rate = softplus(self.decoder(z)) + 1e-6
            pyro.sample("x", dist.Poisson(rate).mask(mask).to_event(x.dim() - 1), obs=x)
