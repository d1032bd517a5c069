"""The linear-Gaussian pair against dense Gaussians and Bayes' rule."""

import math

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from pyrovae.distributions import kl_standard_normal
from pyrovae.guides.linear_gaussian import LinearGaussian as Guide
from pyrovae.models.linear_gaussian import LinearGaussian as Model

SHAPES = [(6,), (64,), (1, 8, 8), (3, 2, 4)]


@pytest.fixture(autouse=True)
def fresh():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def make(shape, latent=3, scale=0.4, dtype=torch.float64, n=7):
    """A pair with the exact guide, and data drawn from the model."""
    model = Model(shape, latent, scale).to(dtype)
    x = draw(model, n)
    return model, Guide(shape, latent).to(dtype).match(model), x


def draw(model, n):
    template = torch.zeros(n, *model.decoder.out_shape, dtype=model.zero.dtype)
    trace = pyro.poutine.trace(pyro.poutine.uncondition(model)).get_trace(template)
    return trace.nodes["x"]["value"].detach()


def dense(model):
    """The marginal of flattened data, in float64, from its D by D covariance."""
    affine = model.decoder.layers[0]
    weight, scale = affine.weight.double(), model.scale.double()
    noise = scale**2 * torch.eye(len(weight), dtype=torch.float64)
    return MultivariateNormal(affine.bias.double(), weight @ weight.mT + noise)


def log_weights(model, guide, x, particles):
    """ln p(x, z) - ln q(z|x), [K, N]."""

    def vectorized(program):
        def run(x):
            with pyro.plate("k", particles, dim=-2):
                program(x)

        return run

    q = pyro.poutine.trace(vectorized(guide)).get_trace(x)
    p = pyro.poutine.trace(pyro.poutine.replay(vectorized(model), q)).get_trace(x)
    q.compute_log_prob()
    p.compute_log_prob()
    return (p.nodes["z"]["log_prob"] + p.nodes["x"]["log_prob"] - q.nodes["z"]["log_prob"]).detach()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("latent", [1, 3, 6])
def test_log_prob_is_the_dense_normal(shape, latent):
    model, _, x = make(shape, latent)
    expected = dense(model).log_prob(x.flatten(1))
    torch.testing.assert_close(model.log_prob(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", [0.05, 1.0, 20.0])
def test_log_prob_in_float32(scale):
    model, _, x = make((64,), scale=scale, dtype=torch.float32)
    answer = model.log_prob(x)
    assert answer.dtype == torch.float32
    torch.testing.assert_close(
        answer.double(), dense(model).log_prob(x.double()), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_posterior_is_the_conditional_of_the_joint(shape):
    model, _, x = make(shape)
    weight, marginal = model.decoder.layers[0].weight, dense(model)
    gain = torch.linalg.solve(marginal.covariance_matrix, weight).mT
    posterior = model.posterior(x)
    assert posterior.batch_shape == (len(x),)
    loc = (x.flatten(1) - marginal.loc) @ gain.mT
    cov = torch.eye(3, dtype=torch.float64) - gain @ weight
    torch.testing.assert_close(posterior.mean, loc, rtol=0, atol=1e-10)
    torch.testing.assert_close(posterior.covariance_matrix[0], cov, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_log_weights_of_the_exact_guide_are_log_prob(shape, dtype, atol):
    model, guide, x = make(shape, dtype=dtype)
    weights = log_weights(model, guide, x, particles=50)
    assert weights.shape == (50, len(x))
    torch.testing.assert_close(weights, model.log_prob(x).expand(50, -1), rtol=0, atol=atol)


def test_log_weights_of_another_guide_vary():
    model, guide, x = make((64,))
    with torch.no_grad():
        guide.encoder.layers[0].bias += 0.1
    assert log_weights(model, guide, x, particles=50).std(0).min() > 0.01


def test_elbo_of_the_exact_guide_is_the_log_likelihood():
    model, guide, x = make((6,))
    expected = -model.log_prob(x).sum().item()
    assert Trace_ELBO().loss(model, guide, x) == pytest.approx(expected, abs=1e-10)
    losses = torch.tensor([TraceMeanField_ELBO().loss(model, guide, x) for _ in range(200)])
    assert losses.std() > 0
    assert abs(losses.mean() - expected) < 4 * losses.std() / math.sqrt(len(losses))


def test_divergence_from_the_prior_is_analytic():
    model, _, x = make((6,), latent=1)
    posterior, zero = model.posterior(x), torch.zeros(1, dtype=torch.float64)
    expected = kl_standard_normal(posterior.mean, posterior.stddev)
    divergence = kl_divergence(posterior, Independent(Normal(zero, 1.0), 1))
    torch.testing.assert_close(divergence, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(6,), (1, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fit_exact_is_the_maximum(shape, dtype):
    x = 3 + torch.randn(200, 6, dtype=dtype) @ torch.randn(6, 6, dtype=dtype)
    x = x.reshape(-1, *shape)
    model = Model(shape, latent=2).to(dtype)
    before = list(model.parameters())
    assert model.fit_exact(x) is model
    assert all(p is q and p.dtype == dtype for p, q in zip(before, model.parameters(), strict=True))
    best = model.log_prob(x.double()).mean()
    gradients = torch.autograd.grad(best, before)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert max(g.abs().max() for g in gradients) < tolerance
    for p in before:
        for step in 0.05 * torch.randn(20, *p.shape, dtype=dtype):
            with torch.no_grad():
                p += step
                assert model.log_prob(x.double()).mean() < best
                p -= step


def test_fit_exact_recovers_the_model():
    truth, _, x = make((6,), latent=2, n=20_000)
    model = Model((6,), latent=2).double().fit_exact(x)
    difference = dense(model).covariance_matrix - dense(truth).covariance_matrix
    assert difference.abs().max() < 0.03
    assert model.log_prob(x).mean() > truth.log_prob(x).mean()


@pytest.mark.parametrize(
    ("x", "latent"),
    [
        (torch.randn(10, 4), 4),
        (torch.randn(10, 4), 5),
        (torch.ones(10, 4), 2),
        (torch.randn(10, 1) @ torch.randn(1, 4), 2),
        (torch.randn(3, 4), 2),
    ],
)
def test_fit_exact_refuses_data_without_noise(x, latent):
    with pytest.raises(ValueError, match="smaller latent"):
        Model((4,), latent).fit_exact(x)


def test_wrong_shapes_are_refused():
    model = Model((1, 2, 3))
    for x in (torch.zeros(2, 3), torch.zeros(5, 6), torch.zeros(0, 1, 2, 3)):
        with pytest.raises(ValueError, match=r"Expected data \[N, 1, 2, 3\]"):
            model.log_prob(x)
    with pytest.raises(ValueError, match="latent"):
        Guide((1, 2, 3), latent=4).match(model)
    with pytest.raises(ValueError, match="scale"):
        Model((4,), scale=0)
