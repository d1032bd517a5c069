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
from pyrovae.compiling.hoist import Hoisted
from pyrovae.evidence.annealing import Settings, annealed_log_likelihood
from pyrovae.evidence.importance import log_likelihood
from pyrovae.evidence.path import (
    GeometricPath,
    Moves,
    Schedule,
    State,
    adapt,
    anneal,
    spaced,
)
from pyrovae.evidence.unconstrained import Coordinates
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.bernoulli import Bernoulli
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


@pytest.mark.parametrize("steps", [1, 4])
def test_moves_leave_their_density_alone(steps):
    """That of points and momenta together, at steps so long that many moves are refused."""
    model, _, x, _ = linear_gaussian(latent=3, n=2)
    moves = Moves(_path((model, Normals(3, 0.4, 2.0)), x), steps)
    posterior = model.posterior(x)
    torch.manual_seed(0)
    u = posterior.sample((4000,))
    chains = moves.start((x,), u)
    for _ in range(6):
        chains, probability = moves((x,), chains, torch.ones(2), torch.full((2, 3), 0.4))
    state, momentum = chains
    assert 0.5 < probability.mean() < 0.95
    assert (state.u - u).abs().mean() > 0.1
    error = posterior.variance.sqrt() / 4000**0.5
    assert ((state.u.mean(0) - posterior.mean).abs() < 4.5 * error).all()
    covariance = torch.stack([state.u[:, n].mT.cov() for n in range(2)])
    assert (covariance - posterior.covariance_matrix).abs().max() < 0.015
    both = torch.stack([torch.cat([state.u, momentum], -1)[:, n].mT.cov() for n in range(2)])
    assert (both[:, 3:, 3:] - torch.eye(3)).abs().max() < 0.12
    assert both[:, :3, 3:].abs().max() < 0.04
    torch.testing.assert_close(state.target, moves.path((x,), state.u).target)


def test_a_chain_goes_on_in_its_direction_and_turns_where_it_is_refused():
    model, guide, x, _ = linear_gaussian(latent=2, n=3)
    moves = Moves(_path((model, guide), x), 1, persistence=1.0)
    chains = moves.start((x,), torch.zeros(50, 3, 2))
    beta = torch.full((3,), 0.5)
    (state, momentum), probability = moves((x,), chains, beta, torch.full((3, 2), 1e-3))
    assert probability.min() > 0.99
    assert (momentum - chains[1]).abs().max() < 0.05
    torch.testing.assert_close(state.u, 1e-3 * chains[1], atol=1e-3, rtol=0)
    (state, momentum), _ = moves((x,), chains, beta, torch.full((3, 2), 1e3))
    assert torch.equal(momentum, -chains[1])
    assert torch.equal(state.u, chains[0].u)


def test_impossible_moves_are_rejected(monkeypatch):
    model, guide, x, _ = linear_gaussian(latent=2, n=3)
    path = _path((model, guide), x)
    moves, at = Moves(path, 3), path.at
    chains = moves.start((x,), torch.zeros(5, 3, 2))

    def watched(rows, u):
        assert u.isfinite().all()
        return at(rows, u)

    monkeypatch.setattr(path, "at", watched)
    for size in (1e3, 1e30, math.nan):
        with pyro.validation_enabled(False):
            stride = torch.full((3, 2), size)
            (after, _), probability = moves((x,), chains, torch.full((3,), 0.5), stride)
        assert after.target.isfinite().all()
        assert torch.equal(after.u, chains[0].u)
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
    moves = Moves(_path((model, Normals(6, 0.0, 1.5)), x), 3)
    knots, ticks = torch.tensor(Settings(num_temperatures=30).knots).double(), []
    move = partial(moves, (x,))
    torch.manual_seed(0)
    start = moves.start((x,), torch.randn(16, 5, 6))
    found = adapt(move, start, knots, 30, lambda: ticks.append(1))
    assert len(found.strides) == len(ticks) == len(knots) == 24
    assert found.betas.shape == (30, 5)
    assert found.strides[-1].mean() < 0.8 * found.strides[0].mean()
    start = moves.start((x,), torch.randn(64, 5, 6))
    _, accepted = anneal(move, start, found, lambda: None)
    assert ((accepted > 0.7) & (accepted < 0.97)).all()


def test_temperatures_are_dense_where_the_densities_change():
    """Between any two of them lies the same part of the integral of the spread."""
    knots = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    at = torch.cat([torch.zeros(1), knots])
    betas = spaced(knots, torch.stack([1 / (0.1 + at), torch.ones(20), torch.zeros(20)], 1), 99)
    assert betas.shape == (99, 3)
    assert (betas.diff(dim=0) > 0).all()
    assert 0 < betas.min() < betas.max() < 1
    even = torch.arange(1, 100, dtype=torch.float64) / 100
    torch.testing.assert_close(betas[:, 1], even)
    torch.testing.assert_close(betas[:, 2], even)
    # ∫ 1 / (0.1 + β) dβ = ln(1 + 10 β), and a fifth of its mean is added everywhere.
    total = math.log(11)
    length = ((1 + 10 * betas[:, 0]).log() + 0.2 * total * betas[:, 0]) / (1.2 * total)
    torch.testing.assert_close(length, even, atol=0.02, rtol=0)


def test_step_sizes_between_knots_lie_between_theirs():
    knots, strides = torch.tensor([0.2, 0.6]).double(), torch.tensor([[[1.0]], [[3.0]]])
    betas = torch.tensor([[0.1], [0.2], [0.3], [0.6], [0.9]]).double()
    schedule = Schedule(betas, knots, strides)
    found = [schedule.stride(index).item() for index in range(5)]
    assert found == pytest.approx([1.0, 1.0, 1.5, 3.0, 3.0])
    assert Schedule(betas, knots[:1], strides[:1]).stride(4).item() == 1.0


def test_chosen_temperatures_do_better_than_even_ones_from_the_prior(monkeypatch):
    model, guide, x, exact = linear_gaussian(latent=6, pixels=200, n=16)
    how = {"num_chains": 8, "num_temperatures": 20, "num_steps": 2, "initial": "prior", "seed": 0}
    chosen = annealed_log_likelihood(model, guide, x, **how)
    monkeypatch.setattr("pyrovae.evidence.path.EVEN", 1e6)
    even = annealed_log_likelihood(model, guide, x, **how)
    assert exact.mean() - chosen.mean < 0.6 * (exact.mean() - even.mean)
    assert chosen.ess.mean() > 1.3 * even.ess.mean()


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


def test_knots_rise_from_end_to_end_and_are_dense_there():
    knots = Settings(num_temperatures=99).knots
    assert knots == sorted(knots)
    assert knots[0] == pytest.approx(1 - knots[-1])
    assert knots[0] < 0.4 * (knots[12] - knots[11])
    assert len(Settings(num_temperatures=3).knots) == 3
    assert Settings(num_temperatures=0).knots == []


@pytest.mark.inductor
def test_compiled_chains_are_those_of_the_handlers():
    """Of images, whose energies are large sums: compiled, they are rounded otherwise."""
    pyro.set_rng_seed(0)
    pair = Bernoulli((784,), latent=3, hidden=(8,)), MeanField((784,), latent=3, hidden=(8,))
    x = torch.rand(6, 784).round()
    how = {"num_chains": 4, "num_temperatures": 2, "num_steps": 2, "seed": 3}
    expected = annealed_log_likelihood(*pair, x, compile=False, **how)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = annealed_log_likelihood(*pair, x, compile=True, **how)
    torch.testing.assert_close(found.log_prob, expected.log_prob, atol=1e-3, rtol=0)


def test_compiled_moves_that_are_others_are_left(monkeypatch):
    """As those of a graph that was recorded empty would be, which gives the same each time."""
    monkeypatch.setattr("pyrovae.compiling.graph._compile", lambda graph, inputs: graph)
    replay = Hoisted.__call__
    pair = shipped_bernoulli()
    how = {"num_chains": 4, "num_temperatures": 2, "num_steps": 2, "seed": 3}
    expected = annealed_log_likelihood(*pair, X, compile=False, **how)
    # Scores of hundreds of nats in float32, summed in float64, are right to a few 1e-5.
    monkeypatch.setattr(Hoisted, "__call__", lambda *args: [e + 5e-5 for e in replay(*args)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        annealed_log_likelihood(*pair, X, compile=True, **how)
    monkeypatch.setattr(Hoisted, "__call__", lambda *args: [each * 0 for each in replay(*args)])
    with pytest.warns(UserWarning, match="Annealing runs eagerly, not compiled: a move came out"):
        found = annealed_log_likelihood(*pair, X, compile=True, **how)
    torch.testing.assert_close(found.log_prob, expected.log_prob)


def test_each_state_is_weighed_by_the_gap_that_it_stands_in():
    """A state that a move at β leaves has ln p − ln q = β here, the first one 10."""
    like = torch.zeros(1, 1, dtype=torch.float64)

    def chains(value):
        none = torch.zeros(0)
        return State(torch.zeros(1, 1, 1), like + value, like, none, none), none

    def move(before, beta, stride):
        return chains(beta), like + 0.5

    knots = torch.tensor([0.1, 0.4], dtype=torch.float64)
    schedule = Schedule(knots[:, None], knots, torch.zeros(2, 1, 1))
    at = move, chains(10.0), schedule, lambda: None
    forward, accepted = anneal(*at)
    assert forward.item() == pytest.approx(0.1 * 10 + 0.3 * 0.1 + 0.6 * 0.4)
    assert accepted.item() == pytest.approx(0.5)
    backward, _ = anneal(*at, backward=True)
    assert backward.item() == pytest.approx(0.6 * 10 + 0.3 * 0.4 + 0.1 * 0.1)


@pytest.mark.parametrize(("chains", "kind"), [(1, "fair"), (4, "fair"), (8, "good")])
def test_few_chains_cannot_tell_whether_their_errors_hold(chains, kind):
    model, guide, x, _ = linear_gaussian(latent=2, pixels=3, n=2, stretch=1.1, shift=0.0)
    found = annealed_log_likelihood(model, guide, x, num_chains=chains, num_temperatures=2, seed=0)
    assert found.verdict.kind == kind
    assert ("too few to tell" in found.verdict) == (kind == "fair")
