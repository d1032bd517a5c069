"""An inverse autoregressive flow on an amortized diagonal normal."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import ConditionalAffineAutoregressive
from pyro.nn import ConditionalAutoRegressiveNN, PyroModule
from torch import Tensor, nn

from pyrovae.nn import MLP

__all__ = ["IAF"]


class IAF(PyroModule):
    r"""A posterior by inverse autoregressive flow.

    .. math:: z_0 \sim \mathcal{N}\bigl(\mu(x), \mathrm{diag}\,\sigma^2(x)\bigr), \qquad
              z_j = s_j \odot z_{j-1} + m_j

    with m and s > 0 autoregressive functions of :math:`z_{j-1}`, given features h(x); every step
    goes through the dimensions in the order opposite to the last one's. A draw and its own density
    take one pass; the density of another z takes one for each dimension.

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimension of z, two at least.
        hidden: The widths of the encoder's hidden layers.
        activation: The name of a :mod:`torch.nn` activation.
        steps: The number of steps.
        width: The width of the hidden layer of each step, no less than ``latent``.

    Raises:
        ValueError: If z has fewer than two dimensions, or a step is too narrow for it.

    References:
        Kingma et al., Improving Variational Inference with Inverse Autoregressive Flow
        (arXiv 1606.04934), equation 10.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        hidden: Sequence[int] = (400,),
        activation: str = "ReLU",
        steps: int = 4,
        width: int = 128,
    ) -> None:
        super().__init__()
        if not 2 <= latent <= width:
            raise ValueError(f"Expected 2 <= latent <= width={width}, got {latent}.")
        self.encoder = MLP(shape, (3, latent), hidden, activation)
        order = torch.arange(latent)
        self.flow = nn.ModuleList(
            ConditionalAffineAutoregressive(
                # Pyro's types ask for a torch.LongTensor, which no function is said to return.
                ConditionalAutoRegressiveNN(
                    latent,
                    latent,
                    [width],
                    permutation=order.flip(0) if step % 2 else order,  # type: ignore[arg-type]
                )
            )
            for step in range(steps)
        )

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` given ``x`` and ``mask`` ``[N, *shape]``."""
        with pyro.plate("data", len(x)):
            loc, log_scale, features = self.encoder(x, mask).unbind(-2)
            base = dist.Normal(loc, log_scale.exp()).to_event(1)
            posterior = dist.ConditionalTransformedDistribution(base, list(self.flow))
            pyro.sample("z", posterior.condition(features))
