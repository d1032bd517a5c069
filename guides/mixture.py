"""A posterior that is a mixture of diagonal normals."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Tensor
from torch.nn.functional import softplus

from pyrovae.nn import MLP

__all__ = ["Mixture"]


class Mixture(PyroModule):
    r"""An amortized mixture, for posteriors of several modes.

    .. math:: q(z \mid x) = \sum_c \pi_c(x) \, \mathcal{N}\bigl(\mu_c(x),
              \mathrm{diag}\,\sigma_c^2(x)\bigr)

    Draws are reparameterized, the choice of the component included, by Pyro's
    :class:`~pyro.distributions.MixtureOfDiagNormals`. Its gradient holds densities in the open,
    for which float32 is too narrow beyond some 30 dimensions.

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimension of z, from 2 to 30.
        hidden: The widths of the encoder's hidden layers.
        activation: The name of a :mod:`torch.nn` activation.
        components: The number of normals.

    Raises:
        ValueError: If ``latent`` is out of range.

    References:
        Jankowiak and Karaletsos, Pathwise Derivatives for Multivariate Distributions
        (arXiv 1806.01856).
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        hidden: Sequence[int] = (400,),
        activation: str = "ReLU",
        components: int = 4,
    ) -> None:
        super().__init__()
        if not 2 <= latent <= 30:
            raise ValueError(f"Expected 2 <= latent <= 30, got {latent}: use a flow for others.")
        self.encoder = MLP(shape, (components, 2 * latent + 1), hidden, activation)

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` given ``x`` and ``mask`` ``[N, *shape]``."""
        with pyro.plate("data", len(x)):
            out = self.encoder(x, mask)
            logits, (loc, raw) = out[..., 0], out[..., 1:].chunk(2, -1)
            # The floor keeps the densities in the gradient within float32.
            scale = softplus(raw) + 0.03
            pyro.sample("z", dist.MixtureOfDiagNormals(loc, scale, logits))
