"""Binary data given a label, which is an input and is not modelled."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae.nn import MLP

__all__ = ["Conditional"]


class Conditional(PyroModule):
    r"""A VAE of x given y.

    .. math:: z \sim \mathcal{N}(0, I), \qquad
              x_d \mid z, y \sim \mathrm{Bernoulli}(\mathrm{sigmoid}(f_d(z, y)))

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimension of z.
        classes: The number of labels.
        hidden: The widths of the decoder's hidden layers; at least one.
        activation: The name of a :mod:`torch.nn` activation.

    References:
        Sohn et al., Learning Structured Output Representation using Deep Conditional Generative
        Models (NeurIPS 2015); Kingma et al. (arXiv 1406.5298), equation 2.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        classes: int = 10,
        hidden: Sequence[int] = (400,),
        activation: str = "ReLU",
    ) -> None:
        super().__init__()
        width, *rest = hidden
        self.code, self.label = nn.Linear(latent, width), nn.Embedding(classes, width)
        self.decoder = nn.Sequential(getattr(nn, activation)(), MLP(width, shape, rest, activation))
        self.register_buffer("zero", torch.zeros(latent), persistent=False)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` and observe ``x`` where ``mask`` is true, given ``y``."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.zero, 1.0).to_event(1))
            logits = self.decoder(self.code(z) + self.label(y))
            pyro.sample("x", dist.Bernoulli(logits=logits).mask(mask).to_event(x.dim() - 1), obs=x)
