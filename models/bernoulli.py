"""A standard normal prior and independent Bernoulli pixels."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyrovae.nn import MLP

__all__ = ["Bernoulli"]


class Bernoulli(PyroModule):
    r"""A VAE for binary data.

    .. math:: z \sim \mathcal{N}(0, I), \qquad
              x_d \mid z \sim \mathrm{Bernoulli}(\mathrm{sigmoid}(f_d(z)))

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimension of z.
        hidden: The widths of the decoder's hidden layers.
        activation: The name of a :mod:`torch.nn` activation.
        mean: The mean of the data ``[*shape]``, for the pixels to start at; None starts them near
            1/2. On the command line ``model.mean=data`` is that of the training data.

    References:
        Kingma and Welling, Auto-Encoding Variational Bayes (arXiv 1312.6114), appendix C.1.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        hidden: Sequence[int] = (400,),
        activation: str = "ReLU",
        mean: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.decoder = MLP(latent, shape, hidden, activation)
        if mean is not None:
            self.decoder.last.bias.data = mean.flatten().logit(eps=1e-3)
        self.register_buffer("zero", torch.zeros(latent), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` and observe ``x`` ``[N, *shape]`` where ``mask`` is true."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.zero, 1.0).to_event(1))
            logits = self.decoder(z)
            pyro.sample("x", dist.Bernoulli(logits=logits).mask(mask).to_event(x.dim() - 1), obs=x)
