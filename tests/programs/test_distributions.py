"""Distributions on a grid are distributions: masses sum to one, and draws follow them."""

import math

import pyro.distributions as dist
import pytest
import torch
from scipy.stats import chi2

from pyrovae.distributions import DiscretizedLogistic, Grid, GridCategorical

LEVELS = 17


def categorical(dtype=torch.float64):
    logits = torch.randn(3, LEVELS, generator=torch.Generator().manual_seed(2)).to(dtype)
    return GridCategorical(2 * logits)


def logistic(dtype=torch.float64):
    """In the middle, at both ends, beyond them, narrower than a step, wider than the grid."""
    loc = torch.tensor([0.4, 0.0, 1.0, -0.7, 1.3, 0.53, 0.5], dtype=dtype)
    scale = torch.tensor([0.1, 0.05, 0.2, 0.3, 0.1, 1e-3, 40.0], dtype=dtype)
    return DiscretizedLogistic(loc, scale, LEVELS)


def mixture(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    logits, loc = torch.randn(2, 3, 4, generator=generator).to(dtype)
    logistics = DiscretizedLogistic(loc, torch.tensor(0.08, dtype=dtype), LEVELS)
    return dist.MixtureSameFamily(dist.Categorical(logits=logits), logistics)


MAKE = {"categorical": categorical, "logistic": logistic, "mixture": mixture}
each = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def masses(d):
    """Every level and its mass, ``[L, 1]`` and ``[L, B]``."""
    values = torch.arange(LEVELS, dtype=torch.float64)[:, None] / (LEVELS - 1)
    return values, d.log_prob(values).exp()


@each
def test_masses_sum_to_one(make):
    _, mass = masses(make())
    torch.testing.assert_close(mass.sum(0), torch.ones_like(mass[0]), rtol=0, atol=1e-12)


@each
def test_mean_and_variance_are_those_of_the_masses(make):
    d = make()
    values, mass = masses(d)
    mean = (mass * values).sum(0)
    torch.testing.assert_close(d.mean, mean, rtol=0, atol=1e-12)
    spread = (mass * (values - mean).square()).sum(0)
    torch.testing.assert_close(d.variance, spread, rtol=0, atol=1e-12)


@each
def test_draws_follow_the_masses(make):
    d, n = make(), 4000
    torch.manual_seed(5)
    drawn = d.sample((n,))
    assert bool(Grid(LEVELS).check(drawn).all())
    values, mass = masses(d)
    count = (drawn.unsqueeze(0) == values.unsqueeze(1)).sum(1)
    assert bool((count.sum(0) == n).all())
    for found, expected in zip(count.T, n * mass.T, strict=True):
        common = expected > 5
        assert found[~common].sum() < 10 + 5 * expected[~common].sum()
        if common.sum() > 1:
            statistic = ((found - expected).square() / expected)[common].sum().item()
            assert statistic < chi2.ppf(1 - 1e-4, int(common.sum()))


@each
def test_float32_holds_the_masses(make):
    values, _ = masses(make())
    exact = make().log_prob(values)
    found = make(torch.float32).log_prob(values.float()).double()
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


@each
def test_particles_and_data_broadcast(make):
    d = make()
    x = d.sample((5, 4))
    whole = d.expand((4, *d.batch_shape)).log_prob(x)
    assert whole.shape == x.shape
    torch.testing.assert_close(whole[3, 2], d.log_prob(x[3, 2]))
    assert d.expand((4, *d.batch_shape)).sample((5,)).shape == x.shape


@each
def test_values_off_the_grid_are_refused(make):
    d, inside = make(), torch.tensor([0.0, 3 / 16, 1.0], dtype=torch.float64)
    outside = torch.tensor([-1 / 16, 0.2, 17 / 16, math.nan, math.inf], dtype=torch.float64)
    column = (slice(None), *[None] * len(d.batch_shape))
    assert bool(d.support.check(inside[column].expand(-1, *d.batch_shape)).all())
    assert not bool(d.support.check(outside[column].expand(-1, *d.batch_shape)).any())
    with pytest.raises(ValueError, match="support"):
        d.log_prob(outside[column])


def test_bytes_are_on_the_grid_of_256_levels_and_of_no_other():
    pixels = torch.arange(256, dtype=torch.uint8).float() / 255
    assert bool(Grid(256).check(pixels).all())
    assert bool(Grid(256).check(pixels.double()).all())
    assert torch.equal(Grid(256).index(pixels), torch.arange(256.0))
    torch.testing.assert_close(Grid(256).values(pixels), pixels, rtol=0, atol=1e-7)
    assert int(Grid(255).check(pixels).sum()) == 2
    with pytest.raises(ValueError, match="levels >= 2"):
        Grid(1)


def test_the_logistic_is_a_difference_of_distribution_functions():
    d, half = logistic(), 0.5 / (LEVELS - 1)
    values, mass = masses(d)
    smooth = dist.Logistic(d.loc, d.scale)
    low = torch.where(values > 0, smooth.cdf(values - half), torch.zeros(7).double())
    high = torch.where(values < 1, smooth.cdf(values + half), torch.ones(7).double())
    torch.testing.assert_close(mass, high - low, rtol=1e-9, atol=1e-12)


def test_the_categorical_is_that_of_the_levels_numbers():
    d = categorical()
    index = torch.arange(LEVELS)[:, None]
    expected = dist.Categorical(logits=d.logits).log_prob(index)
    torch.testing.assert_close(d.log_prob(index.double() / (LEVELS - 1)), expected)


def test_log_mass_and_gradient_are_finite_however_far_off():
    loc = torch.tensor([-50.0, 50.0, 0.0, 1.0, 0.3]).requires_grad_()
    scale = torch.full((5,), 1e-4).requires_grad_()
    x = torch.tensor([0.0, 1.0, 100 / 255])[:, None]
    value = DiscretizedLogistic(loc, scale).log_prob(x)
    value.sum().backward()
    assert bool(value.isfinite().all())
    assert bool(loc.grad.isfinite().all())
    assert bool(scale.grad.isfinite().all())
    torch.testing.assert_close(value[0, 0].detach(), torch.tensor(0.0))


def test_a_uniform_image_takes_eight_bits_a_pixel():
    x = torch.randint(256, (2, 28, 28)) / 255
    log_prob = GridCategorical(torch.zeros(28, 28, 256)).to_event(2).log_prob(x)
    torch.testing.assert_close(-log_prob / (28 * 28 * math.log(2)), torch.full((2,), 8.0))
