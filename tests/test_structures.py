"""Laws of every structure: hierarchies, discrete latents, labels."""

import pyro
import pytest
import torch
from structures import LATENTS, MAKE, X, objective
from torch.fx.experimental.proxy_tensor import make_fx

import pyrovae
from pyrovae.capture import undone
from pyrovae.contract import inspect_pair
from pyrovae.objectives import estimate
from pyrovae.params import Parameters
from pyrovae.traces import replay_model, site_scores, take_particles, trace_guide

each = pytest.mark.parametrize("name", MAKE)


@each
def test_the_contract_holds(name):
    model, guide, args = MAKE[name]()
    layout = inspect_pair(Parameters(model, guide), *args)
    assert layout.latents == LATENTS[name]
    assert "x" in layout.observed
    assert layout.enumerated == ()


@each
def test_scores_of_k_particles_are_a_loop_over_single_ones(name):
    model, guide, args = MAKE[name]()
    parameters = Parameters(model, guide)
    layout = inspect_pair(parameters, *args)
    with torch.no_grad():
        guide_trace = trace_guide(parameters, *args, particles=4, layout=layout)
        model_trace = replay_model(parameters, guide_trace, *args, particles=4, layout=layout)
        together = site_scores(model_trace, layout, 4, len(X))
        for i in range(4):
            one = take_particles(guide_trace, slice(i, i + 1))
            alone = replay_model(parameters, one, *args, particles=1, layout=layout)
            for site, score in site_scores(alone, layout, 1, len(X)).items():
                torch.testing.assert_close(score[0], together[site][i], rtol=1e-5, atol=1e-5)


@each
def test_thirty_steps_improve_the_bound_and_move_every_parameter(name):
    model, guide, args = MAKE[name]()
    first = pyrovae.elbo(model, guide, *args, particles=100, seed=1).mean
    before = [p.clone() for p in (*model.parameters(), *guide.parameters())]
    svi = pyrovae.SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), loss=objective(name))
    for _ in range(30):
        svi.step(*args)
    assert pyrovae.elbo(model, guide, *args, particles=100, seed=1).mean > first + 0.5
    after = (*model.parameters(), *guide.parameters())
    assert not any(torch.equal(p, q) for p, q in zip(before, after, strict=True))


@each
def test_the_bound_is_below_the_likelihood(name):
    model, guide, args = MAKE[name]()
    bound = pyrovae.elbo(model, guide, *args, particles=200, seed=0)
    ll = pyrovae.log_likelihood(model, guide, *args, num_samples=2000, seed=1)
    assert bound.mean <= ll.mean + 3 * ll.mean_standard_error
    many = objective(name, num_particles=200, vectorize_particles=True)
    trained = -estimate(many, Parameters(model, guide), *args).loss.item() / len(X)
    assert trained <= ll.mean + 3 * ll.mean_standard_error
    assert trained == pytest.approx(bound.mean, abs=1.0)


@each
def test_state_survives_a_round_trip(name):
    model, guide, args = MAKE[name]()
    state = Parameters(model, guide).state_dict()
    expected = pyrovae.log_likelihood(model, guide, *args, num_samples=9, seed=0).log_prob
    other_model, other_guide, _ = MAKE[name]()
    other = Parameters(other_model, other_guide)
    before = pyrovae.log_likelihood(other_model, other_guide, *args, num_samples=9, seed=0)
    assert not torch.equal(before.log_prob, expected)
    other.load_state_dict(state)
    after = pyrovae.log_likelihood(other_model, other_guide, *args, num_samples=9, seed=0)
    assert torch.equal(after.log_prob, expected)


@each
def test_what_is_generated_has_the_shape_and_support_of_the_data(name):
    model, guide, (x, *context) = MAKE[name]()
    drawn = pyrovae.sample(model, *context, like=x, n=12, seed=0)
    assert drawn.shape == x.shape
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    mean = pyrovae.reconstruct(model, guide, x, *context, seed=0)
    assert mean.shape == x.shape
    assert 0 < mean.min() < mean.max() < 1
    codes = pyrovae.encode(guide, x, *context, seed=0)
    assert codes.keys() == set(LATENTS[name])
    decoded = pyrovae.decode(model, codes, *context, like=x)
    assert decoded.shape == x.shape


@each
def test_a_captured_step_is_the_eager_step(name):
    model, guide, args = MAKE[name]()
    parameters = Parameters(model, guide)
    loss = objective(name, num_particles=2, vectorize_particles=True)
    leaves = [*model.parameters(), *guide.parameters()]

    def step(*args):
        found = estimate(loss, parameters, *args)
        return [found.loss, *torch.autograd.grad(found.surrogate, leaves)]

    with pyro.validation_enabled(False):
        with undone(parameters, args):
            graph = make_fx(step)(*args)
        others = (1 - args[0], *(y.roll(1) for y in args[1:]))
        results = []
        for run in (step, graph):
            with torch.random.fork_rng():
                torch.manual_seed(5)
                results.append(run(*others))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
