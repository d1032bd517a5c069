"""The deep Markov model as a loop of Pyro sample statements, with the tutorial's sizes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import pyrovae

__all__ = ["epoch_of_pyro"]

# Latent, hidden widths of the emission, the transition and the recurrent network; the rate.
LATENT, EMISSION, TRANSITION, RECURRENT, LR = 100, 100, 200, 600, 3e-4
BATCH = 20


def mlp(*widths: int) -> nn.Sequential:
    """Affine maps with ReLU between them."""
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))[:-1]


class Looped(nn.Module):
    """A site for each step of z and of x, drawn one after the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.emission = mlp(LATENT, EMISSION, EMISSION, width)
        self.gate, self.bent = (mlp(LATENT, TRANSITION, LATENT) for _ in range(2))
        self.straight, self.spread = (nn.Linear(LATENT, LATENT) for _ in range(2))
        self.read = nn.RNN(width, RECURRENT, nonlinearity="relu", batch_first=True)
        self.before = nn.Linear(LATENT, RECURRENT)
        self.loc, self.scale = (nn.Linear(RECURRENT, LATENT) for _ in range(2))
        self.starts = nn.Parameter(torch.zeros(2, LATENT))

    def model(self, x: Tensor, turned: Tensor, mask: Tensor) -> None:
        pyro.module("looped", self)
        z = self.starts[0].expand(len(x), -1)
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                gate, bent = self.gate(z).sigmoid(), self.bent(z)
                loc = (1 - gate) * self.straight(z) + gate * bent
                prior = dist.Normal(loc, softplus(self.spread(bent.relu())))
                z = pyro.sample(f"z_{t}", prior.mask(mask[:, t, None]).to_event(1))
                seen = dist.Bernoulli(logits=self.emission(z)).mask(mask[:, t, None]).to_event(1)
                pyro.sample(f"x_{t}", seen, obs=x[:, t])

    def guide(self, x: Tensor, turned: Tensor, mask: Tensor) -> None:
        pyro.module("looped", self)
        z, h = self.starts[1].expand(len(x), -1), self.read(turned)[0].flip(1)
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                both = (self.before(z).tanh() + h[:, t]) / 2
                found = dist.Normal(self.loc(both), softplus(self.scale(both)))
                z = pyro.sample(f"z_{t}", found.mask(mask[:, t, None]).to_event(1))


def epoch_of_pyro(data: pyrovae.Dataset) -> Callable[[], None]:
    """A pass over the training sequences; each batch as long as its longest, as in the tutorial."""
    pyro.clear_param_store()
    looped = Looped(data.shape[-1])
    optimizer = pyro.optim.ClippedAdam({"lr": LR, "betas": (0.96, 0.999), "clip_norm": 10.0})
    svi = pyro.infer.SVI(looped.model, looped.guide, optimizer, pyro.infer.Trace_ELBO())

    def epoch() -> None:
        for index in torch.randperm(len(data.train)).split(BATCH):
            if len(index) == BATCH:
                x, mask = data.rows(index)
                steps = mask[..., 0]
                x, steps = (each[:, : int(steps.sum(1).max())] for each in (x, steps))
                svi.step(x, x.flip(1), steps)

    return epoch
