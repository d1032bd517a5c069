"""A diagonal normal posterior for counts, whose network sees log(1 + x)."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Tensor

from pyrovae.nn import MLP

__all__ = ["Counts"]


class Counts(PyroModule):
    r"""The diagonal normal guide of data that are counts.

    .. math:: q(z \mid x) = \mathcal{N}\bigl(\mu(\ln(1 + x)), \mathrm{diag}\,\sigma^2(\ln(1 + x))
              \bigr)

    Counts as they are make the first outputs of a network so large that training does not start.

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimension of z.
        hidden: The widths of the encoder's hidden layers.
        activation: The name of a :mod:`torch.nn` activation.

    References:
        Lopez et al., Deep generative modeling for single-cell transcriptomics, Nature Methods 15
        (2018).
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        hidden: Sequence[int] = (400,),
        activation: str = "ReLU",
    ) -> None:
        super().__init__()
        self.encoder = MLP(shape, (2, latent), hidden, activation)

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` given the counts ``x`` and ``mask`` ``[N, *shape]``."""
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x.log1p(), mask).unbind(-2)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
