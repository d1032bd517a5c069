"""Two stochastic layers over binary data, the deeper model of the IWAE paper."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyrovae.nn import MLP

__all__ = ["TwoLayer"]


class TwoLayer(PyroModule):
    r"""A VAE whose prior on z1 is a VAE itself.

    .. math:: z_2 \sim \mathcal{N}(0, I), \qquad
              z_1 \mid z_2 \sim \mathcal{N}\bigl(\mu(z_2), \mathrm{diag}\,\sigma^2(z_2)\bigr),
              \qquad
              x_d \mid z_1 \sim \mathrm{Bernoulli}(\mathrm{sigmoid}(f_d(z_1)))

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimensions of z1, next to the data, and of z2.
        hidden: The widths of the hidden layers between z1 and x.
        hidden_top: The widths of the hidden layers between z2 and z1.
        activation: The name of a :mod:`torch.nn` activation.
        mean: The mean of the data, where the pixels start; on the command line ``model.mean=data``.

    References:
        Burda et al., Importance Weighted Autoencoders (arXiv 1509.00519), section 5.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: Sequence[int] = (100, 50),
        hidden: Sequence[int] = (200, 200),
        hidden_top: Sequence[int] = (100, 100),
        activation: str = "Tanh",
        mean: Tensor | None = None,
    ) -> None:
        super().__init__()
        z1, z2 = latent
        self.decoder = MLP(z1, shape, hidden, activation)
        if mean is not None:
            self.decoder.last.bias.data = mean.flatten().logit(eps=1e-3)
        self.decoder_top = MLP(z2, (2, z1), hidden_top, activation)
        self.register_buffer("zero", torch.zeros(z2), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z2`` and ``z1`` ``[N, latent]`` and observe ``x`` where ``mask`` is true."""
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(self.zero, 1.0).to_event(1))
            loc, log_scale = self.decoder_top(z2).unbind(-2)
            z1 = pyro.sample("z1", dist.Normal(loc, log_scale.exp()).to_event(1))
            logits = self.decoder(z1)
            pyro.sample("x", dist.Bernoulli(logits=logits).mask(mask).to_event(x.dim() - 1), obs=x)
