"""Pairs at the edges: masked as a whole, scaled in part, without latents, without anything."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.score_parts import ScoreParts
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO

import pyrovae
from pyrovae.objectives import estimate, make_objective
from pyrovae.pairs.pair import Pair

X = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
LOSSES = (Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO)


def model(x, mask=None):
    prior = dist.Normal(0.0, 1.0)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", prior if mask is None else prior.mask(mask))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([len(x), 2]).to_event(1), obs=x)


def guide(x, mask=None):
    posterior = dist.Normal(pyro.param("loc", torch.zeros(())), 1.0)
    with pyro.plate("data", len(x)):
        pyro.sample("z", posterior if mask is None else posterior.mask(mask))


def inside(program):
    """The same with its latent's distribution masked."""
    return lambda x: program(x, False)


def outside(program):
    """The same inside poutine.mask."""
    return poutine.mask(program, mask=False)


def nothing(x):
    pass


def likelihood(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(x.new_zeros(2), 1.0).to_event(1), obs=x)


PAIRS = {
    "masked distributions": (inside(model), inside(guide)),
    "masked prior": (inside(model), guide),
    "masked posterior": (model, inside(guide)),
    "masked programs": (outside(model), outside(guide)),
    "masked model": (outside(model), guide),
    "masked guide": (model, outside(guide)),
    "no latents": (likelihood, nothing),
    "nothing": (nothing, nothing),
}


@pytest.mark.parametrize("loss", LOSSES, ids=[loss.__name__ for loss in LOSSES])
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_step_has_pyros_loss(name, loss):
    found = []
    for kind, options in ((SVI, {}), (pyrovae.SVI, {"compile": False})):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        optimizer = pyro.optim.Adam({"lr": 0.1})
        svi = kind(*PAIRS[name], optimizer, loss(max_plate_nesting=1), **options)
        found.append([svi.step(X), svi.step(X)])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


class Unscored(dist.Normal):
    """A normal whose density nobody may ask for."""

    def log_prob(self, value):
        raise AssertionError("a density beside a closed form")


@pytest.mark.parametrize("name", ["trace_mean_field_elbo", "beta_elbo"])
def test_a_latent_whose_divergence_is_closed_has_no_density(name):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Unscored(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), torch.ones(2)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Unscored(x.sum(-1), 0.5))

    found = estimate(make_objective(name), Pair(model, guide), X)
    kl = 0.5 * (X.sum(-1).square() + 0.25 - 1.0 - 2.0 * torch.tensor(0.5).log()).sum()
    torch.testing.assert_close(found.terms["z"], -kl)


class ByItsScore(dist.Normal):
    """A normal whose gradient is by its score, as that of draws by rejection is in part."""

    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape).detach()

    def score_parts(self, value):
        density = self.log_prob(value)
        return ScoreParts(density, density, 0.0)


def test_a_score_beside_a_closed_divergence_is_in_the_gradient():
    mean, n = torch.nn.Parameter(torch.tensor(0.7)), 10_000

    def guide(x):
        loc = pyro.param("mean", mean)
        with pyro.plate("data", len(x)):
            pyro.sample("z", ByItsScore(loc.expand(len(x)), 1.0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    pyro.set_rng_seed(0)
    found = estimate(TraceMeanField_ELBO(), Pair(model, guide), torch.full((n,), 3.0))
    (grad,) = torch.autograd.grad(found.surrogate, mean)
    # Of the likelihood x - mean, of the divergence mean.
    assert -grad.item() / n == pytest.approx((3.0 - 0.7) - 0.7, abs=0.15)


@pytest.mark.parametrize("kind", [SVI, pyrovae.SVI], ids=["Pyro", "pyrovae"])
def test_a_latent_with_a_dimension_that_no_plate_declares_is_refused(kind):
    def program(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(3, len(x)), 1.0))

    svi = kind(program, program, pyro.optim.Adam({}), TraceMeanField_ELBO(max_plate_nesting=2))
    with pytest.raises(ValueError, match="invalid log_prob shape"):
        svi.step(X)


def test_the_elbo_without_latents_is_the_likelihood():
    exact = dist.Normal(0.0, 1.0).log_prob(X).sum(-1)
    for objective in ("trace_elbo", "trace_mean_field_elbo"):
        found = pyrovae.elbo(likelihood, nothing, X, objective=objective, particles=3, batch_size=2)
        torch.testing.assert_close(found.elbo, exact)
        torch.testing.assert_close(found.reconstruction, exact)
        assert found.kl.tolist() == [0.0] * len(X)


def clusters(scale, first=1.0):
    def program(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=first):
            y = pyro.sample("y", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            with poutine.scale(scale=scale):
                means = y.unsqueeze(-1) * pyro.param("means", torch.ones(2))
                pyro.sample("x", dist.Normal(means, 1.0).to_event(1), obs=x)

    return program


@pytest.mark.parametrize("scale", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_scales_that_differ_within_a_sum_over_latents_are_refused(scale):
    svi = pyrovae.SVI(
        clusters(scale),
        nothing,
        pyro.optim.Adam({"lr": 0.1}),
        TraceEnum_ELBO(max_plate_nesting=1),
        compile=False,
    )
    with pytest.raises(ValueError, match=r"'y' and 'x' .* different scales, 1 and 0\.1"):
        svi.step(X)


def test_a_scale_for_each_datum_within_a_sum_over_latents_is_refused():
    svi = pyrovae.SVI(
        clusters(1.0, first=1 + torch.arange(5.0)),
        nothing,
        pyro.optim.Adam({"lr": 0.1}),
        TraceEnum_ELBO(max_plate_nesting=1),
        compile=False,
    )
    with pytest.raises(ValueError, match=r"poutine\.scale has to be a number"):
        svi.step(X)


@pytest.mark.parametrize("first", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_one_scale_around_a_sum_over_latents_multiplies_it(first):
    losses = []
    for scale in (1.0, first):
        pyro.clear_param_store()
        loss = TraceEnum_ELBO(max_plate_nesting=1)
        svi = pyrovae.SVI(
            clusters(1.0, first=scale), nothing, pyro.optim.Adam({"lr": 0.1}), loss, compile=False
        )
        losses.append(svi.step(X))
    assert losses[1] == pytest.approx(losses[0] / 2)


@pytest.mark.parametrize("name", ["trace_elbo", "trace_mean_field_elbo"])
@pytest.mark.parametrize(
    "prior", [dist.Gamma(2.0, 1.0), dist.HalfNormal(1.0), dist.Uniform(0.0, 1.0)], ids=str
)
def test_the_elbo_of_a_guide_that_leaves_the_support_of_the_prior_is_minus_infinity(prior, name):
    def bounded(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Bernoulli(logits=z.unsqueeze(-1)).to_event(1), obs=x)

    x = torch.tensor([[0.0], [1.0], [1.0], [0.0]])
    pyro.clear_param_store()
    found = pyrovae.elbo(bounded, guide, x, objective=name, particles=200, seed=0)
    assert (found.kl == torch.inf).all()
    assert found.reconstruction.isfinite().all()
    x[3] = 0.5
    with pytest.raises(ValueError, match=r"observes 0.5, outside the support of Bernoulli"):
        pyrovae.elbo(bounded, guide, x, batch_size=2)


def test_a_refusal_inside_of_a_program_is_a_sentence_alone():
    pyro.clear_param_store()
    scaled = poutine.scale(model, scale=0.5)
    with pytest.raises(ValueError, match=r"drop poutine.scale or the subsampling plate.$"):
        pyrovae.fit(scaled, guide, X, objective=RenyiELBO(num_particles=3), epochs=1)


def test_nats_are_free_where_the_latent_is():
    """Of data for which it is masked, by the site or by its distribution, there are none."""
    seen, found = torch.tensor([True, True, False, False]), []

    def site(loc, how):
        fn = dist.Normal(loc, 1.0).to_event(1)
        with poutine.mask(mask=seen if how == "site" else torch.ones(4).bool()):
            within = dist.Normal(loc, 1.0).mask(seen[:, None]).to_event(1)
            return pyro.sample("z", {"whole": fn.mask(seen), "each": within}.get(how, fn))

    for how in ("site", "whole", "each"):

        def model(x, how=how):
            with pyro.plate("data", len(x)):
                site(torch.zeros(4, 2), how)
                pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)

        def guide(x, how=how):
            with pyro.plate("data", len(x)):
                site(torch.full((4, 2), 1e-3), how)

        objective = make_objective("free_bits_elbo", free_bits=0.5)
        found.append(
            pyrovae.SVI(model, guide, torch.optim.Adam, objective).evaluate_loss(torch.zeros(4, 3))
        )
    plain = -dist.Normal(0.0, 1.0).log_prob(torch.zeros(12)).sum().item()
    assert found == pytest.approx([plain + 2 * 0.5] * 3)
