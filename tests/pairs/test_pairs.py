"""Pairs written in every way that Pyro allows have the ELBO that Pyro gives them."""

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

import pyrovae
from pairs import PAIRS, binary
from pyrovae.objectives import estimate
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.pair import Pair

each_pair = pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
X = binary()
DISCRETE = (PAIRS["discrete"], PAIRS["mixed"])


def _parameters(make):
    parameters = Pair(*make())
    return parameters, inspect_pair(parameters, X)


@each_pair
def test_a_second_pair_in_the_same_process_trains_too(make):
    names = None
    for _ in range(2):
        model, guide = make()
        svi = pyrovae.SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), loss=Trace_ELBO())
        svi.step(X)
        before = {n: p.detach().clone() for n, p in svi.pair.named().items()}
        svi.step(X)
        moved = {n for n, p in svi.pair.named().items() if not torch.equal(p, before[n])}
        assert moved == before.keys()
        assert names is None or names == moved
        names = moved


@each_pair
@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("particles", [1, 3])
def test_value_and_gradients_are_those_of_pyro(make, loss, particles):
    if make in DISCRETE and loss is TraceMeanField_ELBO:
        particles = None
    parameters = Pair(*make())
    inspect_pair(parameters, X)
    leaves = parameters.named()
    if particles is None:
        with pytest.raises(NotImplementedError, match="reparam"):
            loss().differentiable_loss(parameters.run_model, parameters.run_guide, X)
        return
    objective = loss(
        num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1
    )
    pyro.set_rng_seed(3)
    theirs = objective.differentiable_loss(parameters.run_model, parameters.run_guide, X)
    expected = torch.autograd.grad(theirs, list(leaves.values()))
    pyro.set_rng_seed(3)
    ours = estimate(objective, parameters, X)
    found = torch.autograd.grad(ours.surrogate, list(leaves.values()))
    torch.testing.assert_close(ours.loss, theirs.detach(), rtol=1e-5, atol=1e-4)
    for name, one, other in zip(leaves, found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)


@each_pair
def test_both_estimators_of_the_elbo_agree(make):
    model, guide = make()
    a = pyrovae.elbo(model, guide, X, particles=400, seed=0)
    torch.testing.assert_close(a.elbo, a.reconstruction - a.kl)
    if make not in DISCRETE:
        b = pyrovae.elbo(model, guide, X, particles=400, seed=2, objective="trace_mean_field_elbo")
        assert abs(a.mean - b.mean) < 0.3


@pytest.mark.filterwarnings("ignore:Found plate statements in guide")
@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_scales_masks_and_auxiliary_sites_count_as_in_pyro(loss):
    model, guide = PAIRS["shipped_bernoulli"]()
    keep = torch.arange(len(X)) % 3 > 0

    def weighted(program):
        def run(x):
            with pyro.poutine.scale(scale=0.3), pyro.poutine.mask(mask=keep):
                program(x)

        return run

    def more(x):
        guide(x)
        with pyro.plate("again", len(x)):
            normal = pyro.distributions.Normal(0.0, 2.0)
            pyro.sample("side", normal.expand([len(x)]), infer={"is_auxiliary": True})

    parameters = Pair(weighted(model), weighted(more))
    objective = loss(num_particles=3)
    pyro.set_rng_seed(3)
    theirs = objective.differentiable_loss(parameters.run_model, parameters.run_guide, X)
    pyro.set_rng_seed(3)
    ours = estimate(objective, parameters, X)
    leaves = list(parameters.named().values())
    torch.testing.assert_close(ours.loss, theirs.detach(), rtol=1e-5, atol=1e-4)
    expected = torch.autograd.grad(theirs, leaves)
    for one, other in zip(torch.autograd.grad(ours.surrogate, leaves), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_standard_error_of_a_bound_is_that_of_the_mean():
    parts = torch.tensor([-3.0, -5.0, -10.0])
    found = pyrovae.objectives.elbo.ElboResult(parts, parts, torch.zeros(3))
    assert found.mean == pytest.approx(-6.0)
    assert found.standard_error == pytest.approx((13 / 3) ** 0.5)


def test_deterministic_sites_count_for_nothing():
    model, guide = PAIRS["shipped_bernoulli"]()

    def more(x):
        pyro.deterministic("weight", torch.ones(2))
        model(x)

    for call in (
        lambda model: pyrovae.elbo(model, guide, X, seed=0).elbo,
        lambda model: pyrovae.log_likelihood(model, guide, X, num_samples=9, seed=0).log_prob,
    ):
        assert torch.equal(call(more), call(model))


def test_auxiliary_sites_of_the_guide_keep_the_contract():
    model, guide = PAIRS["shipped_bernoulli"]()

    def more(x):
        with pyro.plate("data", len(x)):
            loc, log_scale = guide.encoder(x).unbind(-2)
            pyro.sample("side", pyro.distributions.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", pyro.distributions.Normal(loc, log_scale.exp()).to_event(1))

    plain = pyrovae.elbo(model, guide, X, particles=400, seed=0)
    found = pyrovae.elbo(model, more, X, particles=400, seed=0)
    entropy = 0.5 * (1 + torch.log(torch.tensor(2 * torch.pi)))
    assert abs(found.mean - plain.mean - entropy) < 0.3
