"""A prior that mixes the guide's posteriors at learned pseudo-inputs, and Bernoulli pixels."""

from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyrovae.nn import MLP

__all__ = ["VampPrior"]


class VampPrior(PyroModule):
    r"""A VAE for binary data with a variational mixture of posteriors as its prior.

    .. math:: z \sim \frac1M \sum_m q(z \mid u_m), \qquad
              x_d \mid z \sim \mathrm{Bernoulli}(\mathrm{sigmoid}(f_d(z)))

    The guide is held by reference: its parameters stay its own, trained and saved once.

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimension of z.
        hidden: The widths of the decoder's hidden layers.
        activation: The name of a :mod:`torch.nn` activation.
        components: The number M of pseudo-inputs u, which are in [0, 1] as the data are.
        guide: The guide that the model is trained with, whose ``z`` is a normal or a mixture.
        mean: The mean of the data, where the pixels start; on the command line ``model.mean=data``.

    Raises:
        ValueError: If there is no guide.

    References:
        Tomczak and Welling, VAE with a VampPrior (arXiv 1705.07120), section 3.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        hidden: Sequence[int] = (400,),
        activation: str = "ReLU",
        components: int = 50,
        guide: Callable | None = None,
        mean: Tensor | None = None,
    ) -> None:
        super().__init__()
        if guide is None:
            raise ValueError("Expected the guide that makes the prior: VampPrior(…, guide=guide).")
        self.decoder = MLP(latent, shape, hidden, activation)
        if mean is not None:
            self.decoder.last.bias.data = mean.flatten().logit(eps=1e-3)
        self.pseudo = PyroParam(
            torch.rand(components, *shape), constraint=constraints.unit_interval
        )
        self.guide = (guide,)

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` and observe ``x`` ``[N, *shape]`` where ``mask`` is true."""
        with poutine.block(hide_types=["sample"]):
            posteriors = poutine.trace(self.guide[0]).get_trace(self.pseudo).nodes["z"]["fn"]
        flow = isinstance(posteriors, dist.TransformedDistribution)
        if flow or not isinstance(posteriors, Distribution):
            raise ValueError("Expected a guide of normals or their mixtures, got a flow for 'z'.")
        weights = dist.Categorical(logits=x.new_zeros(posteriors.batch_shape))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MixtureSameFamily(weights, posteriors))
            logits = self.decoder(z)
            pyro.sample("x", dist.Bernoulli(logits=logits).mask(mask).to_event(x.dim() - 1), obs=x)
