"""A variational autoencoder in plain PyTorch, without Pyro: what the Pyro pair is held against.

The formulas are those of Kingma and Welling, Auto-Encoding Variational Bayes (arXiv 1312.6114),
with their numbers; every bound is in nats per datum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

__all__ = [
    "VAE",
    "adam",
    "copy_from_pair",
    "copy_to_pair",
    "evaluate",
    "log_bernoulli",
    "log_normal",
    "pair_parameters",
    "step",
    "train",
]


class VAE(nn.Module):
    r"""p(z) = N(0, I), p(x|z) Bernoulli or Gaussian, q(z|x) = N(μ(x), diag σ²(x)).

    Args:
        shape: The event shape of the data.
        latent: The dimension J of z.
        hidden: The width of the one hidden layer of each network.
        likelihood: ``"bernoulli"``, or ``"gaussian"`` with one learned scale.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        hidden: int = 400,
        likelihood: str = "bernoulli",
    ) -> None:
        super().__init__()
        pixels = math.prod(shape)
        self.encoder = nn.Sequential(
            nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, pixels)
        )
        self.likelihood = likelihood
        if likelihood == "gaussian":
            self.log_scale = nn.Parameter(torch.tensor(0.0))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """μ and ln σ of equation 9, ``[M, J]`` each, for x ``[M, D]``."""
        return self.encoder(x).chunk(2, dim=-1)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """ln p(x|z) of appendix C, ``[L, M]``, for z ``[L, M, J]``."""
        output = self.decoder(z)
        if self.likelihood == "bernoulli":
            return log_bernoulli(x, output)
        return log_normal(x, output, self.log_scale)

    def elbo_a(self, x: Tensor, noise: Tensor) -> Tensor:
        r"""Estimator A, equation 6, ``[M]``, for x ``[M, *shape]`` and ε ``[L, M, J]``.

        .. math:: \tfrac1L \sum_l \ln p(x, z_l) - \ln q(z_l | x), \quad z_l = \mu + \sigma\epsilon_l
        """
        x = x.flatten(1)
        loc, log_scale = self.encode(x)
        z = loc + log_scale.exp() * noise
        zero = torch.zeros_like(loc)
        log_joint = self.log_likelihood(x, z) + log_normal(z, zero, zero)
        return (log_joint - log_normal(z, loc, log_scale)).mean(0)

    def elbo_b(self, x: Tensor, noise: Tensor) -> Tensor:
        r"""Estimator B, equations 7 and 10, ``[M]``; the KL is that of appendix B.

        .. math:: \tfrac12 \sum_j (1 + \ln \sigma_j^2 - \mu_j^2 - \sigma_j^2)
                  + \tfrac1L \sum_l \ln p(x | z_l)
        """
        x = x.flatten(1)
        loc, log_scale = self.encode(x)
        z = loc + log_scale.exp() * noise
        minus_kl = 0.5 * (1 + 2 * log_scale - loc.square() - (2 * log_scale).exp()).sum(-1)
        return minus_kl + self.log_likelihood(x, z).mean(0)

    def elbo(self, x: Tensor, noise: Tensor, estimator: str) -> Tensor:
        """Estimator ``"A"`` or ``"B"``, ``[M]``."""
        return {"A": self.elbo_a, "B": self.elbo_b}[estimator](x, noise)

    def noise(self, x: Tensor, particles: int) -> Tensor:
        """ε ~ N(0, I), ``[L, M, J]``, from torch's global stream."""
        latent = self.decoder[0].in_features
        return torch.randn(particles, len(x), latent, dtype=x.dtype, device=x.device)


def log_normal(x: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """ln N(x; μ, diag σ²), summed over the last dimension (equations 9 and 12)."""
    error = (x - loc) / log_scale.exp()
    return (-0.5 * error.square() - log_scale - 0.5 * math.log(2 * math.pi)).sum(-1)


def log_bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """Σ x ln y + (1 − x) ln(1 − y) with y = sigmoid(logits), over the last dimension (eq. 11)."""
    x = x.expand_as(logits)
    return -binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)


def adam(vae: VAE, lr: float) -> torch.optim.Adam:
    """The optimizer of every training here."""
    return torch.optim.Adam(vae.parameters(), lr=lr, fused=True)


def step(
    vae: VAE, optimizer: torch.optim.Optimizer, x: Tensor, estimator: str, particles: int
) -> Tensor:
    """One gradient step; returns the loss before it, minus the ELBO summed over the minibatch."""
    loss = -vae.elbo(x, vae.noise(x, particles), estimator).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def train(
    vae: VAE,
    batch: Callable[[Tensor], Tensor],
    num_data: int,
    seeds: Sequence[int],
    *,
    estimator: str = "B",
    batch_size: int = 128,
    particles: int = 1,
    lr: float = 1e-3,
) -> list[float]:
    """Algorithm 1 with Adam, on the CPU; it seeds torch's global stream.

    Args:
        vae: Trained in place.
        batch: Gives the rows of an index ``[M]`` as ``[M, *shape]``; binarizes them if need be.
        num_data: How many rows there are.
        seeds: One for each epoch; it seeds the order, the binarization and ε, drawn in this order.
        estimator: ``"A"`` or ``"B"``.
        batch_size: M; the last minibatch of an epoch may be smaller.
        particles: L.
        lr: Adam's learning rate.

    Returns:
        The mean ELBO of each epoch.
    """
    optimizer = adam(vae, lr)
    history = []
    for seed in seeds:
        torch.manual_seed(seed)
        total = torch.zeros((), dtype=torch.float64)
        for index in torch.randperm(num_data).split(batch_size):
            total -= step(vae, optimizer, batch(index), estimator, particles)
        history.append(total.item() / num_data)
    return history


@torch.no_grad()
def evaluate(vae: VAE, x: Tensor, estimator: str = "B", particles: int = 1) -> Tensor:
    """The ELBO of every datum by either estimator, ``[N]``."""
    parts = [vae.elbo(rows, vae.noise(rows, particles), estimator) for rows in x.split(512)]
    return torch.cat(parts)


def pair_parameters(model: nn.Module, guide: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``Bernoulli`` or ``Gaussian`` with ``MeanField`` by their names in VAE."""
    named = dict(guide.named_parameters()) | dict(model.named_parameters())
    return {
        name.replace(".layers.", ".").replace("scale_unconstrained", "log_scale"): parameter
        for name, parameter in named.items()
    }


def copy_from_pair(vae: VAE, model: nn.Module, guide: nn.Module) -> VAE:
    """Give a VAE the weights of a Pyro pair, bit for bit, in the VAE's own precision."""
    _copy(pair_parameters(model, guide), dict(vae.named_parameters()))
    return vae


def copy_to_pair(vae: VAE, model: nn.Module, guide: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Give a Pyro pair the weights of a VAE."""
    _copy(dict(vae.named_parameters()), pair_parameters(model, guide))
    return model, guide


@torch.no_grad()
def _copy(source: dict[str, Any], target: dict[str, Any]) -> None:
    shapes = [{name: tuple(p.shape) for name, p in side.items()} for side in (source, target)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"Expected parameters {shapes[1]}, got {shapes[0]}.")
    for name, parameter in target.items():
        parameter.copy_(source[name])
