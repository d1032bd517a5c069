"""A standard normal prior and Laplace observations."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

from pyrovae.nn import MLP

__all__ = ["Laplace"]


class Laplace(PyroModule):
    r"""A VAE for real-valued data with outliers: absolute errors in place of squared ones.

    .. math:: z \sim \mathcal{N}(0, I), \qquad x_d \mid z \sim \mathrm{Laplace}(f_d(z), b)

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimension of z.
        hidden: The widths of the decoder's hidden layers.
        activation: The name of a :mod:`torch.nn` activation.
        scale: The initial observation scale b, in units of x; it is learned.

    Raises:
        ValueError: If ``scale`` is not positive.

    References:
        Kingma and Welling, Auto-Encoding Variational Bayes (arXiv 1312.6114).
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        hidden: Sequence[int] = (400,),
        activation: str = "ReLU",
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if scale <= 0:
            raise ValueError(f"Expected scale > 0, got {scale!r}.")
        self.decoder = MLP(latent, shape, hidden, activation)
        self.scale = PyroParam(torch.tensor(float(scale)), constraint=constraints.positive)
        self.register_buffer("zero", torch.zeros(latent), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` and observe ``x`` ``[N, *shape]`` where ``mask`` is true."""
        event = x.dim() - 1
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.zero, 1.0).to_event(1))
            likelihood = dist.Laplace(self.decoder(z), self.scale)
            pyro.sample("x", likelihood.mask(mask).to_event(event), obs=x)
