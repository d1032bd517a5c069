"""A guide of chains that reads what is still to come."""

from collections.abc import Sequence as Sizes

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrovae.distributions import MarkovNormal
from pyrovae.nn import BackwardGRU, lasting

__all__ = ["Sequence"]


class _Combiner(nn.Module):
    """From z_{t-1} and what is known of x_t, …, x_T to the mean and standard deviation of z_t."""

    def __init__(self, latent: int, hidden: int) -> None:
        super().__init__()
        self.before, self.found = nn.Linear(latent, hidden), nn.Linear(hidden, 2 * latent)

    def forward(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        change, spread = self.found((self.before(z) + h).relu()).chunk(2, -1)
        return z / 2 + change, softplus(spread) + 1e-3


class Sequence(PyroModule):
    r"""The structured guide of the deep Markov model, whose factors are those of the posterior.

    .. math:: q(z_{1:T} \mid x) = \prod_t q(z_t \mid z_{t-1}, h_t), \qquad
              h_t = A\,\mathrm{GRU}(x_T, \dots, x_t) + B x_t

    Args:
        shape: The longest sequence and the width of a step, ``[T, D]``.
        latent: The dimension of z_t.
        hidden: The width of the GRU, and of h_t.

    References:
        Krishnan, Shalit and Sontag, Structured Inference Networks for Nonlinear State Space Models
        (arXiv 1609.09869), section 4, ST-R.
    """

    def __init__(self, shape: Sizes[int], latent: int = 32, hidden: int = 200) -> None:
        super().__init__()
        if len(shape) != 2:
            raise ValueError(f"Expected sequences [T, D], got data of shape {[*shape]}.")
        self.encoder = BackwardGRU(shape[-1], hidden)
        self.coming, self.now = nn.Linear(hidden, hidden), nn.Linear(shape[-1], hidden)
        self.combiner = _Combiner(latent, hidden)
        self.start = nn.Parameter(torch.zeros(latent))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Sample ``z`` ``[N, T, latent]`` given ``x`` where ``mask`` ``[N, T, D]`` is true."""
        mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        steps = lasting(mask)
        with pyro.plate("data", len(x)):
            x, lengths = x.masked_fill(~mask, 0.0), steps.sum(-1)
            h = self.coming(self.encoder(x, lengths)) + self.now(x)
            chain = MarkovNormal(self.combiner, self.start, x.shape[:2], h, lengths)
            pyro.sample("z", chain.mask(steps).to_event(1))
