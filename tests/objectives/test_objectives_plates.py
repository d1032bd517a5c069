"""Where sums, scales and masks lie: inside the log-sum-exp, or outside."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from test_objectives import assert_same, gradients, linear, value
from torch import nn

from pyrovae.objectives import make_objective
from pyrovae.objectives.log_weights import cells as find_cells
from pyrovae.pairs.traces import Layout, samples

BOUNDS = ("iwae", "iwae_stl", "iwae_dreg", "renyi", "miwae", "ciwae", "reweighted_wake_sleep")
ALL = (*BOUNDS, "stl", "wake_sleep", "beta_elbo", "free_bits_elbo")
K = 5


class Grid(nn.Module):
    """A row of T cells a datum: a latent for each cell, and with ``top`` one for the row above.

    ``dims`` are those of rows and cells; ``size`` is the number of cells that T are a part of.
    """

    def __init__(self, top=False, dims=(-2, -1), size=None):
        super().__init__()
        self.top, self.dims, self.size = top, dims, size
        self.weight = nn.Parameter(torch.tensor([0.7, 0.6, -0.3], dtype=torch.float64))

    def plates(self, x):
        rows, cells = self.dims
        part = None if self.size is None else torch.arange(x.shape[1])
        return (
            pyro.plate("data", len(x), dim=rows),
            pyro.plate("cells", self.size or x.shape[1], subsample=part, dim=cells),
            x if rows == -2 else x.mT,
        )

    def model(self, x):
        rows, cells, x = self.plates(x)
        with rows:
            top = pyro.sample("top", dist.Normal(self.weight[0], 1.0)) if self.top else 0.2
            with cells:
                z = pyro.sample("z", dist.Normal(top, 1.0))
                pyro.sample("x", dist.Normal(z * self.weight[1], 0.5), obs=x)

    def guide(self, x):
        rows, cells, x = self.plates(x)
        with rows:
            top = pyro.sample("top", dist.Normal(self.weight[2], 0.9)) if self.top else 0.0
            with cells:
                pyro.sample("z", dist.Normal(self.weight[2] * x + top, 0.9))


class Row(Grid):
    """The same cells without rows, in one plate."""

    def plates(self, x):
        return poutine.block(hide=[]), pyro.plate("data", len(x)), x


def cells(n=3, t=4):
    return torch.randn(n, t, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("dims", [(-2, -1), (-1, -2)])
def test_independent_cells_of_a_row_have_a_bound_each(name, dims):
    x = cells()
    flat = (x if dims == (-2, -1) else x.mT).flatten()
    grid, row = Grid(dims=dims), Row()
    assert_same(
        gradients(make_objective(name, particles=K), (grid.model, grid.guide), x),
        gradients(make_objective(name, particles=K), (row.model, row.guide), flat),
    )
    found = value(name, (grid.model, grid.guide), x, particles=K)
    each = value(name, (row.model, row.guide), flat, particles=K)
    expected = each.reshape(3, 4).sum(1) if dims == (-2, -1) else each.reshape(4, 3).sum(0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dims", [(-2, -1), (-1, -2)])
def test_cells_that_share_a_latent_are_summed_inside(dims):
    grid, x = Grid(top=True, dims=dims), cells()
    found, slopes = gradients(make_objective("iwae", particles=K), (grid.model, grid.guide), x)
    pyro.set_rng_seed(3)
    with pyro.plate("particles", K, dim=-3):
        guide = poutine.trace(grid.guide).get_trace(x)
        model = poutine.trace(poutine.replay(grid.model, trace=guide)).get_trace(x)
    weights = 0.0
    for trace, sign in ((model, 1.0), (guide, -1.0)):
        for name, site in samples(trace).items():
            log_prob = site["fn"].log_prob(site["value"])
            within = log_prob.sum(dims[1]) if name != "top" else log_prob.squeeze(dims[1])
            weights = weights + sign * within
    bound = (weights.logsumexp(0) - math.log(K)).flatten()
    torch.testing.assert_close(found.loss, -bound.sum())
    torch.testing.assert_close(value("iwae", (grid.model, grid.guide), x, particles=K), bound)
    (slope,) = torch.autograd.grad(-bound.sum(), [grid.weight])
    torch.testing.assert_close(slopes[next(iter(slopes))], slope)


def test_nested_plates_give_log_p_for_many_particles():
    grid, x = Grid(top=True), cells(t=2)
    a, b = grid.weight[0].item(), grid.weight[1].item()
    cov = b**2 * (torch.eye(2) + 1.0).double() + 0.25 * torch.eye(2).double()
    exact = dist.MultivariateNormal(torch.full((2,), a * b).double(), cov).log_prob(x)
    found = value("iwae", (grid.model, grid.guide), x, particles=100_000)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.02)


@pytest.mark.parametrize("name", BOUNDS)
def test_a_part_of_the_cells_stands_for_all_of_them(name):
    x = cells()
    whole, part = (Grid(size=size) for size in (None, 12))
    one, other = (
        gradients(make_objective(name, particles=K), (grid.model, grid.guide), x)
        for grid in (whole, part)
    )
    torch.testing.assert_close(other[0].loss, 3 * one[0].loss)
    for key, gradient in one[1].items():
        torch.testing.assert_close(other[1][key], 3 * gradient)
    found = value(name, (part.model, part.guide), x, particles=K)
    torch.testing.assert_close(found, 3 * value(name, (whole.model, whole.guide), x, particles=K))
    above = Grid(top=True, size=12)
    with pytest.raises(ValueError, match=r"different scales.*subsampling within a datum"):
        gradients(make_objective(name, particles=K), (above.model, above.guide), x)


def changed(pair, handler):
    """A pair whose programs run inside of a handler."""
    return tuple(handler(program) for program in pair)


def of(total):
    """The programs of the linear pair with their plate a part of ``total`` data."""
    model, guide, x = linear()

    def generate(x):
        with pyro.plate("data", total, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(model.zero, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(model.decoder(z), model.scale).to_event(1), obs=x)

    def infer(x):
        with pyro.plate("data", total, subsample=torch.arange(len(x))):
            loc = guide.encoder(x)
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=guide.scale_tril))

    return (generate, infer), x


@pytest.mark.parametrize("name", ALL)
def test_a_part_of_the_data_stands_for_all_of_them(name):
    (whole, x), (part, _) = of(4), of(40)
    one, other = (gradients(make_objective(name), pair, x) for pair in (whole, part))
    torch.testing.assert_close(other[0].loss, 10 * one[0].loss)
    assert len(one[1]) > 3
    for key, gradient in one[1].items():
        torch.testing.assert_close(other[1][key], 10 * gradient)
    torch.testing.assert_close(value(name, part, x), value(name, whole, x))


@pytest.mark.parametrize("name", ALL)
def test_a_scale_multiplies_the_bound_and_not_the_weights(name):
    model, guide, x = linear()
    scale = torch.tensor([0.25, 0.5, 1.75, 1.0], dtype=torch.float64)
    plain = gradients(make_objective(name), (model, guide), x)
    number, by_datum, rest = (
        gradients(make_objective(name), changed((model, guide), poutine.scale(scale=s)), x)
        for s in (0.3, scale, 2 - scale)
    )
    each = value(name, (model, guide), x)
    scaled = changed((model, guide), poutine.scale(scale=scale))
    torch.testing.assert_close(number[0].loss, 0.3 * plain[0].loss)
    for one, other in zip(plain[1].values(), number[1].values(), strict=True):
        torch.testing.assert_close(other, 0.3 * one)
    if name != "free_bits_elbo":
        torch.testing.assert_close(by_datum[0].loss, -(scale * each).sum())
        torch.testing.assert_close(value(name, scaled, x), each)
        grads = (found[1].values() for found in (plain, by_datum, rest))
        for one, some, others in zip(*grads, strict=True):
            torch.testing.assert_close(some + others, 2 * one)


@pytest.mark.parametrize("name", [name for name in ALL if name != "free_bits_elbo"])
def test_masked_data_count_for_nothing(name):
    model, guide, x = linear()
    mask = torch.tensor([True, False, True, True])
    whole = gradients(make_objective(name), (model, guide), x)
    kept, left = (
        gradients(make_objective(name), changed((model, guide), poutine.mask(mask=m)), x)
        for m in (mask, ~mask)
    )
    each = value(name, (model, guide), x)
    torch.testing.assert_close(kept[0].loss, -(each * mask).sum())
    for one, some, others in zip(*(f[1].values() for f in (whole, kept, left)), strict=True):
        torch.testing.assert_close(some + others, one)


def test_masked_data_take_no_free_bits():
    model, guide, x = linear()
    mask = torch.tensor([True, False, True, True])
    pair = changed((model, guide), poutine.mask(mask=mask))
    found, slopes = gradients(make_objective("free_bits_elbo", free_bits=50.0), pair, x)
    torch.testing.assert_close(found.loss, -found.terms["x"] + 3 * 50.0)
    free, plain = (gradients(make_objective("beta_elbo", beta=b), pair, x)[1] for b in (0.0, 1.0))
    assert slopes.keys() == free.keys()
    for name, slope in slopes.items():
        torch.testing.assert_close(slope, free[name])
        assert "decoder" in name or "scale" in name or not torch.allclose(slope, plain[name])


def test_pixels_that_are_not_seen_are_left_out_of_the_weights():
    model, guide, x = linear()

    def seen(keep):
        def program(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(model.zero, 1.0).to_event(1))
                pixels = dist.Normal(model.decoder(z), model.scale)
                pyro.sample("x", pixels.mask(keep).to_event(1), obs=x)

        return program

    half = torch.tensor([True, True, False, False])
    weight, bias = model.decoder.layers[0].weight[:2], model.decoder.layers[0].bias[:2]
    cov = weight @ weight.mT + model.scale**2 * torch.eye(2)
    exact = dist.MultivariateNormal(bias, cov).log_prob(x[:, :2]).detach()
    found = value("iwae", (seen(half), guide), x, particles=50_000)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", BOUNDS)
def test_sites_with_scales_of_their_own_are_refused(name):
    model, guide, x = linear()

    def weighted(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(model.zero, 1.0).to_event(1))
            with poutine.scale(scale=0.5):
                pixels = dist.Normal(model.decoder(z), model.scale)
                pyro.sample("x", pixels.to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"Sites 'z' and 'x' carry different scales"):
        gradients(make_objective(name), (weighted, guide), x)


def test_a_scale_that_varies_within_a_datum_is_refused():
    grid, x = Grid(top=True), cells()
    with poutine.scale(scale=torch.linspace(0.5, 1.0, 4)):
        trace = poutine.trace(grid.guide).get_trace(x)
    layout = Layout("data", -2, -3, ("top", "z"), ("x",))
    with pytest.raises(ValueError, match="varies within it"):
        find_cells([trace], layout)


def test_a_factor_counts_within_the_plate_and_is_refused_outside():
    model, guide, x = linear()

    def factored(x, outside=False):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(model.zero, 1.0).to_event(1))
            pixels = dist.Normal(model.decoder(z), model.scale).to_event(1)
            pyro.sample("x", pixels, obs=x)
            pyro.factor("bonus", torch.arange(4.0).double())
        if outside:
            pyro.factor("global", torch.tensor(1.0))

    found = value("iwae", (factored, guide), x)
    torch.testing.assert_close(found, value("iwae", (model, guide), x) + torch.arange(4.0))
    with pytest.raises(ValueError, match="factor 'global' lies outside the plate 'data'"):
        value("iwae", (lambda x: factored(x, outside=True), guide), x)
