"""All estimates of log p(x) agree with each other, and with the exact number where it is known."""

import pyro
import pytest
import torch
from known_pairs import KNOWN
from zoo import ZOO

import pyrovae
from pyrovae.evidence.annealing import annealed_log_likelihood
from pyrovae.evidence.importance import log_likelihood
from pyrovae.evidence.sandwich import bidirectional
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.pair import Pair

ANNEALED = {"num_chains": 64, "num_temperatures": 12, "num_steps": 2}
ESTIMATES = {
    "importance": lambda *pair: log_likelihood(*pair, num_samples=3000, seed=1),
    "defensive": lambda *pair: log_likelihood(*pair, num_samples=3000, seed=2, defensive=0.2),
    "refined": lambda *pair: log_likelihood(*pair, num_samples=3000, seed=3, refine_steps=30),
    "refined and defensive": lambda *pair: log_likelihood(
        *pair, num_samples=3000, seed=3, refine_steps=30, defensive=0.2
    ),
    "annealed": lambda *pair: annealed_log_likelihood(*pair, seed=14, **ANNEALED),
    "from the prior": lambda *pair: annealed_log_likelihood(
        *pair, seed=5, initial="prior", **ANNEALED
    ),
}
# Guides that draw latents outside of the prior's support, where the ELBO is minus infinity.
TOO_WIDE = ("bounded", "bounded_rows", "angle_on_a_line")
each_known = pytest.mark.parametrize("name", KNOWN)


@pytest.mark.parametrize("estimate", ESTIMATES)
@each_known
def test_every_estimate_is_exact_within_its_stated_error(name, estimate):
    model, guide, args, log_prob = KNOWN[name]()
    found = ESTIMATES[estimate](model, guide, *args)
    error = found.log_prob - log_prob(*args)
    assert error.abs().max() < 0.6
    assert found.mean_standard_error < 0.1
    z = error / found.standard_error.clamp(min=1e-4)
    assert z.square().mean().sqrt() < 2


def test_a_refined_guide_of_several_latents_compiles():
    """Each site's draws are a part of all coordinates, which lie apart in memory."""
    model, guide, args, _ = KNOWN["optional"]()
    options = {"num_samples": 256, "refine_steps": 3, "seed": 1}
    eager, compiled = (
        log_likelihood(model, guide, *args, **options, compile=compile) for compile in (False, True)
    )
    torch.testing.assert_close(compiled.log_prob, eager.log_prob, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(KNOWN.keys() - {*TOO_WIDE}))
def test_the_elbo_is_the_bound_at_a_single_sample(name):
    model, guide, args, log_prob = KNOWN[name]()
    curve = ESTIMATES["importance"](model, guide, *args).curve.log_prob[0]
    elbo = pyrovae.elbo(model, guide, *args, particles=3000, seed=6).elbo.double()
    torch.testing.assert_close(elbo, curve, atol=0.3, rtol=0)
    assert (elbo < log_prob(*args) + 0.05).all()
    told = pyrovae.diagnose(model, guide, *args, num_samples=256, intervals=False, seed=7)
    torch.testing.assert_close(-(told.rate + told.distortion).double(), elbo, atol=0.6, rtol=0)


@each_known
def test_the_sandwich_holds_the_exact_number(name):
    model, guide, (x, *context), log_prob = KNOWN[name]()
    found = bidirectional(model, guide, *context, like=x, n=len(x), seed=8, **ANNEALED)
    exact = log_prob(found.x, *context)
    for above in (exact - found.lower.log_prob, found.upper - exact):
        assert above.mean() > -3 * above.std() / len(x) ** 0.5
    assert found.gap.abs().max() < 3


def of_zoo(name, estimate, **options):
    """An estimate of a pair of the zoo; None where latents are discrete or the guide is a flow."""
    pyro.set_rng_seed(0)
    model, guide, args = ZOO[name].make()
    try:
        return estimate(model, guide, *args, **options)
    except pyrovae.InputError as error:
        if "is discrete" in str(error) or "cannot score" in str(error):
            return None
        raise


@pytest.mark.parametrize("name", ZOO)
def test_estimates_of_every_pair_agree(name):
    """Where k-hat and ess trust them for most data, annealed from guides and priors in turn."""
    start = ("guide", "prior")[[*ZOO].index(name) % 2]
    brief = {"num_chains": 32, "num_temperatures": 3, "num_steps": 2, "initial": start}
    plain = of_zoo(name, log_likelihood, num_samples=1500, seed=1)
    steep = {"num_samples": 1500, "defensive": 0.5}
    first = of_zoo(name, log_likelihood, **steep, seed=2) or plain
    others = [
        plain,
        of_zoo(name, log_likelihood, **steep, refine_steps=5, seed=3),
        of_zoo(name, annealed_log_likelihood, **brief, seed=4),
    ]
    for other in filter(None, others):
        heavy = first.khat.nan_to_num(0) > 0.5, other.khat.nan_to_num(0) > 0.5
        sure = ~heavy[0] & ~heavy[1] & (other.ess > 20)
        if sure.double().mean() < 0.5:
            continue
        difference = (other.log_prob - first.log_prob)[sure]
        noise = (first.standard_error.square() + other.standard_error.square())[sure].sum().sqrt()
        assert difference.sum().abs() < 4 * noise + 0.02 * len(difference), other.method
    bound = of_zoo(name, pyrovae.elbo, particles=1000, seed=6).mean
    assert bound == pytest.approx(plain.curve.mean[1], abs=0.3)


def repeated(args, n):
    return tuple(arg[torch.arange(n) % len(arg)] for arg in args)


@pytest.mark.parametrize("name", [*KNOWN, *ZOO])
def test_scores_of_many_particles_are_those_of_each_alone(name):
    pyro.set_rng_seed(0)
    model, guide, args, *_ = KNOWN[name]() if name in KNOWN else ZOO[name].make()
    pair = Pair(model, guide)
    with torch.no_grad(), pair.mode(training=False), pyro.validation_enabled(False):
        for n in (1, 64):
            rows = repeated(args, n)
            inspect_pair(pair, *rows)
            for k in (1, 2, 64):
                values, _ = pair.draw(rows, k)
                scored = pair.score_model(rows, k, values)[0], pair.score_guide(rows, k, values)
                for each in {0, k // 2, k - 1}:
                    one = {name: value[each : each + 1] for name, value in values.items()}
                    alone = pair.score_model(rows, 1, one)[0], pair.score_guide(rows, 1, one)
                    for together, single in zip(scored, alone, strict=True):
                        for site, score in single.items():
                            expected = together[site][each : each + 1]
                            torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-3)
