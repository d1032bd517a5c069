"""Annealed importance sampling: unbiased at any temperatures, exact on every kind of latents."""

import math
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import Normals, constrained, curved, linear_gaussian
from torch.distributions import transforms

from pairs import LATENT, binary, discrete, mixed, shipped_bernoulli, two_latents
from pyrovae.evidence.annealing import Settings, annealed_log_likelihood
from pyrovae.evidence.importance import log_likelihood
from pyrovae.evidence.unconstrained import (
    Coordinates,
    GeometricPath,
    State,
    adapt,
    anneal,
    transition,
)
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.pair import Pair

X = binary()
IN_PARALLEL = {"enumerate": "parallel"}
CHEAP = {"num_chains": 8, "num_temperatures": 2, "num_steps": 2}


def _path(pair, x, initial="guide", max_rows=10**6):
    whole = Pair(*pair)
    inspect_pair(whole, x)
    return GeometricPath(Coordinates(whole, (x,)), initial, max_rows)


@pytest.mark.parametrize("make", [shipped_bernoulli, two_latents])
def test_without_temperatures_it_is_importance_sampling(make):
    pair = make()
    found = annealed_log_likelihood(*pair, X, num_chains=40, num_temperatures=0, seed=7)
    expected = log_likelihood(*pair, X, num_samples=40, seed=7)
    for name in ("log_prob", "standard_error", "ess", "khat", "smoothed"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("initial", ["guide", "prior"])
def test_weights_average_to_p_with_two_temperatures(initial):
    model, guide, x, exact = linear_gaussian(latent=2, pixels=3, n=2, stretch=1.5, shift=1.0)
    how = {"num_chains": 8000, "num_temperatures": 2, "num_steps": 2, "initial": initial}
    found = annealed_log_likelihood(model, guide, x, seed=0, **how)
    assert found.standard_error.max() < 0.05
    assert ((found.log_prob - exact).abs() < 3.5 * found.standard_error).all()
    assert found.ess.max() < 7900


def test_more_temperatures_tighten_the_bound():
    model, guide, x, exact = linear_gaussian(latent=8, pixels=12, n=64, stretch=1.8, shift=1.0)
    how = {"num_chains": 4, "num_steps": 3, "seed": 0}
    gaps = []
    for temperatures in (0, 4, 20):
        found = annealed_log_likelihood(model, guide, x, num_temperatures=temperatures, **how)
        gaps.append(exact.mean().item() - found.mean)
    assert gaps[0] > gaps[1] + 0.5 > gaps[2] + 0.8
    assert -0.1 < gaps[2] < 1.2


def test_a_transition_leaves_its_density_alone():
    model, _, x, _ = linear_gaussian(latent=3, n=2)
    path = _path((model, Normals(3, 0.4, 2.0)), x)
    posterior = model.posterior(x)
    u = posterior.sample((4000,))
    torch.manual_seed(0)
    stride = torch.full((2, 3), 0.15)
    state = path((x,), u)
    for _ in range(3):
        state, probability = transition(path, (x,), 4, state, 1.0, stride)
    assert 0.5 < probability.mean() < 0.99
    assert (state.u - u).abs().mean() > 0.1
    error = posterior.variance.sqrt() / 4000**0.5
    assert ((state.u.mean(0) - posterior.mean).abs() < 4.5 * error).all()
    covariance = torch.stack([state.u[:, n].mT.cov() for n in range(2)])
    assert (covariance - posterior.covariance_matrix).abs().max() < 0.015
    torch.testing.assert_close(state.target, path((x,), state.u).target)


def test_impossible_moves_are_rejected():
    model, guide, x, _ = linear_gaussian(latent=2, n=3)
    path = _path((model, guide), x)
    state = path((x,), torch.zeros(5, 3, 2))

    def watched(rows, u):
        assert u.isfinite().all()
        return path(rows, u)

    for size in (1e3, 1e30, math.nan):
        with pyro.validation_enabled(False):
            after, probability = transition(watched, (x,), 3, state, 0.5, torch.full((3, 2), size))
        assert after.target.isfinite().all()
        assert torch.equal(after.u, state.u)
        assert (probability == 0).all()


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("pair", [shipped_bernoulli, two_latents])
def test_slopes_are_those_of_the_densities(pair):
    x = X[:3].double()
    path = _path(pair(), x)
    u = torch.randn(2, 3, sum(path.coordinates.sizes))
    with torch.no_grad():
        state = path((x,), u)
        for axis in range(u.shape[-1]):
            nudge = torch.zeros_like(u)
            nudge[..., axis] = 1e-5
            above, below = path((x,), u + nudge), path((x,), u - nudge)
            for density, slope in (("target", "target_slope"), ("start", "start_slope")):
                expected = (getattr(above, density) - getattr(below, density)) / 2e-5
                torch.testing.assert_close(
                    getattr(state, slope)[..., axis], expected, rtol=1e-5, atol=1e-5
                )


def test_densities_of_real_coordinates_carry_their_jacobian():
    model, guide, x, _ = constrained()
    path = _path((model, guide), x)
    u = torch.randn(4, len(x), 2)
    state = path((x,), u)
    rate, share = u[..., 0].exp(), u[..., 1].sigmoid()
    jacobian = u[..., 0] + transforms.SigmoidTransform().log_abs_det_jacobian(u[..., 1], share)
    prior = dist.Gamma(2.0, 1.0).log_prob(rate) + dist.Beta(1 + rate, 2.0).log_prob(share)
    loc = torch.stack([rate, rate * share], -1)
    likelihood = dist.Normal(loc, 0.5).to_event(1).log_prob(x)
    torch.testing.assert_close(state.target, (prior + likelihood + jacobian).double())
    q = dist.Gamma(3.0, 1.5).log_prob(rate) + dist.Beta(2 + 0.1 * rate, 2.0).log_prob(share)
    torch.testing.assert_close(state.start, (q + jacobian).double())
    drawn = {"rate": rate, "share": share}
    torch.testing.assert_close(path.coordinates.of((x,), drawn), u, rtol=1e-4, atol=1e-4)


class Plates(torch.nn.Module):
    """Two latents for each datum in a plate to the left of the batch's, on a simplex each."""

    def __init__(self, encodes):
        super().__init__()
        self.encodes = encodes

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("part", 2, dim=-2):
            power = 2.0 if self.encodes else 1.0
            share = pyro.sample("share", dist.Dirichlet(torch.full((2, len(x), 3), power)))
            if not self.encodes:
                pyro.sample("x", dist.Normal(share[..., :2], 0.2).to_event(1), obs=x.movedim(0, 1))


def test_latents_in_inner_plates_and_on_the_simplex():
    x = torch.tensor([[[0.2, 0.5], [0.4, 0.4]], [[0.7, 0.1], [0.1, 0.8]], [[0.3, 0.3], [0.5, 0.2]]])
    pair = Plates(False), Plates(True)
    expected = log_likelihood(*pair, x, num_samples=20_000, seed=0)
    how = {"num_chains": 200, "num_temperatures": 8, "num_steps": 3}
    found = annealed_log_likelihood(*pair, x, seed=1, **how)
    assert found.acceptance.min() > 0.4
    error = (found.standard_error.square() + expected.standard_error.square()).sqrt()
    assert ((found.log_prob - expected.log_prob).abs() < 4 * error).all()


def test_two_layers_of_latents_agree_with_many_samples():
    pair = two_latents()
    expected = log_likelihood(*pair, X, num_samples=20_000, seed=0)
    how = {"num_chains": 100, "num_temperatures": 8, "num_steps": 3}
    found = annealed_log_likelihood(*pair, X, seed=1, **how)
    error = (found.standard_error.square() + expected.standard_error.square()).sqrt()
    assert ((found.log_prob - expected.log_prob) / error).square().mean().sqrt() < 2
    assert found.ess.min() > 2 * expected.ess.min() * 100 / 20_000


class Clusters(torch.nn.Module):
    """A categorical latent that the model sums out, above a continuous one."""

    def forward(self, x):
        centers = torch.tensor([[-2.0, 0.0], [2.0, 1.0]])
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.4, 0.6])), infer=IN_PARALLEL)
            z = pyro.sample("z", dist.Normal(centers[y], 0.7).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def test_discrete_latents_are_refused_unless_the_model_sums_them_out():
    for pair in (discrete(), mixed()):
        with pytest.raises(ValueError, match=r"Latent 'y' is discrete.*pyrovae.log_like"):
            annealed_log_likelihood(*pair, X, seed=0)
    x = torch.tensor([[-1.5, 0.2], [0.3, 0.5], [2.0, 2.0]])
    how = {"num_chains": 100, "num_temperatures": 8, "num_steps": 3, "seed": 0}
    found = annealed_log_likelihood(Clusters(), Normals(2, 0.0, 2.0), x, **how)
    parts = dist.Normal(torch.tensor([[-2.0, 0.0], [2.0, 1.0]]), 0.74**0.5).to_event(1)
    exact = (parts.log_prob(x[:, None]) + torch.tensor([0.4, 0.6]).log()).logsumexp(1)
    assert ((found.log_prob - exact).abs() < 4 * found.standard_error).all()
    assert found.standard_error.max() < 0.5


def test_a_guide_that_scores_only_its_own_draws_starts_from_the_prior():
    model, _, x, exact = curved()

    def folded(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [_NoWayBack()]))

    with pytest.raises(ValueError, match=r"did not draw .*: use initial='prior'"):
        annealed_log_likelihood(model, folded, x, seed=0)
    how = {"num_chains": 200, "num_temperatures": 6, "num_steps": 3}
    found = annealed_log_likelihood(model, folded, x, initial="prior", seed=0, **how)
    assert ((found.log_prob - exact).abs() < 4 * found.standard_error).all()
    assert math.isnan(log_likelihood(model, folded, x, num_samples=10, seed=0).uncovered)


class _NoWayBack(transforms.AffineTransform):
    def __init__(self):
        super().__init__(0.0, 1.0, event_dim=1, cache_size=1)

    def _inverse(self, y):
        raise NotImplementedError("no inverse")

    def with_cache(self, cache_size=1):
        return self


def test_step_sizes_reach_their_acceptance_for_each_datum():
    model, _, x, _ = linear_gaussian(latent=6, pixels=10, n=5)
    path = _path((model, Normals(6, 0.0, 1.5)), x)
    betas, ticks = Settings(num_temperatures=30).betas, []
    torch.manual_seed(0)
    move = partial(transition, path, (x,), 3)
    strides = adapt(move, path((x,), torch.randn(16, 5, 6)), betas, lambda: ticks.append(1))
    assert len(strides) == len(ticks) == 30
    assert strides[-1].mean() < 0.8 * strides[0].mean()
    state = path((x,), torch.randn(64, 5, 6))
    _, accepted = anneal(move, state, betas, strides, lambda: None)
    assert ((accepted > 0.5) & (accepted < 0.9)).all()


def test_one_seed_gives_one_answer_whatever_the_chunks():
    pair, x = shipped_bernoulli(), binary(70)
    before = torch.get_rng_state()
    one = annealed_log_likelihood(*pair, x, seed=1, **CHEAP)
    assert torch.equal(before, torch.get_rng_state())
    again = annealed_log_likelihood(*pair, x, seed=1, **CHEAP)
    other = annealed_log_likelihood(*pair, x, seed=2, **CHEAP)
    assert torch.equal(one.log_prob, again.log_prob)
    assert not torch.equal(one.log_prob, other.log_prob)
    fewer = annealed_log_likelihood(*pair, x[:65], seed=1, max_rows=128, **CHEAP)
    torch.testing.assert_close(fewer.log_prob, one.log_prob[:65], atol=1e-2, rtol=0)


def test_no_more_rows_are_scored_at_once_than_asked_for():
    (model, guide), seen = shipped_bernoulli(), []
    model.decoder.register_forward_hook(
        lambda module, inputs, output: seen.append(output[..., 0, 0, 0].numel())
    )
    annealed_log_likelihood(model, guide, X, max_rows=30, seed=0, **CHEAP)
    assert max(rows for rows in seen if rows != 252) <= 24
    assert len(seen) > 12 * 8 * 6 / 24


def test_a_nan_at_the_start_names_its_site():
    model, guide = shipped_bernoulli()

    def broken(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            bad = torch.where(torch.arange(len(x)) == 3, math.nan, 0.0)
            logits = model.decoder(z) + bad[:, None, None, None]
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)

    with (
        pyro.validation_enabled(False),
        pytest.raises(ValueError, match="'x' in the model is NaN for datum 3"),
    ):
        annealed_log_likelihood(broken, guide, X, seed=0, **CHEAP)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chains": 0}, "num_chains >= 1, got 0"),
        ({"num_temperatures": -1}, "num_temperatures >= 0, got -1"),
        ({"num_steps": 0}, "num_steps >= 1, got 0"),
        ({"num_steps": 1.5}, "integer num_steps"),
        ({"initial": "posterior"}, "initial='guide' or 'prior'"),
        ({"max_rows": 0}, "max_rows >= 1"),
        ({"compile": 3}, "compile='auto'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        annealed_log_likelihood(*shipped_bernoulli(), X, **options)


def test_temperatures_rise_from_end_to_end_and_are_dense_there():
    betas = Settings(num_temperatures=99).betas
    assert len(betas) == 99
    assert betas == sorted(betas)
    assert betas[49] == pytest.approx(0.5)
    assert betas[0] == pytest.approx(1 - betas[-1])
    assert betas[0] < 0.25 * (betas[50] - betas[49])
    assert Settings(num_temperatures=0).betas == []


def test_compiled_chains_are_those_of_the_handlers(monkeypatch):
    monkeypatch.setattr("pyrovae.compiling.graph._compile", lambda graph, inputs: graph)
    pair = shipped_bernoulli()
    how = {"num_chains": 4, "num_temperatures": 2, "num_steps": 2, "seed": 3}
    expected = annealed_log_likelihood(*pair, X, compile=False, **how)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = annealed_log_likelihood(*pair, X, compile=True, **how)
    torch.testing.assert_close(found.log_prob, expected.log_prob, atol=1e-3, rtol=0)


def test_each_state_is_weighed_by_the_gap_that_it_stands_in():
    """A state that a transition at β leaves has ln p − ln q = β here, the first one 10."""
    like = torch.zeros(1, 1, dtype=torch.float64)

    def state(value):
        return State(torch.zeros(1, 1, 1), like + value, like, torch.zeros(0), torch.zeros(0))

    def move(before, beta, stride):
        return state(beta), like + 0.5

    at = move, state(10.0), [0.1, 0.4], [None, None], lambda: None
    forward, accepted = anneal(*at)
    assert forward.item() == pytest.approx(0.1 * 10 + 0.3 * 0.1 + 0.6 * 0.4)
    assert accepted.item() == pytest.approx(0.5)
    backward, _ = anneal(*at, backward=True)
    assert backward.item() == pytest.approx(0.6 * 10 + 0.3 * 0.4 + 0.1 * 0.1)
