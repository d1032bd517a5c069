"""Pairs with masks, scales, plates, batch normalization or bounded latents, with their log p(x).

``KNOWN`` maps names to functions that return the model, the guide, ``(x, *context)``, and log p(x)
as a function of such arguments, ``[N]`` in float64.
"""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import nn

NOISE, N = 0.6, 8
SLOPE = torch.tensor([[1.0, 0.5, -0.3, 0.2], [0.2, -1.0, 0.8, 0.5]])
# Each of the four ways in which two coordinates are there or not.
SOME = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0]]).bool()


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def normal(x, covariance):
    """ln N(x; 0, Σ), one Σ for each datum or for all."""
    return dist.MultivariateNormal(x.new_zeros(x.shape[-1]).double(), covariance).log_prob(
        x.double()
    )


def marginal(there):
    """Σ of x = (z ⊙ there) W + noise, for each datum."""
    slope = there.double()[..., None] * SLOPE.double()
    return slope.mT @ slope + NOISE**2 * torch.eye(SLOPE.shape[1]).double()


class Linear(nn.Module):
    """A linear-Gaussian model, or a guide near its posterior; ``there`` and ``seen`` are masks.

    ``there`` ``[N, 2]`` says which coordinates of z a datum has, ``seen`` ``[N, 4]`` which values
    of x were observed.
    """

    def __init__(self, encodes, network=None):
        super().__init__()
        self.encodes, self.network = encodes, network
        self.slope = nn.Parameter(0.4 * SLOPE.mT if encodes else SLOPE.clone())
        self.scale = nn.Parameter(torch.tensor(0.7 if encodes else NOISE))

    def forward(self, x, there=None, seen=None):
        there = torch.ones(len(x), 2).bool() if there is None else there
        seen = torch.ones_like(x).bool() if seen is None else seen
        with pyro.plate("data", len(x)):
            if self.encodes:
                loc = torch.where(seen, x, 0.0) @ self.slope
                pyro.sample("z", dist.Normal(loc, self.scale).mask(there).to_event(1))
            else:
                prior = dist.Normal(x.new_zeros(len(x), 2), 1.0)
                z = pyro.sample("z", prior.mask(there).to_event(1))
                z = torch.where(there, z, 0.0)
                loc = z @ self.slope if self.network is None else self.network(z)
                likelihood = dist.Normal(loc, self.scale)
                pyro.sample("x", likelihood.mask(seen).to_event(1), obs=x)


def linear():
    return Linear(False), Linear(True), (draw(N, 4),), lambda x: normal(x, marginal(SOME[0]))


def masked():
    """Coordinates of a latent that some data lack."""
    args = draw(N, 4), SOME.repeat(2, 1)
    return Linear(False), Linear(True), args, lambda x, there: normal(x, marginal(there))


class Optional(nn.Module):
    """A latent that all data have, and a positive one of the same plate that some are masked in."""

    def __init__(self, encodes):
        super().__init__()
        self.encodes = encodes

    def forward(self, x, there):
        with pyro.plate("data", len(x)):
            if self.encodes:
                pyro.sample("a", dist.Normal(0.6 * x[:, 0], 0.7))
                with pyro.poutine.mask(mask=there):
                    pyro.sample("b", dist.LogNormal(-0.5, 0.8).expand([len(x)]))
            else:
                a = pyro.sample("a", dist.Normal(torch.zeros(len(x)), 1.0))
                with pyro.poutine.mask(mask=there):
                    b = pyro.sample("b", dist.Exponential(torch.ones(len(x))))
                loc = torch.stack([a, a + torch.where(there, b, 0.0)], -1)
                pyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=x)


def optional():
    def log_prob(x, there):
        covariance = torch.ones(2, 2).double() + NOISE**2 * torch.eye(2).double()
        nodes = torch.arange(0.0005, 20, 0.001, dtype=torch.float64)
        shifted = torch.stack([0 * nodes, nodes], -1)
        joint = dist.MultivariateNormal(shifted, covariance).log_prob(x.double()[:, None]) - nodes
        return torch.where(there, joint.logsumexp(1) + math.log(0.001), normal(x, covariance))

    there = torch.arange(N) % 2 == 0
    return Optional(False), Optional(True), (draw(N, 2), there), log_prob


def partial():
    """Values that were not observed, held by x as NaN-free rubbish."""
    seen = (draw(N, 4) > -0.3) | (torch.arange(4) == 0)
    x = torch.where(seen, draw(N, 4), 1e3)

    def log_prob(x, there, seen):
        each = marginal(there).expand(len(x), 4, 4)
        found = zip(x, each, seen, strict=True)
        return torch.stack([normal(row[s], cov[s][:, s]) for row, cov, s in found])

    return Linear(False), Linear(True), (x, SOME.repeat(2, 1), seen), log_prob


def scaled():
    model, guide, args, log_prob = linear()
    scale = pyro.poutine.scale
    return scale(model, scale=0.1), scale(guide, scale=0.1), args, log_prob


def scaled_apart():
    """Scales that make no probability: of one program, and of each datum."""
    model, guide, args, log_prob = linear()
    weights = 0.5 + torch.arange(N) / 4
    return pyro.poutine.scale(model, scale=weights), guide, args, log_prob


class Plates(nn.Module):
    """Three latents for each datum in a plate to the left, each seen through two values."""

    def __init__(self, encodes):
        super().__init__()
        self.encodes = encodes

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("part", 3, dim=-2):
            parts = x.movedim(0, 1)
            if self.encodes:
                pyro.sample("z", dist.Normal(0.5 * parts.mean(-1), 0.7))
            else:
                z = pyro.sample("z", dist.Normal(torch.zeros(3, len(x)), 1.0))
                loc = z[..., None] * torch.tensor([1.0, 0.5])
                pyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=parts)


def plates():
    def log_prob(x):
        slope = torch.tensor([[1.0, 0.5]]).double()
        covariance = slope.mT @ slope + NOISE**2 * torch.eye(2).double()
        return normal(x, covariance).sum(-1)

    return Plates(False), Plates(True), (draw(N, 3, 2),), log_prob


class Normalized(nn.Module):
    """A linear map with batch normalization behind it, for rows of a batch alone."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.norm.running_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
        self.norm.running_var.copy_(torch.tensor([1.5, 0.5, 1.0, 2.0]))

    def forward(self, z):
        return self.norm(z @ SLOPE)


def normalized():
    """Particles that run as rows, with masks."""

    def log_prob(x, there):
        stretch = (network.norm.running_var.double() + network.norm.eps).rsqrt()
        slope = SLOPE.double() * stretch * there.double()[..., None]
        shifted = x.double() + network.norm.running_mean.double() * stretch
        return normal(shifted, slope.mT @ slope + NOISE**2 * torch.eye(4).double())

    network = Normalized()
    args = draw(N, 4), SOME.repeat(2, 1)
    return Linear(False, network), Linear(True), args, log_prob


class Bounded(nn.Module):
    """A positive latent, with a guide of any width that proposes negative values too."""

    def __init__(self, encodes, network=None):
        super().__init__()
        self.encodes, self.network = encodes, network or (lambda z: z)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            if self.encodes:
                pyro.sample("z", dist.Normal(0.7 * x[:, 0], 1.2))
            else:
                z = pyro.sample("z", dist.Exponential(torch.ones(len(x))))
                loc = self.network(z[..., None])
                pyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=x)


def on_a_grid(nodes, log_prior, loc):
    """log p(x) by the midpoint rule for a latent on a line."""

    def log_prob(x):
        likelihood = dist.Normal(loc(nodes), NOISE).to_event(1).log_prob(x.double()[:, None])
        return (likelihood + log_prior).logsumexp(1) + (nodes[1] - nodes[0]).log()

    return log_prob


def bounded():
    nodes = torch.arange(0.0005, 20, 0.001, dtype=torch.float64)
    log_prob = on_a_grid(nodes, -nodes, lambda z: z[:, None])
    return Bounded(False), Bounded(True), (draw(N, 1).abs(),), log_prob


def bounded_rows():
    """The same where particles run as rows."""
    _, guide, args, log_prob = bounded()
    return Bounded(False, nn.BatchNorm1d(1, eps=1e-12)), guide, args, log_prob


def circle(angle):
    return torch.stack([angle.cos(), angle.sin()], -1)


class Angle(nn.Module):
    """An angle whose prior lies across the cut at π; the guide may be a normal on the line."""

    def __init__(self, encodes, around=True):
        super().__init__()
        self.encodes, self.around = encodes, around

    def forward(self, x):
        with pyro.plate("data", len(x)):
            if self.encodes:
                loc = torch.atan2(x[:, 1], x[:, 0])
                kind = dist.VonMises(loc, 2.0) if self.around else dist.Normal(loc, 4.0)
                pyro.sample("z", kind)
            else:
                z = pyro.sample("z", dist.VonMises(torch.full((len(x),), 3.0), 2.0))
                pyro.sample("x", dist.Normal(circle(z), NOISE).to_event(1), obs=x)


def angle(around=True):
    nodes = -math.pi + (torch.arange(2000, dtype=torch.float64) + 0.5) * (2 * math.pi / 2000)
    prior = dist.VonMises(torch.tensor(3.0).double(), torch.tensor(2.0).double())
    log_prob = on_a_grid(nodes, prior.log_prob(nodes), circle)
    return Angle(False), Angle(True, around), (draw(N, 2) - torch.tensor([1.0, 0.0]),), log_prob


def angle_on_a_line():
    return angle(around=False)


KNOWN = {
    make.__name__: make
    for make in (
        linear,
        masked,
        optional,
        partial,
        scaled,
        scaled_apart,
        plates,
        normalized,
        bounded,
        bounded_rows,
        angle,
        angle_on_a_line,
    )
}
