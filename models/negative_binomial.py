"""A standard normal prior and negative binomial counts."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyrovae.nn import MLP

__all__ = ["NegativeBinomial"]


class NegativeBinomial(PyroModule):
    r"""A VAE for counts that vary by more than their mean.

    .. math:: z \sim \mathcal{N}(0, I), \qquad
              x_d \mid z \sim \mathrm{NB}(\mu_d, r_d), \quad \mu_d = \mathrm{softplus}(f_d(z)),
              \quad \mathrm{Var}[x_d \mid z] = \mu_d + \mu_d^2 / r_d

    The data are whole numbers from 0, stored as floating-point numbers. The guide ``counts`` is
    made for them.

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimension of z.
        hidden: The widths of the decoder's hidden layers.
        activation: The name of a :mod:`torch.nn` activation.

    References:
        Lopez et al., Deep generative modeling for single-cell transcriptomics (2018), Nature
        Methods 15; Zhao et al., Variational Autoencoders for Sparse and Overdispersed Discrete
        Data (arXiv 1905.00616).
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        hidden: Sequence[int] = (400,),
        activation: str = "ReLU",
    ) -> None:
        super().__init__()
        self.decoder = MLP(latent, shape, hidden, activation)
        # Pyro gives a PyroParam back as a tensor that satisfies its constraint.
        self.r: Tensor = PyroParam(  # type: ignore[assignment]
            torch.ones(*shape), constraint=constraints.greater_than(1e-3)
        )
        self.register_buffer("zero", torch.zeros(latent), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` and observe ``x`` ``[N, *shape]`` where ``mask`` is true."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.zero, 1.0).to_event(1))
            # The floor keeps ln(mean) finite where softplus underflows.
            mean, r = softplus(self.decoder(z)) + 1e-6, self.r
            likelihood = dist.NegativeBinomial(r, logits=mean.log() - r.log())
            pyro.sample("x", likelihood.mask(mask).to_event(x.dim() - 1), obs=x)
