"""Wake-sleep against its formulas, and over every draw and dream of a discrete latent."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from test_objectives_discrete import DATA, C, Forced, Small, draws, iwae
from torch import nn

from pyrovae.objectives import estimate, make_objective
from pyrovae.pairs.pair import Pair


@pytest.mark.parametrize("insomnia", [1.0, 0.4, 0.0])
def test_wake_and_sleep_learn_what_their_formulas_say(insomnia):
    pair, k = Small(), 3
    objective = make_objective("reweighted_wake_sleep", k, insomnia=insomnia)
    x, y, noise = draws(k)
    weight = pair.posterior(x).log_prob(y).sum(0).exp().detach()
    dream_x, dream_y = 1 - x, y[1]
    weighted = poutine.scale(scale=weight)
    parameters = Pair(weighted(pair.model), weighted(pair.guide))
    objective.prepare(parameters, (x,))
    awake = itertools.chain([y], itertools.repeat(dream_y))
    with Forced(y=lambda fn: next(awake), x=lambda fn: dream_x):
        found = estimate(objective, parameters, x)
    (slope,) = torch.autograd.grad(found.surrogate, [pair.table])
    log_p, log_q = pair.log_joint(x, y, noise)
    normal = (log_p - log_q).softmax(0).detach()
    asleep = pair.posterior(dream_x).log_prob(dream_y)
    total = (normal * (log_p + insomnia * log_q)).sum(0) + (1 - insomnia) * asleep
    expected = torch.autograd.grad(-(weight * total).sum(), [pair.table])[0]
    torch.testing.assert_close(slope, expected)
    torch.testing.assert_close(found.loss, -(weight * iwae(log_p - log_q)).sum().detach())


def test_a_guide_asleep_learns_the_posterior_and_a_model_awake_the_data():
    """The guide descends KL(p ‖ q) over every dream, the model ascends ln p(x) of many samples."""
    pair = Small()
    y, x = torch.arange(C).repeat_interleave(2), DATA.repeat(C)
    log_p, _ = pair.log_joint(x, y, None)
    weighted = poutine.scale(scale=log_p.exp().detach())
    parameters = Pair(weighted(pair.model), weighted(pair.guide))
    objective = make_objective("wake_sleep")
    objective.prepare(parameters, (x,))
    with Forced(y=lambda fn: y, x=lambda fn: x):
        found = estimate(objective, parameters, x)
    (slope,) = torch.autograd.grad(found.surrogate, [pair.table], retain_graph=True)
    every = pair.log_joint(DATA, torch.arange(C).unsqueeze(-1), None)
    joint, posterior = every[0].exp().detach(), every[0].log_softmax(0).detach()
    forward = (joint * (posterior - every[1])).sum()
    (expected,) = torch.autograd.grad(forward, [pair.table], retain_graph=True)
    torch.testing.assert_close(slope[2:4], expected[2:4])

    objective = make_objective("reweighted_wake_sleep", particles=40_000)
    (slope,) = torch.autograd.grad(
        estimate(objective, Pair(pair.model, pair.guide), DATA).surrogate, [pair.table]
    )
    (expected,) = torch.autograd.grad(-every[0].logsumexp(0).sum(), [pair.table])
    torch.testing.assert_close(slope[:2], expected[:2], rtol=0, atol=0.03)


class Seen(nn.Module):
    """A model that observes something made of x, beside what it is given."""

    def __init__(self, *sites, side=False):
        super().__init__()
        self.sites, self.side = sites, side
        self.weight = nn.Parameter(torch.tensor(0.3))

    def model(self, x, *given):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for name in self.sites:
                value = {"x": x, "twice": 2 * x, "shift": x + sum(given)}[name]
                pyro.sample(name, dist.Normal(z * self.weight, 1.0), obs=value)

    def guide(self, x, *given):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.weight * x, 1.0))
            if self.side:
                pyro.sample("side", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})


@pytest.mark.parametrize(
    ("sites", "given", "words"),
    [
        (("twice",), 0, r"No site of the model observes x as it is.*'twice'"),
        (("x", "shift"), 1, r"Sites \['shift'\] observe none of the arguments"),
    ],
)
def test_what_cannot_be_dreamt_of_is_refused(sites, given, words):
    pair, x = Seen(*sites), torch.tensor([0.5, -1.0, 2.0])
    args = (x, *[torch.tensor([3.0, 1.0, 4.0])] * given)
    parameters = Pair(pair.model, pair.guide)
    with pytest.raises(ValueError, match=words):
        estimate(make_objective("wake_sleep"), parameters, *args)
    assert estimate(make_objective("reweighted_wake_sleep"), parameters, *args).loss > 0


def test_a_dream_leaves_what_is_not_observed():
    """A site made of x, and a context that is not observed, are no arguments to dream of."""
    x, given = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([3.0, 1.0, 4.0])
    for sites, args in ((("x", "twice"), (x,)), (("x",), (x, given))):
        pair = Seen(*sites)
        parameters = Pair(pair.model, pair.guide)
        found = estimate(make_objective("wake_sleep"), parameters, *args)
        assert torch.autograd.grad(found.surrogate, [pair.weight])[0] != 0


def test_a_latent_of_the_guide_alone_cannot_be_dreamt_of():
    pair, x = Seen("x", side=True), torch.tensor([0.5, -1.0, 2.0])
    with pytest.raises(ValueError, match=r"no value for \['side'\]"):
        estimate(make_objective("wake_sleep"), Pair(pair.model, pair.guide), x)


def pulled(factor):
    """z ~ N(0, 1) with a factor of z and x, and x ~ N(z, 1)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("pull", factor(z, x))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    return Pair(model, guide)


def test_a_dream_that_would_not_follow_a_factor_is_refused():
    pair, x = pulled(lambda z, x: -4 * (z - 2) ** 2), torch.randn(5)
    with pytest.raises(ValueError, match="'pull' of the model changes with what is drawn, and no"):
        estimate(make_objective("wake_sleep"), pair, x)
    assert estimate(make_objective("reweighted_wake_sleep"), pair, x).loss.isfinite()


def test_a_factor_that_no_draw_changes_may_be_dreamt_with():
    pair, x = pulled(lambda z, x: x.new_full((len(x),), -4.0)), torch.randn(5)
    assert estimate(make_objective("wake_sleep"), pair, x).loss.isfinite()
