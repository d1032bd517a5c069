"""Gradients that go through the latents alone: what they are, their mean, and their variance."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import transforms
from pyro.nn import PyroModule
from test_objectives import gradients, linear
from torch import nn

from pairs import LATENT, PAIRS, SHAPE, binary
from pyrovae.models.bernoulli import Bernoulli
from pyrovae.nn import MLP
from pyrovae.objectives import estimate, make_objective
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import samples

X = binary()


class Flow(PyroModule):
    """A guide whose latent is a flow of an amortized base."""

    def __init__(self, make):
        super().__init__()
        self.encoder = MLP(SHAPE, (2, LATENT), (8,))
        self.flow = make()

    def forward(self, x):
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).unbind(-2)
            base = dist.Normal(loc, log_scale.exp()).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))


class Chain(nn.Module):
    """b | a, x ~ N(b; a, 1), a ~ N(0, 1), x | b ~ N(b, 1), and its posterior in both orders."""

    def __init__(self, order):
        super().__init__()
        self.order = order
        ratio = {"up": [2 / 3, 0.0, 1 / 2], "down": [1 / 3, 1 / 2, 1 / 2]}[order]
        variance = {"up": [2 / 3, 1 / 2], "down": [2 / 3, 1 / 2]}[order]
        self.weight = nn.Parameter(torch.tensor(ratio, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.tensor(variance, dtype=torch.float64).log() / 2)

    def model(self, x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(self, x):
        first, second = ("b", "a") if self.order == "up" else ("a", "b")
        scale = self.log_scale.exp()
        with pyro.plate("data", len(x)):
            z = pyro.sample(first, dist.Normal(self.weight[0] * x, scale[0]))
            loc = self.weight[1] * x + self.weight[2] * z
            pyro.sample(second, dist.Normal(loc, scale[1]))


def spline():
    return transforms.spline_coupling(LATENT, hidden_dims=[8], count_bins=4)


def iaf():
    return transforms.affine_autoregressive(LATENT, hidden_dims=[8])


def shared():
    """A model whose prior is made by the guide's own network."""
    pair = PAIRS["shipped_bernoulli"]()
    model, guide = pair
    pseudo = nn.Parameter(torch.rand(SHAPE))

    def program(x):
        pyro.module("decoder", model.decoder)
        start = pyro.param("pseudo", pseudo)
        with pyro.plate("data", len(x)):
            loc, log_scale = guide.encoder(start).unbind(-2)
            z = pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=model.decoder(z)).to_event(3), obs=x)

    return program, guide


GUIDES = {
    **{
        name: PAIRS[name]
        for name in ("shipped_gaussian", "plain_modules", "same_names", "two_latents")
    },
    "spline": lambda: (Bernoulli(SHAPE, LATENT, (8,)), Flow(spline)),
    "iaf": lambda: (Bernoulli(SHAPE, LATENT, (8,)), Flow(iaf)),
    "shared": shared,
}


def by_a_frozen_copy(pair, x, weigh, particles):
    """The same gradient from a copy of the guide without parameters to train.

    F is what the particles score with latents that are leaves; the guide learns from F's slope in
    each latent, times how the latent moves, times a weight; the model learns from F.
    """
    parameters = Pair(*pair)
    frozen = copy.deepcopy(pair[1]).requires_grad_(False).eval()
    layout = inspect_pair(parameters, x)
    at = {"particles": particles}
    pyro.set_rng_seed(3)
    drawn = parameters.trace_guide(x, **at)
    leaves, moved = drawn.copy(), {}
    for name, site in samples(drawn).items():
        moved[name] = site["value"]
        leaf = site["value"].detach().requires_grad_()
        leaves.nodes[name] = site | {"value": leaf}
    held = Pair(pair[0], poutine.replay(frozen, trace=leaves))
    held.layout = layout
    model_trace = parameters.replay_model(leaves, x, **at)
    guide_trace = held.trace_guide(x, **at)
    for trace in (model_trace, guide_trace):
        trace.compute_log_prob()
    log_p = sum(s["log_prob"] for s in samples(model_trace).values())
    log_w = log_p - sum(s["log_prob"] for s in samples(guide_trace).values())
    v, u = weigh(log_w.detach())
    gain = (v * log_p).sum()
    values = [leaves.nodes[name]["value"] for name in moved]
    slopes = torch.autograd.grad(log_w.sum(), values, retain_graph=True)
    for name, slope in zip(moved, slopes, strict=True):
        gain = gain + (u.unsqueeze(-1) * slope * moved[name]).sum()
    named = parameters.named()
    return dict(zip(named, torch.autograd.grad(-gain, list(named.values())), strict=True))


def stl(log_w):
    return (torch.full_like(log_w, 1 / len(log_w)),) * 2


def iwae_stl(log_w):
    return (log_w.softmax(0),) * 2


def iwae_dreg(log_w):
    return log_w.softmax(0), log_w.softmax(0) ** 2


@pytest.mark.parametrize("weigh", [stl, iwae_stl, iwae_dreg])
@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_the_score_is_left_out_as_with_a_frozen_copy_of_the_guide(make, weigh):
    torch.set_default_dtype(torch.float64)
    try:
        pair, x = make(), X.double()
        expected = by_a_frozen_copy(pair, x, weigh, particles=4)
        _, found = gradients(make_objective(weigh.__name__, particles=4), pair, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("options", [{}, {"alpha": 0.4}, {"beta": 0.3}, {"groups": 2}])
def test_the_model_learns_as_from_the_plain_gradient(options):
    pair = PAIRS["two_latents"]()
    plain, *others = (
        gradients(make_objective("iwae", particles=4, gradient=kind, **options), pair, X)
        for kind in ("plain", "stl", "dreg")
    )
    for loss, found in others:
        torch.testing.assert_close(loss.loss, plain[0].loss)
        for name, gradient in found.items():
            if name.startswith("model"):
                torch.testing.assert_close(gradient, plain[1][name], rtol=1e-4, atol=1e-5)
            else:
                assert not torch.allclose(gradient, plain[1][name], rtol=1e-3)


@pytest.mark.parametrize("name", ["stl", "iwae_stl", "iwae_dreg"])
@pytest.mark.parametrize("order", ["linear", "up", "down"])
def test_the_guide_does_not_move_from_the_exact_posterior(name, order):
    if order == "linear":
        model, guide, x = linear(exact=True)
    else:
        chain, x = Chain(order), torch.randn(7, dtype=torch.float64)
        model, guide = chain.model, chain.guide
    _, found = gradients(make_objective(name, particles=5), (model, guide), x)
    _, plain = gradients(make_objective("iwae", particles=5), (model, guide), x)
    for key in found:
        if "model" not in key:
            assert found[key].abs().max() < 1e-9
            assert plain[key].abs().max() > 1e-2


def moments(objective, pair, x, batches=40):
    """The mean of a gradient over independent batches, the error of that mean, its variance."""
    parameters = Pair(*pair)
    estimate(objective, parameters, x)
    leaves = list(parameters.named().values())
    pyro.set_rng_seed(7)
    draws = []
    for _ in range(batches):
        found = torch.autograd.grad(estimate(objective, parameters, x).surrogate, leaves)
        draws.append(torch.cat([gradient.flatten() for gradient in found]))
    draws = torch.stack(draws) / len(x)
    return draws.mean(0), draws.std(0) / batches**0.5, draws.var(0).sum()


def deviation(one, other):
    """The largest difference of two means in standard errors."""
    return ((one[0] - other[0]) / (one[1] ** 2 + other[1] ** 2 + 1e-20).sqrt()).abs().max()


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"alpha": 1.0}, "stl"),
        ({}, "dreg"),
        ({"alpha": 0.5}, "dreg"),
        ({"alpha": -0.5}, "dreg"),
        ({"beta": 0.3}, "dreg"),
        ({"groups": 2}, "dreg"),
    ],
    ids=["stl", "dreg", "renyi-half", "renyi-minus", "ciwae", "miwae"],
)
def test_paths_have_the_mean_of_the_plain_gradient_and_a_smaller_variance(options, kind):
    model, guide, x = linear(n=150, shift=0.15)
    plain, paths = (
        moments(make_objective("iwae", particles=4, gradient=g, **options), (model, guide), x)
        for g in ("plain", kind)
    )
    assert deviation(plain, paths) < 4
    assert (plain[0].abs() > 10 * plain[1]).any()
    assert paths[2] < 0.8 * plain[2]


@pytest.mark.parametrize("order", ["up", "down"])
@pytest.mark.parametrize("name", ["stl", "iwae_dreg"])
def test_paths_through_a_hierarchy_have_the_mean_of_the_plain_gradient(name, order):
    chain, x = Chain(order), torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64).repeat(200)
    with torch.no_grad():
        chain.weight += torch.tensor([0.2, -0.3, 0.2])
        chain.log_scale -= 0.2
    plain, paths = (
        moments(make_objective(kind, particles=3), (chain.model, chain.guide), x)
        for kind in ("trace_elbo" if name == "stl" else "iwae", name)
    )
    assert deviation(plain, paths) < 4
    assert (plain[0].abs() > 10 * plain[1]).all()
    assert paths[2] < plain[2]


def test_sticking_the_landing_of_iwae_is_off_by_what_the_guide_learns_awake():
    model, guide, x = linear(n=150, shift=0.8)
    settings = {"particles": 4}
    plain = moments(make_objective("iwae", **settings), (model, guide), x)
    stuck = moments(make_objective("iwae_stl", **settings), (model, guide), x)
    awake = moments(make_objective("reweighted_wake_sleep", **settings), (model, guide), x)
    assert deviation(plain, stuck) > 10
    where = torch.cat(
        [
            torch.full((p.numel(),), float(name.startswith("guide")))
            for name, p in Pair(model, guide).named().items()
        ]
    ).double()
    both = (plain[0] + where * awake[0], (plain[1] ** 2 + where * awake[1] ** 2).sqrt())
    assert deviation(both, stuck) < 4
