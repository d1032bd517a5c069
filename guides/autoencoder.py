"""A normal posterior of tiny fixed width, which makes the pair an autoencoder."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Tensor

from pyrovae.nn import MLP

__all__ = ["Autoencoder"]


class Autoencoder(PyroModule):
    r"""A code for each datum, with a fixed noise far below anything that the decoder resolves.

    .. math:: q(z \mid x) = \mathcal{N}(e(x), s^2 I), \qquad
              \mathcal{L} \approx \ln p(x \mid e(x)) - \tfrac12 \|e(x)\|^2 + L (\ln s + \tfrac12)

    Training it is training an autoencoder with a squared penalty on its codes: nothing fills the
    space between them, so that draws from the prior decode to no data. The bound stays a bound:
    the last term is what it costs to name a point of :math:`\mathbb{R}^L` to the precision s.

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimension L of z.
        hidden: The widths of the encoder's hidden layers.
        activation: The name of a :mod:`torch.nn` activation.
        scale: The noise s, in units of z.

    Raises:
        ValueError: If ``scale`` is not positive.

    References:
        Ghosh et al., From Variational to Deterministic Autoencoders (arXiv 1903.12436), section 3.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        hidden: Sequence[int] = (400,),
        activation: str = "ReLU",
        scale: float = 0.01,
    ) -> None:
        super().__init__()
        if scale <= 0:
            raise ValueError(f"Expected scale > 0, got {scale!r}.")
        self.encoder = MLP(shape, latent, hidden, activation)
        self.scale = scale

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` given ``x`` and ``mask`` ``[N, *shape]``."""
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x, mask), self.scale).to_event(1))
