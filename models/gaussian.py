"""A standard normal prior and Gaussian observations."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyrovae.nn import MLP

__all__ = ["Gaussian"]


class Gaussian(PyroModule):
    r"""A VAE for real-valued data.

    .. math:: z \sim \mathcal{N}(0, I), \qquad x_d \mid z \sim \mathcal{N}(f_d(z), \sigma_d^2)

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimension of z.
        hidden: The widths of the decoder's hidden layers.
        activation: The name of a :mod:`torch.nn` activation.
        scale: The observation scale σ, in units of x: ``"learned"`` (one parameter, from 1), a
            positive number (fixed), or ``"pixel"`` (the decoder predicts one per dimension).

    Raises:
        ValueError: If ``scale`` is none of these.

    References:
        Kingma and Welling, Auto-Encoding Variational Bayes (arXiv 1312.6114), appendix C.2.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        hidden: Sequence[int] = (400,),
        activation: str = "ReLU",
        scale: float | str = "learned",
    ) -> None:
        super().__init__()
        self.decoder = MLP(latent, (1 + (scale == "pixel"), *shape), hidden, activation)
        self.register_buffer("zero", torch.zeros(latent), persistent=False)
        if scale == "learned":
            # Pyro gives a PyroParam back as a tensor that satisfies its constraint.
            self.scale: Tensor = PyroParam(  # type: ignore[assignment]
                torch.tensor(1.0), constraint=constraints.positive
            )
        elif scale != "pixel":
            if isinstance(scale, str) or scale <= 0:
                raise ValueError(
                    f"Expected scale='learned', 'pixel' or a number > 0, got {scale!r}."
                )
            self.register_buffer("scale", torch.tensor(float(scale)))

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` and observe ``x`` ``[N, *shape]`` where ``mask`` is true."""
        event = x.dim() - 1
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.zero, 1.0).to_event(1))
            loc, *predicted = self.decoder(z).unbind(-1 - event)
            # The floor keeps the density of a pixel that never varies from growing without bound.
            scale = softplus(predicted[0]) + 1e-3 if predicted else self.scale
            pyro.sample("x", dist.Normal(loc, scale).mask(mask).to_event(event), obs=x)
