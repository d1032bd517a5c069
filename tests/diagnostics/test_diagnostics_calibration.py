"""Intervals cover what they state, and classifiers read off what there is."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import Normals

import pyrovae
from pyrovae.diagnostics import diagnose
from pyrovae.diagnostics.calibration import LEVELS, Calibration, randomized_ranks
from pyrovae.distributions import GridCategorical
from pyrovae.guides.linear_gaussian import LinearGaussian as FullGuide
from pyrovae.models.linear_gaussian import LinearGaussian

LIKELIHOODS = {
    "normal": dist.Normal(0.3, 1.2),
    "student": dist.StudentT(3.0),
    "poisson": dist.Poisson(2.5),
    "bernoulli": dist.Bernoulli(0.2),
    "categorical": dist.Categorical(torch.tensor([0.2, 0.5, 0.3])),
    "mixture": dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([-2.0, 2.0]), 0.3)
    ),
}


@pytest.mark.parametrize("fn", LIKELIHOODS.values(), ids=LIKELIHOODS)
def test_ranks_of_draws_are_uniform(fn):
    fn = fn.expand([20_000])
    ranks = randomized_ranks(fn, fn.sample()).sort().values
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    assert (ranks - uniform).abs().max() < 1.95 / math.sqrt(20_000)


def test_grey_levels_that_differ_by_rounding_are_ties():
    fn = GridCategorical(logits=100.0 * torch.eye(256)[100]).expand([2000])
    ranks = randomized_ranks(fn, torch.full((2000,), 100 / 255 + 6e-8))
    assert ranks.std() == pytest.approx(12**-0.5, rel=0.1)


def test_a_miss_within_three_errors_is_none():
    found = Calibration((0.5, 0.9), (0.44, 0.85), (0.021, 0.016))
    assert found.off == [1]
    assert "the 90% intervals of the likelihood hold 85.0%" in found.verdict


def test_the_values_of_a_datum_count_together():
    def model(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("parts", 4, dim=-1):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    x = torch.randn(1000, 1).expand(1000, 4)
    found = diagnose(model, lambda x: None, x, seed=0).calibration
    assert found.error[0] == pytest.approx(0.5 / math.sqrt(1000), rel=0.15)


@pytest.mark.parametrize("latent", [2, 5])
def test_the_exact_posterior_is_calibrated(latent):
    """Also where there are nearly as many latents as values, which mixed intervals would not."""
    model = LinearGaussian((6,), latent, scale=0.7)
    guide = FullGuide((6,), latent).match(model)
    x = pyrovae.sample(model, like=torch.zeros(1, 6), n=1000, seed=1)
    found = diagnose(model, guide, x, seed=0).calibration
    assert found.levels == LEVELS
    for level, share, error in zip(*found, strict=True):
        assert 0 < error < 0.015
        assert abs(share - level) < 3.5 * error
    assert found.verdict.startswith("Calibration is fine")
    model.scale = torch.tensor(0.35)
    assert "too narrow" in diagnose(model, guide, x, seed=0).verdict
    model.scale = torch.tensor(1.4)
    assert "too wide" in diagnose(model, guide, x, seed=0).verdict


def test_stated_errors_of_coverage_hold_over_repeats():
    model = LinearGaussian((6,), 2, scale=0.7)
    guide = FullGuide((6,), 2).match(model)
    scores = []
    for seed in range(30):
        x = pyrovae.sample(model, like=torch.zeros(1, 6), n=100, seed=seed)
        found = diagnose(model, guide, x, num_samples=2, seed=seed).calibration
        scores.append((found.coverage[1] - 0.8) / found.error[1])
    scores = torch.tensor(scores)
    assert 0.75 < scores.std() < 1.3
    assert abs(scores.mean()) < 0.5


def test_probabilities_that_are_too_sure_are_off():
    truth = torch.tensor([-1.5, -0.5, 0.5, 1.5])

    def make(sharpness):
        def model(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=sharpness * truth).to_event(1), obs=x)

        return model

    x = torch.bernoulli(truth.sigmoid().expand(1000, 4))
    found = {s: diagnose(make(s), Normals(2), x, seed=0).calibration for s in (1.0, 4.0)}
    assert not found[1.0].off
    assert "too narrow" in found[4.0].verdict


def test_masked_values_are_left_out():
    def model(x, seen):
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=seen):
            pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)

    def guide(x, seen):
        pass

    x, seen = torch.randn(500, 3), torch.arange(500) < 400
    x[~seen] = 50.0
    found = diagnose(model, guide, x, seen, seed=0)
    assert not found.calibration.off
    assert found.calibration.error[0] == pytest.approx(0.5 / math.sqrt(1200), rel=0.3)
    assert diagnose(model, guide, x, seen, intervals=False, seed=0).calibration is None
    assert diagnose(model, guide, x, seen & False, seed=0).calibration is None


def test_entries_that_a_distribution_masks_are_left_out():
    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).mask(mask[:, :2]).to_event(1))
            loc = torch.where(mask[:, :2], z, 0.0)
            pyro.sample("x", dist.Normal(loc, 1.0).mask(mask[:, :2]).to_event(1), obs=x)

    def guide(x, mask):
        with pyro.plate("data", len(x)):
            loc = torch.where(mask[:, :2], x / 2, 9.0 * x)
            pyro.sample("z", dist.Normal(loc, 0.5**0.5).mask(mask[:, :2]).to_event(1))

    mask = torch.rand(1000, 2) < 0.6
    x = torch.where(mask, 2**0.5 * torch.randn(1000, 2), 30.0)
    found = diagnose(model, guide, x, mask, seed=0)
    assert not found.calibration.off
    assert found.calibration.error[0] == pytest.approx(0.5 / mask.sum().item() ** 0.5, rel=0.3)
    # A coordinate's mean is x / 2 where it is there, of variance 1/2.
    variance = found.sites["z"].posterior_mean_variance
    torch.testing.assert_close(variance, torch.full((2,), 0.5).double(), rtol=0.1, atol=0)
    assert "'z' is masked for some data and not for others" in found.verdict
    known = torch.tensor([[True, False]]).expand(1000, 2)
    assert 0 < diagnose(model, guide, x, known, seed=0).mutual_information < math.log(2) + 0.2


def clusters(distance):
    y = torch.arange(600) % 3
    centers = distance * torch.tensor([[1.0, 0.0], [-0.5, 0.87], [-0.5, -0.87]])
    return centers[y] + 0.3 * torch.randn(600, 2), y


def encoding(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 0.1).to_event(1))


def decoding(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x)


def test_probes_read_what_is_there_and_nothing_else():
    x, y = clusters(4.0)
    probe = diagnose(decoding, encoding, x, labels=y, seed=0).probe["z"]
    assert (probe.linear, probe.knn) == (1.0, 1.0)
    assert (probe.classes, probe.num_test) == (3, 300)
    assert probe.chance == pytest.approx(1 / 3, abs=0.07)
    x, y = clusters(0.0)
    probe = diagnose(decoding, encoding, x, labels=y, seed=0).probe["z"]
    assert max(probe.linear, probe.knn) < 0.45


def test_a_circle_is_for_neighbours_and_not_for_lines():
    angle = 2 * math.pi * torch.rand(800)
    y = (torch.arange(800) % 2).numpy()
    x = (1 + 2 * torch.as_tensor(y))[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    probe = diagnose(decoding, encoding, x, labels=y, seed=0).probe["z"]
    assert probe.knn > 0.99
    assert probe.linear < 0.7


def test_labels_that_are_no_classes_are_left_aside():
    x, _ = clusters(1.0)
    for labels in (torch.randn(600), torch.ones(600, dtype=torch.long)):
        found = diagnose(decoding, encoding, x, labels=labels, seed=0)
        assert found.probe is None
        assert "nothing was probed" in found.verdict
