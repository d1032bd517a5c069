"""Laws of imputation: against the exact conditional of a linear-Gaussian model, and of refusals."""

import math

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from zoo import table

import one_layer
import pyrovae
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.gaussian import Gaussian
from pyrovae.models.linear_gaussian import LinearGaussian

N, D, K = 60, 5, 4000


class Exact(PyroModule):
    """The posterior of a linear-Gaussian model given some of x, its covariance times a factor."""

    def __init__(self, model, wider=1.0):
        super().__init__()
        self.exact, self.wider = model, wider

    def forward(self, x, mask):
        weight, bias = self.exact.decoder.last.weight, self.exact.decoder.last.bias
        seen = mask.to(x) / self.exact.scale**2
        precision = torch.eye(weight.shape[1]) + torch.einsum("nd,di,dj->nij", seen, weight, weight)
        cov = torch.linalg.inv(precision)
        loc = torch.einsum("nij,dj,nd->ni", cov, weight, seen * (x - bias))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, self.wider * cov))


@pytest.fixture(scope="module")
def linear():
    """A model, data, a mask, and the conditional moments of every datum, in float64."""
    torch.manual_seed(0)
    model = LinearGaussian((D,), 2, scale=0.6)
    with torch.no_grad():
        model.decoder.last.weight.normal_(0, 1)
        model.decoder.last.bias.normal_(0, 1)
        x = pyrovae.sample(model, like=torch.zeros(1, D), n=N, seed=1)
        weight, bias = (p.double() for p in (model.decoder.last.weight, model.decoder.last.bias))
        cov = weight @ weight.T + model.scale.double() ** 2 * torch.eye(D).double()
    mask = torch.rand(N, D) > 0.4
    mask[0], mask[1] = True, False
    loc, scale, log_prob = torch.zeros(N, D).double(), torch.zeros(N, D).double(), []
    covs = {}
    for n in range(N):
        o, m = mask[n], ~mask[n]
        gain = cov[m][:, o] @ torch.linalg.inv(cov[o][:, o])
        loc[n, m] = bias[m] + gain @ (x[n].double() - bias)[o]
        covs[n] = cov[m][:, m] - gain @ cov[o][:, m]
        scale[n, m] = covs[n].diagonal().sqrt()
        seen = dist.MultivariateNormal(bias[o], cov[o][:, o]) if o.any() else None
        log_prob.append(seen.log_prob(x[n].double()[o]).item() if seen else 0.0)
    return model, x, mask, loc, scale, covs, torch.tensor(log_prob)


@pytest.mark.parametrize("wider", [1.0, 1.5])
def test_missing_entries_have_the_exact_conditional_moments(linear, wider):
    model, x, mask, loc, scale, _, log_prob = linear
    holes = torch.where(mask, x, torch.nan)
    found = pyrovae.impute(model, Exact(model, wider), holes, num_samples=K, seed=0)
    error = found.log_likelihood.standard_error
    assert ((found.log_likelihood.log_prob - log_prob).abs() < 4 * error + 1e-4).all()
    z = ((found.mean - loc) / found.standard_error)[~mask]
    assert z.abs().max() < 4
    # χ² of as many entries as are missing, two of one datum at most independent: 1 within 0.13.
    assert 0.65 < z.square().mean() < 1.35
    assert torch.equal(found.mean[mask], x[mask])
    assert torch.equal(found.filled, found.mean)
    for level, quantile in zip(found.levels, found.quantiles, strict=True):
        normal = torch.distributions.Normal(loc[~mask], scale[~mask])
        exact = normal.icdf(torch.tensor(level).double())
        # The error of a quantile: √(q (1 - q) / ESS) over the density there.
        spread = math.sqrt(level * (1 - level)) / normal.log_prob(exact).exp()
        ess = found.ess[:, None].expand(N, D)[~mask]
        assert ((quantile[~mask] - exact).abs() < 4.5 * spread / ess.sqrt()).all()
    if wider == 1.0:
        assert torch.allclose(found.ess, torch.full((N,), float(K)).double(), rtol=1e-3)


def test_draws_are_joint_over_the_entries_of_a_datum(linear):
    model, x, mask, loc, _, covs, _ = linear
    holes, m = torch.where(mask, x, torch.nan), 2000
    found = pyrovae.impute(
        model, Exact(model, 1.5), holes, num_samples=K, num_draws=m, quantiles=(), seed=0
    )
    assert found.quantiles.shape == (0, N, D)
    for n in range(N):
        assert torch.equal(found.draws[:, n, mask[n]], x[n, mask[n]].expand(m, -1))
        some = found.draws[:, n, ~mask[n]].double() - loc[n, ~mask[n]]
        error = some.T @ some / m - covs[n]
        # The variance of a product of normals is at most twice that of their variances' product.
        spread = covs[n].diagonal().outer(covs[n].diagonal()).mul(2 * (1 / m + 1 / K * 1.5)).sqrt()
        assert (error.abs() < 4.5 * spread).all()


def test_annealing_finds_the_same_likelihood_of_what_is_observed(linear):
    model, x, mask, *_, log_prob = linear
    found = pyrovae.annealed_log_likelihood(
        model,
        Exact(model, 1.5),
        x.masked_fill(~mask, 0),
        mask,
        num_chains=32,
        num_temperatures=40,
        seed=0,
    )
    assert ((found.log_prob - log_prob).abs() < 4.5 * found.standard_error + 1e-3).all()


def test_nan_or_a_mask_says_the_same_and_log_likelihood_agrees(linear):
    model, x, mask, *_ = linear
    guide = Exact(model, 1.5)
    one = pyrovae.impute(model, guide, torch.where(mask, x, torch.nan), num_samples=300, seed=3)
    two = pyrovae.impute(model, guide, x, mask, num_samples=300, seed=3)
    ll = pyrovae.log_likelihood(
        model, guide, x.masked_fill(~mask, 0), mask, num_samples=300, seed=3
    )
    assert torch.equal(one.draws, two.draws)
    assert torch.equal(one.quantiles, two.quantiles)
    assert torch.allclose(one.log_likelihood.log_prob, ll.log_prob, atol=1e-6)
    assert torch.allclose(one.khat, ll.khat, atol=1e-4, equal_nan=True)
    with pytest.raises(ValueError, match="NaN only where the mask is false, got 1"):
        pyrovae.impute(
            model,
            guide,
            x.index_fill(0, torch.tensor([0]), torch.nan)[:, :1].expand(N, 1),
            torch.ones(N, 1) > 0,
        )


def test_more_than_a_tile_and_an_unmasked_batch(linear):
    model, x, mask, *_ = linear
    x, mask = x.repeat(2, 1)[:70], mask.repeat(2, 1)[:70]
    found = pyrovae.impute(model, Exact(model), x, mask, num_samples=50, seed=0)
    first = pyrovae.impute(model, Exact(model), x[:69], mask[:69], num_samples=50, seed=0)
    assert torch.equal(found.draws[:, :64], first.draws[:, :64])
    whole = pyrovae.impute(model, Exact(model), x, num_samples=50, seed=0)
    assert torch.equal(whole.filled, x)
    assert "0 of 350 values" in repr(whole)


@pytest.mark.parametrize("name", one_layer.MODELS)
def test_every_shipped_likelihood_fills_its_gaps_with_what_it_supports(name):
    torch.manual_seed(0)
    model, guide = one_layer.pair(name, "mean_field")
    x = one_layer.data(name)
    mask = torch.rand(x.shape) > 0.3
    found = pyrovae.impute(model, guide, x, mask, num_samples=40, num_draws=3, seed=0)
    fn = pyro.poutine.trace(model).get_trace(x, mask).nodes["x"]["fn"]
    for draw in found.draws:
        assert fn.support.check(draw).all()
        assert torch.equal(draw[mask], x[mask])
    assert found.filled.isfinite().all()
    assert (found.quantiles[0] <= found.quantiles[2]).all()


def test_one_sample_has_no_error_and_one_quantile_needs_no_list(linear):
    model, x, mask, *_ = linear
    some, guide = torch.where(mask, x, torch.nan), Exact(model)
    found = pyrovae.impute(model, guide, some, num_samples=1, quantiles=0.5, seed=0)
    assert torch.equal(found.standard_error.isnan(), ~mask)
    assert found.quantiles.shape == (1, N, D)
    found = pyrovae.impute(model, guide, some, num_samples=1, quantiles=torch.tensor([0.1, 0.9]))
    assert found.quantiles.shape == (2, N, D)
    with pytest.raises(pyrovae.InputError, match="at least one datum"):
        pyrovae.impute(model, guide, some[:0])


def test_a_model_that_sees_missing_entries_is_refused(linear):
    model, x, mask, *_ = linear

    def blind(x, mask):
        model(x)

    with pytest.raises(pyrovae.InputError, match=r"'x' depends on what stands where x is missing"):
        pyrovae.impute(blind, Exact(model), x, mask, num_samples=2)


def test_sites_that_are_not_x_entry_by_entry_are_refused(linear):
    model, x, mask, *_ = linear

    def turned(x, mask):
        model(x.flip(1), mask.flip(1))

    with pytest.raises(pyrovae.InputError, match="entries of x one after another"):
        pyrovae.impute(turned, Exact(model), x, mask, num_samples=2)


def test_panels_are_called_what_the_columns_are():
    """Of a frame, of data.columns, or of sites that observe a column each."""
    model, guide, (x, mask) = table()
    gaps = pd.DataFrame(torch.where(mask, x, torch.nan).numpy(), columns=list("abcdef"))
    plain = Gaussian((6,), latent=2), MeanField((6,), latent=2)

    def titles(found):
        return {axes.get_title(loc="left").partition(", ")[0] for axes in found.plot().axes}

    few = {"num_samples": 5, "num_draws": 1, "seed": 0}
    assert titles(pyrovae.impute(*plain, gaps, **few)) == {*"abcdef"}
    assert titles(pyrovae.impute(*plain, x=gaps, **few)) == {*"abcdef"}
    named = pyrovae.impute(*plain, x, mask, columns=model.columns, **few)
    assert titles(named) == {"real", "positive", "count", "binary", "categorical", "ordinal"}
    assert titles(pyrovae.impute(model, guide, x, mask, **few)) == {
        f"x.{column.name}" for column in model.columns
    }
    assert titles(pyrovae.impute(*plain, x, mask, **few)) == {f"x[{j}]" for j in range(6)}
    with pytest.raises(pyrovae.InputError, match=r"each of the 6 entries .* got 2"):
        pyrovae.impute(*plain, x, mask, columns=["a", "b"], **few)


def test_columns_of_one_latent_class_have_exact_probabilities():
    """Two categories and a normal given a class that the model sums over or the guide draws."""
    share = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    centre = torch.tensor([-1.0, 1.0])

    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample(
                "z", dist.Categorical(torch.tensor([0.4, 0.6])), infer={"enumerate": "parallel"}
            )
            pyro.sample("c", dist.Categorical(share[z]).mask(mask[:, 0]), obs=x[:, 0])
            pyro.sample("r", dist.Normal(centre[z], 1.0).mask(mask[:, 1]), obs=x[:, 1])

    def guide(x, mask):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))

    x = torch.tensor([[torch.nan, 0.8], [2.0, torch.nan], [torch.nan, torch.nan]])
    joint = torch.tensor([0.4, 0.6]) * dist.Normal(centre, 1.0).log_prob(torch.tensor(0.8)).exp()
    first = (joint / joint.sum()) @ share
    second = torch.tensor([0.4, 0.6]) * share[:, 2]
    truth = (second / second.sum()) @ centre

    for each in (guide, lambda x, mask: None):
        k = 20_000
        found = pyrovae.impute(model, each, x, num_samples=k, seed=0)
        assert torch.allclose(found.probabilities["c"][0], first, atol=4 / math.sqrt(k))
        assert abs(found.mean[1, 1] - truth) < 4 * found.standard_error[1, 1]
        assert found.filled[0, 0] == first.argmax()
        assert found.mean[0, 0].isnan()


class Censored(PyroModule):
    """x ~ N(0, 1) through z, missing with probability Φ(a x), so that p(x | missing) is skew."""

    a, rho = 2.0, 0.8

    def draw(self, x, z):
        return dist.Normal(self.rho * z, (1 - self.rho**2) ** 0.5)

    def model(self, x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            p = self.draw(x, z)
            pyro.sample("x", p.mask(mask).to_event(1), obs=x)
            hidden = pyro.sample("hidden", p.mask(~mask).to_event(1))
            missing = dist.Normal(0.0, 1.0).cdf(self.a * torch.where(mask, x, hidden))
            pyro.sample("seen", dist.Bernoulli(1 - missing).to_event(1), obs=mask.to(x))

    def guide(self, x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("hidden", self.draw(x, z).mask(~mask).to_event(1))


def test_what_is_missing_because_of_its_value_has_the_moments_of_the_skew_normal():
    pair, x = Censored(), torch.full((50, 1), torch.nan)
    found = pyrovae.impute(pair.model, pair.guide, x, site="hidden", num_samples=K, seed=0)
    shape = pair.a / (1 + pair.a**2) ** 0.5
    mean = shape * (2 / math.pi) ** 0.5
    z = (found.mean - mean) / found.standard_error
    assert z.abs().max() < 4
    assert 0.4 < z.square().mean() < 1.8
    spread = (1 - mean**2) ** 0.5
    drawn = found.draws.double()
    assert drawn.mean() == pytest.approx(mean, abs=4 * spread / 500**0.5)
    level = (found.log_likelihood.log_prob - math.log(0.5)) / found.log_likelihood.standard_error
    assert level.abs().max() < 4
    for name in ("seen", "nothing"):
        with pytest.raises(ValueError, match=f"Expected site='{name}' to name a latent"):
            pyrovae.impute(pair.model, pair.guide, x, site=name, num_samples=10)
    with pytest.raises(ValueError, match="one after another"):
        pyrovae.impute(pair.model, pair.guide, x, num_samples=10)
