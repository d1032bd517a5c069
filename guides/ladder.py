"""Top-down inference of a hierarchy: evidence from the data combined with the layer above."""

from collections.abc import Sequence
from itertools import pairwise

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrovae.nn import MLP

__all__ = ["Ladder"]


class Ladder(PyroModule):
    r"""A guide that samples in the model's order, from the top down.

    .. math:: q(z \mid x) = q(z_L \mid x) \prod_{l < L} q(z_l \mid z_{l+1}, x), \qquad
              q(z_l \mid z_{l+1}, x) \propto
              \mathcal{N}\bigl(z_l; \hat\mu_l(x), \hat\sigma_l^2(x)\bigr) \,
              \mathcal{N}\bigl(z_l; \tilde\mu_l(z_{l+1}), \tilde\sigma_l^2(z_{l+1})\bigr)

    Deterministic layers carry x upwards. The paper takes the second factor from the model, whose
    weights both programs then train; here the guide has a network of its own for it, so that each
    program owns its parameters.

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimensions of z1, next to the data, to zL.
        hidden: The width of the deterministic layer below each of them.
        activation: The name of a :mod:`torch.nn` activation; "GLU" gates every hidden layer.

    References:
        Sønderby et al., Ladder Variational Autoencoders (arXiv 1602.02282), equations 16 to 18.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: Sequence[int] = (64, 32, 16),
        hidden: Sequence[int] = (512, 256, 128),
        activation: str = "LeakyReLU",
    ) -> None:
        super().__init__()
        # A gated layer takes half of its inputs for gates.
        halves = 2 if activation == "GLU" else 1
        self.encoder = MLP(shape, halves * hidden[0], (), activation)
        self.encoders = nn.ModuleList(
            nn.Sequential(getattr(nn, activation)(), MLP(below, halves * above, ()))
            for below, above in pairwise(hidden)
        )
        self.upward = nn.ModuleList(
            nn.Sequential(getattr(nn, activation)(), MLP(width, (2, size), ()))
            for width, size in zip(hidden, latent, strict=True)
        )
        steps = zip(pairwise(latent), hidden[1:], strict=True)
        self.downward = nn.ModuleList(
            MLP(above, (2, below), (width,), activation) for (below, above), width in steps
        )

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``zL`` to ``z1`` ``[N, latent]`` given ``x`` and ``mask`` ``[N, *shape]``."""
        layers = [self.encoder(x, mask)]
        for encoder in self.encoders:
            layers.append(encoder(layers[-1]))
        evidence = [upward(h) for upward, h in zip(self.upward, layers, strict=True)]
        with pyro.plate("data", len(x)):
            loc, scale = _moments(evidence[-1])
            for level in reversed(range(1, len(layers))):
                z = pyro.sample(f"z{level + 1}", dist.Normal(loc, scale).to_event(1))
                loc, scale = _product(evidence[level - 1], self.downward[level - 1](z))
            pyro.sample("z1", dist.Normal(loc, scale).to_event(1))


def _moments(found: Tensor) -> tuple[Tensor, Tensor]:
    loc, scale = found.unbind(-2)
    # The floor keeps the precision of a layer that is all but certain finite.
    return loc, softplus(scale) + 1e-3


def _product(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The moments of the normalized product of two normal densities."""
    (loc, scale), (loc2, scale2) = _moments(one), _moments(other)
    precision, precision2 = scale.pow(-2), scale2.pow(-2)
    total = precision + precision2
    return (loc * precision + loc2 * precision2) / total, total.rsqrt()
