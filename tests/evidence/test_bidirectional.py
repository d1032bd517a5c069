"""The sandwich: log p(x) of simulated data lies between its two bounds."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import ORACLES, linear_gaussian

import pyrovae
from pairs import LATENT, SHAPE, binary, discrete, published_example, shipped_bernoulli, two_latents
from pyrovae._tools import InputError
from pyrovae.evidence import sandwich
from pyrovae.evidence.annealing import annealed_log_likelihood
from pyrovae.evidence.importance import log_likelihood
from pyrovae.evidence.sandwich import bidirectional

X = binary()
CHEAP = {"num_chains": 8, "num_temperatures": 2, "num_steps": 2}


@pytest.mark.parametrize("make", ORACLES.values(), ids=ORACLES)
def test_the_bounds_hold_log_p_between_them(make):
    model, guide, x, _ = make()
    how = {"num_chains": 64, "num_temperatures": 8, "num_steps": 3, "seed": 3}
    found = bidirectional(model, guide, like=x, n=40, **how)
    exact = model.log_prob(found.x).detach().double()
    below, above = exact - found.lower.log_prob, found.upper - exact
    for bound in (below, above):
        assert bound.mean() > -3 * bound.std() / 40**0.5
    assert found.mean_gap == pytest.approx((below + above).mean().item(), abs=1e-3)
    assert -0.1 < found.mean_gap < 1.5
    assert f"{found.mean_gap:.3f}" in found.verdict


def test_bounds_from_a_good_guide_are_tight():
    model, guide, x, _ = linear_gaussian(stretch=1.1, shift=0.1)
    how = {"num_chains": 64, "num_temperatures": 6, "num_steps": 3, "seed": 0}
    found = bidirectional(model, guide, like=x, n=64, **how)
    exact = model.log_prob(found.x).detach().double()
    z = (found.lower.log_prob - exact) / found.lower.standard_error
    assert (z.abs() < 2).double().mean() > 0.85
    assert (found.upper - exact).abs().mean() < 0.2
    assert abs(found.mean_gap) < 0.05
    assert found.mean_gap_standard_error < 0.03


def test_without_temperatures_the_upper_bound_is_the_weight_of_the_posterior_draw():
    model, guide, x, _ = linear_gaussian(stretch=0.8)
    found = bidirectional(model, guide, like=x, n=300, num_temperatures=0, num_chains=1, seed=0)
    exact = model.log_prob(found.x).detach().double()
    assert (found.upper - exact).mean() > 0.05
    reciprocal = (exact - found.upper).exp().mean()
    assert reciprocal.item() == pytest.approx(1.0, abs=0.15)
    lower = log_likelihood(model, guide, found.x, num_samples=1, seed=0)
    torch.testing.assert_close(found.lower.log_prob, lower.log_prob, atol=1e-3, rtol=0)


def test_more_temperatures_close_the_gap():
    model, guide, x, _ = linear_gaussian(latent=6, pixels=10, stretch=2.5, shift=1.5)
    gaps = [
        bidirectional(
            model, guide, like=x, n=64, num_chains=4, num_temperatures=t, num_steps=3, seed=0
        ).mean_gap
        for t in (0, 3, 15)
    ]
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > 0


def test_annealing_the_simulated_data_repeats_the_lower_bound():
    model, guide, x, _ = linear_gaussian()
    found = bidirectional(model, guide, like=x, n=12, seed=5, **CHEAP)
    again = annealed_log_likelihood(model, guide, found.x, seed=5, **CHEAP)
    torch.testing.assert_close(again.log_prob, found.lower.log_prob, atol=1e-3, rtol=0)
    same = bidirectional(model, guide, like=x, n=12, seed=5, **CHEAP)
    assert torch.equal(same.upper, found.upper)
    assert torch.equal(same.x, found.x)
    other = bidirectional(model, guide, like=x, n=12, seed=6, **CHEAP)
    assert not torch.equal(other.x, found.x)


@pytest.mark.parametrize("make", [published_example, two_latents])
def test_data_reach_the_guide_in_the_shape_that_it_takes(make):
    found = bidirectional(*make(), like=X, n=6, seed=0, **CHEAP)
    assert found.x.shape == (6, *SHAPE)
    assert ((found.x == 0) | (found.x == 1)).all()
    assert found.gap.isfinite().all()


def test_compiled_bounds_are_those_of_the_handlers(monkeypatch):
    """As recorded; test_annealing.py compiles the chains."""
    monkeypatch.setattr("pyrovae.compiling.graph._compile", lambda graph, inputs: graph)
    how = {"like": X[:1].expand(3, *SHAPE), "n": 3, "num_chains": 5, "num_temperatures": 2}
    pair = shipped_bernoulli()
    expected = bidirectional(*pair, **how, seed=0, compile=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = bidirectional(*pair, **how, seed=0, compile=True)
    torch.testing.assert_close(found.lower.log_prob, expected.lower.log_prob, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.upper, expected.upper, atol=1e-3, rtol=0)


def test_other_observed_sites_are_simulated_too():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 0.5).to_event(1), obs=x)
            pyro.sample("side", dist.Normal(z, 0.5), obs=torch.zeros(len(x)))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x[:, 0], 0.2**0.5))

    how = {"num_chains": 1, "num_temperatures": 0, "seed": 0}
    found = bidirectional(model, guide, like=torch.zeros(2, 1), n=500, **how)
    alone = dist.Normal(0.0, 1.25**0.5).log_prob(found.x[:, 0])
    entropy = dist.Normal(0.0, 0.5).entropy().item()
    assert (found.upper - alone).mean().item() == pytest.approx(-entropy, abs=0.1)


def test_a_context_stays_with_its_rows():
    (model, _), seen = shipped_bernoulli(), []

    def above(x, level):
        seen.append(level)
        with pyro.plate("data", len(x)):
            loc = level[:, None] * torch.ones(LATENT)
            z = pyro.sample("z", dist.Normal(loc, 0.1).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=model.decoder(z)).to_event(3), obs=x)

    def below(x, level):
        with pyro.plate("data", len(x)):
            loc = level[:, None] * torch.ones(LATENT)
            pyro.sample("z", dist.Normal(loc, 0.15).to_event(1))

    level = torch.tensor([-2.0, 0.0, 2.0])
    found = bidirectional(above, below, level, like=X[:3], n=70, seed=0, **CHEAP)
    assert {tuple(rows[:5].tolist()) for rows in seen} >= {(-2.0, 0.0, 2.0, -2.0, 0.0)}
    assert 0 < found.mean_gap < 0.7


def test_what_cannot_be_simulated_is_named():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            loc = z.sum(-1)
            pyro.sample("total", dist.Normal(loc, 1.0), obs=x.flatten(1).sum(-1))

    guide = shipped_bernoulli()[1]
    with pytest.raises(ValueError, match=r"observes x itself, got \['total'\]"):
        bidirectional(model, guide, like=X, n=4, seed=0, **CHEAP)
    with pytest.raises(ValueError, match="'y' is discrete"):
        bidirectional(*discrete(), like=X, n=4, seed=0)
    with pytest.raises(ValueError, match="n >= 1, got 0"):
        bidirectional(*shipped_bernoulli(), like=X, n=0)
    with pytest.raises(ValueError, match="num_chains >= 1"):
        bidirectional(*shipped_bernoulli(), like=X, num_chains=0)


def tilted(tilt, scale=7**-0.5):
    """A conjugate pair whose model weighs z or x by a factor, and its exact guide for ``-z²``."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("tilt", tilt(z, x))
            pyro.sample("x", dist.Normal(z[..., None], 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(4 / 7 * x[:, 0], scale))

    return model, guide


@pytest.mark.parametrize("ask", [bidirectional, pyrovae.calibrate])
def test_a_factor_that_weighs_draws_is_refused_where_data_are_simulated(ask):
    """Called too narrow otherwise, or bounds that are none, though the guide is exact."""
    few = {"num_chains": 4, "num_temperatures": 0} if ask is bidirectional else {}
    model, guide = tilted(lambda z, x: -(z**2))
    with pytest.raises(InputError, match="factor 'tilt' of the model changes with what is drawn"):
        ask(model, guide, like=torch.zeros(1, 1), n=60, seed=0, **few)
    # One that no draw changes weighs nothing against anything else.
    model, guide = tilted(lambda z, x: -x[:, 0].square())
    ask(model, guide, like=torch.zeros(1, 1), n=60, seed=0, **few)


def test_bounds_in_the_wrong_order_are_an_error(monkeypatch):
    def simulate(*args):
        return {name: value.roll(1, 1) for name, value in simulated(*args).items()}

    simulated = sandwich.simulate
    monkeypatch.setattr(sandwich, "simulate", simulate)
    how = {"num_chains": 8, "num_temperatures": 0, "seed": 0}
    with pytest.raises(InputError, match=r"upper bound is .* below the lower one.*changes between"):
        bidirectional(*tilted(lambda z, x: 0 * z, 0.8), like=torch.zeros(1, 1), n=100, **how)


def test_one_datum_says_nothing_of_chance():
    found = bidirectional(*shipped_bernoulli(), like=X, n=1, seed=0, **CHEAP)
    assert "nan" not in found.verdict
    assert "bounds in expectation alone" in found.verdict
