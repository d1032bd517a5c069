"""A posterior for the mixture model: first the component, then the code given it."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae.nn import MLP

__all__ = ["GMVAE"]


class GMVAE(PyroModule):
    r"""A categorical posterior on y and a diagonal normal on z for each value of y.

    .. math:: q(y, z \mid x) = \mathrm{Cat}\bigl(y; \pi(x)\bigr) \,
              \mathcal{N}\bigl(z; \mu(x, y), \mathrm{diag}\,\sigma^2(x, y)\bigr)

    :class:`pyro.infer.TraceEnum_ELBO` sums over y exactly; every other objective samples it.

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimension of z.
        components: The number of values of y.
        hidden: The widths of the hidden layers of both networks; at least one.
        activation: The name of a :mod:`torch.nn` activation.

    References:
        Kingma et al., Semi-supervised Learning with Deep Generative Models (arXiv 1406.5298),
        equation 4.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        components: int = 10,
        hidden: Sequence[int] = (400,),
        activation: str = "ReLU",
    ) -> None:
        super().__init__()
        width, *rest = hidden
        self.classifier = MLP(shape, components, hidden, activation)
        self.component = nn.Embedding(components, width)
        self.encoder = MLP(shape, width, ())
        self.posterior = nn.Sequential(
            getattr(nn, activation)(), MLP(width, (2, latent), rest, activation)
        )

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``y`` ``[N]``, then ``z`` ``[N, latent]``, given ``x`` and ``mask``."""
        with pyro.plate("data", len(x)):
            q = dist.Categorical(logits=self.classifier(x, mask))
            y = pyro.sample("y", q, infer={"enumerate": "parallel"})
            h = self.encoder(x, mask) + self.component(y)
            loc, log_scale = self.posterior(h).unbind(-2)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
