"""A learned mixture of Gaussians as the prior, and independent Bernoulli pixels."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from pyrovae.nn import MLP

__all__ = ["MixturePrior"]


class MixturePrior(PyroModule):
    r"""A VAE for binary data whose prior is learned with it.

    .. math:: z \sim \sum_m \pi_m \, \mathcal{N}(\mu_m, \mathrm{diag}\,\sigma_m^2), \qquad
              x_d \mid z \sim \mathrm{Bernoulli}(\mathrm{sigmoid}(f_d(z)))

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimension of z.
        hidden: The widths of the decoder's hidden layers.
        activation: The name of a :mod:`torch.nn` activation.
        components: The number of Gaussians.
        mean: The mean of the data, where the pixels start; on the command line ``model.mean=data``.

    References:
        Nalisnick, Hertel and Smyth, Approximate Inference for Deep Latent Gaussian Mixtures
        (2016), NIPS Workshop on Bayesian Deep Learning; Tomczak and Welling, VAE with a VampPrior
        (arXiv 1705.07120), section 3.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        hidden: Sequence[int] = (400,),
        activation: str = "ReLU",
        components: int = 50,
        mean: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.decoder = MLP(latent, shape, hidden, activation)
        if mean is not None:
            self.decoder.last.bias.data = mean.flatten().logit(eps=1e-3)
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, latent))
        # Pyro gives a PyroParam back as a tensor that satisfies its constraint.
        self.scale: Tensor = PyroParam(  # type: ignore[assignment]
            torch.ones(components, latent), constraint=constraints.greater_than(1e-3)
        )

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` and observe ``x`` ``[N, *shape]`` where ``mask`` is true."""
        weights = dist.Categorical(logits=self.logits)
        prior = dist.MixtureSameFamily(weights, dist.Normal(self.loc, self.scale).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            logits = self.decoder(z)
            pyro.sample("x", dist.Bernoulli(logits=logits).mask(mask).to_event(x.dim() - 1), obs=x)
