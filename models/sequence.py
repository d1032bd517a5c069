"""The deep Markov model: sequences whose latents are a chain."""

from collections.abc import Sequence as Sizes

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrovae.distributions import MarkovNormal
from pyrovae.nn import MLP, lasting

__all__ = ["Sequence"]


class _Transition(nn.Module):
    """From z_{t-1} to the mean and standard deviation of z_t: linear where its gate is closed."""

    def __init__(self, latent: int, hidden: int) -> None:
        super().__init__()
        self.gate = MLP(latent, latent, hidden)
        self.bent = MLP(latent, latent, hidden)
        self.straight, self.spread = nn.Linear(latent, latent), nn.Linear(latent, latent)
        nn.init.eye_(self.straight.weight)
        nn.init.zeros_(self.straight.bias)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        gate, bent = self.gate(z).sigmoid(), self.bent(z)
        loc = (1 - gate) * self.straight(z) + gate * bent
        return loc, softplus(self.spread(bent.relu())) + 1e-3


class Sequence(PyroModule):
    r"""The deep Markov model for sequences of binary vectors.

    .. math:: z_t \sim \mathcal{N}\bigl(\mu(z_{t-1}), \mathrm{diag}\,\sigma^2(z_{t-1})\bigr), \qquad
              x_t \mid z_t \sim \mathrm{Bernoulli}\bigl(f(z_t)\bigr)

    Args:
        shape: The longest sequence and the width of a step, ``[T, D]``.
        latent: The dimension of z_t.
        hidden: The widths of the hidden layers from z_t to x_t.
        transition: The width of the hidden layers from z_{t-1} to z_t.

    References:
        Krishnan, Shalit and Sontag, Structured Inference Networks for Nonlinear State Space Models
        (arXiv 1609.09869), section 5.
    """

    def __init__(
        self,
        shape: Sizes[int],
        latent: int = 32,
        hidden: Sizes[int] = (100, 100),
        transition: int = 100,
    ) -> None:
        super().__init__()
        if len(shape) != 2:
            raise ValueError(
                f"Expected sequences [T, D], got data of shape {[*shape]}: say --shape T,D, or "
                f"shape=(T, D) to load_data, where they were read as images."
            )
        self.decoder = MLP(latent, shape[-1:], hidden)
        self.transition = _Transition(latent, transition)
        self.start = nn.Parameter(torch.zeros(latent))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Sample ``z`` ``[N, T, latent]``, observe ``x`` where ``mask`` ``[N, T, D]`` is true."""
        mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        with pyro.plate("data", len(x)):
            prior = MarkovNormal(self.transition, self.start, x.shape[:2])
            z = pyro.sample("z", prior.mask(lasting(mask)).to_event(1))
            likelihood = dist.Bernoulli(logits=self.decoder(z))
            pyro.sample("x", likelihood.mask(mask).to_event(2), obs=x)
