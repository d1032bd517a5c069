"""The identities of docs/theory.md, checked on the code that is printed there."""

import itertools
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from torch.distributions import kl_divergence

from pyrovae.guides.mean_field import MeanField
from pyrovae.models.bernoulli import Bernoulli
from pyrovae.models.linear_gaussian import LinearGaussian

DOCUMENT = Path(__file__).parents[2] / "docs" / "theory.md"
KINDS = ["diagonal", "full", "low_rank"]


@pytest.fixture(autouse=True)
def in_double_precision():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture
def theory():
    """The namespace left by running the document's Python blocks in order."""
    text, names = DOCUMENT.read_text(encoding="utf-8"), {}
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        above = text[: block.start(1)].count("\n")
        exec(compile("\n" * above + block[1], DOCUMENT, "exec"), names)
    return SimpleNamespace(**names)


def close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def within(samples, expected, errors=4.0):
    """The mean over the first dimension is as expected, to a number of standard errors."""
    distance = (samples.mean(0) - expected).abs()
    assert (distance < errors * samples.std(0) / math.sqrt(len(samples))).all()


def categorical(batch=200, size=5):
    return dist.Categorical(dist.Dirichlet(torch.full((batch, size), 0.7)).sample())


def gaussian(kind, batch=(), size=4):
    """A Gaussian and its covariance matrix."""
    loc, scale = torch.randn(*batch, size), 0.5 + torch.rand(*batch, size)
    if kind == "diagonal":
        return dist.Normal(loc, scale).to_event(1), scale.square().diag_embed()
    root = torch.randn(*batch, size, 2) if kind == "low_rank" else torch.randn(*batch, size, size)
    cov = root @ root.mT + scale.diag_embed()
    if kind == "low_rank":
        return dist.LowRankMultivariateNormal(loc, root, scale), cov
    return dist.MultivariateNormal(loc, cov), cov


def linear_model(n=5):
    """A linear-Gaussian model, data, and a posterior that is not the exact one."""
    model = LinearGaussian((4,), latent=2, scale=0.8)
    return model, torch.randn(n, 4), gaussian("full", (n,), size=2)[0]


def bernoulli_model(latent):
    model = Bernoulli((3,), latent, hidden=(4,), activation="Tanh")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.6)
    return model, torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)


def test_the_document_names_every_test_here():
    named = re.findall(r"`tests/\w+/(test_\w+)\.py::(\w+)`", DOCUMENT.read_text(encoding="utf-8"))
    for module, test in named:
        source = next(Path(__file__).parents[1].rglob(f"{module}.py")).read_text(encoding="utf-8")
        assert f"\ndef {test}(" in source
    written = {name for name in globals() if name.startswith("test_")}
    here = {test for module, test in named if module == "test_theory"}
    assert written - here == {"test_the_document_names_every_test_here"}


def test_information_of_independent_events_adds(theory):
    coin, die = dist.Categorical(torch.ones(2)), dist.Categorical(torch.rand(6))
    heads, six, certain = torch.tensor(1), torch.tensor(5), dist.Categorical(torch.ones(1))
    assert theory.information(coin, heads).item() == pytest.approx(math.log(2))
    close(theory.information(certain, torch.tensor(0)), torch.tensor(0.0))
    both = dist.Categorical((coin.probs[:, None] * die.probs).flatten())
    total = theory.information(coin, heads) + theory.information(die, six)
    close(theory.information(both, torch.tensor(11)), total)


def test_entropy_is_largest_for_the_uniform(theory):
    P = categorical()
    close(theory.entropy(P), P.entropy())
    close(theory.entropy(dist.Categorical(torch.ones(5))), torch.tensor(math.log(5)))
    close(theory.entropy(dist.Categorical(torch.eye(5)[0])), torch.tensor(0.0))
    assert (theory.entropy(P) < math.log(5)).all()
    assert (theory.entropy(P) > 0).all()
    x = P.sample((2_000,))
    within(theory.information(P, x), P.entropy(), errors=5)


def test_cross_entropy_is_entropy_plus_divergence(theory):
    P, Q = categorical(), categorical()
    close(theory.divergence(P, Q), (P.probs * (P.probs / Q.probs).log()).sum(-1))
    close(theory.cross_entropy(P, Q), theory.entropy(P) + theory.divergence(P, Q))


def test_divergence_is_not_negative(theory):
    P, Q = categorical(), categorical()
    assert (theory.divergence(P, Q) > 0).all()
    assert (theory.gibbs_gap(P, Q) > 0).all()
    close(theory.gibbs_gap(P, P), torch.zeros(200))
    close(theory.divergence(P, P), torch.zeros(200))


def test_cross_entropy_is_least_at_the_truth(theory):
    P = categorical()
    logits = P.logits.clone().requires_grad_()
    least = theory.cross_entropy(P, dist.Categorical(logits=logits))
    close(torch.autograd.grad(least.sum(), logits)[0], torch.zeros(200, 5))
    near = dist.Categorical(logits=logits + 1e-3 * torch.randn(200, 5))
    assert (theory.cross_entropy(P, near) > least).all()


@pytest.mark.parametrize("q", KINDS)
@pytest.mark.parametrize("p", KINDS)
def test_gaussian_divergences(theory, q, p):
    (q, q_cov), (p, p_cov) = gaussian(q), gaussian(p)
    close(kl_divergence(q, p), theory.gaussian_divergence(q.mean, q_cov, p.mean, p_cov))
    close(kl_divergence(q, q), torch.tensor(0.0))
    z = q.sample((20_000,))
    within(q.log_prob(z) - p.log_prob(z), kl_divergence(q, p))


def test_divergence_from_the_standard_normal(theory):
    loc, scale = torch.randn(7, 3), torch.rand(7, 3) + 0.1
    q, p = dist.Normal(loc, scale).to_event(1), dist.Normal(torch.zeros(3), 1.0).to_event(1)
    close(theory.rate(loc, scale), kl_divergence(q, p))
    close(theory.rate(torch.zeros(3), torch.tensor(1.0)), torch.tensor(0.0))


def test_evidence_is_elbo_plus_divergence(theory):
    model, x, q = linear_model()
    close(theory.evidence(model, q, x), model.log_prob(x))
    close(theory.linear_elbo(model, model.posterior(x), x), model.log_prob(x))
    assert (theory.linear_elbo(model, q, x) < model.log_prob(x)).all()


def test_forms_are_the_losses_of_pyro(theory):
    model, x = bernoulli_model(latent=2)
    guide = MeanField((3,), latent=2, hidden=(4,))
    p, q = theory.traces(model, guide, x)
    for loss, elbo in ((Trace_ELBO(), theory.form_a), (TraceMeanField_ELBO(), theory.form_b)):
        pyro.set_rng_seed(1)
        expected = loss.loss(model, guide, x)
        pyro.set_rng_seed(1)
        p, q = theory.traces(model, guide, x)
        assert -elbo(p, q).sum().item() == pytest.approx(expected, abs=1e-10)


def test_forms_agree_in_expectation(theory):
    model, x = bernoulli_model(latent=2)
    guide = MeanField((3,), latent=2, hidden=(4,))
    p, q = theory.traces(model, guide, x.repeat(10_000, 1))
    difference = (theory.form_a(p, q) - theory.form_b(p, q)).reshape(10_000, len(x))
    assert difference.std(0).min() > 0.1
    within(difference, 0)


def test_forms_agree_exactly_on_the_linear_model(theory):
    model, x, q = linear_model()
    corners = math.sqrt(2) * torch.cat([torch.eye(2), -torch.eye(2)])
    z = q.mean + (q.scale_tril @ corners.mT).permute(2, 0, 1)
    scores = [theory.log_joint(model, x[[n]], z[:, n]) for n in range(len(x))]
    prior, likelihood = (torch.cat(s, 1).mean(0) for s in zip(*scores, strict=True))
    close(prior + likelihood - q.log_prob(z).mean(0), theory.linear_elbo(model, q, x))
    rate = kl_divergence(q, dist.Normal(torch.zeros(2), 1.0).to_event(1))
    close(likelihood - rate, theory.linear_elbo(model, q, x))


def test_jensen_bounds_the_evidence(theory):
    model, x, _ = linear_model()
    guide, repeats = MeanField((4,), latent=2, hidden=(4,)), 1_000
    p, q = theory.traces(model, guide, x.repeat(64 * repeats, 1))
    log_weights = theory.form_a(p, q).detach().reshape(64, repeats, len(x))
    mean, last = theory.bounds(log_weights[:1])
    close(mean, last)
    for particles in (2, 8, 64):
        mean, bound = theory.bounds(log_weights[:particles])
        assert (mean < bound).all()
        rise = (bound - last).sum(-1)
        assert rise.mean() > 4 * rise.std() / math.sqrt(repeats)
        last = bound
    slack = model.log_prob(x) - last
    assert (slack.mean(0) > -4 * slack.std(0) / math.sqrt(repeats)).all()


def test_monte_carlo_error_falls_as_the_root(theory):
    model, x, q = linear_model(n=1)
    exact = theory.linear_elbo(model, q, x) + kl_divergence(
        q, dist.Normal(torch.zeros(2), 1.0).to_event(1)
    )
    sizes, repeats = torch.tensor([16, 64, 256, 1024, 4096]), 400
    errors = []
    for n in sizes.tolist():
        z = q.sample((repeats * n,))
        values = dist.Normal(model.decoder(z), model.scale).to_event(1).log_prob(x)
        mean, standard_error = theory.monte_carlo(values.detach().reshape(repeats, n))
        errors.append((mean - exact).square().mean().sqrt())
    log_n = sizes.log() - sizes.log().mean()
    slope = (log_n * torch.stack(errors).log()).sum() / log_n.square().sum()
    tolerance = 4 / torch.sqrt(2 * repeats * log_n.square().sum())
    assert abs(slope + 0.5) < tolerance
    covered = ((mean - exact).abs() < 1.96 * standard_error).double()
    assert abs(covered.mean() - 0.95) < 4 * math.sqrt(0.95 * 0.05 / repeats)


def test_pathwise_gradients_vary_less_than_score_gradients(theory):
    model, x, _ = linear_model(n=1)
    affine, n = model.decoder.layers[0], 100_000
    loc, scale = torch.tensor([0.3, -0.5]), torch.tensor([0.7, 0.4])
    gain = affine.weight.detach() / model.scale.detach() ** 2
    exact_loc = (x - affine(loc)).detach()[0] @ gain
    exact_scale = -scale * (gain * affine.weight.detach()).sum(0)
    rows = [p.expand(n, 2).clone().requires_grad_() for p in (loc, scale)]

    def f(z):
        return dist.Normal(affine(z), model.scale).to_event(1).log_prob(x)

    pathwise, score = theory.pathwise_gradient(f, *rows), theory.score_gradient(f, *rows)
    for low, high, exact in zip(pathwise, score, (exact_loc, exact_scale), strict=True):
        within(low, exact)
        within(high, exact)
        within(low - high, 0)
        assert (low.var(0) < high.var(0)).all()


@pytest.mark.parametrize("latent", [1, 2])
def test_quadrature_converges(theory, latent):
    model, x = bernoulli_model(latent)
    exact = theory.grid(model, x, latent, step=0.1)
    close(theory.grid(model, x, latent, step=0.2), exact)
    errors = [(theory.hermite(model, x, latent, n) - exact).abs().max() for n in (5, 20, 80)]
    assert errors[-1] < 1e-6
    assert all(fine < 0.1 * coarse for coarse, fine in itertools.pairwise(errors))


@pytest.mark.parametrize("latent", [1, 2])
def test_prior_draws_agree_with_quadrature(theory, latent):
    model, x = bernoulli_model(latent)
    mean, standard_error = theory.prior_monte_carlo(model, x, latent, n=50_000)
    exact = theory.grid(model, x, latent, step=0.2).exp()
    assert ((mean - exact).abs() < 4 * standard_error).all()
    assert (standard_error < 0.05 * exact).all()


@pytest.mark.parametrize("latent", [1, 2])
def test_likelihood_of_all_data_sums_to_one(theory, latent):
    model, x = bernoulli_model(latent)
    close(theory.grid(model, x, latent, step=0.2).exp().sum(), torch.tensor(1.0))


def test_discrete_latent_sums_out(theory):
    P, locs, x = dist.Categorical(torch.rand(4)), torch.randn(4, 2), torch.randn(6, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", P)
            pyro.sample("x", dist.Normal(locs[z], 0.5).to_event(1), obs=x)

    mixture = dist.MixtureSameFamily(P, dist.Normal(locs, 0.5).to_event(1))
    close(theory.enumerated(model, x, 4), mixture.log_prob(x))
    enumerated = TraceEnum_ELBO(max_plate_nesting=1).loss(
        config_enumerate(model), lambda x: None, x
    )
    assert -enumerated == pytest.approx(mixture.log_prob(x).sum().item(), abs=1e-10)
