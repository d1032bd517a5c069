"""A standard normal prior and a mixture of discretized logistics for every pixel."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor
from torch.nn.functional import softplus

from pyrovae import distributions
from pyrovae.nn import MLP

__all__ = ["DiscretizedLogistic"]


class DiscretizedLogistic(PyroModule):
    r"""A VAE for 8-bit images.

    .. math:: z \sim \mathcal{N}(0, I), \qquad
              x_d \mid z \sim \sum_m \pi_{dm} \, \mathrm{Logistic}(\mu_{dm}, s_{dm})
              \text{ rounded to the levels}

    with π, μ and s read off f(z). The data are on the grid k / (L - 1): 8-bit images over 255 for
    256 levels, the digits over 16 for 17. The log-likelihood is of the whole numbers k, and
    :math:`-\ln p(x) / (D \ln 2)` its bits per dimension. Channels are independent given z.

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimension of z.
        hidden: The widths of the decoder's hidden layers.
        activation: The name of a :mod:`torch.nn` activation.
        levels: The number of grey levels L.
        components: The number of logistics of each pixel.

    References:
        Salimans et al., PixelCNN++ (arXiv 1701.05517), section 2.1.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        hidden: Sequence[int] = (400,),
        activation: str = "ReLU",
        levels: int = 256,
        components: int = 5,
    ) -> None:
        super().__init__()
        self.levels = levels
        self.decoder = MLP(latent, (3, *shape, components), hidden, activation)
        self.register_buffer("zero", torch.zeros(latent), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` and observe ``x`` ``[N, *shape]`` where ``mask`` is true."""
        event = x.dim() - 1
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.zero, 1.0).to_event(1))
            logits, loc, raw = self.decoder(z).unbind(-2 - event)
            # At first an eighth of the range; the floor keeps a narrow scale from vanishing.
            logistics = distributions.DiscretizedLogistic(
                loc, softplus(raw - 2) + 1e-4, self.levels
            )
            mixture = dist.MixtureSameFamily(dist.Categorical(logits=logits), logistics)
            pyro.sample("x", mixture.mask(mask).to_event(event), obs=x)
