"""A RealNVP posterior: affine couplings on an amortized diagonal normal."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import ConditionalAffineCoupling, Permute
from pyro.nn import ConditionalDenseNN, PyroModule
from torch import Tensor, nn

from pyrovae.nn import MLP

__all__ = ["Flow"]


class Flow(PyroModule):
    r"""A posterior by a RealNVP whose couplings see features of the data.

    .. math:: z_0 \sim \mathcal{N}\bigl(\mu(x), \mathrm{diag}\,\sigma^2(x)\bigr), \qquad
              z_j = T_j(z_{j-1}; h(x))

    Each T scales and shifts one half of its input as the other half and h say, and turns their
    order round, so that a draw and the density of any z take one pass each.

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimension of z, two at least.
        hidden: The widths of the encoder's hidden layers.
        activation: The name of a :mod:`torch.nn` activation.
        steps: The number of couplings.
        width: The width of the two hidden layers of each coupling.

    Raises:
        ValueError: If z has fewer than two dimensions.

    References:
        Rezende and Mohamed, Variational Inference with Normalizing Flows (arXiv 1505.05770);
        Dinh, Sohl-Dickstein and Bengio, Density estimation using Real NVP (arXiv 1605.08803).
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        hidden: Sequence[int] = (400,),
        activation: str = "ReLU",
        steps: int = 4,
        width: int = 64,
    ) -> None:
        super().__init__()
        if latent < 2:
            raise ValueError(f"Expected latent >= 2, for a flow to couple halves, got {latent}.")
        self.encoder = MLP(shape, (3, latent), hidden, activation)
        keep, rest = latent // 2, latent - latent // 2
        self.couplings = nn.ModuleList(
            ConditionalAffineCoupling(
                keep, ConditionalDenseNN(keep, latent, [width, width], [rest, rest])
            )
            for _ in range(steps)
        )
        self.register_buffer("turned", torch.arange(latent).flip(0), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` given ``x`` and ``mask`` ``[N, *shape]``."""
        with pyro.plate("data", len(x)):
            loc, log_scale, features = self.encoder(x, mask).unbind(-2)
            base = dist.Normal(loc, log_scale.exp()).to_event(1)
            flow = [step for each in self.couplings for step in (each, Permute(self.turned))]
            posterior = dist.ConditionalTransformedDistribution(base, flow)
            pyro.sample("z", posterior.condition(features))
