"""Mixtures and partly observed labels against sums, equations and quadrature written by hand."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from structures import PARTLY, X, gmvae, semi_supervised, two_layer
from torch.distributions import Bernoulli, Normal
from torch.nn.functional import log_softmax

import pyrovae
from pyrovae.guides.semi_supervised import SemiSupervised as SemiSupervisedGuide
from pyrovae.models.semi_supervised import SemiSupervised
from pyrovae.objectives import estimate
from pyrovae.pairs.pair import Pair
from pyrovae.sampling import classify

ENUM = TraceEnum_ELBO(max_plate_nesting=1)


def double(make, **options):
    """A pair and its arguments in float64."""
    model, guide, (x, *context) = make(**options)
    return model.double(), guide.double(), (x.double(), *context)


def gradients(value, model, guide):
    leaves = [*model.parameters(), *guide.parameters()]
    return torch.autograd.grad(value, leaves, retain_graph=True)


def agree(one, other, model, guide, atol=1e-10):
    """Equal values, and equal gradients for every parameter of the pair."""
    torch.testing.assert_close(one, other, rtol=1e-10, atol=atol)
    found, expected = (gradients(value, model, guide) for value in (one, other))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=atol)


def noise_of(*shape):
    """What Pyro's next normal draw of this shape is made of."""
    with torch.random.fork_rng():
        return torch.normal(torch.zeros(shape).double(), torch.ones(shape).double())


def gmvae_by_hand(model, guide, x, noise):
    """The ELBO summed over three components, ``noise[c]`` [N, D] under component c."""
    log_q, log_p = log_softmax(guide.classifier(x), -1), log_softmax(model.logits, -1)
    total = 0.0
    for c in range(3):
        h = guide.encoder(x) + guide.component.weight[c]
        loc, log_scale = guide.posterior(h).unbind(-2)
        z = loc + log_scale.exp() * noise[c]
        terms = log_p[c] - log_q[:, c] + code(z, model.loc[c], model.scale[c])
        terms = terms + pixels(model.decoder(z), x) - code(z, loc, log_scale.exp())
        total = total + (log_q[:, c].exp() * terms).sum()
    return total


def m2_by_hand(model, guide, x, y, noise, alpha):
    """J of equation 9 with the sign of a bound, from equations 6 to 8, datum by datum."""
    log_q = log_softmax(guide.classifier(x), -1)

    def minus_l(n, label, draw):
        """Equation 6."""
        h = guide.encoder(x[n : n + 1]) + guide.label.weight[label]
        loc, log_scale = guide.posterior(h).unbind(-2)
        z = loc + log_scale.exp() * noise[draw, n]
        logits = model.decoder(model.code(z) + model.label.weight[label])
        prior = code(z, torch.zeros(1).double(), torch.ones(1).double())
        terms = pixels(logits, x[n : n + 1]) - math.log(3) + prior - code(z, loc, log_scale.exp())
        return terms.sum()

    total = 0.0
    for n, label in enumerate(y.tolist()):
        q = log_q[n].exp()
        if label < 0:
            expected = sum(q[c] * minus_l(n, c, c) for c in range(3))
            total = total + expected - (q * log_q[n]).sum()
        else:
            weights = q.detach()
            total = total + sum(weights[c] * minus_l(n, label, c) for c in range(3))
            total = total + alpha * log_q[n, label]
    return total


def code(z, loc, scale):
    return Normal(loc, scale).log_prob(z).sum(-1)


def pixels(logits, x):
    return Bernoulli(logits=logits).log_prob(x).flatten(-3).sum(-1)


def test_the_enumerated_bound_of_a_mixture_is_its_sum_by_hand():
    model, guide, (x,) = double(gmvae)
    torch.manual_seed(3)
    noise = noise_of(3, 12, 3)
    found = estimate(ENUM, Pair(model, guide), x)
    expected = gmvae_by_hand(model, guide, x, noise)
    agree(-found.surrogate, expected, model, guide)
    torch.testing.assert_close(-found.loss, expected.detach(), rtol=1e-10, atol=0)


def test_particles_of_the_enumerated_bound_are_averaged():
    model, guide, (x,) = double(gmvae)
    torch.manual_seed(3)
    noise = noise_of(3, 4, 12, 3)
    loss = TraceEnum_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    found = estimate(loss, Pair(model, guide), x)
    expected = sum(gmvae_by_hand(model, guide, x, noise[:, k]) for k in range(4)) / 4
    agree(-found.surrogate, expected, model, guide)


@pytest.mark.parametrize("alpha", [0.0, 2.5])
def test_the_bound_of_m2_is_that_of_its_paper(alpha):
    model, guide, (x, y) = double(semi_supervised, alpha=alpha)
    torch.manual_seed(3)
    noise = noise_of(3, 12, 3)
    found = estimate(ENUM, Pair(model, guide), x, y)
    agree(-found.surrogate, m2_by_hand(model, guide, x, y, noise, alpha), model, guide)


def test_the_classifiers_weight_changes_training_and_no_evaluation():
    model, guide, args = semi_supervised()
    results = []
    for guide.alpha in (0.0, 2.0):
        bound = pyrovae.elbo(model, guide, *args, seed=0).elbo
        ll = pyrovae.log_likelihood(model, guide, *args, num_samples=20, seed=0).log_prob
        torch.manual_seed(0)
        results.append((bound, ll, ENUM.loss(model, guide, *args)))
    for one, other in zip(results[0][:2], results[1][:2], strict=True):
        assert torch.equal(one, other)
    seen = PARTLY >= 0
    log_q = log_softmax(guide.classifier(X), -1)[seen, PARTLY[seen]].sum().item()
    assert results[1][2] - results[0][2] == pytest.approx(-2.0 * log_q, rel=1e-4)


def test_hidden_labels_may_be_written_with_obs_mask():
    model, guide, args = double(semi_supervised)

    def masked_model(x, y):
        seen = y >= 0
        with pyro.plate("data", len(x)):
            prior = dist.Categorical(logits=model.logits)
            label = pyro.sample("y", prior, obs=y.clamp(min=0), obs_mask=seen)
            z = pyro.sample("z", dist.Normal(model.zero, 1.0).to_event(1))
            logits = model.decoder(model.code(z) + model.label(label))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)

    def masked_guide(x, y):
        hidden = y < 0
        with pyro.plate("data", len(x)):
            logits = guide.classifier(x)
            q = dist.Categorical(logits=torch.where(hidden[:, None], logits, logits.detach()))
            with pyro.poutine.mask(mask=hidden):
                drawn = pyro.sample("y_unobserved", q, infer={"enumerate": "parallel"})
            h = guide.encoder(x) + guide.label(torch.where(hidden, drawn, y))
            loc, log_scale = guide.posterior(h).unbind(-2)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    losses = []
    for pair in ((model, guide), (masked_model, masked_guide)):
        torch.manual_seed(0)
        losses.append(estimate(ENUM, Pair(*pair), *args).surrogate)
    agree(*losses, model, guide)
    ours = pyrovae.log_likelihood(model, guide, *args, num_samples=50, seed=0)
    theirs = pyrovae.log_likelihood(masked_model, masked_guide, *args, num_samples=50, seed=0)
    torch.testing.assert_close(ours.log_prob, theirs.log_prob)


GRID = torch.linspace(-10, 10, 2001).double()


def integral(log_density):
    """ln of the integral over z, by the trapezium rule on a grid, ``[G, N]`` to ``[N]``."""
    return log_density.logsumexp(0) + math.log(20 / 2000)


def test_log_likelihood_of_a_mixture_is_its_quadrature():
    model, guide, (x,) = double(gmvae, latent=1)
    decoded = pixels(model.decoder(GRID[:, None])[:, None], x)
    weights = log_softmax(model.logits, -1)
    prior = torch.stack(
        [weights[c] + code(GRID[:, None], model.loc[c], model.scale[c]) for c in range(3)]
    )
    exact = integral(decoded + prior.logsumexp(0)[:, None]).detach()
    for pair in ((model, guide), summed_mixture(model, guide)):
        ll = pyrovae.log_likelihood(*pair, x, num_samples=4000, seed=0)
        assert ll.mean_standard_error < 0.03
        assert ((ll.log_prob - exact).abs() < 5 * ll.standard_error).all()


def test_log_likelihood_of_m2_is_that_of_what_is_seen():
    model, guide, (x, y) = double(semi_supervised, latent=1)
    prior = code(GRID[:, None], torch.zeros(1).double(), torch.ones(1).double())
    joint = []
    for label in range(3):
        logits = model.decoder(model.code(GRID[:, None]) + model.label.weight[label])
        joint.append(integral(pixels(logits[:, None], x) + prior[:, None]) - math.log(3))
    joint = torch.stack(joint).detach()
    exact = torch.where(y < 0, joint.logsumexp(0), joint.gather(0, y.clamp(min=0)[None])[0])
    ll = pyrovae.log_likelihood(model, guide, x, y, num_samples=4000, seed=0)
    assert ll.mean_standard_error < 0.05
    assert ((ll.log_prob - exact).abs() < 5 * ll.standard_error).all()


def summed_mixture(model, guide):
    """The mixture with y summed out by the model, and a guide for z alone."""
    marked = pyro.infer.config_enumerate(model)

    def without_y(x):
        with pyro.plate("data", len(x)):
            loc, log_scale = guide.posterior(guide.encoder(x)).unbind(-2)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return marked, without_y


def test_probabilities_of_a_class_are_those_of_the_guide():
    for make in (gmvae, semi_supervised):
        _, guide, args = make()
        q = classify(guide, *args)
        assert q.shape == (12, 3)
        torch.testing.assert_close(q, guide.classifier(X).softmax(-1))
        assert torch.equal(q, classify(guide, *args, site="y"))
        assert guide.training
    with pytest.raises(ValueError, match=r"got 'w'; it has \['y'\]"):
        classify(guide, *args, site="w")
    _, continuous, args = two_layer()
    with pytest.raises(ValueError, match="it has none"):
        classify(continuous, *args)


def test_classes_come_in_the_order_of_the_support():
    def guide(x):
        with pyro.plate("data", len(x)):
            logits = x.flatten(1)[:, :3]
            pyro.sample("hot", dist.OneHotCategorical(logits=logits))
            pyro.sample("coin", dist.Bernoulli(probs=torch.full((len(x),), 0.2)))

    probabilities = X.flatten(1)[:, :3].softmax(-1)
    torch.testing.assert_close(classify(guide, X, site="hot"), probabilities)
    torch.testing.assert_close(classify(guide, X, site="coin")[0], torch.tensor([0.8, 0.2]))
    with pytest.raises(ValueError, match=r"got None; it has \['coin', 'hot'\]"):
        classify(guide, X)


def test_m2_learns_the_digits_from_a_hundred_labels():
    data = pyrovae.load_data("digits", binarize="threshold", context="labels", labelled=100)
    settings = {"latent": 5, "hidden": (64,)}
    model = SemiSupervised(data.shape, **settings)
    guide = SemiSupervisedGuide(data.shape, **settings, alpha=5.0)

    def accuracy():
        found = classify(guide, *data.split("test")).argmax(-1)
        return (found == data.labels.test).float().mean().item()

    assert accuracy() < 0.3
    objective = TraceEnum_ELBO(max_plate_nesting=1)
    pyrovae.fit(model, guide, data, objective=objective, epochs=5, batch_size=64, lr=5e-3, seed=0)
    assert accuracy() > 0.65


HALF, PULL = torch.tensor(0.5), torch.tensor([1.0, -1.0, 0.3])
STRAIGHT = {
    "bits": (
        dist.Bernoulli(logits=PULL).to_event(1),
        lambda logits: dist.RelaxedBernoulliStraightThrough(HALF, logits=logits).to_event(1),
        torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3),
        lambda logits: dist.Bernoulli(logits=logits).to_event(1),
    ),
    "class": (
        dist.OneHotCategorical(logits=PULL),
        lambda logits: dist.RelaxedOneHotCategoricalStraightThrough(HALF, logits=logits),
        torch.eye(3),
        lambda logits: dist.OneHotCategorical(logits=logits),
    ),
}


@pytest.mark.parametrize("kind", STRAIGHT)
def test_a_straight_through_relaxation_counts_by_the_mass_of_what_it_draws(kind):
    prior, relaxed, states, law = STRAIGHT[kind]
    x = torch.tensor([-1.0, 0.3, 2.0])
    logits = x[:, None] * PULL

    def likelihood(z):
        return dist.Normal(z @ torch.tensor([-1.0, 0.5, 2.0]), 1.0)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", likelihood(pyro.sample("z", prior)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", relaxed(x[:, None] * PULL).mask(True))

    log_p = prior.log_prob(states) + likelihood(states).log_prob(x[:, None])
    log_q = torch.stack([law(row).log_prob(states) for row in logits])
    found = pyrovae.log_likelihood(model, guide, x, num_samples=20_000, seed=0)
    torch.testing.assert_close(found.log_prob.float(), log_p.logsumexp(1), rtol=0, atol=0.03)
    exact = (log_q.exp() * (log_p - log_q)).sum(1)
    for estimator in ("trace_elbo", "trace_mean_field_elbo"):
        elbo = pyrovae.elbo(model, guide, x, objective=estimator, particles=20_000, seed=0).elbo
        torch.testing.assert_close(elbo, exact, rtol=0, atol=0.05)
    row = pyrovae.check(model, guide, x)["reparameterized"]
    assert row.status == "warned"
    assert "is drawn straight through: gradients are biased" in row.message
