"""Pyro's examples/vae/vae.py: the plain autoencoder of two classes of networks."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from clients import agrees, fits, has_no_false_alarm, runs_captured, takes_the_steps_of_pyro
from pyro.infer import Trace_ELBO
from torch import nn

import pyrovae

PIXELS, LATENT, HIDDEN = 16, 3, 8


class Encoder(nn.Module):
    """Two heads on a hidden layer, which flatten images by themselves."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(PIXELS, HIDDEN)
        self.loc, self.log_scale = nn.Linear(HIDDEN, LATENT), nn.Linear(HIDDEN, LATENT)
        self.softplus = nn.Softplus()

    def forward(self, x):
        hidden = self.softplus(self.hidden(x.reshape(-1, PIXELS)))
        return self.loc(hidden), torch.exp(self.log_scale(hidden))


class Decoder(nn.Module):
    """Probabilities of pixels, in a row."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(LATENT, HIDDEN), nn.Linear(HIDDEN, PIXELS)
        self.softplus = nn.Softplus()

    def forward(self, z):
        return torch.sigmoid(self.out(self.softplus(self.hidden(z))))


class VAE(nn.Module):
    """Both programs as methods of one module, whose networks are stated one by one."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            loc, scale = x.new_zeros(x.shape[0], LATENT), x.new_ones(x.shape[0], LATENT)
            z = pyro.sample("latent", dist.Normal(loc, scale).to_event(1))
            image = self.decoder.forward(z)
            likelihood = dist.Bernoulli(image, validate_args=False).to_event(1)
            pyro.sample("obs", likelihood, obs=x.reshape(-1, PIXELS))
            return image

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("latent", dist.Normal(*self.encoder.forward(x)).to_event(1))


def images(n=12, grey=False):
    u = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return u if grey else (u < 0.4).float()


def programs():
    vae = VAE()
    return vae.model, vae.guide


@pytest.mark.parametrize("grey", [True, False], ids=["grey", "binary"])
def test_steps(grey):
    takes_the_steps_of_pyro(programs, [(images(grey=grey),)] * 5, Trace_ELBO)


@pytest.mark.usefixtures("recorded")
def test_compiled():
    runs_captured(programs, [(images(),)] * 5, Trace_ELBO)


def test_fit_and_evidence():
    vae, x = VAE(), images()
    fits(vae.model, vae.guide, (x,))
    found = pyrovae.log_likelihood(vae.model, vae.guide, x, num_samples=2000, seed=0)
    with torch.no_grad():
        q = dist.Normal(*vae.encoder(x)).to_event(1)
        z = q.sample((2000,))
        weights = dist.Normal(torch.zeros(LATENT), 1.0).to_event(1).log_prob(z) - q.log_prob(z)
        likelihood = dist.Bernoulli(vae.decoder(z)).to_event(1)
        agrees(found, weights + likelihood.log_prob(x.reshape(-1, PIXELS)))


def test_grey_pixels_are_no_data_of_a_bernoulli():
    """Pyro's example hands them to it without validation."""
    with pytest.raises(pyrovae.InputError, match="a Bernoulli scores only 0 and 1"):
        pyrovae.log_likelihood(*programs(), images(grey=True), num_samples=2)


def test_samples():
    x = pyrovae.sample(programs()[0], like=images(), n=400, seed=0)
    assert x.shape == (400, PIXELS)
    assert set(x.unique().tolist()) == {0.0, 1.0}


def test_check():
    has_no_false_alarm(pyrovae.check(*programs(), images()))
