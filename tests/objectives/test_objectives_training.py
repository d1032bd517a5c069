"""Objectives at work: weights that change, captured graphs, both kinds of SVI."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI as PyroSVI
from test_objectives import PATHS, assert_same, gradients, linear, value
from test_objectives_discrete import Small
from test_objectives_gradients import Chain
from torch.fx.experimental.proxy_tensor import make_fx

import pyrovae
from pairs import LATENT, PAIRS, binary
from pyrovae.objectives import Estimate, Objective, estimate, make_objective
from pyrovae.objectives.elbo import elbo
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import site_scores

X = binary()
SETTINGS = {
    "warm_up_elbo": {"warm_up": 10},
    "reweighted_wake_sleep": {"insomnia": 0.5},
    "miwae": {"particles": 3, "groups": 2},
}


def kl(model, guide, x):
    """The closed divergence of each datum, ``[N]``."""
    posterior = dist.MultivariateNormal(guide.encoder(x), scale_tril=guide.scale_tril)
    prior = dist.MultivariateNormal(model.zero, torch.eye(2).to(x))
    return torch.distributions.kl_divergence(posterior, prior)


@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
def test_beta_multiplies_the_divergence(beta):
    model, guide, x = linear()
    found, slopes = gradients(make_objective("beta_elbo", beta=beta), (model, guide), x)
    nats = kl(model, guide, x)
    torch.testing.assert_close(found.terms["z"], -nats.sum().detach())
    torch.testing.assert_close(found.loss, -found.terms["x"] - beta * found.terms["z"])
    plain = gradients(make_objective("trace_mean_field_elbo"), (model, guide), x)[1]
    leaves = Pair(model, guide).named()
    moved = torch.autograd.grad(nats.sum(), list(leaves.values()), allow_unused=True)
    for (name, slope), more in zip(slopes.items(), moved, strict=True):
        change = 0.0 if more is None else (beta - 1) * more
        torch.testing.assert_close(slope, plain[name] + change)


def test_the_weight_rises_in_place_and_stays():
    objective = make_objective("warm_up_elbo", beta=2.0, warm_up=4)
    held, seen = objective.beta, []
    for step in range(6):
        objective.at_step(step)
        seen.append(held.item())
    assert seen == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    objective.at_step(1)
    assert held.item() == 1.0
    assert objective.beta is held
    cosine = make_objective("warm_up_elbo", warm_up=4, schedule="cosine")
    cosine.at_step(1)
    assert cosine.beta.item() == pytest.approx(0.5)
    own = make_objective("warm_up_elbo", warm_up=4, schedule=lambda done: done**2)
    own.at_step(1)
    assert own.beta.item() == pytest.approx(0.25)
    assert make_objective("beta_elbo", beta=3.0).beta.item() == 3.0
    assert make_objective("warm_up_elbo", warm_up=10).beta.item() == pytest.approx(0.1)


def test_svi_and_fit_count_the_steps_of_a_warm_up():
    model, guide, x = linear()
    objective = make_objective("warm_up_elbo", warm_up=8)
    svi = pyrovae.SVI(model, guide, torch.optim.Adam, objective, compile=False)
    seen = [(svi.step(x), objective.beta.item())[1] for _ in range(10)]
    assert seen == [min(1.0, (step + 1) / 8) for step in range(10)]
    settings = {"batch_size": 2, "epochs": 3, "progress": False, "seed": 0}
    with pytest.raises(ValueError, match="warm-up of 7 steps is longer than the training of 6"):
        pyrovae.fit(
            model, guide, x, objective=make_objective("warm_up_elbo", warm_up=7), **settings
        )
    objective = make_objective("warm_up_elbo", warm_up=6)
    found = pyrovae.fit(model, guide, x, objective=objective, **settings)
    assert objective.beta.item() == 1.0
    for row in found.history:
        parts = row["train_reconstruction"] - row["train_kl"]
        assert row["train_elbo"] == pytest.approx(parts)
    assert found.history[0]["train_elbo"] < -found.history[0]["train_loss"]


def test_a_warm_up_longer_than_training_is_refused():
    model, guide, x = linear()
    parameters = Pair(model, guide)
    objective = make_objective("warm_up_elbo", warm_up=50)
    objective.prepare(parameters, (x,), steps=50)
    with pytest.raises(ValueError, match="warm-up of 50 steps is longer than the training of 49"):
        objective.prepare(parameters, (x,), steps=49)


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_free_bits_stop_the_gradient_below_and_not_above(share):
    model, guide, x = linear()
    nats = kl(model, guide, x).mean().item()
    objective = make_objective("free_bits_elbo", free_bits=share * nats)
    found, slopes = gradients(objective, (model, guide), x)
    counted = max(share, 1.0) * nats * len(x)
    torch.testing.assert_close(found.loss, -found.terms["x"] + counted)
    assert -found.terms["z"].item() == pytest.approx(nats * len(x))
    expected = gradients(make_objective("beta_elbo", beta=share < 1), (model, guide), x)[1]
    for name, slope in slopes.items():
        torch.testing.assert_close(slope, expected[name])


def test_free_bits_are_given_by_site():
    torch.manual_seed(0)
    parameters = Pair(*PAIRS["two_latents"]())
    settings = {"analytic": False}
    found = {}
    for free in ({"top": 100.0}, {"low": 100.0}, {"top": 100.0, "low": 100.0}, 100.0):
        objective = make_objective("free_bits_elbo", free_bits=free, **settings)
        objective.prepare(parameters, (X,))
        pyro.set_rng_seed(3)
        result = estimate(objective, parameters, X)
        spent = -sum(result.terms[name] for name in ("x", "total")) + len(X) * 100.0
        key = "+".join(free) if isinstance(free, dict) else "all"
        found[key] = result.loss
        if key in ("top", "low"):
            other = {"top": "low", "low": "top"}[key]
            torch.testing.assert_close(result.loss, spent - result.terms[other])
    torch.testing.assert_close(found["top+low"], found["all"])
    with pytest.raises(ValueError, match=r"free_bits names \['lower'\].*'low', 'top'"):
        estimate(make_objective("free_bits_elbo", free_bits={"lower": 1.0}), parameters, X)


@pytest.mark.parametrize(("order", "closed"), [("down", True), ("up", False)])
def test_divergences_are_closed_where_the_guide_has_the_order_of_the_model(order, closed):
    chain, x = Chain(order), torch.randn(5, dtype=torch.float64)
    objective = make_objective("beta_elbo", beta=1.0)
    found = [gradients(objective, (chain.model, chain.guide), x, seed=s)[0] for s in (1, 2)]
    first, second = ([f.terms[name].item() for f in found] for name in ("a", "b"))
    assert (first[0] == first[1]) == closed
    assert second[0] != second[1]
    exact = dist.Normal(torch.zeros(5).double(), 3**0.5).log_prob(x)
    many = elbo(chain.model, chain.guide, x, particles=4000, objective="trace_mean_field_elbo")
    torch.testing.assert_close(many.elbo, exact, rtol=0, atol=0.1)
    if not closed:
        each = value("beta_elbo", (chain.model, chain.guide), x, beta=1.0)
        torch.testing.assert_close(each, exact, rtol=0, atol=1e-9)


def captured(objective, parameters, x):
    """Loss, terms and gradients as one graph, and the function that it records."""
    estimate(objective, parameters, x)
    leaves = list(parameters.named().values())

    def flat(x):
        found = estimate(objective, parameters, x)
        slopes = torch.autograd.grad(found.surrogate, leaves, allow_unused=True)
        slopes = [slope for slope in slopes if slope is not None]
        return [found.loss, *found.terms.values(), *slopes]

    with pyro.validation_enabled(False):
        return make_fx(flat)(x), flat


def assert_captured(graph, flat, x):
    with pyro.validation_enabled(False):
        pyro.set_rng_seed(5)
        expected = flat(x)
        pyro.set_rng_seed(5)
        with torch.no_grad():
            found = graph(x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


SCORED = ("trace_elbo", "free_bits_elbo", "iwae", "ciwae", "miwae", "wake_sleep")


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.filterwarnings("ignore:Failed to verify mean field")
def test_a_captured_step_runs_a_hierarchical_guide_as_the_eager_one(name):
    chain, x = Chain("up"), torch.linspace(-1, 1, 5, dtype=torch.float64)
    parameters = Pair(chain.model, chain.guide)
    graph, flat = captured(make_objective(name), parameters, x)
    assert_captured(graph, flat, x**2)


@pytest.mark.parametrize("name", SCORED)
def test_a_captured_step_scores_discrete_latents_as_the_eager_one(name):
    pair, x = Small(mixed=True), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    parameters = Pair(pair.model, pair.guide)
    graph, flat = captured(make_objective(name, **SETTINGS.get(name, {})), parameters, x)
    assert_captured(graph, flat, 1 - x)


@pytest.mark.parametrize("enumerate", ["parallel", "sequential"])
def test_a_captured_enumeration_is_the_eager_one(enumerate):
    pair, x = Small(True, enumerate), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    graph, flat = captured(make_objective("trace_enum_elbo"), Pair(pair.model, pair.guide), x)
    assert_captured(graph, flat, 1 - x)


def test_a_captured_graph_follows_the_warm_up():
    model, guide, x = linear()
    objective = make_objective("warm_up_elbo", warm_up=8)
    graph, flat = captured(objective, Pair(model, guide), x)
    losses = []
    for step in (0, 3, 7):
        objective.at_step(step)
        assert_captured(graph, flat, x)
        pyro.set_rng_seed(5)
        losses.append(graph(x)[0].item())
    assert losses[2] - losses[0] == pytest.approx(7 / 8 * kl(model, guide, x).sum().item())


@pytest.mark.parametrize("name", ["iwae", "stl", "iwae_dreg", "reweighted_wake_sleep"])
def test_the_encoder_runs_once_for_all_particles(name):
    model, guide = PAIRS["shipped_bernoulli"]()
    objective, parameters = make_objective(name, particles=8), Pair(model, guide)
    objective.prepare(parameters, (X,))
    seen = {"encoder": [], "decoder": []}
    for key, network in (("encoder", guide.encoder), ("decoder", model.decoder)):
        network.register_forward_hook(
            lambda _, given, __, key=key: seen[key].append(given[0].shape)
        )
    estimate(objective, parameters, X)
    assert seen == {"encoder": [X.shape], "decoder": [(8, len(X), LATENT)]}


class Own(Objective):
    """The ELBO, written as the page on objectives says."""

    def bounds(self, parameters, *args):
        self.known(parameters, args)
        total = 0.0
        for trace, sign in zip(parameters.trace(*args, sums=True), (1, -1), strict=True):
            scores = site_scores(trace, parameters.known, 1, len(args[0]))
            total = total + sign * sum(scores.values())[0]
        return total

    def estimate(self, parameters, *args):
        bound = self.bounds(parameters, *args).sum()
        return Estimate(-bound.detach(), -bound, {})


def test_an_objective_of_ones_own_is_two_methods():
    model, guide, x = linear()
    own, plain = (gradients(o, (model, guide), x) for o in (Own(), make_objective("trace_elbo")))
    assert_same(own, plain)
    assert value(Own(), (model, guide), x).shape == (4,)
    svi = pyrovae.SVI(model, guide, torch.optim.Adam, Own(), compile=False)
    assert svi.step(x) > 0


@pytest.mark.parametrize("name", ["iwae", "iwae_dreg", "beta_elbo", "reweighted_wake_sleep"])
@pytest.mark.parametrize("pair", ["published_example", "functions"])
def test_an_objective_is_a_loss_for_the_svi_of_pyro(name, pair):
    model, guide = PAIRS[pair]()
    svi = PyroSVI(model, guide, pyro.optim.Adam({"lr": 0.02}), loss=make_objective(name))
    first = value("iwae", (model, guide), X, particles=100).mean()
    for _ in range(40):
        svi.step(X)
    assert value("iwae", (model, guide), X, particles=100).mean() > first + 0.5
