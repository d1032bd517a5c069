"""A Gaussian mixture prior with the component as a discrete latent, and Bernoulli pixels."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from pyrovae.nn import MLP

__all__ = ["GMVAE"]


class GMVAE(PyroModule):
    r"""A VAE that clusters: each datum comes from one of C components.

    .. math:: y \sim \mathrm{Cat}(\pi), \qquad
              z \mid y \sim \mathcal{N}(\mu_y, \mathrm{diag}\,\sigma_y^2), \qquad
              x_d \mid z \sim \mathrm{Bernoulli}(\mathrm{sigmoid}(f_d(z)))

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimension of z.
        components: The number of components C.
        hidden: The widths of the decoder's hidden layers.
        activation: The name of a :mod:`torch.nn` activation.
        mean: The mean of the data, where the pixels start; on the command line ``model.mean=data``.

    References:
        Jiang et al., Variational Deep Embedding (arXiv 1611.05148), equations 1 to 5.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        components: int = 10,
        hidden: Sequence[int] = (400,),
        activation: str = "ReLU",
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
            torch.ones(components, latent), constraint=constraints.positive
        )

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``y`` ``[N]``, ``z`` ``[N, latent]``; observe ``x`` where ``mask`` is true."""
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=self.logits))
            z = pyro.sample("z", dist.Normal(self.loc[y], self.scale[y]).to_event(1))
            logits = self.decoder(z)
            pyro.sample("x", dist.Bernoulli(logits=logits).mask(mask).to_event(x.dim() - 1), obs=x)
