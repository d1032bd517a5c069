"""Latents that the model alone has are summed over, exactly, wherever a pair is scored."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.traceenum_elbo import _compute_dice_elbo
from torch import nn
from torch.distributions import Bernoulli, Categorical, Normal

import pyrovae
from pairs import LATENT, SHAPE, binary
from pyrovae.guides.mean_field import MeanField
from pyrovae.nn import MLP
from pyrovae.objectives import estimate
from pyrovae.pairs.contract import check_objective, inspect_pair
from pyrovae.pairs.enumeration import exact_terms
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import site_scores

X = binary()
PARALLEL = {"enumerate": "parallel"}
ENUM = TraceEnum_ELBO(max_plate_nesting=1)


class Cluster(nn.Module):
    """z and two observed sites depend on a component that no guide samples."""

    def __init__(self, infer=PARALLEL):
        super().__init__()
        self.infer = infer
        self.logits = nn.Parameter(torch.randn(3))
        self.loc = nn.Parameter(torch.randn(3, LATENT))
        self.shade = nn.Parameter(torch.randn(3))
        self.decoder = MLP(LATENT, SHAPE, (8,))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=self.logits), infer=self.infer)
            self.given(y, x)

    def given(self, y, x):
        z = pyro.sample("z", dist.Normal(self.loc[y], 1.0).to_event(1))
        logits = self.decoder(z) + self.shade[y][..., None, None, None]
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)
        pyro.sample("total", dist.Normal(8 * self.shade[y], 2.0), obs=x.flatten(1).sum(-1))


def cluster():
    return Cluster(), MeanField(SHAPE, LATENT, (8,))


def at_component(model, c):
    """The same model with its component fixed, and its probability a factor."""

    def program(x):
        with pyro.plate("data", len(x)):
            y = torch.full((len(x),), c)
            pyro.factor("prior", Categorical(logits=model.logits).log_prob(y))
            model.given(y, x)

    return program


def test_the_contract_tells_such_latents_apart():
    layout = inspect_pair(Pair(*cluster()), X)
    assert layout.latents == ("z",)
    assert layout.enumerated == ("y",)
    assert layout.observed == ("x", "total")
    unmarked = Cluster(infer={}), MeanField(SHAPE, LATENT, (8,))
    with pytest.raises(ValueError, match=r"'y' is missing in the guide.*'enumerate': 'parallel'"):
        inspect_pair(Pair(*unmarked), X)


def test_log_likelihood_is_the_sum_over_components():
    model, guide = cluster()
    found = pyrovae.log_likelihood(model, guide, X, num_samples=300, seed=0).log_prob
    each = [
        pyrovae.log_likelihood(at_component(model, c), guide, X, num_samples=300, seed=0).log_prob
        for c in range(3)
    ]
    torch.testing.assert_close(found, torch.stack(each).logsumexp(0), rtol=0, atol=1e-5)


def test_scores_are_marginal_site_by_site():
    model, guide = (program.double() for program in cluster())
    x = X.double()
    parameters = Pair(model, guide)
    layout = inspect_pair(parameters, x)
    at = {"particles": 5}
    with torch.no_grad():
        guide_trace = parameters.trace_guide(x, **at)
        found = site_scores(parameters.replay_model(guide_trace, x, **at), layout, 5, 12)
        z = guide_trace.nodes["z"]["value"]
        prior = Normal(model.loc[:, None, None], 1.0).log_prob(z).sum(-1)
        prior = prior + model.logits.log_softmax(0)[:, None, None]
        logits = model.decoder(z) + model.shade[:, None, None, None, None, None]
        total = Normal(8 * model.shade[:, None], 2.0).log_prob(x.flatten(1).sum(-1))
        joint = prior + Bernoulli(logits=logits).log_prob(x).sum((-1, -2, -3)) + total[:, None]
    torch.testing.assert_close(found["z"], prior.logsumexp(0))
    torch.testing.assert_close(found["x"], joint.logsumexp(0) - prior.logsumexp(0))
    assert not found["y"].any()
    assert not found["total"].any()


def test_what_is_masked_says_nothing_of_the_latent():
    model, guide = cluster()
    keep = torch.arange(12) < 8

    def masked(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=model.logits), infer=PARALLEL)
            with pyro.poutine.mask(mask=keep):
                model.given(y, x)

    hidden = pyro.poutine.mask(guide, mask=keep)
    whole, found = (
        pyrovae.elbo(pair[0], pair[1], X, seed=0).elbo
        for pair in ((model, guide), (masked, hidden))
    )
    torch.testing.assert_close(found[keep], whole[keep])
    torch.testing.assert_close(found[~keep], torch.zeros(4), rtol=0, atol=1e-6)


def test_both_estimators_fall_back_on_the_marginal():
    model, guide = cluster()
    found = pyrovae.elbo(model, guide, X, particles=5, seed=0)
    again = pyrovae.elbo(model, guide, X, particles=5, seed=0, objective="trace_mean_field_elbo")
    torch.testing.assert_close(found.elbo, again.elbo)
    torch.testing.assert_close(found.kl, again.kl)


def test_the_trained_bound_is_below_the_likelihood_and_near_the_reported_one():
    model, guide = cluster()
    loss = TraceEnum_ELBO(num_particles=300, vectorize_particles=True, max_plate_nesting=1)
    trained = -estimate(loss, Pair(model, guide), X).loss.item() / len(X)
    reported = pyrovae.elbo(model, guide, X, particles=300, seed=0)
    ll = pyrovae.log_likelihood(model, guide, X, num_samples=2000, seed=0)
    assert trained == pytest.approx(reported.mean, abs=0.4)
    assert max(trained, reported.mean) < ll.mean + 3 * ll.mean_standard_error


def test_fit_trains_what_the_model_sums_over():
    model, guide = cluster()
    before = pyrovae.elbo(model, guide, X, particles=50, seed=0).mean
    result = pyrovae.fit(model, guide, X, objective=ENUM, epochs=30, batch_size=6, lr=0.02, seed=0)
    after = pyrovae.elbo(model, guide, X, particles=50, seed=0).mean
    assert after > before + 1
    assert result.elbo == pytest.approx(after, abs=2)


@pytest.mark.parametrize("objective", [Trace_ELBO(), TraceMeanField_ELBO(), RenyiELBO()])
def test_objectives_that_would_draw_such_latents_are_refused(objective):
    layout = inspect_pair(Pair(*cluster()), X)
    with pytest.raises(ValueError, match=r"no bound.*\['y'\].*train with TraceEnum_ELBO"):
        check_objective(layout, objective)
    check_objective(layout._replace(enumerated=()), objective)
    check_objective(layout, ENUM)


def test_a_finite_mixture_needs_no_guide_at_all():
    loc = torch.tensor([-2.0, 0.0, 3.0])

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])), infer=PARALLEL)
            pyro.sample("x", dist.Normal(loc[y], 1.0), obs=x)

    x = torch.randn(9)
    weights = torch.tensor([0.2, 0.5, 0.3]).log()[:, None]
    exact = (weights + Normal(loc[:, None], 1.0).log_prob(x)).logsumexp(0)
    torch.testing.assert_close(pyrovae.elbo(model, lambda x: None, x).elbo, exact)


def test_a_latent_of_every_pixel_is_summed_inside_its_plate():
    p = torch.tensor([0.3, 0.7])

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0))
            with pyro.plate("pixels", x.shape[1], dim=-1):
                on = pyro.sample("on", dist.Categorical(p), infer=PARALLEL)
                pyro.sample("x", dist.Normal(z + 2.0 * on, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0))

    x = torch.randn(6, 4)
    grid = torch.linspace(-8, 8, 2001).double()
    each = p.double().log() + Normal(
        grid[:, None, None, None] + torch.tensor([0.0, 2.0]), 0.5
    ).log_prob(x[..., None].double())
    joint = each.logsumexp(-1).sum(-1) + Normal(0.0, 1.0).log_prob(grid)[:, None]
    exact = joint.logsumexp(0) + math.log(16 / 2000)
    ll = pyrovae.log_likelihood(model, guide, x, num_samples=10_000, seed=0)
    assert ((ll.log_prob - exact).abs() < 5 * ll.standard_error).all()
    assert ll.standard_error.max() < 0.1


def test_factors_that_disagree_by_hundreds_of_nats_do_not_underflow():
    one, two = torch.tensor([0.0, -500.0]), torch.tensor([-400.0, 0.0])

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(torch.tensor(0.5)), infer=PARALLEL).long()
            pyro.factor("one", one[y] + 0 * x)
            pyro.factor("two", two[y] + 0 * x)
            pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0), obs=x)

    found = pyrovae.elbo(model, lambda x: None, torch.zeros(3))
    exact = -400 + math.log(0.5) - 0.5 * math.log(2 * math.pi)
    assert found.elbo.tolist() == pytest.approx([exact] * 3, abs=1e-3)


def test_chains_are_summed_one_link_at_a_time():
    matrix = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
    emit = torch.tensor([-1.0, 1.0])
    steps = 14

    def model(x):
        with pyro.plate("data", len(x)):
            y = torch.zeros(len(x), dtype=torch.int64)
            for t in pyro.markov(range(steps)):
                y = pyro.sample(f"y{t}", dist.Categorical(matrix[y]), infer=PARALLEL)
                pyro.sample(f"x{t}", dist.Normal(emit[y], 1.0), obs=x[:, t])

    x = torch.randn(5, steps)
    alpha = torch.zeros(5, 2).log()
    alpha[:, 0] = 0.0
    for t in range(steps):
        alpha = (alpha[..., None] + matrix.log()).logsumexp(1)
        alpha = alpha + Normal(emit, 1.0).log_prob(x[:, t, None])
    found = pyrovae.elbo(model, lambda x: None, x)
    torch.testing.assert_close(found.elbo, alpha.logsumexp(-1), rtol=0, atol=1e-4)


def test_reconstructions_draw_such_latents_from_their_posterior():
    loc = torch.tensor([[-5.0, 5.0], [5.0, -5.0]])

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.5, 0.5])), infer=PARALLEL)
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + loc[y], 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 0.1).to_event(1))

    y = torch.arange(20) % 2
    found = pyrovae.reconstruct(model, guide, loc[y], seed=0)
    assert (found - loc[y]).abs().max() < 1
    drawn = pyrovae.sample(model, like=loc, n=200, seed=0)
    assert 60 < (drawn[:, 0] > 0).sum() < 140
    chosen = pyrovae.decode(model, {"y": y, "z": torch.zeros(20, 2)}, like=loc)
    assert torch.equal(chosen, loc[y])


class Both(nn.Module):
    """A guide that enumerates one latent and reparameterizes another, inside a plate of pixels."""

    def __init__(self):
        super().__init__()
        self.net = MLP(SHAPE, (2, 3), (8,))
        self.pixel = nn.Parameter(torch.zeros(16))
        self.above = nn.Parameter(torch.randn(3))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-2):
            y = pyro.sample("y", dist.Categorical(torch.ones(len(x), 1, 3)))
            z = pyro.sample("z", dist.Normal(self.above[y], 1.0))
            with pyro.plate("pixels", 16, dim=-1):
                on = pyro.sample("on", dist.Bernoulli(0.3))
                logits = z + on * self.above[y]
                pyro.sample("x", dist.Bernoulli(logits=logits), obs=x.flatten(1))

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-2):
            logits, loc = self.net(x).unbind(-2)
            y = pyro.sample("y", dist.Categorical(logits=logits[:, None]), infer=PARALLEL)
            pyro.sample("z", dist.Normal(loc.sum(-1, keepdim=True) + self.above[y], 1.0))
            with pyro.plate("pixels", 16, dim=-1):
                pyro.sample("on", dist.Bernoulli(logits=self.pixel), infer=PARALLEL)


def both():
    module = Both()
    return module.model, module.guide


@pytest.mark.parametrize("make", [cluster, both])
@pytest.mark.parametrize("particles", [1, 3])
def test_terms_by_site_add_up_to_the_bound_of_pyro(make, particles):
    model, guide = make()
    parameters = Pair(model, guide)
    inspect_pair(parameters, X)
    loss = TraceEnum_ELBO(
        num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=2
    )
    scaled = [
        pyro.poutine.scale(p, scale=0.25) for p in (parameters.run_model, parameters.run_guide)
    ]
    ((model_trace, guide_trace),) = loss._get_traces(*scaled, (X,), {})
    terms = exact_terms(model_trace, guide_trace)
    expected = _compute_dice_elbo(model_trace, guide_trace)
    torch.testing.assert_close(sum(terms.values()), expected, rtol=1e-5, atol=1e-4)
    leaves = list(parameters.named().values())
    ours = torch.autograd.grad(sum(terms.values()), leaves, retain_graph=True)
    theirs = torch.autograd.grad(expected, leaves)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_values_that_the_guide_rules_out_cost_nothing():
    logits = torch.zeros(2, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.5, 0.5, 0.0])))
            pyro.sample("x", dist.Bernoulli(probs=0.2 + 0.1 * y), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            possible = torch.cat([logits, torch.tensor([-torch.inf])])
            pyro.sample("y", dist.Categorical(logits=possible), infer=PARALLEL)

    ((model_trace, guide_trace),) = ENUM._get_traces(model, guide, (torch.ones(4),), {})
    total = sum(exact_terms(model_trace, guide_trace).values())
    assert total.item() == pytest.approx(4 * 0.5 * math.log(0.2 * 0.3), abs=1e-5)
    (gradient,) = torch.autograd.grad(total, logits)
    assert gradient.tolist() == pytest.approx([math.log(0.2 / 0.3), math.log(0.3 / 0.2)], abs=1e-5)


SAMPLED = {"enumerate": "parallel", "num_samples": 5}


@pytest.mark.parametrize("infer", [{}, SAMPLED, {"enumerate": "sequential"}, PARALLEL])
@pytest.mark.parametrize("above", [{}, SAMPLED])
def test_latents_that_are_drawn_count_as_in_pyro(infer, above):
    logits = torch.linspace(-1.0, 1.0, 3, requires_grad=True)
    loc = torch.tensor(0.3, requires_grad=True)

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0), infer=above)
            pyro.sample("y", dist.Categorical(logits=logits + z.unsqueeze(-1)), infer=infer)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            y = pyro.sample("y", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Bernoulli(logits=z + y), obs=x)

    loss = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    scaled = [pyro.poutine.scale(program, scale=0.25) for program in (model, guide)]
    for traces in loss._get_traces(*scaled, (torch.ones(4),), {}):
        found, expected = sum(exact_terms(*traces).values()), _compute_dice_elbo(*traces)
        torch.testing.assert_close(found, expected)
        ours = torch.autograd.grad(found, [logits, loc], retain_graph=True)
        torch.testing.assert_close(ours, torch.autograd.grad(expected, [logits, loc]))
