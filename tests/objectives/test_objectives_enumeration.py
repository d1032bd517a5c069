"""Discrete latents summed exactly: Pyro's sums, the model's own, and none of it read back."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from test_objectives_discrete import DATA, C, Small, exact, mean
from torch import nn

from pyrovae.objectives import estimate, make_objective, per_datum
from pyrovae.pairs.pair import Pair


@pytest.mark.parametrize("enumerate", ["parallel", "sequential"])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_enumeration_is_the_exact_sum(enumerate, scale):
    pair = Small(enumerate=enumerate)
    weighted = poutine.scale(scale=scale)
    parameters = Pair(weighted(pair.model), weighted(pair.guide))
    objective = make_objective("trace_enum_elbo")
    objective.max_plate_nesting = 1
    found = estimate(objective, parameters, DATA)
    total, slope = exact(pair, mean, 1)
    torch.testing.assert_close(found.loss, scale * total)
    (gradient,) = torch.autograd.grad(found.surrogate, [pair.table])
    torch.testing.assert_close(gradient, scale * slope)
    each = per_datum(objective, parameters, DATA)
    torch.testing.assert_close(each.sum(), -total)
    assert found.terms.keys() == {"x", "y"}
    torch.testing.assert_close(sum(found.terms.values()), -found.loss)


@pytest.mark.parametrize("enumerate", ["parallel", "sequential", None])
@pytest.mark.parametrize("particles", [1, 3])
def test_enumeration_beside_samples_is_that_of_pyro(enumerate, particles):
    pair = Small(mixed=True, enumerate=enumerate)
    parameters = Pair(pair.model, pair.guide)
    objective = make_objective("trace_enum_elbo", particles)
    objective.max_plate_nesting = 1 + (particles > 1)
    objective.strict_enumeration_warning = False
    pyro.set_rng_seed(3)
    found = estimate(objective, parameters, DATA)
    pyro.set_rng_seed(3)
    theirs = objective.differentiable_loss(pair.model, pair.guide, DATA)
    torch.testing.assert_close(found.loss, theirs.detach())
    gradients = (torch.autograd.grad(loss, [pair.table])[0] for loss in (found.surrogate, theirs))
    torch.testing.assert_close(*gradients)


class Cells(nn.Module):
    """A discrete latent for each cell of a row, below a continuous one for the row."""

    def __init__(self, enumerate):
        super().__init__()
        self.infer = {"enumerate": enumerate}
        self.table = nn.Parameter(torch.linspace(-1, 1, 2 * C, dtype=torch.float64).reshape(2, C))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("cells", x.shape[1], dim=-1):
                y = pyro.sample("y", dist.Categorical(logits=self.table[0]))
                pyro.sample("x", dist.Bernoulli(logits=self.table[0][y] + z), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(self.table[1, 0], 0.5))
            with pyro.plate("cells", x.shape[1], dim=-1):
                logits = self.table[1] * x.unsqueeze(-1)
                pyro.sample("y", dist.Categorical(logits=logits), infer=self.infer)


@pytest.mark.parametrize("enumerate", ["parallel", "sequential"])
def test_enumeration_within_cells_counts_the_row_once(enumerate):
    pair, x = Cells(enumerate), torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]).double()
    objective = make_objective("trace_enum_elbo")
    objective.max_plate_nesting = 2
    pyro.set_rng_seed(3)
    found = estimate(objective, Pair(pair.model, pair.guide), x)
    pyro.set_rng_seed(3)
    theirs = objective.differentiable_loss(pair.model, pair.guide, x)
    torch.testing.assert_close(found.loss, theirs.detach())
    gradients = (torch.autograd.grad(loss, [pair.table])[0] for loss in (found.surrogate, theirs))
    torch.testing.assert_close(*gradients)


class Summed(nn.Module):
    """y is the model's alone, which sums over it; z and x are normal."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64))
        self.slope = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))

    def model(self, x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=self.loc), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(self.loc[y], 0.7))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.slope * x, 1.0))

    def log_prob(self, x):
        parts = dist.Normal(self.loc, (0.7**2 + 0.5**2) ** 0.5).log_prob(x.unsqueeze(-1))
        return (parts + self.loc.log_softmax(0)).logsumexp(-1)


def test_what_the_model_sums_over_is_inside_of_the_weights():
    pair, x = Summed(), torch.tensor([0.3, 2.5], dtype=torch.float64)
    parameters = Pair(pair.model, pair.guide)
    exact = -pair.log_prob(x).sum()
    (expected,) = torch.autograd.grad(exact, [pair.loc])
    for name in ("iwae", "iwae_dreg", "reweighted_wake_sleep"):
        pyro.set_rng_seed(0)
        found = estimate(make_objective(name, particles=30_000), parameters, x)
        torch.testing.assert_close(found.loss, exact.detach(), rtol=0, atol=0.02)
        slopes = torch.autograd.grad(found.surrogate, [pair.loc, pair.slope])
        torch.testing.assert_close(slopes[0], expected, rtol=0, atol=0.03)
        assert slopes[1] != 0
    asleep = estimate(make_objective("wake_sleep"), parameters, x)
    assert asleep.surrogate.requires_grad


def test_impossible_values_are_left_out_of_an_enumeration():
    pair = Small(mixed=True, enumerate="sequential")
    with torch.no_grad():
        pair.table[2, 0] = -1e4
        pair.table[0, 0] = -torch.inf
    parameters = Pair(pair.model, pair.guide)
    found = estimate(make_objective("trace_enum_elbo"), parameters, DATA)
    (gradient,) = torch.autograd.grad(found.surrogate, [pair.table])
    assert found.loss.isfinite()
    assert gradient[1:, 1:].isfinite().all()
