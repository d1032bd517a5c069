"""Bottom-up inference of two stochastic layers: first the one next to the data."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Tensor

from pyrovae.nn import MLP

__all__ = ["TwoLayer"]


class TwoLayer(PyroModule):
    r"""A guide that runs the model's arrows backwards.

    .. math:: q(z_1, z_2 \mid x) = q(z_1 \mid x) \, q(z_2 \mid z_1),

    each a diagonal normal whose moments a network reads off what it depends on.

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimensions of z1, next to the data, and of z2.
        hidden: The widths of the hidden layers between x and z1.
        hidden_top: The widths of the hidden layers between z1 and z2.
        activation: The name of a :mod:`torch.nn` activation.

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
    ) -> None:
        super().__init__()
        z1, z2 = latent
        self.encoder = MLP(shape, (2, z1), hidden, activation)
        self.encoder_top = MLP(z1, (2, z2), hidden_top, activation)

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z1``, then ``z2`` ``[N, latent]`` given ``x`` and ``mask`` ``[N, *shape]``."""
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x, mask).unbind(-2)
            z1 = pyro.sample("z1", dist.Normal(loc, log_scale.exp()).to_event(1))
            loc, log_scale = self.encoder_top(z1).unbind(-2)
            pyro.sample("z2", dist.Normal(loc, log_scale.exp()).to_event(1))
