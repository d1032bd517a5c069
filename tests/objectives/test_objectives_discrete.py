"""Latents without a path: their gradients, summed over every draw, are the exact ones."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.distributions import kl_divergence

from pairs import PAIRS, binary
from pyrovae.objectives import estimate, make_objective
from pyrovae.pairs.pair import Pair

C = 3
DATA = torch.tensor([1.0, 0.0], dtype=torch.float64)
XS = binary()


class Forced(Messenger):
    """Draws what it is told at some sites, as if by chance."""

    def __init__(self, **makers):
        super().__init__()
        self.makers = makers

    def _pyro_sample(self, msg):
        if msg["name"] in self.makers and not msg["is_observed"] and not msg["done"]:
            msg["value"], msg["done"] = self.makers[msg["name"]](msg["fn"]), True


class Small(nn.Module):
    """y of three values and, if ``mixed``, z given y; x is a coin."""

    def __init__(self, mixed=False, enumerate=None, constant=0.0, lesson=False):
        super().__init__()
        self.lesson = lesson
        self.mixed, self.infer, self.constant = mixed, {"enumerate": enumerate}, constant
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(5, C, generator=generator, dtype=torch.float64))

    def posterior(self, x):
        return dist.Categorical(logits=self.table[2] + x.unsqueeze(-1) * self.table[3])

    def model(self, x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=self.table[0]))
            logits = self.table[1][y]
            if self.mixed:
                logits = logits + pyro.sample("z", dist.Normal(logits, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=logits), obs=x)
            if self.constant:
                pyro.factor("constant", torch.full_like(x, self.constant))

    def guide(self, x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", self.posterior(x), infer=self.infer)
            if self.mixed:
                pyro.sample("z", dist.Normal(self.table[4][y], 0.8))
            if self.lesson:
                pyro.factor("lesson", -self.table[1, : len(x)], has_rsample=True)

    def log_joint(self, x, y, noise):
        """ln p(x, y, z) and ln q(y, z | x) at z = loc + 0.8 noise, by hand."""
        logits = self.table[1][y]
        log_p, log_q = self.table[0].log_softmax(0)[y], self.posterior(x).log_prob(y)
        if self.mixed:
            q = dist.Normal(self.table[4][y], 0.8)
            z = q.loc + 0.8 * noise
            log_p = log_p + dist.Normal(logits, 1.0).log_prob(z)
            log_q, logits = log_q + q.log_prob(z), logits + z
        return log_p + dist.Bernoulli(logits=logits).log_prob(x), log_q


def draws(k):
    """Each datum once for every draw of its K particles: x ``[R]``, y and the noise ``[K, R]``."""
    y = torch.tensor(list(itertools.product(range(C), repeat=k))).mT
    noise = torch.randn(k, len(DATA), 1, dtype=torch.float64).expand(-1, -1, y.shape[1])
    return DATA.repeat_interleave(y.shape[1]), y.repeat(1, len(DATA)), noise.flatten(1)


def expected(pair, objective, k):
    """The mean of an objective's loss and gradient over every draw: each weighted as a datum."""
    x, y, noise = draws(k)
    weight = pair.posterior(x).log_prob(y).sum(0).exp().detach()
    weighted = poutine.scale(scale=weight)
    parameters = Pair(weighted(pair.model), weighted(pair.guide))
    objective.max_plate_nesting = 2
    estimate(objective, parameters, x)
    rows = slice(None) if k > 1 else 0
    with Forced(y=lambda fn: y[rows], z=lambda fn: fn.mean + fn.stddev * noise[rows]):
        found = estimate(objective, parameters, x)
    return found.loss, torch.autograd.grad(found.surrogate, [pair.table])[0]


def exact(pair, bound, k):
    """The mean of minus a bound over every draw, and its gradient, by autograd alone."""
    x, y, noise = draws(k)
    log_p, log_q = pair.log_joint(x, y, noise)
    weight = pair.posterior(x).log_prob(y).sum(0).exp()
    total = -(weight * bound(log_p - log_q)).sum()
    return total.detach(), torch.autograd.grad(total, [pair.table])[0]


def iwae(log_w):
    return log_w.logsumexp(0) - torch.tensor(float(len(log_w))).double().log()


def mean(log_w):
    return log_w.mean(0)


CASES = {
    "trace_elbo-1": (Trace_ELBO(), 1, mean),
    "trace_elbo-2": (Trace_ELBO(2, 2, vectorize_particles=True), 2, mean),
    "iwae-1": (make_objective("iwae", 1), 1, iwae),
    "iwae-2": (make_objective("iwae", 2), 2, iwae),
    "iwae-4": (make_objective("iwae", 4), 4, iwae),
    "renyi": (make_objective("renyi", 3, alpha=0.4), 3, lambda w: iwae(0.6 * w) / 0.6),
    "elbo-3": (make_objective("renyi", 3, alpha=1.0), 3, mean),
    "ciwae": (make_objective("ciwae", 3, beta=0.3), 3, lambda w: 0.3 * mean(w) + 0.7 * iwae(w)),
    "miwae-2-1": (make_objective("miwae", 1, groups=2), 2, mean),
    "miwae-2-2": (
        make_objective("miwae", 2, groups=2),
        4,
        lambda w: (iwae(w[:2]) + iwae(w[2:])) / 2,
    ),
    "beta-1": (make_objective("beta_elbo", 2, beta=1.0, analytic=False), 2, mean),
}


@pytest.mark.parametrize("mixed", [False, True], ids=["discrete", "mixed"])
@pytest.mark.parametrize(("objective", "k", "bound"), CASES.values(), ids=CASES)
def test_the_gradient_over_every_draw_is_that_of_the_sum(objective, k, bound, mixed):
    pair = Small(mixed)
    pyro.set_rng_seed(1)
    loss, gradient = expected(pair, objective, k)
    pyro.set_rng_seed(1)
    total, slope = exact(pair, bound, k)
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(gradient, slope, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("mixed", [False, True], ids=["discrete", "mixed"])
@pytest.mark.parametrize("analytic", [False, True], ids=["sampled", "analytic"])
def test_the_score_of_a_weighted_elbo_has_its_weights(analytic, mixed):
    """β is on every divergence, also in what a discrete latent's score is multiplied by."""
    pair, beta = Small(mixed), 2.5
    objective = make_objective("beta_elbo", 1, beta=beta, analytic=analytic)
    pyro.set_rng_seed(1)
    loss, gradient = expected(pair, objective, 1)
    pyro.set_rng_seed(1)
    x, y, noise = draws(1)
    y, noise = y[0], noise[0]
    prior, posterior = dist.Categorical(logits=pair.table[0]), pair.posterior(x)
    logits = pair.table[1][y]
    divergence = posterior.log_prob(y) - prior.log_prob(y)
    if analytic:
        divergence = kl_divergence(posterior, prior.expand(posterior.batch_shape))
    if mixed:
        p, q = dist.Normal(logits, 1.0), dist.Normal(pair.table[4][y], 0.8)
        z = q.loc + 0.8 * noise
        of_z = kl_divergence(q, p) if analytic else q.log_prob(z) - p.log_prob(z)
        divergence, logits = divergence + of_z, logits + z
    value = dist.Bernoulli(logits=logits).log_prob(x) - beta * divergence
    total = -(posterior.log_prob(y).exp() * value).sum()
    (slope,) = torch.autograd.grad(total, [pair.table])
    torch.testing.assert_close(loss, total.detach())
    torch.testing.assert_close(gradient, slope, rtol=1e-7, atol=1e-10)


def test_a_closed_divergence_of_a_discrete_latent_is_differentiated_as_it_is():
    pair, y = Small(), torch.tensor([2, 0])
    parameters, objective = Pair(pair.model, pair.guide), make_objective("beta_elbo", 1)
    objective.prepare(parameters, (DATA,))
    with Forced(y=lambda fn: y):
        found = estimate(objective, parameters, DATA)
    (slope,) = torch.autograd.grad(found.surrogate, [pair.table])
    prior, posterior = dist.Categorical(logits=pair.table[0]), pair.posterior(DATA)
    nats = kl_divergence(posterior, prior.expand(posterior.batch_shape))
    value = dist.Bernoulli(logits=pair.table[1][y]).log_prob(DATA) - 4.0 * nats
    total = value + value.detach() * posterior.log_prob(y)
    torch.testing.assert_close(slope, torch.autograd.grad(-total.sum(), [pair.table])[0])


@pytest.mark.parametrize("name", ["beta_elbo", "wake_sleep", "reweighted_wake_sleep", "iwae"])
def test_a_factor_of_the_guide_is_taken_off_in_every_objective(name):
    """As in Pyro's ELBO: it is no density of a latent, so that no weight and no sleep is for it."""
    slopes, losses = [], []
    for lesson in (False, True):
        pair = Small(mixed=True, lesson=lesson)
        objective, parameters = make_objective(name), Pair(pair.model, pair.guide)
        objective.prepare(parameters, (DATA,))
        pyro.set_rng_seed(3)
        found = estimate(objective, parameters, DATA)
        losses.append(found.loss)
        slopes.append(torch.autograd.grad(found.surrogate, [pair.table])[0])
    change = torch.zeros(5, C, dtype=torch.float64)
    change[1, :2] = -1.0
    paths = [0, 1, 4]
    torch.testing.assert_close(slopes[1][paths] - slopes[0][paths], change[paths])
    torch.testing.assert_close(losses[1] - losses[0], -Small().table[1, :2].sum().detach())


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("name", ["discrete", "mixed"])
def test_the_score_function_is_that_of_pyro_for_the_same_noise(name, particles):
    parameters = Pair(*PAIRS[name]())
    leaves = list(parameters.named().values())
    loss = Trace_ELBO(particles, 1 + (particles > 1), vectorize_particles=particles > 1)
    pyro.set_rng_seed(3)
    found = estimate(loss, parameters, XS)
    pyro.set_rng_seed(3)
    theirs = loss.differentiable_loss(parameters.run_model, parameters.run_guide, XS)
    torch.testing.assert_close(found.loss, theirs.detach())
    ours = torch.autograd.grad(found.surrogate, leaves)
    for one, other in zip(ours, torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_estimator_b_refuses_a_latent_without_a_path():
    with pytest.raises(ValueError, match=r"'y' from a OneHotCategorical.*trace_enum_elbo"):
        estimate(TraceMeanField_ELBO(), Pair(*PAIRS["mixed"]()), XS)


SHIFTED = [
    ("iwae", {"particles": 3}),
    ("renyi", {"particles": 3, "alpha": 0.4}),
    ("ciwae", {"particles": 3}),
    ("miwae", {"particles": 1, "groups": 3}),
    ("miwae", {"particles": 2, "groups": 2}),
]


@pytest.mark.parametrize(("name", "options"), SHIFTED, ids=lambda value: str(value))
def test_a_constant_in_ln_p_does_not_matter_to_the_score_of_several_particles(name, options):
    slopes = []
    for constant in (0.0, 100.0):
        pair = Small(mixed=True, constant=constant)
        parameters, objective = Pair(pair.model, pair.guide), make_objective(name, **options)
        objective.prepare(parameters, (DATA,))
        pyro.set_rng_seed(0)
        found = estimate(objective, parameters, DATA)
        slopes.append(torch.autograd.grad(found.surrogate, [pair.table])[0])
    torch.testing.assert_close(*slopes)


def test_the_other_particles_steady_the_score():
    model, guide = PAIRS["discrete"]()
    parameters, leaves = Pair(model, guide), list(guide.parameters())
    plain = Trace_ELBO(4, 2, vectorize_particles=True)
    means, spreads = [], []
    for objective in (plain, make_objective("renyi", 4, alpha=1.0)):
        estimate(objective, parameters, XS)
        pyro.set_rng_seed(0)
        slopes = (
            torch.autograd.grad(estimate(objective, parameters, XS).surrogate, leaves)
            for _ in range(60)
        )
        drawn = torch.stack([torch.cat([g.flatten() for g in slope]) for slope in slopes])
        means.append(drawn.mean(0))
        spreads.append(drawn.var(0))
    assert spreads[1].sum() < 0.02 * spreads[0].sum()
    error = ((spreads[0] + spreads[1]) / 60).sqrt()
    assert ((means[0] - means[1]).abs() < 4.5 * error + 1e-6).all()
