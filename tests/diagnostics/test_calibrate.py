"""Simulation-based calibration tells an exact posterior from one that is not."""

import json

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrovae
from pyrovae.diagnostics import ranks
from pyrovae.guides.linear_gaussian import LinearGaussian as ExactGuide
from pyrovae.models.linear_gaussian import LinearGaussian

LIKE = torch.zeros(1, 2)
NOISE = 1.0


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=x)


def guide(width=1.0, shift=0.0):
    """The posterior N(x / 2, 1/2), stretched and moved by so many of its standard deviations."""

    def program(x):
        scale = 0.5**0.5
        with pyro.plate("data", len(x)):
            loc = x / 2 + shift * scale
            pyro.sample("z", dist.Normal(loc, width * scale).to_event(1))

    return program


def test_p_values_and_bands_hold_what_they_state():
    generator = torch.Generator().manual_seed(0)
    sets = [torch.randint(0, 20, (100,), generator=generator) for _ in range(400)]
    found = torch.tensor([ranks.p_value(each, 19) for each in sets])
    error = (0.05 * 0.95 / 400) ** 0.5
    assert (found < 0.05).double().mean().item() == pytest.approx(0.05, abs=3 * error)
    low, high = ranks.band(100, 19, 0.05)
    shares = torch.stack([ranks.distribution(each, 19) for each in sets])
    inside = ((shares >= low) & (shares <= high)).all(1)
    assert inside.double().mean().item() == pytest.approx(0.95, abs=4 * error)
    assert torch.equal(inside, found >= 0.05)


@pytest.mark.parametrize("most", [1, 2, 4, 19])
def test_moments_of_uniform_ranks_are_standard_whatever_their_number(most):
    generator = torch.Generator().manual_seed(0)
    sets = torch.randint(0, most + 1, (2000, 500), generator=generator)
    found = torch.tensor([ranks.moments(each, most) for each in sets])
    assert found.mean(0).abs().max() < 4 / 2000**0.5
    # Two ranks lie as far from the middle.
    assert found.std(0).tolist() == pytest.approx([1.0, float(most > 1)], abs=0.07)


@pytest.mark.parametrize(
    ("make", "shape"), [(guide(width=0.3), "too narrow"), (guide(shift=0.5), "biased")]
)
def test_one_draw_for_each_datum_names_the_shape(make, shape):
    found = pyrovae.calibrate(model, make, LIKE, n=500, num_samples=1, corrected=False, seed=0)
    assert found.shape == shape, found.verdict


def test_ties_are_broken_at_random():
    torch.manual_seed(0)
    value = torch.randint(0, 2, (4000, 1)).float()
    draws = torch.randint(0, 2, (9, 4000, 1)).float()
    found = ranks.draw_ranks(draws, value)[:, 0]
    assert torch.bincount(found).tolist() == pytest.approx([400] * 10, abs=80)
    assert ranks.p_value(found, 9) > 0.01


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (guide(), "fine"),
        (guide(width=0.5), "too narrow"),
        (guide(width=2.0), "too wide"),
        (guide(shift=0.5), "biased"),
    ],
)
def test_guides_are_called_what_they_are(make, shape):
    found = pyrovae.calibrate(model, make, LIKE, n=500, seed=0)
    assert found.shape == shape, found.verdict
    assert f"is {shape}" in found.verdict
    assert found.verdict.kind == ("good" if shape == "fine" else "doubtful")
    # Weights make up for a guide whose tails are heavy enough, and not for one of half the width.
    if shape != "too narrow":
        assert found.corrected_shape == "fine", found.verdict
    assert found.ranks["z"].shape == (500, 2)
    assert found.khat.shape == (500,)
    assert min(each.min() for each in found.ranks.values()) >= 0
    assert max(each.max() for each in found.ranks.values()) == 99
    json.dumps(found.summary())


def masked(by):
    """The exact pair where the second coordinate, or the whole latent, counts for some data."""

    def site(loc, scale, mask):
        if by == "poutine":
            with pyro.poutine.mask(mask=mask.all(-1)):
                return pyro.sample("z", dist.Normal(loc, scale).to_event(1))
        return pyro.sample("z", dist.Normal(loc, scale).mask(mask).to_event(1))

    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = site(torch.zeros(2), 1.0, mask)
            z = torch.where(mask.all(-1, keepdim=True) if by == "poutine" else mask, z, 0.0)
            pyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=x)

    def guide(x, mask):
        with pyro.plate("data", len(x)):
            site(x / 2, 0.5**0.5, mask)

    return model, guide


@pytest.mark.parametrize("by", ["poutine", "distribution"])
def test_what_is_masked_is_not_ranked(by):
    mask = torch.tensor([[True, True], [True, False]]).repeat(150, 1)
    pair, options = masked(by), {"n": 300, "num_samples": 19, "corrected": False}
    found = [pyrovae.calibrate(*pair, torch.zeros(300, 2), mask, seed=s, **options)
             for s in range(4)]  # fmt: skip
    assert sum(each.shape == "fine" for each in found) >= 3
    seen = found[0].ranks["z"] >= 0
    assert torch.equal(seen, mask.all(-1, keepdim=True).expand(300, 2) if by == "poutine" else mask)
    alone = pyrovae.calibrate(*pair, torch.zeros(300, 2), mask & False, seed=0, **options)
    assert alone.shape in ("fine", "misshapen")
    assert (alone.ranks["z"] == -1).all()


@pytest.mark.parametrize("by", ["poutine", "distribution"])
def test_probabilities_of_a_masked_class_are_known(by):
    loc = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 3.0]])

    def site(fn, hidden):
        if by == "poutine":
            with pyro.poutine.mask(mask=hidden):
                return pyro.sample("y", fn)
        return pyro.sample("y", fn.mask(hidden))

    def model(x, y):
        with pyro.plate("data", len(x)):
            drawn = site(dist.Categorical(torch.ones(3) / 3), y < 0)
            found = torch.where(y < 0, drawn, y)
            pyro.sample("x", dist.Normal(loc[found], 1.0).to_event(1), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            logits = dist.Normal(loc, 1.0).to_event(1).log_prob(x[..., None, :])
            site(dist.Categorical(logits=logits), y < 0)

    y = torch.tensor([-1, -1, -1, 2]).repeat(50)
    options = {"n": 200, "num_samples": 9, "corrected": False, "seed": 0}
    found = pyrovae.calibrate(model, guide, torch.zeros(200, 2), y, **options)
    assert found.shape == "fine"
    assert found.reliability["y"].size.sum() == 3 * 150
    seen = pyrovae.diagnose(model, guide, torch.randn(200, 2), y, seed=0).sites["y"]
    assert 0.1 < seen.posterior_mean_variance.item() < 0.6


def test_an_exact_guide_is_doubted_at_the_stated_rate():
    shapes = [
        pyrovae.calibrate(
            model, guide(), LIKE, n=60, num_samples=19, corrected=False, seed=seed
        ).shape
        for seed in range(40)
    ]
    # Binomial(40, 0.05) is above 6 once in 300 times; the union bound makes it less.
    assert sum(shape != "fine" for shape in shapes) <= 6


def counting(x):
    """Three rates of Poisson counts, whose posterior is Gamma(4 + x, 2)."""
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(torch.full((3,), 4.0), 1.0).to_event(1))
        pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)


def skewed(width=1.0, shift=0.0):
    """That posterior at another width, or moved by so many of its standard deviations."""

    def program(x):
        mean, variance = (4 + x) / 2, (4 + x) / 4
        mean, variance = mean + shift * variance.sqrt(), variance * width**2
        with pyro.plate("data", len(x)):
            law = dist.Gamma(mean.square() / variance, mean / variance)
            pyro.sample("rate", law.to_event(1))

    return program


def test_skewed_posteriors_of_counts_are_called_what_they_are_at_the_stated_rate():
    like = torch.zeros(1, 3)

    def shapes(make, seeds):
        options = {"n": 100, "num_samples": 19, "corrected": False}
        return [pyrovae.calibrate(counting, make, like, seed=s, **options).shape for s in seeds]

    # As above: Binomial(40, 0.05) is above 6 once in 300 times.
    assert sum(shape != "fine" for shape in shapes(skewed(), range(40))) <= 6
    assert set(shapes(skewed(width=0.5), range(5))) == {"too narrow"}
    assert set(shapes(skewed(width=2.0), range(5))) == {"too wide"}
    assert set(shapes(skewed(shift=0.6), range(5))) == {"biased"}


@pytest.mark.parametrize(("width", "shape"), [(0.6, "too narrow"), (1.6, "too wide")])
def test_few_data_name_the_shape_that_all_coordinates_have(width, shape):
    """Functions see it before any coordinate does; they say that it is off, and not how."""
    found = [
        pyrovae.calibrate(
            model, guide(width), LIKE, n=60, num_samples=19, corrected=False, seed=seed
        ).shape
        for seed in range(12)
    ]
    assert set(found) <= {shape, "fine"}
    assert found.count(shape) >= 9


def test_a_matched_linear_gaussian_pair_is_fine():
    pyro.set_rng_seed(3)
    linear = LinearGaussian((6,), 3, scale=0.5)
    exact = ExactGuide((6,), 3).match(linear)
    found = pyrovae.calibrate(linear, exact, torch.zeros(1, 6), n=300, seed=1)
    assert (found.shape, found.corrected_shape) == ("fine", "fine")
    # All weights are equal, so that one in ten draws is taken.
    assert (found.khat < 0.7).all()


def test_correlations_that_a_guide_leaves_out_are_seen_in_the_joint():
    """z_1 and z_2 are known by their sum: marginals alone are right, together they are not."""

    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            total = z.sum(-1, keepdim=True)
            pyro.sample("x", dist.Normal(total, 0.2).to_event(1), obs=x)

    gain = 1 / (2 + 0.04)

    def marginals(x):
        with pyro.plate("data", len(x)):
            loc = (gain * x).expand(*x.shape[:-1], 2)
            pyro.sample("z", dist.Normal(loc, (1 - gain) ** 0.5).to_event(1))

    found = pyrovae.calibrate(program, marginals, torch.zeros(1, 1), n=500, corrected=False, seed=0)
    said = {test.name: test.shape for test in found.tests}
    assert said["z[0]"] == said["z[1]"] == "fine"
    assert said["ln p(z, x)"] != "fine"
    assert found.shape != "fine"


def mixture(sharpness):
    """A latent class, and its posterior with log-odds multiplied by a number."""

    def above(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Normal(2.0 * y[..., None], 1.0).to_event(1), obs=x)

    def below(x):
        levels = torch.tensor([0.0, 2.0, 4.0])
        with pyro.plate("data", len(x)):
            logits = -0.5 * (x - levels).square() * sharpness
            pyro.sample("y", dist.Categorical(logits=logits))

    return above, below


@pytest.mark.parametrize(
    ("sharpness", "shape"), [(1.0, "fine"), (3.0, "too narrow"), (0.3, "too wide")]
)
def test_probabilities_of_a_class_are_held_against_what_came_true(sharpness, shape):
    found = pyrovae.calibrate(*mixture(sharpness), torch.zeros(1, 1), n=1000, seed=0)
    said = {test.name: test.shape for test in found.tests}
    assert said["probabilities of y"] == shape
    assert (found.reliability["y"].error > 0.05) == (shape != "fine")
    assert found.shape == shape
    if sharpness <= 1:
        assert found.corrected_shape == "fine"


def test_an_exact_guide_of_dependent_discrete_latents_is_doubted_at_the_stated_rate():
    """Its probabilities are averages over draws, and what comes true comes true together."""

    def bits(x):
        c = pyro.sample("c", dist.Bernoulli(x.new_full((len(x),), 0.5)))
        probs = (0.05 + 0.9 * c)[..., None].expand(*c.shape, 8)
        pyro.sample("z", dist.Bernoulli(probs).to_event(1))

    def model(x):
        with pyro.plate("data", len(x)):
            bits(x)
            pyro.sample("x", dist.Normal(x.new_zeros(1), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            bits(x)

    how = {"like": torch.zeros(1, 1), "n": 300, "num_samples": 19, "corrected": False}
    found = [pyrovae.calibrate(model, guide, seed=seed, **how) for seed in range(10)]
    assert sum(each.reliability["z"].p_value < 0.05 for each in found) <= 2
    assert sum(each.shape != "fine" for each in found) <= 2


def test_data_reach_the_guide_with_their_context():
    def above(x, level):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(level, 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)

    def below(x, level):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x[..., 0] + level) / 2, 0.5**0.5))

    level = torch.tensor([0.0, 0.0, 30.0])
    found = pyrovae.calibrate(above, below, torch.zeros(3, 1), level, n=300, seed=1)
    assert found.shape == "fine", found.verdict


def test_the_figure_has_a_panel_for_each_set():
    figure = pyrovae.calibrate(*mixture(1.0), torch.zeros(1, 1), n=60, seed=0).plot()
    assert [axes.get_title() for axes in figure.axes] == [
        "guide", "resampled by weights", "reliability"
    ]  # fmt: skip


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="n >= 50, got 10"):
        pyrovae.calibrate(model, guide(), LIKE, n=10)

    def point(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x / 2).to_event(1))

    with pytest.raises(ValueError, match="all its mass on one point"):
        pyrovae.calibrate(model, point, LIKE, n=50)
    assert pyrovae.calibrate(model, point, LIKE, n=100, corrected=False).shape != "fine"
