"""Pairs whose log p(x) is known: in closed form, by a sum, or by quadrature."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyrovae
from pyrovae.guides.linear_gaussian import LinearGaussian as FullGuide
from pyrovae.models.linear_gaussian import LinearGaussian


def linear_gaussian(latent=4, pixels=20, n=10, stretch=1.2, shift=0.2):
    """A linear decoder, data of its own, and its exact posterior moved and stretched as a guide."""
    pyro.set_rng_seed(5)
    model = LinearGaussian((pixels,), latent, scale=0.7)
    guide = FullGuide((pixels,), latent).match(model)
    guide.scale_tril = stretch * guide.scale_tril.detach()
    with torch.no_grad():
        guide.encoder.layers[0].bias.add_(shift * guide.scale_tril.diagonal())
    x = pyrovae.sample(model, like=torch.zeros(1, pixels), n=n, seed=1)
    return model, guide, x, model.log_prob(x).double()


class Normals(nn.Module):
    """A guide of independent normals whose moments are fixed numbers."""

    def __init__(self, dims, loc=0.0, scale=1.0):
        super().__init__()
        self.register_buffer("loc", torch.zeros(dims) + torch.as_tensor(loc))
        self.register_buffer("scale", torch.zeros(dims) + torch.as_tensor(scale))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc, self.scale).to_event(1))


class MixturePrior(nn.Module):
    """z from two normals in the plane, x = Wz and noise: p(x) is a mixture of two normals."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centers", torch.tensor([[-1.5, 0.0], [1.0, 1.0]]))
        self.register_buffer("weights", torch.tensor([0.3, 0.7]))
        self.register_buffer("slope", torch.tensor([[1.0, 0.5], [-0.4, 1.2], [0.3, 0.3]]))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            parts = dist.Normal(self.centers, 0.6).to_event(1)
            which = dist.Categorical(self.weights)
            z = pyro.sample("z", dist.MixtureSameFamily(which, parts))
            pyro.sample("x", dist.Normal(z @ self.slope.mT, 0.5).to_event(1), obs=x)

    def log_prob(self, x):
        slope, centers = self.slope.double(), self.centers.double()
        cov = 0.36 * slope @ slope.mT + 0.25 * torch.eye(3).double()
        parts = dist.MultivariateNormal(centers @ slope.mT, cov)
        return (parts.log_prob(x.double()[:, None]) + self.weights.double().log()).logsumexp(1)


def mixture_prior(n=8):
    model = MixturePrior()
    x = pyrovae.sample(model, like=torch.zeros(1, 3), n=n, seed=3)
    return model, Normals(2, 0.0, 1.5), x, model.log_prob(x)


class Curved(nn.Module):
    """A decoder in the plane with no closed form."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", self.likelihood(z), obs=x)

    def likelihood(self, z):
        a, b = z.unbind(-1)
        loc = torch.stack([a.tanh() + 0.5 * b, a * b, (2 * b).sin()], -1)
        return dist.Normal(loc, 0.4).to_event(1)

    def log_prob(self, x):
        nodes = torch.arange(-6, 6.001, 0.03, dtype=torch.float64)
        z = torch.cartesian_prod(nodes, nodes)
        prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        each = self.likelihood(z).log_prob(x.double()[:, None]) + prior
        return each.logsumexp(1) + 2 * math.log(0.03)


def curved(n=6):
    model = Curved()
    x = pyrovae.sample(model, like=torch.zeros(1, 3), n=n, seed=4)
    return model, Normals(2, 0.0, 1.2), x, model.log_prob(x)


class Constrained(nn.Module):
    """A rate and a share, on their own supports, the second below the first."""

    def __init__(self, encodes):
        super().__init__()
        self.encodes = encodes

    def forward(self, x):
        with pyro.plate("data", len(x)):
            if self.encodes:
                rate = pyro.sample("rate", dist.Gamma(3.0 + 0 * x[:, 0], 1.5))
                pyro.sample("share", dist.Beta(2.0 + 0.1 * rate, 2.0))
            else:
                rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
                share = pyro.sample("share", dist.Beta(1.0 + rate, 2.0))
                loc = torch.stack([rate, rate * share], -1)
                pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)

    def log_prob(self, x):
        rate = torch.arange(0.005, 14, 0.01, dtype=torch.float64)
        share = torch.arange(0.0025, 1, 0.005, dtype=torch.float64)
        rate, share = torch.cartesian_prod(rate, share).unbind(-1)
        prior = dist.Gamma(2.0, 1.0).log_prob(rate) + dist.Beta(1 + rate, 2.0).log_prob(share)
        loc = torch.stack([rate, rate * share], -1)
        each = dist.Normal(loc, 0.5).to_event(1).log_prob(x.double()[:, None]) + prior
        return each.logsumexp(1) + math.log(0.01 * 0.005)


def constrained(n=6):
    model = Constrained(False)
    x = pyrovae.sample(model, like=torch.zeros(1, 2), n=n, seed=2)
    return model, Constrained(True), x, model.log_prob(x)


ORACLES = {
    "linear_gaussian": linear_gaussian,
    "fifty_latents": lambda: linear_gaussian(50, 60, 6, 1.1, 0.1),
    "mixture_prior": mixture_prior,
    "curved": curved,
    "constrained": constrained,
}
