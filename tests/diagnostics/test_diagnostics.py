"""Rate, distortion, units and information, against closed forms and on every kind of pair."""

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import structures
import torch
from oracles import Normals
from torch import nn

import pyrovae
from pairs import PAIRS, binary, shipped_bernoulli, shipped_gaussian
from pyrovae.diagnostics import Diagnosis, aggregate, aggregate_posterior, diagnose
from pyrovae.diagnostics.result import SiteDiagnosis
from pyrovae.distributions import GridCategorical, kl_standard_normal
from pyrovae.guides.linear_gaussian import LinearGaussian as FullGuide
from pyrovae.models.linear_gaussian import LinearGaussian

KINDS = {name: lambda make=make: (*make(), (binary(),)) for name, make in PAIRS.items()}
KINDS |= structures.MAKE
each_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def exact(n=3000, latent=2, pixels=6, scale=0.7):
    """A linear decoder, its exact posterior, and data of its own."""
    pyro.set_rng_seed(5)
    model = LinearGaussian((pixels,), latent, scale=scale)
    guide = FullGuide((pixels,), latent).match(model)
    return model, guide, pyrovae.sample(model, like=torch.zeros(1, pixels), n=n, seed=1)


def decoder(model):
    return model.decoder.layers[0].weight.double(), model.scale.double()


def prior_only(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)


class Table(nn.Module):
    """A guide that looks up what it says of a datum, by the number that is the datum."""

    def __init__(self, make, *values):
        super().__init__()
        self.make, self.values = make, values

    def forward(self, x):
        with pyro.plate("data", len(x)):
            rows = x.flatten(1)[:, 0].long()
            pyro.sample("z", self.make(*(value[rows] for value in self.values)))


def numbers(n):
    return torch.arange(n).float()[:, None].expand(n, 3)


def test_rate_and_distortion_of_the_exact_posterior():
    model, guide, x = exact(n=200)
    found = diagnose(model, guide, x, num_samples=64, intervals=False, seed=0)
    posterior, (weight, scale) = model.posterior(x.double()), decoder(model)
    cov, loc = posterior.covariance_matrix, posterior.mean
    rate = 0.5 * (cov.diagonal(dim1=1, dim2=2).sum(1) + loc.square().sum(1) - 2 - cov.logdet())
    torch.testing.assert_close(found.rate.double(), rate, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.elbo.double(), model.log_prob(x).double(), rtol=0, atol=1.5)
    miss = x - loc @ weight.mT - model.decoder.layers[0].bias
    spread = miss.square().sum(1) + (weight @ cov @ weight.mT).diagonal(dim1=1, dim2=2).sum(1)
    distortion = 3 * (2 * math.pi * scale.square()).log() + spread / (2 * scale.square())
    error = (found.distortion - distortion).std() / math.sqrt(200)
    assert abs((found.distortion - distortion).mean()) < 4 * error


def test_information_of_the_exact_posterior():
    model, guide, x = exact()
    found = diagnose(model, guide, x, intervals=False, seed=0)
    weight, scale = decoder(model)
    gram = weight.mT @ weight / scale.square()
    information = 0.5 * torch.logdet(torch.eye(2) + gram).item()
    assert 0.3 < information < 3
    error = found.mutual_information_error
    assert found.mutual_information == pytest.approx(information, abs=4 * error + 0.01)
    assert found.aggregate.upper == pytest.approx(information, abs=4 * error + 0.01)
    assert found.aggregate.upper > found.mutual_information
    assert found.marginal_kl == pytest.approx(0, abs=0.05)
    assert "2 of 2 units are active" in found.verdict
    variance = model.posterior(x.double()).mean.var(0)
    torch.testing.assert_close(found.sites["z"].posterior_mean_variance, variance.cpu())


@each_kind
def test_the_parts_add_up_for_every_kind_of_pair(make):
    model, guide, rows = make()
    found = diagnose(model, guide, *rows, num_samples=400, seed=0)
    rate = found.rate.double().mean().item()
    assert sum(site.kl_total for site in found.sites.values()) == pytest.approx(rate, abs=1e-4)
    bound = pyrovae.elbo(model, guide, *rows, particles=4000, seed=1)
    torch.testing.assert_close(found.rate, bound.kl, rtol=0.1, atol=0.4)
    assert abs((found.elbo - bound.elbo).mean()) < 0.15
    held = json.loads(json.dumps(found.summary(), allow_nan=False))
    means = {name: held[name]["mean"] for name in ("elbo", "rate", "distortion")}
    assert means["elbo"] == pytest.approx(-means["rate"] - means["distortion"], abs=1e-5)
    assert (held["remainder"] is None) == (found.aggregate is None)
    if found.aggregate:
        parts, error = found.aggregate, found.aggregate.standard_error
        error = 4 * math.hypot(error, parts.marginal_kl_error) + 0.02
        split = parts.mutual_information + parts.marginal_kl
        assert held["remainder"] == pytest.approx(rate - split, abs=1e-9)
        assert abs(held["remainder"]) < error
        assert -error < parts.mutual_information <= math.log(12)


def test_divergences_by_coordinate_are_those_of_normals():
    model, guide = shipped_bernoulli()
    x = binary(40)
    site = diagnose(model, guide, x, intervals=False, seed=0).sites["z"]
    loc, log_scale = guide.encoder(x).unbind(-2)
    each = kl_standard_normal(loc[..., None], log_scale.exp()[..., None]).double().detach()
    torch.testing.assert_close(site.kl, each.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(site.kl_standard_error, each.std(0) / 40**0.5, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(site.posterior_mean_variance, loc.detach().double().var(0))
    assert site.factorized


@pytest.mark.parametrize(
    ("prior", "posterior"),
    [
        (dist.Bernoulli(0.3), lambda p: dist.Bernoulli(p)),
        (dist.Uniform(0.0, 1.0), lambda p: dist.Beta(1 + p, 2.0)),
    ],
    ids=["bernoulli", "uniform"],
)
def test_divergences_that_may_be_infinite_take_particles(prior, posterior):
    """Torch marks where these are infinite, in the prior's shape alone."""
    x = torch.tensor([[0.1, 0.5], [0.9, 0.2], [0.6, 0.7]])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior.expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(x).to_event(1))

    expected = torch.distributions.kl_divergence(posterior(x), prior.expand([3, 2])).sum(-1)
    found = pyrovae.elbo(model, guide, x, objective="trace_mean_field_elbo", particles=5)
    torch.testing.assert_close(found.kl, expected)
    torch.testing.assert_close(pyrovae.diagnose(model, guide, x, seed=0).rate, expected)


def test_a_guide_that_ignores_the_data_has_collapsed():
    for spread, what in ((1.0, "is the prior"), (0.3, "hardly differs between data")):
        found = diagnose(prior_only, Normals(2, 0.0, spread), torch.randn(50, 3), seed=0)
        assert found.mutual_information == pytest.approx(0, abs=1e-5)
        assert found.aggregate.upper == pytest.approx(0, abs=1e-5)
        assert found.sites["z"].active_units == 0
        assert found.verdict.startswith("The posterior has collapsed: 0 of 2 units")
        assert what in found.verdict
    rate = 2 * (0.5 * (0.09 - 1) - math.log(0.3))
    assert found.marginal_kl == pytest.approx(rate, abs=0.15)


def test_scales_of_training_are_left_out():
    model, guide, x = exact(n=40)
    plain = diagnose(model, guide, x, seed=0).summary()
    scaled = (pyro.poutine.scale(each, scale=3.0) for each in (model, guide))
    assert diagnose(*scaled, x, seed=0).summary() == plain


def test_a_posterior_without_a_mean_is_averaged():
    guide = Table(lambda loc: dist.Cauchy(loc, 0.01).to_event(1), torch.randn(200, 2))
    found = diagnose(prior_only, guide, numbers(200), num_samples=64, intervals=False, seed=0)
    assert found.sites["z"].active.all()


def test_stated_errors_of_information_hold_over_repeats():
    model, guide, x = exact(n=2000)
    found = [aggregate_posterior(model, guide, x, num_draws=50, seed=seed) for seed in range(60)]
    spread = torch.tensor([each.mutual_information for each in found]).std().item()
    stated = torch.tensor([each.standard_error for each in found]).mean().item()
    assert 0.7 < spread / stated < 1.4


@pytest.mark.parametrize(("short", "capped"), [(0.9, True), (1.1, False)])
def test_information_within_a_nat_of_the_cap_is_capped(short, capped):
    parts = aggregate.Aggregate(math.log(100) - short, 0.1, 0.0, 0.1, 5.0, 100)
    assert parts.capped == capped
    nats = torch.ones(100)
    unit = SiteDiagnosis(torch.ones(1), torch.ones(1), torch.ones(1), torch.tensor([True]), True)
    found = Diagnosis(100, nats, nats, {"z": unit}, parts)
    assert found.verdict.kind == ("fair" if capped else "good")
    exact = Diagnosis(100, nats, nats, {"z": unit}, parts._replace(standard_error=2.5e-16))
    assert f"{parts.mutual_information:.3f} are information about the data" in exact.verdict


def test_an_unused_site_is_named():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
            pyro.sample("w", dist.Normal(0.1, 1.0))

    found = diagnose(model, guide, 2**0.5 * torch.randn(400), seed=0)
    assert "1 of 2 units is active (z 1 of 1, w 0 of 1): the posterior mean varies" in found.verdict
    assert "the KL of a unit is 0.005 to 0.34 nats, and less than 0.05 nats in 1" in found.verdict
    assert "Site w is unused" in found.verdict
    assert found.verdict.kind == "doubtful"
    assert found.sites["w"].kl_total == pytest.approx(0.005)


def test_the_noise_of_sampled_means_is_no_activity():
    def make(loc):
        shift = dist.transforms.AffineTransform(0.0, 1.0)
        return dist.TransformedDistribution(dist.Normal(loc, 1.0).to_event(1), [shift])

    centers = torch.stack([torch.zeros(2000), 0.5 * torch.randn(2000)], 1)
    found = diagnose(prior_only, Table(make, centers), numbers(2000), num_samples=4, seed=0)
    variance = found.sites["z"].posterior_mean_variance
    assert variance[0] < 0.03
    assert variance[1] == pytest.approx(centers[:, 1].var().item(), abs=0.04)
    once = diagnose(prior_only, Table(make, centers), numbers(2000), num_samples=64, seed=0)
    assert once.sites["z"].active.tolist() == [False, True]


@pytest.mark.parametrize("kind", [dist.Categorical, dist.OneHotCategorical])
def test_information_of_a_discrete_latent_is_the_sum_over_its_values(kind):
    logits = 2 * torch.randn(300, 4)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", kind(logits=torch.tensor([0.0, 1.0, 0.0, -1.0])))
            pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)

    def entropy(p):
        return -(p * p.log()).sum(-1)

    found = diagnose(model, Table(lambda l: kind(logits=l), logits), numbers(300), seed=0)
    q, p = logits.softmax(-1), torch.tensor([0.0, 1.0, 0.0, -1.0]).softmax(-1)
    information = (entropy(q.mean(0)) - entropy(q).mean()).item()
    assert found.mutual_information == pytest.approx(
        information, abs=4 * found.mutual_information_error
    )
    marginal = (q.mean(0) * (q.mean(0) / p).log()).sum().item()
    assert found.marginal_kl == pytest.approx(marginal, abs=4 * found.aggregate.marginal_kl_error)
    torch.testing.assert_close(found.rate, (q * (q / p).log()).sum(-1), rtol=1e-4, atol=1e-5)
    variance = found.sites["z"].posterior_mean_variance
    torch.testing.assert_close(variance, q.double().var(0).sum()[None], rtol=1e-4, atol=1e-5)


def test_separate_posteriors_reach_the_cap_and_it_is_said():
    guide = Table(lambda loc: dist.Normal(loc, 0.01).to_event(1), torch.randn(30, 2) * 5)
    found = diagnose(prior_only, guide, numbers(30), seed=0)
    assert found.mutual_information == pytest.approx(math.log(30), abs=0.05)
    assert found.mutual_information <= math.log(30)
    assert "cannot show more than ln N = 3.4 nats" in found.verdict


def test_labelled_data_have_no_information_beside_unlabelled():
    model, guide, (x, y) = structures.semi_supervised()
    found = diagnose(model, guide, x, y, seed=0)
    assert "'y' is masked for some data and not for others" in found.verdict
    assert found.summary()["mutual_information"]["mean"] is None
    with pytest.raises(ValueError, match="masked for some data"):
        aggregate_posterior(model, guide, x, y)
    probs = guide.classifier(x[y < 0]).softmax(-1).detach().double()
    variance = found.sites["y"].posterior_mean_variance
    torch.testing.assert_close(variance, probs.var(0).sum()[None], rtol=1e-4, atol=1e-8)
    known = diagnose(model, guide, x, structures.Y, seed=0)
    assert known.sites["y"].kl_total == 0
    assert known.aggregate is not None


def test_guides_that_cannot_score_are_refused_in_words():
    point = Table(lambda loc: dist.Delta(loc).to_event(1), torch.randn(20, 2))
    with pytest.raises(ValueError, match="cannot score latents that it did not draw"):
        aggregate_posterior(prior_only, point, numbers(20))
    found = diagnose(prior_only, point, numbers(20), seed=0)
    assert math.isnan(found.mutual_information)
    assert "cannot score latents" in found.verdict


@pytest.mark.parametrize("likelihood", ["grid", "categorical"])
def test_bits_of_a_uniform_choice_of_256_levels(likelihood):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            logits = torch.zeros(5, levels)
            kind = GridCategorical if likelihood == "grid" else dist.Categorical
            pyro.sample("x", kind(logits=logits).to_event(1), obs=x)

    levels = 256
    x = torch.randint(0, 256, (30, 5)).float()
    x = x / 255 if likelihood == "grid" else x
    found = diagnose(model, Normals(2), x, seed=0)
    assert found.bits_per_dimension == pytest.approx(8)
    levels = 255
    x = x.clamp(max=254 / 255) * 255 / 254 if likelihood == "grid" else x.clamp(max=254)
    x = (x * 254).round() / 254 if likelihood == "grid" else x
    assert diagnose(model, Normals(2), x, seed=0).bits_per_dimension is None


@pytest.mark.parametrize("size", [10, 5])
def test_bits_of_a_part_of_the_values_count_all_of_them(size):
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("values", 10, subsample_size=size, dim=-1) as part:
                pyro.sample("x", dist.Categorical(logits=torch.zeros(256)), obs=x[:, part])

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0))

    x = torch.randint(0, 256, (30, 10)).float()
    assert diagnose(model, guide, x, seed=0).bits_per_dimension == pytest.approx(8)


def test_draws_follow_the_seed_and_leave_the_pair_as_it_was():
    model, guide = shipped_gaussian()
    guide.eval()
    x, state = binary(), torch.get_rng_state()
    a, b, c = (diagnose(model, guide, x, seed=s).summary() for s in (0, 0, 1))
    assert a == b
    assert a["distortion"] != c["distortion"]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not guide.training


def test_tiles_do_not_show(monkeypatch):
    model, guide, x = exact(n=50)
    whole = aggregate_posterior(model, guide, x, seed=0)
    monkeypatch.setattr(aggregate, "PAIRS", aggregate.PAIRS // aggregate.DATA * 7)
    monkeypatch.setattr(aggregate, "DATA", 7)
    parts = aggregate_posterior(model, guide, x, seed=0)
    assert tuple(parts) == pytest.approx(tuple(whole), rel=1e-5)


def test_bad_input_is_refused():
    model, guide = shipped_bernoulli()
    x = binary()
    with pytest.raises(ValueError, match="at least two data points"):
        diagnose(model, guide, x[:1])
    with pytest.raises(ValueError, match="num_samples >= 2"):
        diagnose(model, guide, x, num_samples=1)
    with pytest.raises(ValueError, match="a label for each of 12 data points"):
        diagnose(model, guide, x, labels=torch.zeros(3))
    with torch.no_grad():
        guide.encoder.layers[0].weight.fill_(math.nan)
    with pytest.raises(ValueError, match="Expected parameter loc of Normal"):
        diagnose(model, guide, x)
