"""Laws of every pair under every objective that fits it.

A plain pair has one latent, whole, that its guide draws in one Gaussian. To an objective those
differ by their numbers alone: one comes under every third, and of three in a row each has one.
"""

import warnings
from pathlib import Path

import pyro
import pytest
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from zoo import ZOO

import pyrovae
from pyrovae.compiling.graph import record
from pyrovae.objectives import OBJECTIVES, estimate, make_objective, per_datum
from pyrovae.pairs.contract import check_support, inspect_pair
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.parameters import owners
from pyrovae.pairs.traces import samples, site_scores

SETTINGS = {
    "warm_up_elbo": {"warm_up": 3},
    "reweighted_wake_sleep": {"insomnia": 0.5},
    "free_bits_elbo": {"free_bits": 1e-3},
}
PLAIN = [name for name in ZOO if name.endswith(("-mean_field", "-counts"))]
PLAIN += ["bernoulli-convolutional", "bernoulli-full_covariance", "bernoulli-low_rank", "linear"]
PLAIN += ["conditional", "plain_modules", "published_example", "same_names", "functions"]
FITTING = [
    (name, fits)
    for name, entry in ZOO.items()
    for n, fits in enumerate(entry.objectives)
    if name not in PLAIN or n % 3 == PLAIN.index(name) % 3
]
UNFIT = [(name, unfit) for name, entry in ZOO.items() for unfit in entry.refused]
DOUBTED = [(name, doubted) for name, entry in ZOO.items() for doubted in entry.doubted]
STEPS = 4

each = pytest.mark.parametrize("name", ZOO)


def over(cases):
    """Parametrizes a test by a pair and an objective."""
    ids = [f"{name}-{objective}" for name, objective in cases]
    return pytest.mark.parametrize(("name", "objective"), cases, ids=ids)


def make(name, seed=0):
    """A pair of the zoo with its parameters and its batch."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, guide, args = ZOO[name].make()
    return Pair(model, guide), model, guide, args


def made(objective):
    return make_objective(objective, **SETTINGS.get(objective, {}))


def part_of(guide_trace, part):
    """The same trace with some of its particles, or of its data, whichever come first."""
    drawn = prune_subsample_sites(guide_trace)
    for name, site in samples(guide_trace).items():
        if not site["is_observed"]:
            drawn.nodes[name] = site | {"value": site["value"][part]}
    return drawn


def bound(iwae, parameters, args):
    """The importance-weighted bound in nats per datum, by the same draws each time."""
    pyro.set_rng_seed(4)
    return per_datum(iwae, parameters, *args).mean()


def test_every_program_and_objective_that_is_shipped_is_in_the_zoo(repository):
    seen = {
        type(module).__module__.removeprefix("pyrovae.")
        for name in ZOO
        for program in ZOO[name].make()[:2]
        for module in owners(program)
    }
    shipped = {
        f"{kind}.{path.stem}"
        for kind in ("models", "guides")
        for path in Path(repository, kind).glob("[!_]*.py")
    }
    assert shipped <= seen
    assert {objective for _, objective in FITTING} == set(OBJECTIVES)


@each
def test_the_check_passes(name, monkeypatch):
    monkeypatch.setattr("pyrovae.checking.bounds.record", lambda *args: None)  # as captured below
    _, model, guide, args = make(name)
    report = pyrovae.check(model, guide, *args, particles=8)
    assert report.passed, report
    warned = [row.name for row in report.rows if row.status == "warned"]
    assert warned == list(ZOO[name].limits), report
    needs = [row for row in report.rows if row.message.startswith("needs ")]
    assert not needs, report


@over(FITTING)
def test_the_loss_is_minus_the_sum_of_what_each_datum_has_and_training_lowers_it(name, objective):
    parameters, model, guide, args = make(name)
    loss, iwae = made(objective), make_objective("iwae")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        estimate(loss, parameters, *args)
        pyro.set_rng_seed(3)
        found = estimate(loss, parameters, *args)
        pyro.set_rng_seed(3)
        each = per_datum(loss, parameters, *args)
        assert each.shape == (len(args[0]),)
        assert bool(each.isfinite().all())
        assert not each.requires_grad
        if objective != "trace_enum_elbo":
            torch.testing.assert_close(-each.sum(), found.loss, rtol=1e-4, atol=1e-3)
        before, leaves = bound(iwae, parameters, args), parameters.named()
        assert {t.dtype for t in (found.loss, *found.terms.values())} == {args[0].dtype}
        slopes = torch.autograd.grad(found.surrogate, list(leaves.values()))
        assert all(bool(slope.isfinite().all()) for slope in slopes)
        idle = {key for key, slope in zip(leaves, slopes, strict=True) if not slope.any()}
        assert not idle or objective == "free_bits_elbo"
        start = {key: leaf.detach().clone() for key, leaf in leaves.items()}
        svi = pyrovae.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss, compile=False)
        for _ in range(STEPS):
            svi.step(*args)
    assert svi.pair.named().keys() == start.keys()
    still = {k for k, leaf in svi.pair.named().items() if torch.equal(leaf, start[k])}
    assert still <= idle
    if objective not in ZOO[name].noisy:
        assert bound(iwae, parameters, args) > before + 0.01


@over(UNFIT)
def test_an_objective_that_does_not_fit_is_refused(name, objective):
    parameters, model, guide, args = make(name)
    words = ZOO[name].refused[objective]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(ValueError, match=words):
            estimate(made(objective), parameters, *args)
        with pytest.raises(ValueError, match=words):
            pyrovae.SVI(model, guide, torch.optim.Adam, made(objective)).step(*args)


@over(DOUBTED)
def test_an_objective_that_fits_badly_warns(name, objective):
    parameters, _, _, args = make(name)
    with pytest.warns(UserWarning, match=ZOO[name].doubted[objective]):
        estimate(made(objective), parameters, *args)


@each
def test_scores_of_k_particles_are_a_loop_over_single_ones(name):
    parameters, _, _, args = make(name)
    layout, k, n = inspect_pair(parameters, *args), 3, len(args[0])
    with torch.no_grad():
        guide_trace = parameters.trace_guide(*args, particles=k)
        model_trace = parameters.replay_model(guide_trace, *args, particles=k)
        together = [site_scores(t, layout, k, n) for t in (guide_trace, model_trace)]
        for i in range(k):
            drawn = part_of(guide_trace, i)
            with poutine.replay(trace=drawn):
                guide_alone = parameters.trace_guide(*args)
            alone = guide_alone, parameters.replay_model(drawn, *args)
            for scores, trace in zip(together, alone, strict=True):
                found = site_scores(trace, layout, 1, n)
                assert found.keys() == scores.keys()
                for site, score in found.items():
                    torch.testing.assert_close(score[0], scores[site][i], rtol=1e-4, atol=1e-4)


@each
def test_scores_of_a_datum_do_not_depend_on_its_batch(name):
    parameters, _, _, args = make(name)
    layout, part = inspect_pair(parameters, *args), slice(4, 7)
    rows = [arg[part] for arg in args]
    with torch.no_grad():
        whole = parameters.trace_guide(*args)
        drawn = part_of(whole, part)
        with poutine.replay(trace=drawn):
            few = parameters.trace_guide(*rows)
        models = parameters.replay_model(whole, *args), parameters.replay_model(drawn, *rows)
        for one, other in ((whole, few), models):
            expected = site_scores(one, layout, 1, len(args[0]))
            for site, score in site_scores(other, layout, 1, 3).items():
                torch.testing.assert_close(score, expected[site][:, part], rtol=1e-4, atol=1e-4)


@each
def test_a_bound_rises_with_the_samples_behind_it_to_log_p(name):
    parameters, model, guide, args = make(name)
    bounds = []
    for groups, particles in ((16, 1), (4, 4), (1, 16)):
        objective = make_objective("miwae", groups=groups, particles=particles)
        objective.prepare(parameters, args)
        pyro.set_rng_seed(3)
        bounds.append(per_datum(objective, parameters, *args))
    assert bool((torch.stack(bounds).diff(dim=0) > -1e-3).all())
    assert bounds[2].mean() > bounds[0].mean() + 1e-3
    found = pyrovae.log_likelihood(model, guide, *args, num_samples=400, seed=1)
    error = found.mean_standard_error + bounds[2].std() / len(bounds[2]) ** 0.5
    assert bounds[2].mean() <= found.mean + 3 * error
    assert pyrovae.elbo(model, guide, *args, particles=50, seed=0).mean <= found.mean + 3 * error


@each
def test_a_state_makes_another_pair_the_same(name):
    parameters, model, guide, args = make(name)
    inspect_pair(parameters, *args)
    expected = pyrovae.log_likelihood(model, guide, *args, num_samples=9, seed=0).log_prob
    state = parameters.state_dict()
    assert len({id(leaf) for leaf in parameters.named().values()}) == len(parameters.named())
    other, model, guide, _ = make(name, seed=1)
    inspect_pair(other, *args)
    before = pyrovae.log_likelihood(model, guide, *args, num_samples=9, seed=0).log_prob
    assert not torch.equal(before, expected)
    other.load_state_dict(state)
    found = pyrovae.log_likelihood(model, guide, *args, num_samples=9, seed=0).log_prob
    assert torch.equal(found, expected)


@each
def test_what_is_drawn_is_data(name):
    parameters, model, guide, (x, *context) = make(name)
    layout = inspect_pair(parameters, x, *context)
    drawn = pyrovae.sample(model, *context, like=x, n=len(x), seed=0)
    again = pyrovae.reconstruct(model, guide, x, *context, seed=0)
    codes = pyrovae.encode(guide, x, *context, seed=0)
    decoded = pyrovae.decode(model, codes, *context, like=x, seed=0)
    assert codes.keys() == set(layout.latents)
    for found in (drawn, again, decoded):
        found = whole(found)
        assert found[0].numel() == x[0].numel()
        assert len(found) == len(x)
        assert bool(found.isfinite().all())
    drawn = whole(drawn)
    assert bool((drawn[0] != drawn[1]).any())
    if bool((x == x.round()).all()):
        assert bool((drawn == drawn.round()).all())
        assert x.min() >= drawn.min() >= 0
    check_support(parameters, drawn.reshape(x.shape), *context)


def whole(found):
    """What all sites have drawn of x: one site does, or a site for each of its columns."""
    if not isinstance(found, dict):
        return found
    return found["x"] if "x" in found else torch.stack([*found.values()], -1)


def _captured():
    """Each pair with one of its objectives, so that each objective comes as often as another."""
    left = dict.fromkeys(OBJECTIVES, 0)
    for name, entry in ZOO.items():
        chosen = min(entry.objectives, key=left.get)
        left[chosen] += 1
        yield name, chosen


@over(list(_captured()))
def test_a_captured_step_is_the_eager_step(name, objective):
    parameters, _, _, args = make(name)
    loss = made(objective)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        estimate(loss, parameters, *args)
        leaves = list(parameters.named().values())

        def step(*args):
            found = estimate(loss, parameters, *args)
            return [found.loss, *torch.autograd.grad(found.surrogate, leaves)]

        with pyro.validation_enabled(False):
            graph = record(step, args, parameters)
            others = [arg.flip(0) for arg in args]
            pyro.set_rng_seed(5)
            expected = step(*others)
            pyro.set_rng_seed(5)
            found = graph(*others)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
