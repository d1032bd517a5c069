"""Pyro's examples/scanvi: counts of genes, labels that some cells have, batch normalization."""

from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from clients import agrees, fits, has_no_false_alarm, runs_captured, takes_the_steps_of_pyro
from pyro import poutine
from pyro.distributions.util import broadcast_shape
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.optim import MultiStepLR
from torch import nn
from torch.distributions import constraints
from torch.nn.functional import softmax, softplus

import pyrovae

GENES, LABELS, LATENT, HIDDEN = 5, 3, 2, 6


def layers(*sizes):
    """Linear layers with batch normalization, and a ReLU between two of them."""
    made = []
    for size, following in pairwise(sizes):
        made += [nn.Linear(size, following), nn.BatchNorm1d(following), nn.ReLU()]
    return nn.Sequential(*made[:-1])


def halves(value):
    return value.reshape((*value.shape[:-1], 2, -1)).unbind(-2)


def side_by_side(*parts):
    """Tensors joined, after what enumerates one of them has been broadcast to all."""
    shape = (*broadcast_shape(*[part.shape[:-1] for part in parts]), -1)
    return torch.cat([part.expand(shape) for part in parts], dim=-1)


class Moments(nn.Module):
    """Normals from two tensors, laid out as rows for the batch normalization."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.fc = layers(inputs, HIDDEN, 2 * outputs)

    def forward(self, one, other):
        both = side_by_side(one, other)
        hidden = self.fc(both.reshape(-1, both.size(-1)))
        loc, scale = halves(hidden.reshape(both.shape[:-1] + hidden.shape[-1:]))
        return loc, softplus(scale)


class XDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = layers(LATENT, HIDDEN, 2 * GENES)

    def forward(self, z2):
        gate_logits, mu = halves(self.fc(z2))
        return gate_logits, softmax(mu, dim=-1)


class Z2LEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = layers(GENES, HIDDEN, 2 * LATENT + 2)

    def forward(self, x):
        loc, scale = halves(self.fc(torch.log1p(x)))
        scale = softplus(scale)
        return loc[..., :-1], scale[..., :-1], loc[..., -1:], scale[..., -1:]


class SCANVI(nn.Module):
    """p(x | z2, l) with z2 of the label: where that is known, a factor trains the classifier."""

    def __init__(self, scale_factor=1.0, alpha=0.01):
        super().__init__()
        self.z2_decoder, self.x_decoder = Moments(LATENT + LABELS, LATENT), XDecoder()
        self.z2l_encoder, self.z1_encoder = Z2LEncoder(), Moments(LABELS + LATENT, LATENT)
        self.classifier = layers(LATENT, HIDDEN, LABELS)
        self.scale_factor, self.alpha, self.epsilon = scale_factor, alpha, 5.0e-3

    def model(self, x, y=None):
        pyro.module("scanvi", self)
        theta = pyro.param(
            "inverse_dispersion", 10.0 * x.new_ones(GENES), constraint=constraints.positive
        )
        with pyro.plate("batch", len(x)), poutine.scale(scale=self.scale_factor):
            z1 = pyro.sample("z1", dist.Normal(0, x.new_ones(LATENT)).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(LABELS)), obs=y)
            z2 = pyro.sample("z2", dist.Normal(*self.z2_decoder(z1, y)).to_event(1))
            size = pyro.sample("l", dist.LogNormal(2.0, 0.5 * x.new_ones(1)).to_event(1))
            gate_logits, mu = self.x_decoder(z2)
            pyro.sample("x", self.likelihood(theta, size, gate_logits, mu), obs=x)

    def likelihood(self, theta, size, gate_logits, mu):
        logits = (size * mu + self.epsilon).log() - (theta + self.epsilon).log()
        return dist.ZeroInflatedNegativeBinomial(
            gate_logits=gate_logits, total_count=theta, logits=logits
        ).to_event(1)

    def guide(self, x, y=None):
        pyro.module("scanvi", self)
        with pyro.plate("batch", len(x)), poutine.scale(scale=self.scale_factor):
            z2_loc, z2_scale, l_loc, l_scale = self.z2l_encoder(x)
            pyro.sample("l", dist.LogNormal(l_loc, l_scale).to_event(1))
            z2 = pyro.sample("z2", dist.Normal(z2_loc, z2_scale).to_event(1))
            labels = dist.OneHotCategorical(logits=self.classifier(z2))
            if y is None:
                y = pyro.sample("y", labels)
            else:
                missed = -self.alpha * labels.log_prob(y)
                pyro.factor("classification_loss", missed, has_rsample=False)
            pyro.sample("z1", dist.Normal(*self.z1_encoder(z2, y)).to_event(1))


def cells(n=12):
    x = torch.poisson(torch.full((n, GENES), 2.0), generator=torch.Generator().manual_seed(1))
    return x, torch.eye(LABELS)[torch.arange(n) % LABELS]


X, Y = cells()
SCALE = 1.0 / (len(X) * GENES)


def programs(scale_factor=SCALE):
    scanvi = SCANVI(scale_factor)
    return scanvi.model, config_enumerate(scanvi.guide, "parallel", expand=True)


def enumerated():
    return TraceEnum_ELBO(strict_enumeration_warning=False, max_plate_nesting=1)


def falling():
    options = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.005}}
    return MultiStepLR(options | {"milestones": [20], "gamma": 0.2})


def test_steps():
    takes_the_steps_of_pyro(programs, [(X, None), (X, Y)] * 3, enumerated, falling)


@pytest.mark.usefixtures("recorded")
def test_compiled():
    runs_captured(programs, [(X, Y)] * 4, enumerated)


def test_fit_and_evidence():
    """log p(x) of cells without a label, and log p(x, y) of those with one, unscaled both."""
    scanvi = SCANVI(SCALE)
    guide = config_enumerate(scanvi.guide, "parallel", expand=True)
    fits(scanvi.model, guide, (X,), enumerated(), epochs=50, lr=0.05)
    found = [
        pyrovae.log_likelihood(scanvi.model, guide, *rows, num_samples=2000, seed=0)
        for rows in ((X,), (X, Y))
    ]
    with torch.no_grad():
        weights = by_hand(scanvi.eval(), 2000)
    agrees(found[0], weights.logsumexp(1))
    agrees(found[1], weights[:, Y.argmax(-1), torch.arange(len(X))])


def by_hand(scanvi, k):
    """ln p(x, y, z1, z2, l) - ln q(z1, z2, l | x, y), ``[K, y, N]``."""
    z2_loc, z2_scale, l_loc, l_scale = scanvi.z2l_encoder(X)
    q_size = dist.LogNormal(l_loc, l_scale).to_event(1)
    q_z2 = dist.Normal(z2_loc, z2_scale).to_event(1)
    size, z2 = q_size.sample((k, LABELS)), q_z2.sample((k, LABELS))
    y = torch.eye(LABELS)[:, None].expand(k, LABELS, len(X), LABELS)
    q_z1 = dist.Normal(*scanvi.z1_encoder(z2, y)).to_event(1)
    z1 = q_z1.sample()
    weights = dist.Normal(torch.zeros(LATENT), 1.0).to_event(1).log_prob(z1) - q_z1.log_prob(z1)
    weights += dist.Normal(*scanvi.z2_decoder(z1, y)).to_event(1).log_prob(z2) - q_z2.log_prob(z2)
    weights += dist.LogNormal(torch.tensor([2.0]), 0.5).to_event(1).log_prob(size)
    weights -= q_size.log_prob(size) + torch.tensor(float(LABELS)).log()
    gate_logits, mu = scanvi.x_decoder(z2.reshape(-1, LATENT))
    gate_logits, mu = (each.reshape(*z2.shape[:-1], GENES) for each in (gate_logits, mu))
    theta = pyro.param("inverse_dispersion")
    return weights + scanvi.likelihood(theta, size, gate_logits, mu).log_prob(X)


def test_samples():
    model, _ = programs()
    x = pyrovae.sample(model, like=X, n=20, seed=0)
    assert x.shape == (20, GENES)
    assert (x == x.round()).all()
    assert pyrovae.sample(model, Y, like=X, seed=0).shape == X.shape


def test_check():
    says = {"sites": "no density", "independent_data": "normalizes over the batch"}
    says |= {"analytic_KL": "in another order"}
    has_no_false_alarm(pyrovae.check(*programs(), X, Y), **says)
