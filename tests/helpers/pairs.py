"""Pairs written in every way that Pyro allows, for tests that hold for all of them."""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

from pyrovae.guides.mean_field import MeanField
from pyrovae.models.bernoulli import Bernoulli
from pyrovae.models.gaussian import Gaussian
from pyrovae.nn import MLP

SHAPE, LATENT = (1, 4, 4), 3


def binary(n=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.bernoulli(torch.full((n, *SHAPE), 0.4), generator=generator)


def shipped_bernoulli():
    return Bernoulli(SHAPE, LATENT, (8,)), MeanField(SHAPE, LATENT, (8,))


def shipped_gaussian():
    return Gaussian(SHAPE, LATENT, (8,)), MeanField(SHAPE, LATENT, (8,))


class VAE(nn.Module):
    """The class of Pyro's published example, with its sites and its pyro.module statements."""

    def __init__(self, z_dim=LATENT, hidden_dim=8):
        super().__init__()
        self.encoder = MLP(16, (2, z_dim), (hidden_dim,), "Softplus")
        self.decoder = MLP(z_dim, 16, (hidden_dim,), "Softplus")
        self.z_dim = z_dim

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = torch.zeros(x.shape[0], self.z_dim, dtype=x.dtype, device=x.device)
            z_scale = torch.ones(x.shape[0], self.z_dim, dtype=x.dtype, device=x.device)
            z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))
            loc_img = torch.sigmoid(self.decoder.forward(z))
            pyro.sample(
                "obs",
                dist.Bernoulli(loc_img, validate_args=False).to_event(1),
                obs=x.reshape(-1, 16),
            )
            return loc_img

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, z_scale = self.encoder.forward(x.reshape(-1, 16)).unbind(-2)
            pyro.sample("latent", dist.Normal(z_loc, z_scale.exp()).to_event(1))


def published_example():
    vae = VAE()
    return vae.model, vae.guide


class PlainModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = MLP(LATENT, SHAPE, (8,))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(3), obs=x)


class PlainGuide(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = MLP(SHAPE, (2, LATENT), (8,))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            loc, log_scale = self.net(x).unbind(-2)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def plain_modules():
    return PlainModel(), PlainGuide()


class SameNames(PyroModule):
    """A model or a guide whose attributes are called as the other's."""

    def __init__(self, encodes):
        super().__init__()
        self.encodes = encodes
        self.net = MLP(SHAPE, LATENT, (8,)) if encodes else MLP(LATENT, SHAPE, (8,))
        self.scale = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            if self.encodes:
                pyro.sample("z", dist.Normal(self.net(x), self.scale).to_event(1))
            else:
                z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.net(z), self.scale).to_event(3), obs=x)


def same_names():
    return SameNames(False), SameNames(True)


def functions():
    decoder, encoder = MLP(LATENT, SHAPE, (8,)), MLP(SHAPE, LATENT, (8,))

    def model(x):
        pyro.module("decoder", decoder)
        scale = pyro.param("noise", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), scale).to_event(3), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        scale = pyro.param("spread", torch.ones(LATENT), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), scale).to_event(1))

    return model, guide


class TwoLatents(PyroModule):
    """Two continuous latents, one above the other, and two observed sites."""

    def __init__(self, encodes):
        super().__init__()
        self.encodes = encodes
        self.net = MLP(SHAPE, (4, 2), (8,)) if encodes else MLP(2, SHAPE, (8,))
        self.side = nn.Linear(2, 2)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            if self.encodes:
                a, b, c, d = self.net(x).unbind(-2)
                top = pyro.sample("top", dist.Normal(a, b.exp()).to_event(1))
                pyro.sample("low", dist.Normal(c + self.side(top), d.exp()).to_event(1))
            else:
                top = pyro.sample("top", dist.Laplace(torch.zeros(2), 1.0).to_event(1))
                low = pyro.sample("low", dist.Normal(self.side(top), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=self.net(low)).to_event(3), obs=x)
                total = x.flatten(1).sum(-1)
                pyro.sample("total", dist.Normal(top.sum(-1), 5.0), obs=total)


def two_latents():
    return TwoLatents(False), TwoLatents(True)


class Discrete(nn.Module):
    """A categorical latent, scored without reparameterization."""

    def __init__(self, encodes):
        super().__init__()
        self.encodes = encodes
        self.net = MLP(SHAPE, 3, (8,)) if encodes else MLP(3, SHAPE, ())

    def forward(self, x):
        with pyro.plate("data", len(x)):
            if self.encodes:
                pyro.sample("y", dist.OneHotCategorical(logits=self.net(x)))
            else:
                y = pyro.sample("y", dist.OneHotCategorical(logits=torch.zeros(3)))
                pyro.sample("x", dist.Bernoulli(logits=self.net(y)).to_event(3), obs=x)


def discrete():
    return Discrete(False), Discrete(True)


class Mixed(nn.Module):
    """A categorical latent beside a continuous one."""

    def __init__(self, encodes):
        super().__init__()
        self.encodes = encodes
        self.net = MLP(SHAPE, (3, 3), (8,)) if encodes else MLP(6, SHAPE, (8,))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            if self.encodes:
                logits, loc, log_scale = self.net(x).unbind(-2)
                pyro.sample("y", dist.OneHotCategorical(logits=logits))
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
            else:
                y = pyro.sample("y", dist.OneHotCategorical(logits=torch.zeros(3)))
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                logits = self.net(torch.cat([y, z], -1))
                pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)


def mixed():
    return Mixed(False), Mixed(True)


PAIRS = {
    make.__name__: make
    for make in (
        shipped_bernoulli,
        shipped_gaussian,
        published_example,
        plain_modules,
        same_names,
        functions,
        two_latents,
        discrete,
        mixed,
    )
}
