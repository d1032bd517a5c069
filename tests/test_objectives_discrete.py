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
from pyrovae.objectives import estimate, make_objective, per_datum
from pyrovae.params import Parameters

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

    def __init__(self, mixed=False, enumerate=None, constant=0.0):
        super().__init__()
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
    parameters = Parameters(weighted(pair.model), weighted(pair.guide))
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
    parameters, objective = Parameters(pair.model, pair.guide), make_objective("beta_elbo", 1)
    objective.prepare(parameters, (DATA,))
    with Forced(y=lambda fn: y):
        found = estimate(objective, parameters, DATA)
    (slope,) = torch.autograd.grad(found.surrogate, [pair.table])
    prior, posterior = dist.Categorical(logits=pair.table[0]), pair.posterior(DATA)
    nats = kl_divergence(posterior, prior.expand(posterior.batch_shape))
    value = dist.Bernoulli(logits=pair.table[1][y]).log_prob(DATA) - 4.0 * nats
    total = value + value.detach() * posterior.log_prob(y)
    torch.testing.assert_close(slope, torch.autograd.grad(-total.sum(), [pair.table])[0])


@pytest.mark.parametrize("insomnia", [1.0, 0.4, 0.0])
def test_wake_and_sleep_learn_what_their_formulas_say(insomnia):
    pair, k = Small(), 3
    objective = make_objective("reweighted_wake_sleep", k, insomnia=insomnia)
    x, y, noise = draws(k)
    weight = pair.posterior(x).log_prob(y).sum(0).exp().detach()
    dream_x, dream_y = 1 - x, y[1]
    weighted = poutine.scale(scale=weight)
    parameters = Parameters(weighted(pair.model), weighted(pair.guide))
    objective.prepare(parameters, (x,))
    awake = itertools.chain([y], itertools.repeat(dream_y))
    with Forced(y=lambda fn: next(awake), x=lambda fn: dream_x):
        found = estimate(objective, parameters, x)
    (slope,) = torch.autograd.grad(found.surrogate, [pair.table])
    log_p, log_q = pair.log_joint(x, y, noise)
    normal = (log_p - log_q).softmax(0).detach()
    asleep = pair.posterior(dream_x).log_prob(dream_y)
    total = (normal * (log_p + insomnia * log_q)).sum(0) + (1 - insomnia) * asleep
    expected = torch.autograd.grad(-(weight * total).sum(), [pair.table])[0]
    torch.testing.assert_close(slope, expected)
    torch.testing.assert_close(found.loss, -(weight * iwae(log_p - log_q)).sum().detach())


def test_a_guide_asleep_learns_the_posterior_and_a_model_awake_the_data():
    """The guide descends KL(p ‖ q) over every dream, the model ascends ln p(x) of many samples."""
    pair = Small()
    y, x = torch.arange(C).repeat_interleave(2), DATA.repeat(C)
    log_p, _ = pair.log_joint(x, y, None)
    weighted = poutine.scale(scale=log_p.exp().detach())
    parameters = Parameters(weighted(pair.model), weighted(pair.guide))
    objective = make_objective("wake_sleep")
    objective.prepare(parameters, (x,))
    with Forced(y=lambda fn: y, x=lambda fn: x):
        found = estimate(objective, parameters, x)
    (slope,) = torch.autograd.grad(found.surrogate, [pair.table], retain_graph=True)
    every = pair.log_joint(DATA, torch.arange(C).unsqueeze(-1), None)
    joint, posterior = every[0].exp().detach(), every[0].log_softmax(0).detach()
    forward = (joint * (posterior - every[1])).sum()
    (expected,) = torch.autograd.grad(forward, [pair.table], retain_graph=True)
    torch.testing.assert_close(slope[2:4], expected[2:4])

    objective = make_objective("reweighted_wake_sleep", particles=40_000)
    (slope,) = torch.autograd.grad(
        estimate(objective, Parameters(pair.model, pair.guide), DATA).surrogate, [pair.table]
    )
    (expected,) = torch.autograd.grad(-every[0].logsumexp(0).sum(), [pair.table])
    torch.testing.assert_close(slope[:2], expected[:2], rtol=0, atol=0.03)


@pytest.mark.parametrize("enumerate", ["parallel", "sequential"])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_enumeration_is_the_exact_sum(enumerate, scale):
    pair = Small(enumerate=enumerate)
    weighted = poutine.scale(scale=scale)
    parameters = Parameters(weighted(pair.model), weighted(pair.guide))
    objective = make_objective("trace_enum_elbo")
    objective.max_plate_nesting = 1
    found = estimate(objective, parameters, DATA)
    total, slope = exact(pair, mean, 1)
    torch.testing.assert_close(found.loss, scale * total)
    (gradient,) = torch.autograd.grad(found.surrogate, [pair.table])
    torch.testing.assert_close(gradient, scale * slope)
    each = per_datum(objective, parameters, DATA)
    torch.testing.assert_close(each.sum(), -found.loss)
    if enumerate == "sequential":
        assert found.terms == {}
    else:
        assert found.terms.keys() == {"x", "y"}
        torch.testing.assert_close(sum(found.terms.values()), -found.loss)


@pytest.mark.parametrize("enumerate", ["parallel", "sequential", None])
@pytest.mark.parametrize("particles", [1, 3])
def test_enumeration_beside_samples_is_that_of_pyro(enumerate, particles):
    pair = Small(mixed=True, enumerate=enumerate)
    parameters = Parameters(pair.model, pair.guide)
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
    found = estimate(objective, Parameters(pair.model, pair.guide), x)
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
    parameters = Parameters(pair.model, pair.guide)
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
    parameters = Parameters(pair.model, pair.guide)
    found = estimate(make_objective("trace_enum_elbo"), parameters, DATA)
    (gradient,) = torch.autograd.grad(found.surrogate, [pair.table])
    assert found.loss.isfinite()
    assert gradient[1:, 1:].isfinite().all()


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("name", ["discrete", "mixed"])
def test_the_score_function_is_that_of_pyro_for_the_same_noise(name, particles):
    parameters = Parameters(*PAIRS[name]())
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
        estimate(TraceMeanField_ELBO(), Parameters(*PAIRS["mixed"]()), XS)


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
        parameters, objective = Parameters(pair.model, pair.guide), make_objective(name, **options)
        objective.prepare(parameters, (DATA,))
        pyro.set_rng_seed(0)
        found = estimate(objective, parameters, DATA)
        slopes.append(torch.autograd.grad(found.surrogate, [pair.table])[0])
    torch.testing.assert_close(*slopes)


def test_the_other_particles_steady_the_score():
    model, guide = PAIRS["discrete"]()
    parameters, leaves = Parameters(model, guide), list(guide.parameters())
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
