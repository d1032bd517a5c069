"""Guides whose latents give no path, or give one with noise of their own."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import transforms
from pyro.nn import PyroModule, PyroParam
from test_objectives import gradients
from test_objectives_gradients import Flow
from torch import nn
from torch.distributions import constraints

from pairs import LATENT, PAIRS, SHAPE, binary
from pyrovae.models.bernoulli import Bernoulli
from pyrovae.objectives import estimate, make_objective
from pyrovae.pairs.pair import Pair

X = binary()


class Dropped(PyroModule):
    """A hierarchical guide with noise of its own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(-3), nn.Linear(16, 4), nn.Dropout(0.5))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            top, low = self.net(x).chunk(2, -1)
            top = pyro.sample("top", dist.Normal(top, 1.0).to_event(1))
            pyro.sample("low", dist.Normal(low + top, 1.0).to_event(1))


class Planar(Flow):
    """A flow without an inverse."""

    def __init__(self):
        super().__init__(lambda: transforms.planar(LATENT))


class Inexact(transforms.Transform):
    """A map whose inverse is off."""

    domain, codomain, bijective = constraints.real_vector, constraints.real_vector, True

    def _call(self, x):
        return x * 2

    def _inverse(self, y):
        return y / 2.1

    def log_abs_det_jacobian(self, x, y):
        return torch.zeros_like(x).sum(-1)


class Rough(PyroModule):
    """A guide with such a map, which remembers what it has just drawn."""

    def __init__(self):
        super().__init__()
        self.loc = PyroParam(torch.zeros(LATENT))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(self.loc, 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [Inexact(cache_size=1)]))


@pytest.mark.parametrize(
    ("model", "guide", "words"),
    [
        (PAIRS["two_latents"]()[0], Dropped(), "dropout"),
        (Bernoulli(SHAPE, LATENT, (8,)), Planar(), "no inverse"),
        (Bernoulli(SHAPE, LATENT, (8,)), Rough(), "inverse of its flow is not exact"),
        (*PAIRS["mixed"](), "'y' from a OneHotCategorical"),
    ],
    ids=["dropout", "planar", "inexact", "discrete"],
)
@pytest.mark.parametrize("name", ["stl", "iwae_dreg"])
def test_guides_that_give_no_path_are_refused(model, guide, words, name):
    with pytest.raises(ValueError, match=words):
        estimate(make_objective(name), Pair(model, guide), X)


def test_dropout_in_a_guide_of_one_latent_is_the_same_in_both_parts():
    class Noisy(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = nn.Sequential(nn.Flatten(-3), nn.Linear(16, LATENT), nn.Dropout(0.5))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.loc(x), 1.0).to_event(1))

    pair = PAIRS["shipped_bernoulli"]()[0], Noisy()
    _, found = gradients(make_objective("stl"), pair, X)
    _, plain = gradients(make_objective("iwae", particles=1), pair, X)
    pyro.set_rng_seed(3)
    site = poutine.trace(pair[1]).get_trace(X).nodes["z"]
    site["fn"].log_prob(site["value"].detach()).sum().backward()
    for name, parameter in pair[1].named_parameters():
        expected = plain[f"guide.{name}"] - parameter.grad
        torch.testing.assert_close(found[f"guide.{name}"], expected, rtol=1e-4, atol=1e-4)
