"""What ArviZ is given equals what is computed directly, on any pair, and comes back from a file."""

import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import linear_gaussian
from scipy import stats
from structures import MAKE, PARTLY, Y, conditional, gmvae, semi_supervised
from torch import nn

import pyrovae
from pairs import PAIRS, binary, discrete, shipped_bernoulli, two_latents
from pyrovae.guides.linear_gaussian import LinearGaussian as FullGuide
from pyrovae.inference_data import _resampled, load, loo, save, to_inference_data
from pyrovae.models.linear_gaussian import LinearGaussian

X = binary()
EVERY = {name: lambda make=make: (*make(), (X,)) for name, make in PAIRS.items()} | MAKE
pytestmark = pytest.mark.filterwarnings(
    "ignore:Passing a dict or None as alias_mapping",
    "ignore:The inplace keyword in DataFrame.sort_values",
    "ignore:This plot always uses the `observed_data` group",
)


class Parts(nn.Module):
    """A batch whose data have three parts each, in a plate right of the data's."""

    def __init__(self, encodes):
        super().__init__()
        self.encodes = encodes

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-2):
            scale = 0.5 if self.encodes else 1.0
            z = pyro.sample("z", dist.Normal(0.0, scale))
            with pyro.plate("parts", 3, dim=-1):
                w = pyro.sample("w", dist.Normal(torch.zeros(2), scale).to_event(1))
                if not self.encodes:
                    pyro.sample("x", dist.Normal(z + w.sum(-1), 1.0), obs=x)


class Summed(nn.Module):
    """A component that the model sums over, and a shift that the guide draws."""

    def __init__(self, encodes):
        super().__init__()
        self.encodes = encodes
        self.register_buffer("loc", torch.tensor([-1.0, 0.5, 2.0]))
        self.register_buffer("share", torch.tensor([0.2, 0.5, 0.3]))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.3 if self.encodes else 1.0))
            if not self.encodes:
                where = {"enumerate": "parallel"}
                y = pyro.sample("y", dist.Categorical(self.share), infer=where)
                pyro.sample("x", dist.Normal(self.loc[y] + z, 0.5), obs=x)

    def posterior(self, x):
        """p(y | x), [N, 3]."""
        each = dist.Normal(self.loc, math.sqrt(1.25)).log_prob(x[:, None]) + self.share.log()
        return each.softmax(1)


def tensor(idata, group, name):
    """A variable, without its chain."""
    values = torch.as_tensor(idata[group][name].values)
    return values if group.endswith("_data") else values[0]


def weights(idata):
    """Normalized weights ``[K, N]``."""
    return tensor(idata, "sample_stats", "log_weight").softmax(0)


def groups(idata):
    return sorted(idata.children) if hasattr(idata, "children") else sorted(idata.groups())


def dataset(idata, group):
    node = idata[group]
    return node.to_dataset() if hasattr(node, "to_dataset") else node


@pytest.fixture(scope="module")
def linear():
    model, guide, x, _ = linear_gaussian(n=100)
    return model, guide, x, to_inference_data(model, guide, x, num_samples=300, seed=3)


@pytest.mark.parametrize("name", EVERY)
def test_weights_are_those_of_log_likelihood_for_any_pair(name):
    model, guide, rows = EVERY[name]()
    idata = to_inference_data(model, guide, *rows, num_samples=40, num_prior=3, seed=1)
    found = tensor(idata, "sample_stats", "log_weight").logsumexp(0) - math.log(40)
    expected = pyrovae.log_likelihood(model, guide, *rows, num_samples=40, seed=1)
    torch.testing.assert_close(found, expected.log_prob, atol=1e-5, rtol=0)
    for each in ("log_prob", "standard_error", "ess", "khat", "smoothed"):
        held = torch.as_tensor(idata["sample_stats"][each].values)
        torch.testing.assert_close(held, getattr(expected, each), equal_nan=True)
    latents, observed = set(idata["posterior"].data_vars), set(idata["observed_data"].data_vars)
    assert latents == set(idata["prior"].data_vars)
    assert observed == set(idata["prior_predictive"].data_vars)
    for group, names in (("posterior", latents), ("posterior_predictive", observed)):
        for each in names:
            other = "prior" if group == "posterior" else "observed_data"
            held, known = idata[group][each], idata[other][each]
            assert held.dims[:3] == ("chain", "draw", "datum")
            assert held.shape[2:] == known.shape[known.dims.index("datum") :]


def test_draws_do_not_depend_on_the_tiles_and_cross_them(linear):
    model, guide, x, idata = linear
    found = tensor(idata, "sample_stats", "log_weight").logsumexp(0) - math.log(300)
    expected = pyrovae.log_likelihood(model, guide, x, num_samples=300, seed=3).log_prob
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    fewer = to_inference_data(model, guide, x[:70], num_samples=20, num_prior=0, seed=3)
    assert np.array_equal(fewer["posterior"].z[0], idata["posterior"].z[0, :20, :70])


def test_densities_are_those_of_the_programs(linear):
    model, guide, x, idata = linear
    z = tensor(idata, "posterior", "z")
    likelihood = dist.Normal(model.decoder(z), model.scale).log_prob(x).sum(-1)
    prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    q = dist.MultivariateNormal(guide.encoder(x), scale_tril=guide.scale_tril).log_prob(z)
    given = {"atol": 1e-4, "rtol": 0, "check_dtype": False}
    held = tensor(idata, "log_likelihood", "x")
    torch.testing.assert_close(held, likelihood.detach(), **given)
    ratio = tensor(idata, "sample_stats", "log_weight") - held
    torch.testing.assert_close(ratio, (prior - q).detach(), **given)
    assert torch.equal(tensor(idata, "observed_data", "x"), x)


@pytest.mark.parametrize("resample", [False, True])
def test_weighted_draws_have_the_moments_of_the_posterior(resample):
    model, guide, x, _ = linear_gaussian(n=20)
    options = {"num_samples": 4000, "num_prior": 0, "seed": 0, "resample": resample}
    idata = to_inference_data(model, guide, x, **options)
    z, w = tensor(idata, "posterior", "z").double(), weights(idata)[..., None]
    exact = model.posterior(x)
    mean = (w * z).sum(0)
    variance = (w * (z - mean).square()).sum(0)
    z_scores = (mean - exact.mean) / (exact.variance / 2000).sqrt()
    assert z_scores.abs().max() < 4.5
    assert z_scores.square().mean() > 0.1
    torch.testing.assert_close(variance, exact.variance.double(), rtol=0.15, atol=0)
    plain = (z.mean(0) - exact.mean) / (exact.variance / 2000).sqrt()
    assert (plain.abs().max() < 4.5) == resample


def test_resampled_draws_weigh_what_all_did():
    model, guide, x, _ = linear_gaussian(n=70)
    options = {"num_samples": 200, "num_prior": 0, "seed": 4}
    proposed = to_inference_data(model, guide, x, **options)
    kept = to_inference_data(model, guide, x, **options, resample=True)
    held = tensor(kept, "sample_stats", "log_weight")
    average = tensor(proposed, "sample_stats", "log_weight").logsumexp(0) - math.log(200)
    torch.testing.assert_close(held, average.expand(200, 70))
    z, old, w = (
        tensor(kept, "posterior", "z"),
        tensor(proposed, "posterior", "z"),
        weights(proposed),
    )
    counts = (z[:, None] == old).all(-1).sum(0)
    assert torch.equal(counts.sum(0), torch.full((70,), 200))
    assert ((counts - 200 * w).abs() < 1).all()
    same = (z[:, None] == old).all(-1).double().argmax(1)
    scores = tensor(proposed, "log_likelihood", "x").gather(0, same)
    assert torch.equal(tensor(kept, "log_likelihood", "x"), scores)
    assert kept["posterior"].attrs["description"] != proposed["posterior"].attrs["description"]


def test_systematic_resampling_is_unbiased_and_keeps_to_the_weights():
    log_weight = torch.tensor([0.1, 0.45, 0.05, 0.4]).log()[:, None].expand(4, 5000)
    index = _resampled(log_weight)
    counts = torch.stack([(index == k).sum(0) for k in range(4)]).double()
    expected = 4 * log_weight.exp().double()
    assert ((counts - expected).abs() < 1).all()
    error = counts.std(1) / math.sqrt(5000)
    assert ((counts.mean(1) - expected[:, 0]).abs() < 4 * error).all()
    first = torch.stack([(index[0] == k).double().mean() for k in range(4)])
    torch.testing.assert_close(first, expected[:, 0] / 4, atol=0.03, rtol=0)
    impossible = _resampled(torch.full((4, 3), -math.inf))
    assert torch.equal(impossible.sort(0).values, torch.arange(4)[:, None].expand(4, 3))


def test_predictions_have_the_moments_of_the_model():
    model, _, x, _ = linear_gaussian(n=40, pixels=6)
    guide = FullGuide((6,), 4).match(model)
    idata = to_inference_data(model, guide, x, num_samples=2000, num_prior=500, seed=0)
    w, b = (p.detach() for p in (model.decoder.layers[0].weight, model.decoder.layers[0].bias))
    noise, exact = model.scale.detach().square(), model.posterior(x)
    mean, variance = (
        model.decoder(exact.mean),
        (w @ exact.covariance_matrix @ w.mT).diagonal(0, 1, 2),
    )
    drawn = tensor(idata, "posterior_predictive", "x")
    error = ((variance + noise) / 2000).sqrt()
    assert ((drawn.mean(0) - mean) / error).abs().max() < 4.5
    torch.testing.assert_close(drawn.var(0), (variance + noise).detach(), rtol=0.2, atol=0)
    imagined = tensor(idata, "prior_predictive", "x").flatten(0, 1)
    cov = w @ w.mT + noise * torch.eye(6)
    assert ((imagined.mean(0) - b) / (cov.diagonal() / len(imagined)).sqrt()).abs().max() < 4.5
    torch.testing.assert_close(imagined.T.cov(), cov, atol=0.1, rtol=0)
    z = tensor(idata, "prior", "z").flatten(0, 1)
    assert stats.kstest(z[:, 0], "norm").pvalue > 0.01
    again = dist.Normal(model.decoder(tensor(idata, "prior", "z")), model.scale)
    residual = (tensor(idata, "prior_predictive", "x") - again.mean.detach()) / model.scale.detach()
    assert stats.kstest(residual.flatten()[:5000], "norm").pvalue > 0.01


def test_what_the_model_sums_over_is_drawn_from_its_posterior():
    model, guide, x = Summed(False), Summed(True), torch.linspace(-2, 3, 9)
    idata = to_inference_data(model, guide, x, num_samples=6000, num_prior=100, seed=0)
    y, w, exact = tensor(idata, "posterior", "y"), weights(idata), model.posterior(x)
    share = torch.stack([(w * (y == k)).sum(0) for k in range(3)], 1)
    error = (exact * (1 - exact) * w.square().sum(0)[:, None]).sqrt()
    assert ((share - exact).abs() < 4.5 * error).all()
    joint = (w * tensor(idata, "posterior", "z")).sum(0) + (w * model.loc[y]).sum(0)
    slope = 1 / 1.25
    per_component = model.loc + slope * (x[:, None] - model.loc)
    assert ((joint - (exact * per_component).sum(1)).abs() < 0.1).all()
    residual = tensor(idata, "posterior_predictive", "x") - model.loc[y]
    residual = (residual - tensor(idata, "posterior", "z")) / 0.5
    assert stats.kstest(residual.flatten()[:5000], "norm").pvalue > 0.01


def test_plates_within_a_datum_are_dimensions_of_its_sites_alone():
    x = torch.randn(5, 3)
    idata = to_inference_data(Parts(False), Parts(True), x, num_samples=30, num_prior=4, seed=0)
    assert idata["posterior"].z.dims == ("chain", "draw", "datum")
    assert idata["posterior"].w.sizes["w_dim_0"] == 3
    assert idata["posterior"].w.sizes["w_dim_1"] == 2
    z, w = tensor(idata, "posterior", "z"), tensor(idata, "posterior", "w")
    exact = dist.Normal(z[..., None] + w.sum(-1), 1.0).log_prob(x).sum(-1).double()
    torch.testing.assert_close(tensor(idata, "log_likelihood", "x"), exact, atol=1e-5, rtol=0)
    assert torch.equal(tensor(idata, "observed_data", "x"), x)


def test_each_observed_site_has_its_own_likelihood():
    model, guide = two_latents()
    idata = to_inference_data(model, guide, X, num_samples=30, num_prior=0, seed=0)
    top = tensor(idata, "posterior", "top")
    total = X.flatten(1).sum(-1)
    exact = dist.Normal(top.sum(-1), 5.0).log_prob(total).double()
    torch.testing.assert_close(tensor(idata, "log_likelihood", "total"), exact)
    exact = dist.Bernoulli(logits=model.net(tensor(idata, "posterior", "low"))).log_prob(X)
    held = tensor(idata, "log_likelihood", "x")
    exact = exact.flatten(2).sum(-1).detach().double()
    torch.testing.assert_close(held, exact, atol=1e-5, rtol=0)
    assert "prior" not in groups(idata)


def test_a_latent_that_a_datum_lacks_is_missing_there():
    model, guide, rows = semi_supervised()
    idata = to_inference_data(model, guide, *rows, num_samples=20, num_prior=5, seed=0)
    for group in ("posterior", "prior"):
        y = tensor(idata, group, "y")
        assert torch.equal(y.isnan(), (PARTLY >= 0).expand_as(y))
        assert set(y[:, PARTLY < 0].unique().tolist()) <= {0.0, 1.0, 2.0}
    assert torch.equal(tensor(idata, "constant_data", "y"), PARTLY)
    z = tensor(idata, "log_likelihood", "label_")
    torch.testing.assert_close(z[0, :7], torch.full((7,), -math.log(3)).double())


def test_what_a_distribution_masks_is_missing_there():
    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).mask(mask[:, :2]).to_event(1))
            logits = torch.where(mask[:, :2], z, 0.0).sum(-1, keepdim=True)
            logits = logits.expand(*z.shape[:-1], 3)
            pyro.sample("x", dist.Bernoulli(logits=logits).mask(mask).to_event(1), obs=x)

    def guide(x, mask):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).mask(mask[:, :2]).to_event(1))

    mask = torch.tensor([[True, True, False], [True, False, True]])
    x = torch.ones(2, 3)
    found = to_inference_data(model, guide, x, mask, num_samples=4, num_prior=3, seed=0)
    for group, draws in (("posterior", 4), ("prior", 3)):
        z = found[group].z.values[0]
        assert z.shape == (draws, 2, 2)
        assert (np.isnan(z) == ~mask[:, :2].numpy()).all()
    observed = found["observed_data"].x.values
    assert (np.isnan(observed) == ~mask.numpy()).all()
    assert not np.isnan(found["posterior_predictive"].x.values).any()


def test_values_that_count_are_integers():
    model, guide = discrete()
    idata = to_inference_data(model, guide, X, num_samples=5, num_prior=5, seed=0)
    assert idata["posterior"].y.dtype == idata["observed_data"].x.dtype == np.int8
    assert idata["posterior_predictive"].x.dtype == np.int8
    assert np.array_equal(idata["posterior"].y.sum("y_dim_0"), np.ones((1, 5, 12)))
    model, guide, rows = gmvae()
    idata = to_inference_data(model, guide, *rows, num_samples=5, num_prior=5, seed=0)
    assert idata["posterior"].y.dtype == np.int64


def test_coordinates_and_attributes_say_what_it_is():
    model, guide, rows = conditional()
    labels = ["a", "bb", "c"] * 4
    options = {
        "num_samples": 8,
        "num_prior": 2,
        "seed": 5,
        "attrs": {"split": "test", "beta": None},
    }
    idata = to_inference_data(model, guide, *rows, labels=labels, first=30, **options)
    for group in groups(idata):
        assert idata[group].datum.values.tolist() == list(range(30, 42))
        assert idata[group].label.values.tolist() == labels
        assert idata[group].attrs["inference_library"] == "pyrovae"
    assert idata["posterior"].sel(datum=35).z.shape == (1, 8, 3)
    about = idata.attrs
    assert (about["model"], about["guide"], about["seed"]) == ("Conditional", "Conditional", 5)
    assert (about["num_samples"], about["num_prior"], about["units"]) == (8, 2, "nats")
    assert (about["split"], about["beta"]) == ("test", "null")
    assert torch.equal(tensor(idata, "constant_data", "y"), Y)
    assert idata["sample_stats"].log_weight.attrs["units"] == "nats"
    assert "units" not in idata["sample_stats"].khat.attrs


@pytest.mark.parametrize("name", ["conditional", "semi_supervised", "two_latents", "discrete"])
def test_a_file_gives_back_what_was_written(name, tmp_path):
    model, guide, rows = EVERY[name]()
    labels = [f"nr {i}" for i in range(12)]
    idata = to_inference_data(model, guide, *rows, num_samples=12, num_prior=3, labels=labels)
    save(idata, tmp_path / "found.nc")
    found = load(tmp_path / "found.nc")
    assert type(found) is type(idata)
    assert groups(found) == groups(idata)
    assert dict(found.attrs) == dict(idata.attrs)
    for group in groups(idata):
        one, other = dataset(found, group), dataset(idata, group)
        assert one.identical(other)
        assert all(one[n].dtype == other[n].dtype for n in other.data_vars)
    assert [path.name for path in tmp_path.iterdir()] == ["found.nc"]


def test_a_file_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    model, guide = shipped_bernoulli()
    path = tmp_path / "found.nc"
    save(to_inference_data(model, guide, X, num_samples=5, num_prior=0, seed=0), path)
    before = path.read_bytes()
    other = to_inference_data(model, guide, X, num_samples=6, num_prior=0, seed=0)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="cannot be written"):
        save(other, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["found.nc"]
    monkeypatch.undo()
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(ValueError, match=r"found\.nc is damaged"):
        load(path)
    with pytest.raises(FileNotFoundError, match="Expected a netCDF file"):
        load(tmp_path / "nothing.nc")


def test_a_better_estimate_is_taken_if_it_is_of_these_data(linear):
    model, guide, x, _ = linear
    ll = pyrovae.log_likelihood(model, guide, x, num_samples=500, seed=1)
    options = {"num_samples": 8, "num_prior": 0, "log_likelihood": ll}
    whole = to_inference_data(model, guide, x, **options)
    part = to_inference_data(model, guide, x[30:40], first=30, **options)
    assert np.array_equal(whole["sample_stats"].log_prob, ll.log_prob)
    assert np.array_equal(part["sample_stats"].khat, ll.khat[30:40])
    assert part.attrs["log_prob_num_samples"] == 500
    with pytest.raises(ValueError, match="Expected an estimate of log p"):
        to_inference_data(model, guide, x + 1, **options)
    with pytest.raises(ValueError, match="rows 95 to 104"):
        to_inference_data(model, guide, x[:10], first=95, **options)


def test_seeds_decide_and_nothing_else_is_touched():
    model, guide = shipped_bernoulli()
    model.train()
    guide.eval()
    state = torch.get_rng_state()
    one, other = (to_inference_data(model, guide, X, num_samples=9, seed=2) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not guide.training
    for group in groups(one):
        for name in one[group].data_vars:
            assert one[group][name].equals(other[group][name])
    free = to_inference_data(model, guide, X, num_samples=9)
    again = to_inference_data(model, guide, X, num_samples=9, seed=int(free.attrs["seed"]))
    assert free["posterior"].z.equals(again["posterior"].z)
    assert not free["posterior"].z.equals(one["posterior"].z)


class Names(nn.Module):
    """Latents that are called as what ArviZ or the file call otherwise."""

    def __init__(self, encodes):
        super().__init__()
        self.encodes = encodes

    def forward(self, x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("draw", dist.Normal(0.0, 1.0))
            b = pyro.sample("net/ess", dist.Normal(0.0, 1.0))
            c = pyro.sample("ess", dist.Normal(0.0, 1.0))
            if not self.encodes:
                pyro.sample("datum", dist.Normal(a + b + c, 1.0), obs=x)


def test_any_name_of_a_site_will_do(tmp_path):
    x = torch.randn(6)
    idata = to_inference_data(Names(False), Names(True), x, num_samples=4, num_prior=3, seed=0)
    assert set(idata["posterior"].data_vars) == {"draw_", "net.ess", "ess"}
    assert idata["posterior"]["ess"].shape == (1, 4, 6)
    assert torch.equal(tensor(idata, "observed_data", "datum_"), x)
    save(idata, tmp_path / "found.nc")
    assert dataset(load(tmp_path / "found.nc"), "prior").identical(dataset(idata, "prior"))


class Broken(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        with pyro.plate("data", len(x)):
            if self.how == "delta":
                pyro.sample("z", dist.Delta(torch.zeros(len(x))))
                return
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if self.how == "model":
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])
            if self.how == "nan":
                pyro.sample(
                    "x", dist.Normal(0 * z + math.nan, 1.0, validate_args=False), obs=x[:, 0]
                )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples >= 1"),
        ({"num_prior": -1}, "num_prior >= 0"),
        ({"first": -1}, "first >= 0"),
        ({"labels": [1, 2]}, "Expected a label for each of 12 data points, got 2"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    model, guide = shipped_bernoulli()
    with pytest.raises(ValueError, match=message):
        to_inference_data(model, guide, X, **options)


def test_bad_pairs_are_refused():
    x = torch.randn(4, 1)
    with pytest.raises(ValueError, match="no importance weights"):
        to_inference_data(Broken("model"), Broken("delta"), x)
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="site 'x' in the model"):
        to_inference_data(Broken("nan"), Broken("guide"), x)


def test_compare_pairs_the_data_as_we_do(linear):
    import arviz

    model, guide, x, idata = linear
    other = LinearGaussian((20,), 4, scale=0.8)
    exact = FullGuide((20,), 4).match(other)
    options = {"num_samples": 300, "num_prior": 0, "seed": 0}
    worse = to_inference_data(other, exact, x, **options)
    a = pyrovae.log_likelihood(model, guide, x, num_samples=300, seed=3)
    b = pyrovae.log_likelihood(other, exact, x, num_samples=300, seed=0)
    paired = pyrovae.compare_log_likelihood(a, b)
    exactly = {} if arviz.__version__.startswith("0.") else {"round_to": "none"}
    found = arviz.compare({"one": loo(idata), "two": loo(worse)}, **exactly).loc["two"]
    assert loo(idata).se == pytest.approx(math.sqrt(100 * a.log_prob.var(correction=0)))
    assert abs(found["elpd_diff"]) == pytest.approx(100 * paired.difference, rel=0.02)
    error = 100 * paired.data_standard_error
    assert found["dse"] == pytest.approx(error, rel=0.06)


def test_loo_is_log_p_and_the_harmonic_mean_is_not(linear):
    import arviz

    model, guide, x, idata = linear
    exact = model.log_prob(x).double()
    ours = loo(idata)
    elpd = ours.elpd_loo if hasattr(ours, "elpd_loo") else ours.elpd
    assert elpd == pytest.approx(exact.sum().item(), abs=3)
    drawn = to_inference_data(model, guide, x, num_samples=300, num_prior=0, seed=3, resample=True)
    with pytest.warns(UserWarning, match="Pareto"):
        theirs = arviz.loo(drawn, pointwise=True)
    assert (theirs.pareto_k > 0.7).mean() > 0.5
    assert (theirs.elpd_loo if hasattr(theirs, "elpd_loo") else theirs.elpd) - elpd > 50


@pytest.mark.parametrize("resample", [False, True])
def test_p_loo_is_what_the_posterior_has_seen(resample):
    model, guide, x, exact = linear_gaussian(n=40, pixels=6)
    options = {"num_samples": 4000, "num_prior": 0, "seed": 0, "resample": resample}
    found = loo(to_inference_data(model, guide, x, **options))
    weight, bias = (p.detach().double() for p in model.decoder.layers[0].parameters())
    posterior, noise = model.posterior(x.double()), model.scale.detach().double().square()
    cov = weight @ posterior.covariance_matrix @ weight.mT + noise * torch.eye(6)
    seen = dist.MultivariateNormal(posterior.mean @ weight.mT + bias, cov).log_prob(x.double())
    held = found.p_loo if hasattr(found, "p_loo") else found.p
    assert held == pytest.approx((seen - exact).sum().item(), rel=0.02)


@pytest.fixture
def figures():
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


def old_plots(arviz, idata):
    y = idata["observed_data"].x.isel(x_dim_0=0)
    y_hat = idata["prior_predictive"].x.isel(x_dim_0=0).stack(__sample__=("chain", "draw"))
    weight = 0 * y_hat - math.log(y_hat.sizes["__sample__"])
    pit = arviz.loo_pit(y=y.values, y_hat=y_hat.values, log_weights=weight.values)
    arviz.plot_ppc(idata, num_pp_samples=5)
    arviz.plot_ppc(idata, group="prior", num_pp_samples=5)
    arviz.plot_loo_pit(y=y, y_hat=y_hat, log_weights=weight)
    arviz.plot_loo_pit(idata.isel(x_dim_0=0), y="x")
    (points,) = arviz.plot_khat(loo(idata)).collections[:1]
    return pit, points.get_offsets()[:, 1]


def new_plots(arviz, idata):
    pixel = idata.isel(x_dim_0=0, missing_dims="ignore")
    below = pixel["prior_predictive"].x <= pixel["observed_data"].x
    arviz.plot_ppc_dist(idata, num_samples=5)
    arviz.plot_ppc_dist(idata, group="prior_predictive", num_samples=5)
    arviz.plot_ppc_pit(pixel, group="prior_predictive")
    arviz.plot_loo_pit(pixel)
    khat = arviz.plot_khat(loo(idata))
    return below.mean(("chain", "draw")).values, khat.viz["khat"]["pareto_k"].item().get_offsets()[
        :, 1
    ]


def test_plots_of_arviz_show_it(linear, figures):
    import arviz

    *_, idata = linear
    plots = old_plots if arviz.__version__.startswith("0.") else new_plots
    pit, khat = plots(arviz, idata)
    assert stats.kstest(pit, "uniform").pvalue > 0.01
    np.testing.assert_allclose(khat, idata["sample_stats"].khat, atol=1e-6)
    drawn = [figures.figure(n) for n in figures.get_fignums()]
    assert len(drawn) >= 5
    assert all(axes.has_data() for figure in drawn for axes in figure.axes)


def test_the_block_of_the_page_runs(repository, tmp_path, monkeypatch, capsys, figures):
    monkeypatch.chdir(tmp_path)
    text = (repository / "docs" / "arviz.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    namespace = {"__name__": "arviz_page"}
    exec(compile(block, "docs/arviz.md", "exec"), namespace)
    assert (tmp_path / "digits.nc").is_file()
    assert re.search(r"8 latents +0 .*\n2 latents +1 ", capsys.readouterr().out)
    assert len(figures.get_fignums()) == 2
