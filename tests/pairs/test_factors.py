"""A factor in the guide is no density: training counts it, evaluation leaves it out."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrovae
from pyrovae.objectives import estimate
from pyrovae.pairs.pair import Pair


def _conjugate(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)


def _with_a_factor(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, 0] / 2, 0.5**0.5))
        pyro.factor("classified", torch.full((len(x),), -5.0), has_rsample=False)


def _estimates(guide, x):
    """Every number that is reported of log p(x), which the guide's posterior makes exact."""
    programs = _conjugate, guide, x
    yield pyrovae.elbo(*programs, seed=0).elbo
    yield pyrovae.elbo(*programs, particles=3, objective="trace_mean_field_elbo", seed=0).elbo
    yield pyrovae.log_likelihood(*programs, num_samples=4, seed=0).log_prob
    diagnosis = pyrovae.diagnose(*programs, seed=0)
    yield -diagnosis.rate - diagnosis.distortion


def test_a_factor_in_the_guide_is_no_part_of_q():
    x = torch.tensor([[0.5], [-1.0], [2.0]])
    exact = dist.Normal(0.0, 2.0**0.5).log_prob(x[:, 0])
    first, _, weighed, _ = _estimates(_with_a_factor, x)
    torch.testing.assert_close(first, exact)
    torch.testing.assert_close(weighed.float(), exact)

    def without(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0] / 2, 0.5**0.5))

    for ours, theirs in zip(_estimates(_with_a_factor, x), _estimates(without, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    mixed = {"num_samples": 4, "defensive": 0.5, "seed": 0}
    torch.testing.assert_close(
        pyrovae.log_likelihood(_conjugate, _with_a_factor, x, **mixed).log_prob,
        pyrovae.log_likelihood(_conjugate, without, x, **mixed).log_prob,
    )


def test_training_counts_a_factor_in_the_guide_as_pyro_does():
    x = torch.tensor([[0.5], [-1.0], [2.0]])
    loss = pyro.infer.Trace_ELBO()
    pyro.set_rng_seed(0)
    found = estimate(loss, Pair(_conjugate, _with_a_factor), x).loss
    pyro.set_rng_seed(0)
    assert found.item() == pytest.approx(loss.loss(_conjugate, _with_a_factor, x))


def test_the_check_says_of_a_factor_in_the_guide_what_becomes_of_it():
    report = pyrovae.check(_conjugate, _with_a_factor, torch.randn(6, 1))
    assert report["sites"].status == "warned"
    assert "factor classified is no density" in report["sites"].message
    assert report.passed


def test_draws_that_no_factor_weighs_are_made_with_a_warning():
    def weighed(x, moving=True):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("tilt", 3 * z if moving else torch.ones(len(x)))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    x = torch.randn(6, 1)
    with pytest.warns(UserWarning, match="'tilt' of the model changes with what is drawn"):
        pyrovae.sample(weighed, like=x, n=4)
    with pytest.warns(UserWarning, match="'tilt' of the model changes with what is drawn"):
        pyrovae.to_inference_data(weighed, _with_a_factor, x, num_samples=2, num_prior=2)
    pyrovae.to_inference_data(weighed, _with_a_factor, x, num_samples=2, num_prior=0)
    pyrovae.decode(weighed, {"z": torch.zeros(4)}, like=x)
    pyrovae.sample(lambda x: weighed(x, moving=False), like=x, n=4)
