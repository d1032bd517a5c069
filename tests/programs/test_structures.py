"""What every structure has beside the laws of all pairs: its latents, and a bound that sums."""

import pytest
from structures import LATENTS, MAKE, X, objective

import pyrovae
from pyrovae.objectives import estimate
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.pair import Pair

each = pytest.mark.parametrize("name", MAKE)


@each
def test_the_contract_holds(name):
    model, guide, args = MAKE[name]()
    layout = inspect_pair(Pair(model, guide), *args)
    assert layout.latents == LATENTS[name]
    assert "x" in layout.observed
    assert layout.enumerated == ()


@each
def test_the_bound_is_below_the_likelihood(name):
    model, guide, args = MAKE[name]()
    bound = pyrovae.elbo(model, guide, *args, particles=200, seed=0)
    ll = pyrovae.log_likelihood(model, guide, *args, num_samples=2000, seed=1)
    assert bound.mean <= ll.mean + 3 * ll.mean_standard_error
    many = objective(name, num_particles=200, vectorize_particles=True)
    trained = -estimate(many, Pair(model, guide), *args).loss.item() / len(X)
    assert trained <= ll.mean + 3 * ll.mean_standard_error
    assert trained == pytest.approx(bound.mean, abs=1.0)
