"""A hierarchy of any number of stochastic layers over binary data."""

from collections.abc import Sequence
from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrovae.nn import MLP

__all__ = ["Ladder"]


class Ladder(PyroModule):
    r"""A chain of L diagonal normals, each the prior of the one below.

    .. math:: z_L \sim \mathcal{N}(0, I), \qquad
              z_l \mid z_{l+1} \sim \mathcal{N}\bigl(\mu_l(z_{l+1}),
              \mathrm{diag}\,\sigma_l^2(z_{l+1})\bigr), \qquad
              x_d \mid z_1 \sim \mathrm{Bernoulli}(\mathrm{sigmoid}(f_d(z_1)))

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimensions of z1, next to the data, to zL.
        hidden: The width of the hidden layer below each of them.
        activation: The name of a :mod:`torch.nn` activation; "GLU" gates every hidden layer.
        mean: The mean of the data, where the pixels start; on the command line ``model.mean=data``.

    References:
        Sønderby et al., Ladder Variational Autoencoders (arXiv 1602.02282), equations 1 to 3.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: Sequence[int] = (64, 32, 16),
        hidden: Sequence[int] = (512, 256, 128),
        activation: str = "LeakyReLU",
        mean: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.decoder = MLP(latent[0], shape, hidden[:1], activation)
        if mean is not None:
            self.decoder.last.bias.data = mean.flatten().logit(eps=1e-3)
        steps = zip(pairwise(latent), hidden[1:], strict=True)
        self.decoders = nn.ModuleList(
            MLP(above, (2, below), (width,), activation) for (below, above), width in steps
        )
        self.register_buffer("zero", torch.zeros(latent[-1]), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``zL`` to ``z1`` ``[N, latent]`` and observe ``x`` where ``mask`` is true."""
        top = len(self.decoders) + 1
        with pyro.plate("data", len(x)):
            z = pyro.sample(f"z{top}", dist.Normal(self.zero, 1.0).to_event(1))
            for level in reversed(range(1, top)):
                loc, scale = self.decoders[level - 1](z).unbind(-2)
                # The floor keeps a layer that is all but certain from dividing by zero.
                prior = dist.Normal(loc, softplus(scale) + 1e-3).to_event(1)
                z = pyro.sample(f"z{level}", prior)
            logits = self.decoder(z)
            pyro.sample("x", dist.Bernoulli(logits=logits).mask(mask).to_event(x.dim() - 1), obs=x)
