"""A standard normal prior and a categorical distribution over every pixel's grey levels."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae.distributions import GridCategorical
from pyrovae.nn import MLP

__all__ = ["Categorical"]


class Categorical(PyroModule):
    r"""A VAE for images of few grey levels, which takes no order among them for granted.

    .. math:: z \sim \mathcal{N}(0, I), \qquad
              p\bigl(x_d = \tfrac{k}{L - 1} \bigm| z\bigr) = \mathrm{softmax}(A f_d(z) + b)_k

    The decoder gives every pixel a few features, and one affine map, shared by all pixels, makes
    them logits. The data are on the grid k / (L - 1): 8-bit images over 255 for 256 levels, the
    digits over 16 for 17. The log-likelihood is of the whole numbers k, and
    :math:`-\ln p(x) / (D \ln 2)` its bits per dimension.

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimension of z.
        hidden: The widths of the decoder's hidden layers.
        activation: The name of a :mod:`torch.nn` activation.
        levels: The number of grey levels L.
        features: How many features of each pixel the logits are made from.

    Raises:
        ValueError: If there are fewer than two levels.

    References:
        Van den Oord et al., Pixel Recurrent Neural Networks (arXiv 1601.06759), section 2.2.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        hidden: Sequence[int] = (400,),
        activation: str = "ReLU",
        levels: int = 256,
        features: int = 8,
    ) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"Expected levels >= 2, got {levels}.")
        self.decoder = MLP(latent, (*shape, features), hidden, activation)
        self.head = nn.Linear(features, levels)
        self.register_buffer("zero", torch.zeros(latent), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` and observe ``x`` ``[N, *shape]`` where ``mask`` is true."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.zero, 1.0).to_event(1))
            logits = self.head(self.decoder(z))
            pyro.sample("x", GridCategorical(logits).mask(mask).to_event(x.dim() - 1), obs=x)
