"""Divergences between Gaussians of every kind, against dense matrices."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch.distributions import kl_divergence

from pyrovae.distributions import kl_standard_normal

KINDS = ["diagonal", "full", "low_rank"]
PAIRS = [(q, p) for q in KINDS for p in KINDS]
MIXED = [(q, p) for q, p in PAIRS if q != p and "diagonal" in (q, p)]
BATCHES = [((7,), ()), ((), (7,)), ((3, 7), ()), ((3, 7), (7,)), ((3, 1), (7,)), ((7,), (3, 7))]


@pytest.fixture(autouse=True)
def seeded():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def parameters(*batch, size=4, dtype=torch.float64):
    loc, scale, root = (torch.randn(*batch, *s, dtype=dtype) for s in ([size], [size], [size] * 2))
    return loc, 0.5 + scale.abs(), 0.5 * root


def build(kind, loc, scale, root):
    if kind == "diagonal":
        return dist.Normal(loc, scale).to_event(1)
    if kind == "low_rank":
        return dist.LowRankMultivariateNormal(loc, root[..., :2], scale)
    return dist.MultivariateNormal(loc, scale_tril=root.tril(-1) + scale.diag_embed())


def gaussian(kind, *batch, **options):
    return build(kind, *parameters(*batch, **options))


def dense(d, batch=()):
    """The same Gaussian, by its covariance matrix in float64."""
    diagonal = isinstance(d, dist.Independent)
    cov = d.variance.diag_embed() if diagonal else d.covariance_matrix
    return dist.MultivariateNormal(d.mean.double(), cov.double()).expand(batch)


def close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("q", "p"), PAIRS)
def test_every_pair_agrees_with_dense_matrices(q, p):
    q, p = gaussian(q), gaussian(p)
    close(kl_divergence(q, p), kl_divergence(dense(q), dense(p)))
    close(kl_divergence(q, q), torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize(("q", "p"), PAIRS)
@pytest.mark.parametrize("batches", BATCHES)
def test_every_pair_broadcasts(q, p, batches):
    q, p, batch = (
        gaussian(q, *batches[0]),
        gaussian(p, *batches[1]),
        torch.broadcast_shapes(*batches),
    )
    expected = kl_divergence(dense(q, batch), dense(p, batch))
    close(kl_divergence(q, p), expected)
    close(kl_divergence(q.expand(batch), p.expand(batch)), expected)


@pytest.mark.parametrize(("q", "p"), MIXED)
def test_float32(q, p):
    q, p = (gaussian(kind, 7, dtype=torch.float32) for kind in (q, p))
    divergence = kl_divergence(q, p)
    assert divergence.dtype == torch.float32
    torch.testing.assert_close(
        divergence.double(), kl_divergence(dense(q, (7,)), dense(p, (7,))), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("q", "p"), MIXED)
def test_gradients(q, p):
    def divergence(*values):
        return kl_divergence(build(q, *values[:3]), build(p, *values[3:]))

    leaves = [v.requires_grad_() for v in parameters(2) + parameters()]
    assert torch.autograd.gradcheck(divergence, leaves)


@pytest.mark.parametrize(("q", "p"), MIXED)
def test_divergence_is_an_expectation(q, p):
    q, p = gaussian(q), gaussian(p)
    z = q.sample((20_000,))
    ratio = q.log_prob(z) - p.log_prob(z)
    distance = abs(ratio.mean() - kl_divergence(q, p))
    assert distance < 4 * ratio.std() / math.sqrt(len(z))


@pytest.mark.parametrize(("q", "p"), MIXED)
def test_mean_field_elbo_stays_analytic(q, p):
    q, p, x = gaussian(q, 6), gaussian(p), torch.randn(6, dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", p)
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", q)

    first, second = (TraceMeanField_ELBO().loss(model, guide, x) for _ in range(2))
    elbo = dist.Normal(0.0, 1.0).log_prob(x) - kl_divergence(dense(q, (6,)), dense(p, (6,)))
    assert first == second == pytest.approx(-elbo.sum().item(), abs=1e-10)


@pytest.mark.parametrize("kind", ["full", "low_rank"])
def test_other_pairs_keep_their_rules(kind):
    vector, matrix = torch.ones(4), torch.ones(4, 4)
    others = [
        dist.Laplace(vector, vector).to_event(1),
        dist.Normal(matrix, matrix).to_event(2),
        dist.Normal(matrix, matrix).to_event(1).to_event(1),
    ]
    for other in others:
        for pair in ((gaussian(kind), other), (other, gaussian(kind))):
            with pytest.raises(NotImplementedError):
                kl_divergence(*pair)
    with pytest.raises(ValueError, match="one event shape"):
        kl_divergence(gaussian(kind), gaussian("diagonal", size=3))


def test_a_point_keeps_the_rule_of_pyro():
    full, point = gaussian("full"), torch.ones(4, dtype=torch.float64)
    close(kl_divergence(dist.Delta(point).to_event(1), full), -full.log_prob(point))


def test_standard_normal():
    loc, scale, _ = parameters(7)
    prior = dist.Normal(torch.zeros(4, dtype=torch.float64), 1.0).to_event(1)
    expected = kl_divergence(dist.Normal(loc, scale).to_event(1), prior)
    close(kl_standard_normal(loc, scale), expected)
    close(kl_standard_normal(prior.mean, prior.stddev), torch.zeros_like(prior.mean[0]))
