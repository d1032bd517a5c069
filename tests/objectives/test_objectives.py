"""The values of every objective: bounds on log p(x), their limits, and their names."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)

from pairs import binary
from pyrovae.guides.linear_gaussian import LinearGaussian as Guide
from pyrovae.models.linear_gaussian import LinearGaussian as Model
from pyrovae.objectives import OBJECTIVES, estimate, make_objective, per_datum
from pyrovae.pairs.pair import Pair

X = binary()
PATHS = ("trace_mean_field_elbo", "stl", "iwae_stl", "iwae_dreg")
DISCRETE = ("discrete", "mixed")
SETTINGS = {"warm_up_elbo": {"warm_up": 3}}
NAMES = [name for name in OBJECTIVES if name != "trace_enum_elbo"]


def linear(exact=False, n=1, shift=0.4):
    """A linear pair in float64, whose log p(x) is known, and ``n`` copies of four data."""
    pyro.set_rng_seed(0)
    model, guide = Model((4,), 2, scale=0.7).double(), Guide((4,), 2).double()
    guide.match(model)
    if not exact:
        with torch.no_grad():
            guide.encoder.layers[0].bias += shift
            guide.scale_tril_unconstrained += 0.2
    x = torch.randn(4, 4, dtype=torch.float64).repeat(n, 1)
    return model, guide, x


def value(objective, pair, x, seed=3, **options):
    """Nats per datum from the named objective, ``[N]``."""
    pyro.set_rng_seed(seed)
    objective = make_objective(objective, **options) if isinstance(objective, str) else objective
    return per_datum(objective, Pair(*pair), x)


def gradients(objective, pair, x, seed=3):
    """An objective's estimate and the gradient of its surrogate for every parameter."""
    parameters = Pair(*pair)
    if isinstance(objective, ELBO):
        objective.max_plate_nesting = 2
    else:
        objective.prepare(parameters, (x,))
    pyro.set_rng_seed(seed)
    found = estimate(objective, parameters, x)
    leaves = parameters.named()
    grads = torch.autograd.grad(found.surrogate, list(leaves.values()), allow_unused=True)
    return found, dict(zip(leaves, grads, strict=True))


def assert_same(one, other, rtol=1e-9, atol=1e-10):
    """Two losses with their gradients are the same."""
    torch.testing.assert_close(one[0].loss, other[0].loss, rtol=rtol, atol=atol)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_the_terms_are_the_elbo_at_beta_1(name):
    model, guide, x = linear(n=300)
    objective = make_objective(name, **SETTINGS.get(name, {}))
    found, _ = gradients(objective, (model, guide), x)
    exact = value("trace_mean_field_elbo", (model, guide), x, particles=20).sum()
    assert abs(sum(found.terms.values()) - exact) < 0.03 * abs(exact)
    assert found.terms.keys() == {"x", "z"}


@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith("_elbo") or n == "trace_elbo"])
def test_every_bound_is_log_p_at_the_exact_posterior(name):
    model, guide, x = linear(exact=True)
    found = value(name, (model, guide), x)
    torch.testing.assert_close(found, model.log_prob(x).detach(), rtol=0, atol=1e-9)


def test_iwae_rises_with_k_and_stays_below_log_p():
    model, guide, x = linear(n=500)
    bounds = torch.stack(
        [value("iwae", (model, guide), x, particles=k) for k in (1, 2, 4, 16, 64)]
    ).reshape(5, 500, 4)
    mean, error = bounds.mean(1), bounds.std(1) / 500**0.5
    exact = model.log_prob(x[:4]).detach()
    assert (mean <= exact + 3 * error).all()
    assert (mean[1:] - mean[:-1] > -2 * error[:-1]).all()
    assert (mean[3] > mean[0] + 5 * error[0]).all()
    assert (exact - mean[-1] < 0.1).all()


@pytest.mark.parametrize("alpha", [0.0, 0.5, -1.0, 2.0])
def test_renyi_is_that_of_pyro(alpha):
    model, guide, x = linear()
    theirs = RenyiELBO(alpha, num_particles=6, vectorize_particles=True, max_plate_nesting=1)
    _, ours = gradients(make_objective("renyi", particles=6, alpha=alpha), (model, guide), x)
    parameters = Pair(model, guide)
    pyro.set_rng_seed(3)
    expected = estimate(theirs, parameters, x).loss.item()
    for name, leaf in parameters.named().items():
        torch.testing.assert_close(ours[name], leaf.grad, rtol=1e-9, atol=1e-10, msg=name)
    found = value("renyi", (model, guide), x, particles=6, alpha=alpha)
    assert -found.sum().item() == pytest.approx(expected, rel=1e-6)


def test_renyi_falls_with_alpha_from_iwae_to_the_elbo():
    model, guide, x = linear()
    orders = (0.0, 0.3, 0.9, 1 - 1e-7, 1.0, 1.5)
    bounds = [value("renyi", (model, guide), x, particles=9, alpha=alpha) for alpha in orders]
    torch.testing.assert_close(bounds[0], value("iwae", (model, guide), x, particles=9))
    torch.testing.assert_close(bounds[3], bounds[4], rtol=1e-5, atol=1e-5)
    elbo = value("trace_elbo", (model, guide), x, particles=9)
    torch.testing.assert_close(bounds[4], elbo)
    falls = torch.stack(bounds).diff(dim=0)
    assert (falls[[0, 1, 4]] < -1e-3).all()
    assert (falls < 1e-5).all()


@pytest.mark.parametrize(
    ("options", "others"),
    [
        (("miwae", {"particles": 6, "groups": 1}), ("iwae", {"particles": 6})),
        (("miwae", {"particles": 1, "groups": 6}), ("trace_elbo", {"particles": 6})),
        (("ciwae", {"particles": 6, "beta": 0.0}), ("iwae", {"particles": 6})),
        (("ciwae", {"particles": 6, "beta": 1.0}), ("trace_elbo", {"particles": 6})),
        (("renyi", {"particles": 6, "alpha": 1.0}), ("trace_elbo", {"particles": 6})),
        (("iwae", {"particles": 1}), ("trace_elbo", {"particles": 1})),
        (("iwae_dreg", {"particles": 1}), ("stl", {"particles": 1})),
        (("iwae_stl", {"particles": 1}), ("stl", {"particles": 1})),
        (("iwae_dreg", {"particles": 6, "alpha": 1.0}), ("stl", {"particles": 6})),
        (("iwae_dreg", {"particles": 6, "beta": 1.0}), ("stl", {"particles": 6})),
        (("beta_elbo", {"beta": 1.0}), ("trace_mean_field_elbo", {})),
        (("beta_elbo", {"beta": 1.0, "analytic": False}), ("trace_elbo", {})),
        (("free_bits_elbo", {"free_bits": 0.0}), ("trace_mean_field_elbo", {})),
    ],
    ids=lambda case: f"{case[0]}-{'-'.join(map(str, case[1].values()))}",
)
def test_limits(options, others):
    model, guide, x = linear()
    one, other = (
        gradients(make_objective(name, **settings), (model, guide), x)
        for name, settings in (options, others)
    )
    assert_same(one, other)


def test_miwae_and_ciwae_are_means_of_their_parts():
    model, guide, x = linear()
    pyro.set_rng_seed(3)
    parameters = Pair(model, guide)
    objective = make_objective("miwae", particles=4, groups=3)
    log_weights = torch.randn(12, 5, dtype=torch.float64)
    log_4, log_12 = torch.tensor([4.0, 12.0], dtype=torch.float64).log()
    parts = [part.logsumexp(0) - log_4 for part in log_weights.split(4)]
    torch.testing.assert_close(objective.bound(log_weights), sum(parts) / 3)
    mixed = make_objective("ciwae", particles=12, beta=0.3).bound(log_weights)
    iwae = log_weights.logsumexp(0) - log_12
    torch.testing.assert_close(mixed, 0.3 * log_weights.mean(0) + 0.7 * iwae)
    assert per_datum(objective, parameters, x).shape == (4,)


@pytest.mark.parametrize(
    "loss", [Trace_ELBO(4, 1, vectorize_particles=True), TraceMeanField_ELBO()]
)
def test_an_elbo_of_pyro_by_datum_sums_to_its_loss(loss):
    model, guide, x = linear()
    pyro.set_rng_seed(3)
    each = per_datum(loss, Pair(model, guide), x)
    pyro.set_rng_seed(3)
    assert -each.sum() == pytest.approx(float(loss.loss(model, guide, x)), rel=1e-9)


def test_a_loss_that_sums_by_itself_is_run_datum_by_datum():
    model, guide, x = linear(exact=True)
    found = per_datum(RenyiELBO(num_particles=3), Pair(model, guide), x)
    torch.testing.assert_close(found.double(), model.log_prob(x).detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
        TraceGraph_ELBO(),
        RenyiELBO(num_particles=2),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_no_scale_is_in_what_a_loss_makes_of_a_datum(loss, scale):
    x = torch.tensor([0.3, 2.0, -1.0])

    def model(x):
        with pyro.plate("data", 30, subsample_size=len(x)), poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 30, subsample_size=len(x)), poutine.scale(scale=scale):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    torch.testing.assert_close(per_datum(loss, Pair(model, guide), x), exact)


def test_names_options_and_objects():
    assert all(line and not line.endswith(".") for _, line in OBJECTIVES.values())
    own = make_objective("iwae", particles=50)
    assert make_objective(own) is own
    assert own.particles == 50
    assert make_objective("iwae").particles == 10
    assert make_objective("trace_elbo", particles=3).num_particles == 3
    with pytest.raises(ValueError, match=r"No objective 'iwea'.*did you mean 'iwae'"):
        make_objective("iwea")
    with pytest.raises(ValueError, match=r"takes no option 'betta'.*did you mean 'beta'"):
        make_objective("beta_elbo", betta=2.0)
    with pytest.raises(ValueError, match="takes no option 'beta'"):
        make_objective("trace_elbo", beta=2.0)
    with pytest.raises(ValueError, match="with a name"):
        make_objective(own, beta=2.0)
    with pytest.raises(TypeError, match="an objective's name"):
        make_objective(3)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("iwae", {"particles": 0}, "particles >= 1"),
        ("miwae", {"groups": 0}, "groups >= 1"),
        ("renyi", {"alpha": float("inf")}, "finite alpha"),
        ("ciwae", {"beta": 1.5}, "beta from 0"),
        ("iwae", {"gradient": "dregs"}, "'dreg'"),
        ("beta_elbo", {"beta": -1.0}, "beta >= 0"),
        ("beta_elbo", {"warm_up": 2.5}, "integer warm_up"),
        ("beta_elbo", {"schedule": "steep"}, "linear or cosine"),
        ("free_bits_elbo", {"free_bits": {"z": -0.1}}, "free_bits >= 0"),
        ("wake_sleep", {"insomnia": 1.1}, "insomnia from 0"),
        ("reweighted_wake_sleep", {"particles": 1}, "particles >= 2"),
    ],
)
def test_options_out_of_range_are_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        make_objective(name, **options)


def test_a_pair_is_looked_at_once_and_without_a_trace_in_the_random_stream():
    model, guide, x = linear()
    objective = make_objective("iwae_dreg", particles=3)
    seen = []
    program = lambda data: seen.append(1) or guide(data)  # noqa: E731
    parameters = Pair(model, program)
    pyro.set_rng_seed(5)
    first = estimate(objective, parameters, x).loss
    looked = len(seen)
    pyro.set_rng_seed(5)
    assert torch.equal(estimate(objective, parameters, x).loss, first)
    assert len(seen) == looked + 1 > 3


@pytest.mark.parametrize("order", ["one order", "two orders"])
def test_closed_forms_are_taken_in_one_order_alone(order):
    """The ELBO of the exact posterior is log p(x), whichever latent the guide draws first."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            if order == "one order":
                a = pyro.sample("a", dist.Normal(x / 3, (2 / 3) ** 0.5))
                pyro.sample("b", dist.Normal((a + x) / 2, 0.5**0.5))
            else:
                b = pyro.sample("b", dist.Normal(2 * x / 3, (2 / 3) ** 0.5))
                pyro.sample("a", dist.Normal(b / 2, 0.5**0.5))

    x = torch.tensor([-1.0, 0.5, 2.0])
    loss = TraceMeanField_ELBO(20_000, max_plate_nesting=1, vectorize_particles=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = -estimate(loss, Pair(model, guide), x).loss
    expected = dist.Normal(0.0, 3**0.5).log_prob(x).sum()
    assert found.item() == pytest.approx(expected.item(), abs=0.05)
