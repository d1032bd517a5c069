"""Likelihoods of the programs with one latent layer, held against their formulas."""

import pytest
import torch
from pyro import poutine
from torch.nn.functional import softplus

from one_layer import LATENT, PRIORS, SHAPE, N, build, data, double, pair


def bernoulli(model, f, x):
    return f * x - softplus(f)


def continuous_bernoulli(model, f, x):
    weight = 10 * torch.tanh(f / 10)
    return weight * x + (weight / torch.expm1(weight)).log()


def laplace(model, f, x):
    return -(x - f).abs() / model.scale - (2 * model.scale).log()


def poisson(model, f, x):
    mean = softplus(f)
    return x * mean.log() - mean - torch.lgamma(x + 1)


def negative_binomial(model, f, x):
    mean, r = softplus(f), model.r
    ways = torch.lgamma(x + r) - torch.lgamma(r) - torch.lgamma(x + 1)
    return ways + r * (r / (r + mean)).log() + x * (mean / (r + mean)).log()


def categorical(model, f, x):
    logits = model.head(f).log_softmax(-1)
    return logits.gather(-1, (16 * x).round().long()[..., None])[..., 0]


def discretized_logistic(model, f, x):
    weight, loc, raw = f.unbind(-5)
    scale, x = softplus(raw - 2) + 1e-4, x[..., None]
    upper = torch.where(x == 1, 1.0, torch.sigmoid((x + 1 / 32 - loc) / scale))
    lower = torch.where(x == 0, 0.0, torch.sigmoid((x - 1 / 32 - loc) / scale))
    return (weight.softmax(-1) * (upper - lower)).sum(-1).log()


FORMULAS = dict.fromkeys((*PRIORS, "convolutional", "bernoulli"), bernoulli) | {
    f.__name__: f
    for f in (
        continuous_bernoulli,
        laplace,
        poisson,
        negative_binomial,
        categorical,
        discretized_logistic,
    )
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_likelihood_is_its_formula(name):
    model, x = double(*pair(name, "mean_field"))[0], data(name).double()
    z = torch.randn(N, LATENT, dtype=torch.float64)
    trace = poutine.trace(poutine.condition(model, {"z": z})).get_trace(x)
    trace.compute_log_prob()
    exact = FORMULAS[name](model, model.decoder(z), x).flatten(1).sum(-1)
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.3, -2.0, 1e4, -1e4])
def test_the_continuous_bernoulli_is_a_density_at_any_weight(weight):
    model = build("models", "continuous_bernoulli", (1,), hidden=())
    with torch.no_grad():
        model.decoder.layers[0].weight.zero_()
        model.decoder.layers[0].bias.fill_(weight)
        x = torch.linspace(0, 1, 20_001)[:, None]
        trace = poutine.trace(model).get_trace(x)
    trace.compute_log_prob()
    density = trace.nodes["x"]["log_prob"].double().exp()
    assert torch.trapezoid(density, dx=1 / 20_000).item() == pytest.approx(1, abs=1e-4)
    assert density.max() < model.limit + 1e-2


def test_negative_binomial_counts_vary_by_more_than_their_mean():
    model = build("models", "negative_binomial")
    with torch.no_grad():
        model.r = torch.full(SHAPE, 2.0)
        x = data("negative_binomial", 1).expand(20_000, *SHAPE)
        trace = poutine.trace(poutine.condition(model, {"z": torch.zeros(20_000, 3)})).get_trace(x)
        likelihood = trace.nodes["x"]["fn"]
        drawn = likelihood.sample()
        mean = softplus(model.decoder(torch.zeros(3)))
    torch.testing.assert_close(likelihood.mean[0], mean, rtol=1e-4, atol=1e-5)
    assert (drawn.mean(0) - mean).abs().max() < 0.1
    torch.testing.assert_close(likelihood.variance[0], mean + mean.square() / 2)
    assert (drawn.var(0) / (mean + mean.square() / 2) - 1).abs().max() < 0.15
