"""Priors and posteriors of one latent layer, held against closed forms and quadrature."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch.distributions import kl_divergence

import pyrovae
from one_layer import (
    FLOWS,
    GUIDES,
    LATENT,
    PRIORS,
    SHAPE,
    N,
    build,
    data,
    double,
    edited,
    grid,
    pair,
    posterior_of,
    prior_of,
    svi_of,
)
from pyrovae.guides.linear_gaussian import LinearGaussian as AffineGuide
from pyrovae.models.linear_gaussian import LinearGaussian
from pyrovae.objectives import estimate
from pyrovae.pairs.pair import Pair


@pytest.mark.parametrize("guide", GUIDES)
def test_a_posterior_is_a_density_and_draws_follow_it(guide):
    programs = double(*pair("bernoulli", guide, latent=2))
    x = data("bernoulli", 1).double()
    if guide == "autoencoder":
        programs[1].scale = 0.3
    z, area = grid()
    with torch.no_grad():
        posterior = posterior_of(programs[1], x)
        density = posterior.log_prob(z[:, None])[:, 0].exp()
        drawn = posterior_of(programs[1], x.expand(20_000, *SHAPE))
        pyro.set_rng_seed(1)
        drawn = drawn.sample()
    assert (density.sum() * area).item() == pytest.approx(1, abs=1e-3)
    for f in (lambda z: z, torch.square, lambda z: z[:, :1] * z, torch.sin):
        expected = (density[:, None] * f(z)).sum(0) * area
        error = 5 * f(drawn).std(0) / math.sqrt(len(drawn)) + 1e-3
        assert bool(((f(drawn).mean(0) - expected).abs() < error).all())


@pytest.mark.parametrize("model", PRIORS)
def test_a_learned_prior_is_a_density_and_draws_follow_it(model):
    programs = double(*pair(model, "mean_field", latent=2))
    x = data(model, 4).double()
    svi = svi_of(*programs)
    for _ in range(20):
        svi.step(x)
    z, area = grid()
    with torch.no_grad():
        prior = prior_of(programs[0], x[:1])
        density = prior.log_prob(z[:, None])[:, 0].exp()
        pyro.set_rng_seed(1)
        drawn = prior.sample((20_000,))[:, 0]
    assert (density.sum() * area).item() == pytest.approx(1, abs=1e-3)
    for f in (lambda z: z, torch.square, lambda z: z[:, :1] * z, torch.sin):
        expected = (density[:, None] * f(z)).sum(0) * area
        error = 5 * f(drawn).std(0) / math.sqrt(len(drawn)) + 1e-3
        assert bool(((f(drawn).mean(0) - expected).abs() < error).all())


@pytest.mark.parametrize(
    "line",
    ["dist.Laplace(self.zero, 1.0)", "dist.StudentT(3.0, self.zero, 1.0)"],
    ids=["laplace", "student-t"],
)
def test_the_prior_is_one_line_to_edit(line):
    make = edited("models", "bernoulli", "dist.Normal(self.zero, 1.0)", line)
    model, guide = make((4,), latent=1, hidden=(6,)), build("guides", "mean_field", (4,), latent=1)
    x = torch.bernoulli(torch.full((5, 4), 0.5))
    ll = pyrovae.log_likelihood(model, guide, x, num_samples=4000, seed=0)
    with torch.no_grad():
        z = torch.linspace(-150, 150, 300_001)[:, None, None]
        prior = eval(line, {"dist": dist, "self": model}).log_prob(z[..., 0])
        likelihood = dist.Bernoulli(logits=model.decoder(z)).to_event(1).log_prob(x)
        exact = (prior + likelihood).double().logsumexp(0) + math.log(300 / 300_000)
    assert bool(((ll.log_prob - exact).abs() < 5 * ll.standard_error + 2e-3).all())


def test_a_mixture_prior_with_a_linear_decoder_is_a_mixture_of_gaussians():
    make = edited(
        "models", "mixture_prior", "dist.Bernoulli(logits=logits)", "dist.Normal(logits, 0.5)"
    )
    model = make((5,), latent=2, hidden=(), components=3)
    with torch.no_grad():
        model.logits.copy_(torch.tensor([0.5, -1.0, 0.0]))
        model.scale = 0.3 + torch.rand(3, 2)
    x = pyrovae.sample(model, like=torch.zeros(1, 5), n=40, seed=2)
    weight, bias = model.decoder.layers[0].weight, model.decoder.layers[0].bias
    factor = weight * model.scale.unsqueeze(-2)
    cov = factor @ factor.mT + 0.25 * torch.eye(5)
    parts = dist.MultivariateNormal(model.loc @ weight.mT + bias, cov)
    exact = dist.MixtureSameFamily(dist.Categorical(logits=model.logits), parts).log_prob(x)
    guide = AffineGuide((5,), latent=2)
    with torch.no_grad():
        guide.encoder.layers[0].weight.zero_()
        guide.scale_tril = 2.0 * torch.eye(2)
    ll = pyrovae.log_likelihood(model, guide, x, num_samples=4000, seed=0)
    z = (ll.log_prob - exact.detach()) / ll.standard_error
    assert z.abs().max() < 4.5
    assert ll.mean == pytest.approx(exact.mean().item(), abs=4 * ll.mean_standard_error)
    assert ll.mean_standard_error < 0.02


def train_guide(model, guide, x, objective, steps, lr):
    """Train a guide alone, with a rate that falls to zero."""
    model.requires_grad_(False).eval()
    parameters, optimizer = Pair(model, guide), torch.optim.Adam(guide.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        estimate(objective, parameters, x).surrogate.backward()
        optimizer.step()


@pytest.mark.parametrize("guide", ["full_covariance", "low_rank", "mean_field"])
def test_covariances_reach_the_exact_posterior_of_a_linear_model(guide):
    model = LinearGaussian((6,), latent=2, scale=0.6)
    with torch.no_grad():
        weight = [[1.0, 0.9], [0.8, 1.0], [1.0, 1.0], [0.1, 0.0], [0.0, 0.2], [0.5, 0.6]]
        model.decoder.layers[0].weight.copy_(torch.tensor(weight))
    x = pyrovae.sample(model, like=torch.zeros(1, 6), n=30, seed=0)
    program = build("guides", guide, (6,), latent=2, hidden=())
    objective = TraceMeanField_ELBO(4, 1, vectorize_particles=True)
    train_guide(model, program, x, objective, steps=500, lr=0.06)
    with torch.no_grad():
        exact = model.posterior(x)
        gap = kl_divergence(posterior_of(program, x), exact).mean().item()
    precision = torch.linalg.inv(exact.covariance_matrix[0])
    least = 0.5 * (precision.diagonal().log().sum() - precision.logdet()).item()
    assert least > 0.5
    expected, slack = {"mean_field": (least, 0.02), "low_rank": (0.0, 0.1)}.get(guide, (0.0, 0.02))
    assert gap == pytest.approx(expected, abs=slack)


class Ring(PyroModule):
    """A datum says how far z is from the origin, and nothing of where it lies on that circle."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            radius = z.square().sum(-1, keepdim=True)
            pyro.sample("x", dist.Normal(radius, 0.3).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("guide", "options", "least", "most"),
    [
        ("mean_field", {}, 1.8, 2.2),
        ("iaf", {"width": 16, "steps": 4}, 0.0, 1.8),
        ("mixture", {"components": 4}, 0.0, 1.6),
        ("flow", {"width": 16, "steps": 4}, 0.0, 1.4),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_flows_and_mixtures_come_nearer_to_a_ring_than_a_normal(guide, options, least, most):
    x, (z, area) = torch.tensor([[2.0]]), grid(121, 5.0)
    log_joint = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    log_joint += dist.Normal(z.square().sum(-1), 0.3).log_prob(x)[0]
    log_evidence = log_joint.logsumexp(0) + math.log(area)
    program = build("guides", guide, (1,), latent=2, **options)
    objective = Trace_ELBO(16, 1, vectorize_particles=True)
    train_guide(Ring(), program, x, objective, steps=200, lr=0.02)
    with torch.no_grad():
        log_q = posterior_of(program, x).log_prob(z[:, None].float())[:, 0].double()
    gap = (log_q.exp() * (log_q - log_joint + log_evidence)).sum() * area
    assert least < gap < most


def test_the_autoencoder_codes_better_and_generates_worse():
    x = pyrovae.load_data("digits", binarize="threshold").train[:512]
    found = {}
    for guide in ("mean_field", "autoencoder"):
        pyro.set_rng_seed(0)
        programs = pair("bernoulli", guide, latent=6, hidden=(48,))
        svi = svi_of(*programs, lr=0.01)
        for step in range(150):
            svi.step(x[step % 4 :: 4])
        bound = pyrovae.elbo(*programs, x, particles=5, seed=0)
        drawn = pyrovae.sample(programs[0], like=x, n=200, mean=True, seed=0).gt(0.5).float()
        off = torch.cdist(drawn.flatten(1), x.flatten(1), p=1).amin(1).mean().item()
        found[guide] = bound.reconstruction.mean().item(), bound.mean, off
    (coded, bound, off), (code, price, away) = found["mean_field"], found["autoencoder"]
    assert code > coded + 4
    assert price < bound - 8
    assert away > off + 1


def test_a_vamp_prior_is_the_mixture_of_its_guides_posteriors():
    for name in set(GUIDES) - set(FLOWS):
        model, guide = pair("vamp_prior", name)
        prior = prior_of(model, data("vamp_prior"))
        z = torch.randn(5, N, LATENT)
        parts = [posterior_of(guide, u[None]) for u in model.pseudo]
        exact = torch.stack([q.log_prob(z) for q in parts]).logsumexp(0) - math.log(len(parts))
        torch.testing.assert_close(prior.log_prob(z), exact, rtol=1e-4, atol=1e-4)


def test_a_flow_prior_lies_near_what_it_starts_from():
    model = build("models", "flow_prior", latent=4)
    drawn = prior_of(model, data("flow_prior")).sample((2000,))
    assert drawn.mean((0, 1)).abs().max() < 1.0
    assert drawn.std((0, 1)).log().abs().max() < 1.0


@pytest.mark.parametrize(
    ("kind", "name"), [("models", "flow_prior"), ("guides", "flow"), ("guides", "iaf")]
)
def test_a_flow_couples_every_dimension_with_others(kind, name):
    x = data("flow_prior", 1)
    program = build(kind, name, latent=5)
    flow = prior_of(program, x) if kind == "models" else posterior_of(program, x)

    def run(z):
        for transform in flow.transforms:
            z = transform(z)
        return z[0]

    slope = torch.autograd.functional.jacobian(run, torch.randn(1, 5))[:, 0]
    assert bool((slope.abs().gt(1e-6).sum(-1) > 1).all())
    assert slope.slogdet().sign == 1
