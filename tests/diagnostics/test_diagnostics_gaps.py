"""Gaps, curves and distances whose values are known."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrovae
from pairs import SHAPE, binary, functions, shipped_bernoulli
from pyrovae.diagnostics import inference_gaps, rate_distortion_curve, sample_distances
from pyrovae.guides.linear_gaussian import LinearGaussian as FullGuide
from pyrovae.models.linear_gaussian import LinearGaussian


class Off(FullGuide):
    """The best product of normals, moved by so many of its standard deviations."""

    def __init__(self, model, shift):
        super().__init__(model.decoder.out_shape, model.decoder.in_shape[0])
        self.match(model)
        precision = torch.linalg.inv(self.scale_tril @ self.scale_tril.mT).detach()
        self.spread, self.shift = precision.diagonal().rsqrt(), shift
        product = precision.diagonal().log().sum()
        self.approximation = 0.5 * (product - precision.logdet()).item()
        delta = shift * self.spread
        self.amortization = 0.5 * (delta @ precision @ delta).item()

    def forward(self, x):
        with pyro.plate("data", len(x)):
            loc = self.encoder(x) + self.shift * self.spread
            pyro.sample("z", dist.Normal(loc, self.spread).to_event(1))


def test_gaps_of_a_linear_decoder():
    model = LinearGaussian((8,), 3, scale=0.4)
    x = pyrovae.sample(model, like=torch.zeros(1, 8), n=64, seed=1)
    guide = Off(model, 0.5)
    assert guide.approximation > 0.05
    found = inference_gaps(model, guide, x, num_samples=2000, seed=0)
    error = 4 * found.amortization_standard_error + 0.01
    assert found.amortization_mean == pytest.approx(guide.amortization, abs=error)
    error = 4 * found.approximation_standard_error + 0.01
    assert found.approximation_mean == pytest.approx(guide.approximation, abs=error)
    total = model.log_prob(x).double().mean() - pyrovae.elbo(model, guide, x, particles=500).mean
    assert found.total.mean().item() == pytest.approx(total.item(), abs=0.1)
    assert "because the guide is amortized" in found.verdict


def test_a_better_estimate_of_the_evidence_is_taken():
    model = LinearGaussian((8,), 3, scale=0.4)
    x = pyrovae.sample(model, like=torch.zeros(1, 8), n=16, seed=1)
    guide = Off(model, 0.5)
    ll = pyrovae.log_likelihood(model, FullGuide((8,), 3).match(model), x, num_samples=10, seed=0)
    found = inference_gaps(model, guide, x, num_samples=200, log_prob=ll, seed=0)
    own = inference_gaps(model, guide, x, num_samples=200, seed=0)
    moved = found.approximation - own.approximation
    torch.testing.assert_close(moved, ll.log_prob - own.log_prob.log_prob)
    assert found.log_prob is ll
    with pytest.raises(ValueError, match="of the same 16 data"):
        inference_gaps(model, guide, x + 1, num_samples=10, refine_steps=1, log_prob=ll)
    with pytest.raises(ValueError, match="refine_steps >= 1"):
        inference_gaps(model, guide, x, refine_steps=0)


@pytest.mark.parametrize("make", [shipped_bernoulli, functions])
def test_the_rate_falls_with_beta_and_the_pair_stays_as_it_was(make):
    model, guide = make()
    x = torch.zeros(200, *SHAPE)
    x[::2] = 1.0
    parameters = pyrovae.training.svi.Pair(model, guide)
    pyrovae.elbo(model, guide, x[:4])
    before = parameters.state_dict()
    betas = (0.1, 1.0, 30.0)
    how = {"epochs": 25, "lr": 0.02, "batch_size": 50, "compile": False}
    found = rate_distortion_curve(model, guide, x, betas, seed=0, **how)
    assert tuple(point.beta for point in found) == betas
    rates = [point.rate for point in found]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > math.log(2) > 0.5 > rates[-1]
    assert [p.distortion for p in found] == sorted(p.distortion for p in found)
    for point in found:
        assert point.elbo == pytest.approx(-point.rate - point.distortion, abs=1e-5)
        assert point.elbo_error > 0
    after = parameters.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    again = rate_distortion_curve(model, guide, x, betas[1:2], seed=0, **how)
    assert again[0] == pytest.approx(found[1])


def test_points_of_a_curve_are_means_over_data_with_their_errors():
    model, guide = shipped_bernoulli()
    x = binary(60)
    how = {"epochs": 1, "lr": 1e-12, "batch_size": 60, "compile": False, "seed": 0}
    (point,) = rate_distortion_curve(model, guide, x, [2.0], **how)
    bound = pyrovae.elbo(model, guide, x, objective="trace_mean_field_elbo", particles=200, seed=1)
    for name, each in (("rate", bound.kl), ("distortion", -bound.reconstruction)):
        assert getattr(point, name) == pytest.approx(each.mean().item(), rel=0.05)
        error = each.std().item() / math.sqrt(60)
        assert getattr(point, f"{name}_error") == pytest.approx(error, rel=0.2)


def test_curves_of_nothing_are_refused():
    model, guide = shipped_bernoulli()
    with pytest.raises(ValueError, match="Expected a β at least"):
        rate_distortion_curve(model, guide, binary(), [], epochs=1)
    with pytest.raises(ValueError, match="beta >= 0"):
        rate_distortion_curve(model, guide, binary(), [-1.0], epochs=1)
    with pytest.raises(ValueError, match="Expected no objective"):
        rate_distortion_curve(model, guide, binary(), [1.0], epochs=1, objective="iwae")
    adam = torch.optim.Adam([*model.parameters(), *guide.parameters()])
    with pytest.raises(ValueError, match="carry its state from one β to the next"):
        rate_distortion_curve(model, guide, binary(), [1.0, 2.0], epochs=1, optimizer=adam)


def normals(n, size, seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    loc = torch.randn(size, generator=generator, dtype=torch.float64)
    return loc + torch.randn(n, size, generator=generator, dtype=torch.float64) @ root


def test_the_distance_of_normals_with_known_moments():
    from scipy.linalg import sqrtm

    a, b = normals(60, 4, 0), normals(50, 4, 1)
    (m, s), (n, t) = ((x.mean(0), x.T.cov()) for x in (a, b))
    root = torch.as_tensor(sqrtm((s @ t).numpy()).real)
    expected = (m - n).square().sum() + torch.trace(s + t - 2 * root)
    assert sample_distances(a, b).frechet == pytest.approx(expected.item(), rel=1e-8)
    assert sample_distances(b, a).frechet == pytest.approx(expected.item(), rel=1e-8)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(s), (a - m).T, upper=False).T
    scaled = 3 * white + torch.tensor([1.0, 2.0, 0.0, 0.0])
    assert sample_distances(white, scaled).frechet == pytest.approx(5 + 4 * 4)


def test_singular_covariances_are_no_trouble():
    few, line = normals(8, 40, 0), normals(20, 1, 1) * torch.ones(40)
    assert sample_distances(few, few).frechet == pytest.approx(0, abs=1e-10)
    assert sample_distances(line, line + 2).frechet == pytest.approx(160)
    assert sample_distances(line, 3 * line - 2 * line.mean(0)).frechet == pytest.approx(
        40 * 4 * line[:, 0].var().item()
    )
    same = torch.ones(20, 3)
    found = sample_distances(same, same)
    assert found == (0.0, 1.0, 1.0, 20, 20, 5)


def test_precision_and_recall_at_the_extremes():
    x = torch.rand(200, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert sample_distances(x, x.clone())[:3] == pytest.approx((0.0, 1.0, 1.0), abs=1e-8)
    assert sample_distances(x, x + 100)[1:3] == (0.0, 0.0)
    half = sample_distances(torch.cat([x, x + 100]), x)
    assert (half.precision, half.recall) == (1.0, 0.5)
    wide = sample_distances(x, torch.cat([x, x + 100]))
    assert (wide.precision, wide.recall) == (0.5, 1.0)


def test_balls_reach_to_the_kth_neighbour():
    """Points 0, 1, 3, 7: radii for k = 1 are 1, 1, 2, 4; for k = 2 they are 3, 2, 3, 6."""
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    probes = torch.tensor([[-1.0], [-1.5], [-3.0], [-3.5], [11.0], [11.5], [13.1], [5.2]])
    assert sample_distances(x, probes, k=1).precision == 3 / 8
    assert sample_distances(x, probes, k=2).precision == 6 / 8


def test_features_are_what_is_compared():
    x = torch.rand(100, 1, 4, 4)
    y = x.flip(0) + torch.tensor([0.0, 50.0, 0.0, 0.0])
    first = sample_distances(x, y, features=lambda v: v[:, 0, :, 0])
    assert first[:3] == pytest.approx((0.0, 1.0, 1.0), abs=1e-10)
    assert sample_distances(x, y).precision == 0.0


def test_bad_samples_are_refused():
    x = torch.rand(10, 3)
    with pytest.raises(ValueError, match="features of one size"):
        sample_distances(x, torch.rand(10, 4))
    with pytest.raises(ValueError, match="Expected 1 <= k <"):
        sample_distances(x, x[:5])
    with pytest.raises(ValueError, match="finite features"):
        sample_distances(x, x / 0)
