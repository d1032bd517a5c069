"""A guide of chains that reads what is still to come."""

from collections.abc import Sequence as Sizes

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import affine_autoregressive
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrovae.distributions import MarkovNormal
from pyrovae.nn import BackwardGRU, lasting

__all__ = ["Sequence"]


class _Combiner(nn.Module):
    """From u_{t-1} and what is known of x_t, …, x_T to the mean and standard deviation of u_t."""

    def __init__(self, latent: int, hidden: int, flows: int, width: int) -> None:
        super().__init__()
        self.before, self.found = nn.Linear(latent, hidden), nn.Linear(hidden, 2 * latent)
        self.flows = nn.ModuleList(
            affine_autoregressive(latent, [width], stable=True) for _ in range(flows)
        )

    def forward(self, u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        z = u
        for flow in self.flows:
            z = flow(z)
        change, spread = self.found((self.before(z) + h).relu()).chunk(2, -1)
        return z / 2 + change, softplus(spread) + 1e-3


class Sequence(PyroModule):
    r"""The structured guide of the deep Markov model, whose factors are those of the posterior.

    .. math:: u_t \mid z_{t-1}, x \sim
              \mathcal{N}\bigl(\mu(z_{t-1}, h_t), \mathrm{diag}\,\sigma^2(z_{t-1}, h_t)\bigr),
              \quad z_t = F(u_t), \quad h_t = A\,\mathrm{GRU}(x_T, \dots, x_t) + B x_t

    F is the identity, or as many inverse autoregressive flows as ``flows`` says. With these a draw
    and its own density take one pass; the density of another z takes one for each dimension, which
    annealing pays at every move.

    Args:
        shape: The longest sequence and the width of a step, ``[T, D]``.
        latent: The dimension of z_t.
        hidden: The width of the GRU, and of h_t.
        flows: The number of flows, the same at all steps.
        width: The width of the hidden layer of each flow, no less than ``latent``.

    Raises:
        ValueError: If the data are no sequences, or z_t has too many dimensions or too few for
            a flow.

    References:
        Krishnan, Shalit and Sontag, Structured Inference Networks for Nonlinear State Space Models
        (arXiv 1609.09869), section 4, ST-R; Kingma et al. (arXiv 1606.04934), for the flows.
    """

    def __init__(
        self,
        shape: Sizes[int],
        latent: int = 32,
        hidden: int = 200,
        flows: int = 0,
        width: int = 100,
    ) -> None:
        super().__init__()
        if len(shape) != 2:
            raise ValueError(f"Expected sequences [T, D], got data of shape {[*shape]}.")
        if flows and not 2 <= latent <= width:
            raise ValueError(f"Expected 2 <= latent <= width={width} for a flow, got {latent}.")
        self.encoder = BackwardGRU(shape[-1], hidden)
        self.coming, self.now = nn.Linear(hidden, hidden), nn.Linear(shape[-1], hidden)
        self.combiner = _Combiner(latent, hidden, flows, width)
        self.start = nn.Parameter(torch.zeros(latent))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Sample ``z`` ``[N, T, latent]`` given ``x`` where ``mask`` ``[N, T, D]`` is true."""
        mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        steps = lasting(mask)
        with pyro.plate("data", len(x)):
            x, lengths = x.masked_fill(~mask, 0.0), steps.sum(-1)
            h = self.coming(self.encoder(x, lengths)) + self.now(x)
            chain = MarkovNormal(self.combiner, self.start, x.shape[:2], h, lengths)
            posterior = dist.TransformedDistribution(chain, [*self.combiner.flows])
            pyro.sample("z", posterior.mask(steps).to_event(1))
