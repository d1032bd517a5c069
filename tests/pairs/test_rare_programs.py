"""Programs that few write and Pyro takes: every part of the library takes them as well."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.infer.reparam import LocScaleReparam
from torch import nn

import pyrovae
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.gaussian import Gaussian

X = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """A model that observes x, given z by a function."""

    def __init__(self, latent, observed):
        super().__init__()
        self.latent, self.observed = latent, observed
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, mask=True):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.latent(x))
            likelihood = dist.Normal(self.observed(z), self.scale).mask(mask)
            pyro.sample("x", likelihood.to_event(1), obs=x)


class Guide(nn.Module):
    """A guide of a latent, given what a layer makes of x."""

    def __init__(self, latent, inputs=2, name="z"):
        super().__init__()
        self.net, self.latent, self.name = nn.Linear(inputs, 2), latent, name

    def forward(self, x, mask=True):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample(self.name, self.latent(*self.net(x * mask).unbind(-1)))


def _scaled(a, b):
    """A Beta on (-1, 1), of which torch says that its support is real."""
    transform = dist.transforms.AffineTransform(-1.0, 2.0)
    return dist.TransformedDistribution(dist.Beta(a.exp(), b.exp()), [transform])


def _both(z):
    return torch.stack([z, -z], -1)


def status(report, name):
    return next(row.status for row in report.rows if row.name == name)


@pytest.mark.parametrize("case", ["a scaled base", "a point"])
def test_a_support_that_torch_does_not_derive_is_no_fault(case):
    prior, guide = {
        "a scaled base": (lambda x: dist.Uniform(-1.0, 1.0), _scaled),
        "a point": (lambda x: dist.Gamma(2.0, 2.0), lambda a, b: dist.Delta(a.sigmoid() + 0 * b)),
    }[case]
    pair = Model(prior, _both), Guide(guide)
    assert status(pyrovae.check(*pair, X, seed=0), "latents in support") == "passed"
    pyrovae.fit(*pair, X, epochs=1, compile=False, seed=0)


def test_a_support_that_is_wider_is_still_a_fault():
    pair = Model(lambda x: dist.Uniform(-1.0, 1.0), _both), Guide(lambda a, b: dist.Normal(a, 1.0))
    with pytest.raises(ValueError, match="the guide can draw"):
        pyrovae.fit(*pair, X, epochs=1, compile=False, seed=0)


def test_a_group_of_an_easy_guide_draws_points_of_a_positive_latent():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
            b = pyro.sample("b", dist.LogNormal(x.new_zeros(()), 0.5))
            both = torch.stack([a + b, a - b], -1)
            pyro.sample("x", dist.Normal(both, 0.6).to_event(1), obs=x)

    class Grouped(EasyGuide):
        def __init__(self):
            super().__init__(model)
            self.net = nn.Linear(2, 4)

        def guide(self, x):
            loc, scale = self.net(x).chunk(2, -1)
            with self.plate("data", len(x), subsample=torch.arange(len(x))):
                drawn = dist.Normal(loc, scale.exp()).to_event(1)
                self.group(match="a|b").sample("ab", drawn)

    assert status(pyrovae.check(model, Grouped(), X, seed=0), "latents in support") == "passed"


def test_what_reparam_puts_in_the_place_of_a_latent_is_no_data():
    class Reparametrized(Model):
        def forward(self, x, mask=True):
            with poutine.reparam(config={"z": LocScaleReparam(0.0)}):
                super().forward(x, mask)

    model = Reparametrized(lambda x: dist.Normal(self_loc, 1.0).to_event(1), lambda z: z)
    guide = Guide(lambda a, b: dist.Normal(torch.stack([a, b], -1), 0.5).to_event(1))
    guide.name, self_loc = "z_decentered", torch.zeros(2)
    assert pyrovae.sample(model, like=X, n=3, seed=0).shape == (3, 2)
    assert pyrovae.reconstruct(model, guide, X, seed=0).shape == X.shape
    mask = torch.arange(80).reshape(40, 2) % 3 > 0
    assert pyrovae.impute(model, guide, X * mask, mask, num_samples=20, seed=0).mean.shape


def test_gaps_are_filled_beside_a_latent_that_the_model_sums_over():
    """Of the two modes given x1 alone, each latent of the guide keeps its weight."""

    class Mixture(nn.Module):
        def forward(self, x, mask=True):
            with pyro.plate("data", len(x)):
                shares = torch.tensor([0.4, 0.6])
                y = pyro.sample("y", dist.Categorical(shares), infer={"enumerate": "parallel"})
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                loc = torch.stack([z + 2.0 * y, z - 2.0 * y], -1)
                pyro.sample("x", dist.Normal(loc, 0.5).mask(mask).to_event(1), obs=x)

    mask = torch.ones(40, 2, dtype=torch.bool)
    mask[:20, 1] = False
    guide = Guide(lambda a, b: dist.Normal(a, 1.5))
    found = pyrovae.impute(Mixture(), guide, X * mask, mask, num_samples=4000, seed=0)
    x = X[:20, :1].double()
    likelihood = dist.Normal(torch.tensor([0.0, 2.0]), math.sqrt(1.25)).log_prob(x)
    share = (likelihood + torch.tensor([0.4, 0.6]).log()).softmax(-1)
    # E[z | x1, y] is 0.8 (x1 - 2 y), and x2 is about z - 2 y.
    expected = (share * (0.8 * (x - torch.tensor([0.0, 2.0])) - torch.tensor([0.0, 2.0]))).sum(-1)
    torch.testing.assert_close(found.mean[:20, 1].double(), expected, atol=0.15, rtol=0.0)


def test_eight_bits_are_told_beside_a_latent_that_the_model_sums_over():
    x = torch.randint(256, (40, 3), generator=torch.Generator().manual_seed(0)).float()

    def model(x):
        with pyro.plate("data", len(x)):
            how = {"enumerate": "parallel"}
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.4, 0.6])), infer=how)
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            logit = (0.1 * z + 0.1 * y)[..., None].expand(*(0.1 * z + 0.1 * y).shape, 3)
            pyro.sample("x", dist.Binomial(255, logits=logit).to_event(1), obs=x)

    guide = Guide(lambda a, b: dist.Normal(0 * a, 1.0), inputs=3)
    assert pyrovae.diagnose(model, guide, x, seed=0).bits_per_dimension is not None


def test_pixels_may_be_a_plate_to_the_left_of_the_data():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(5))

        def forward(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                with pyro.plate("pixels", 5, dim=-2):
                    pyro.sample("x", dist.Normal(self.w[:, None] * z, 0.5), obs=x.T)

    report = pyrovae.check(
        Transposed(), Guide(lambda a, b: dist.Normal(a, 0.5), inputs=5), torch.randn(40, 5), seed=0
    )
    assert status(report, "samples") == "passed"


def test_a_curve_of_the_loss_stands_for_an_elbo_that_there_is_not(tmp_path):
    """Sites that are scaled otherwise have no ELBO in common."""

    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=0.3):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x):
        weight = pyro.param("w", torch.tensor(0.5))
        with pyro.plate("data", len(x)), poutine.scale(scale=0.3):
            pyro.sample("z", dist.Normal(weight * x, 0.4).to_event(1))

    fit = pyrovae.fit(model, guide, X, epochs=2, compile=False, seed=0, out=tmp_path / "run")
    (axes,) = fit.plot().axes
    assert axes.get_title(loc="left") == "loss"
    assert (tmp_path / "run" / "figures" / "learning_curves.png").exists()


def test_what_pyros_obs_mask_leaves_out_needs_no_use():
    class Partly(nn.Module):
        def forward(self, x, seen):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x, obs_mask=seen)

    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 2)

        def forward(self, x, seen):
            with pyro.plate("data", len(x)):
                loc = self.net(x * seen[:, None])
                z = pyro.sample("z", dist.Normal(loc, 0.7).to_event(1))
                with poutine.mask(mask=~seen):
                    pyro.sample("x_unobserved", dist.Normal(z, 0.6).to_event(1))

    report = pyrovae.check(Partly(), Beside(), X, torch.arange(40) % 3 > 0, seed=0)
    assert status(report, "gradients") == "passed", report


def test_what_a_library_keeps_from_being_captured_is_warned_of():
    """The transform to the factor of a correlation matrix looks at values, in code of torch."""
    free = dist.transforms.transform_to(dist.constraints.corr_cholesky)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LKJCholesky(2, torch.tensor(1.5)))
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), scale_tril=z), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(1)).expand(len(x), 1)
        with pyro.plate("data", len(x)):
            drawn = dist.Normal(loc, 0.6).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(drawn, [free]))

    assert status(pyrovae.check(model, guide, X, seed=0), "capture") == "warned"


def test_latents_to_decode_are_given_by_name():
    with pytest.raises(TypeError, match="latents by name"):
        pyrovae.decode(Gaussian((2,), latent=2), torch.zeros(3, 2), like=X)


def test_a_check_of_a_few_samples_leaves_what_a_model_counts():
    class Counting(Gaussian):
        def __init__(self):
            super().__init__((2,), latent=2)
            self.register_buffer("replaced", torch.zeros(()))
            self.register_buffer("written", torch.zeros(()))

        def forward(self, x, *more):
            if self.training:
                self.replaced = self.replaced + 1
                self.written.add_(1)
            return super().forward(x, *more)

    model, objective = Counting(), pyrovae.make_objective("iwae", particles=4, backward=2)
    pyrovae.fit(model, MeanField((2,), latent=2), X, objective=objective, epochs=2, compile=False)
    # Two steps, in each of which the model runs once for all samples and once for a few.
    assert model.replaced.item() == model.written.item() == 4


def test_a_plate_of_a_fixed_size_is_told_beside_events():
    def model(x):
        with pyro.plate("data", 128):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", 128):
            pyro.sample("z", dist.Normal(x, 0.5).to_event(1))

    with pytest.raises(ValueError, match=r"size of the batch, len\(x\), here 40, or declare"):
        pyrovae.elbo(model, guide, X)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_is_counted_among_all_data_and_infinity_is_named(bad):
    pyro.set_rng_seed(0)
    pair, x = (Gaussian((2,), latent=2), MeanField((2,), latent=2)), torch.randn(200, 2)
    x[150, 1] = bad
    for function in (pyrovae.log_likelihood, pyrovae.elbo, pyrovae.fit):
        with pytest.raises(ValueError, match=r"1 of 200 data hold .* in row 150"):
            function(*pair, x)
