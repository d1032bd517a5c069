"""A diagonal normal posterior whose network sees the data and their labels."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae.nn import MLP

__all__ = ["Conditional"]


class Conditional(PyroModule):
    r"""The diagonal normal guide of a VAE of x given y.

    .. math:: q(z \mid x, y) = \mathcal{N}\bigl(\mu(x, y), \mathrm{diag}\,\sigma^2(x, y)\bigr)

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimension of z.
        classes: The number of labels.
        hidden: The widths of the encoder's hidden layers; at least one.
        activation: The name of a :mod:`torch.nn` activation.

    References:
        Sohn et al., Learning Structured Output Representation using Deep Conditional Generative
        Models (NeurIPS 2015).
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
        self.encoder, self.label = MLP(shape, width, ()), nn.Embedding(classes, width)
        self.posterior = nn.Sequential(
            getattr(nn, activation)(), MLP(width, (2, latent), rest, activation)
        )

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` given ``x``, ``mask`` ``[N, *shape]``, ``y``."""
        with pyro.plate("data", len(x)):
            h = self.encoder(x, mask) + self.label(y)
            loc, log_scale = self.posterior(h).unbind(-2)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
