"""Binary data with labels, of which only some are known: the model M2."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae.nn import MLP

__all__ = ["SemiSupervised"]


class SemiSupervised(PyroModule):
    r"""A VAE of x and y, where y is observed for some data and latent for the others.

    .. math:: y \sim \mathrm{Cat}(1/C), \qquad z \sim \mathcal{N}(0, I), \qquad
              x_d \mid y, z \sim \mathrm{Bernoulli}(\mathrm{sigmoid}(f_d(y, z)))

    A datum with a label counts with ln p(x, y), one without (y = −1) with ln p(x).

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimension of z.
        classes: The number of labels C.
        hidden: The widths of the decoder's hidden layers; at least one.
        activation: The name of a :mod:`torch.nn` activation.

    References:
        Kingma et al., Semi-supervised Learning with Deep Generative Models (arXiv 1406.5298),
        equation 2.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        classes: int = 10,
        hidden: Sequence[int] = (400,),
        activation: str = "ReLU",
    ) -> None:
        super().__init__()
        width, *rest = hidden
        self.code, self.label = nn.Linear(latent, width), nn.Embedding(classes, width)
        self.decoder = nn.Sequential(getattr(nn, activation)(), MLP(width, shape, rest, activation))
        self.register_buffer("zero", torch.zeros(latent), persistent=False)
        self.register_buffer("logits", torch.zeros(classes), persistent=False)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z``, and ``y`` where it is −1; observe ``x`` where ``mask`` is true, and ``y``.

        A factor, and no observed site, holds ln p(y) of the labels that are given, so that
        generation keeps them and draws the others.
        """
        # Pyro's types ask for a torch.BoolTensor, which no comparison is said to return.
        hidden = y < 0
        with pyro.plate("data", len(x)):
            prior = dist.Categorical(logits=self.logits)
            with pyro.poutine.mask(mask=hidden):  # type: ignore[call-overload]
                drawn = pyro.sample("y", prior)
            with pyro.poutine.mask(mask=~hidden):  # type: ignore[call-overload]
                pyro.factor("label", prior.log_prob(y.clamp(min=0)))
            z = pyro.sample("z", dist.Normal(self.zero, 1.0).to_event(1))
            logits = self.decoder(self.code(z) + self.label(torch.where(hidden, drawn, y)))
            pyro.sample("x", dist.Bernoulli(logits=logits).mask(mask).to_event(x.dim() - 1), obs=x)
