"""Laws of the programs with one latent layer: every model goes with every guide."""

import copy

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch.fx.experimental.proxy_tensor import make_fx

import pyrovae
from one_layer import (
    FLOWS,
    GUIDES,
    LATENT,
    MODELS,
    SHAPE,
    N,
    build,
    data,
    double,
    each_pair,
    pair,
    posterior_of,
    prior_of,
    svi_of,
)
from pyrovae.contract import check_support, inspect_pair
from pyrovae.objectives import estimate
from pyrovae.params import Parameters
from pyrovae.traces import replay_model, site_scores, take_particles, trace_guide


def last_bias(program):
    """What is added to each output of a program's network."""
    network = program.encoder if hasattr(program, "encoder") else program.decoder
    return [value for name, value in network.named_parameters() if name.endswith("bias")][-1]


@pytest.mark.parametrize("model", MODELS)
def test_any_model_goes_with_any_guide(model):
    x = data(model)
    for guide in GUIDES:
        parameters = Parameters(*pair(model, guide))
        if model == "vamp_prior" and guide in FLOWS:
            with pytest.raises(ValueError, match="got a flow"):
                inspect_pair(parameters, x)
            continue
        layout = inspect_pair(parameters, x)
        assert (layout.latents, layout.observed) == (("z",), ("x",))
        with torch.no_grad():
            trace = trace_guide(parameters, x, particles=2, layout=layout)
            model_trace = replay_model(parameters, trace, x, particles=2, layout=layout)
            scores = [site_scores(t, layout, 2, N) for t in (trace, model_trace)]
        for score in (scores[0]["z"], scores[1]["z"], scores[1]["x"]):
            assert score.shape == (2, N)
            assert bool(score.isfinite().all())


@each_pair
def test_scores_of_k_particles_are_a_loop_over_single_ones(model, guide):
    parameters, x, k = Parameters(*pair(model, guide)), data(model), 3
    layout = inspect_pair(parameters, x)
    with torch.no_grad():
        guide_trace = trace_guide(parameters, x, particles=k, layout=layout)
        model_trace = replay_model(parameters, guide_trace, x, particles=k, layout=layout)
        together = site_scores(model_trace, layout, k, N)
        drawn = site_scores(guide_trace, layout, k, N)["z"]
        for i in range(k):
            one = take_particles(guide_trace, slice(i, i + 1))
            alone = replay_model(parameters, one, x, particles=1, layout=layout)
            for name, score in site_scores(alone, layout, 1, N).items():
                torch.testing.assert_close(score[0], together[name][i], rtol=1e-5, atol=1e-4)
            found = posterior_of(parameters.run_guide, x).log_prob(one.nodes["z"]["value"][0])
            torch.testing.assert_close(found, drawn[i], rtol=1e-4, atol=1e-4)


@each_pair
def test_scores_of_a_datum_do_not_depend_on_its_batch(model, guide):
    (model, guide), x, part = pair(model, guide), data(model), slice(4, 7)
    with torch.no_grad():
        whole = poutine.trace(guide).get_trace(x)
        site = whole.nodes["z"]
        z, expected = site["value"], site["fn"].log_prob(site["value"])
        found = posterior_of(guide, x[part]).log_prob(z[part])
        torch.testing.assert_close(found, expected[part], rtol=1e-5, atol=1e-5)
        scores = []
        for values, rows in ((z, x), (z[part], x[part])):
            trace = poutine.trace(poutine.condition(model, {"z": values})).get_trace(rows)
            trace.compute_log_prob()
            scores.append([trace.nodes[name]["log_prob"] for name in ("z", "x")])
        for one, other in zip(*scores, strict=True):
            torch.testing.assert_close(one[part], other, rtol=1e-5, atol=1e-4)


@each_pair
def test_thirty_steps_improve_the_bound_and_move_every_parameter(model, guide):
    programs, x = pair(model, guide), data(model)
    before = pyrovae.elbo(*programs, x, particles=20, seed=1).mean
    outputs = [last_bias(program) for program in programs]
    first = [bias.detach().clone() for bias in outputs]
    svi = svi_of(*programs)
    svi.step(x)
    start = {name: leaf.detach().clone() for name, leaf in svi.parameters.named().items()}
    for _ in range(30):
        svi.step(x)
    after = svi.parameters.named()
    assert start.keys() == after.keys()
    assert all(not torch.equal(start[name], after[name]) for name in start)
    unused = [int((old == new).sum()) for old, new in zip(first, outputs, strict=True)]
    assert unused == [0, LATENT * (LATENT - 1) / 2 if guide == "full_covariance" else 0]
    assert pyrovae.elbo(*programs, x, particles=20, seed=1).mean > before + 0.5


@each_pair
def test_the_bound_is_below_the_likelihood(model, guide):
    programs, x = pair(model, guide), data(model)
    bound = pyrovae.elbo(*programs, x, particles=50, seed=0)
    analytic = pyrovae.elbo(*programs, x, particles=50, seed=2, objective="trace_mean_field_elbo")
    ll = pyrovae.log_likelihood(*programs, x, num_samples=200, seed=1)
    assert bound.mean <= ll.mean + 3 * ll.mean_standard_error
    assert abs(bound.mean - analytic.mean) < 1.0


@each_pair
def test_a_state_makes_another_pair_the_same(model, guide):
    programs, others, x = pair(model, guide), pair(model, guide), data(model)
    svi = svi_of(*programs)
    svi.step(x)
    expected = pyrovae.log_likelihood(*programs, x, num_samples=9, seed=0).log_prob
    state = svi.parameters.state_dict()
    parameters = Parameters(*others)
    parameters.load_state_dict(state)
    assert torch.equal(pyrovae.log_likelihood(*others, x, num_samples=9, seed=0).log_prob, expected)
    assert len({id(p) for p in parameters.named().values()}) == len(parameters.named())
    copied = copy.deepcopy(programs)
    assert torch.equal(pyrovae.log_likelihood(*copied, x, num_samples=9, seed=0).log_prob, expected)


@each_pair
def test_draws_have_the_shape_of_the_data_and_lie_in_the_support(model, guide):
    programs, x = pair(model, guide), data(model)
    drawn = pyrovae.sample(programs[0], like=x, n=7, seed=0)
    again = pyrovae.reconstruct(*programs, x, seed=0)
    assert drawn.shape == (7, *SHAPE)
    assert again.shape == x.shape
    assert bool(again.isfinite().all())
    check_support(Parameters(*programs), drawn)
    assert bool((drawn[0] != drawn[1]).any())


@each_pair
def test_nothing_is_lost_at_extreme_data(model, guide):
    parameters = Parameters(*pair(model, guide))
    counts = model in ("poisson", "negative_binomial")
    for value in (0.0, 1.0, *([200.0] if counts else [])):
        x = torch.full((4, *SHAPE), value)
        inspect_pair(parameters, x)
        found = estimate(Trace_ELBO(), parameters, x)
        assert bool(found.loss.isfinite())
        leaves = list(parameters.named().values())
        gradients = torch.autograd.grad(found.surrogate, leaves)
        assert all(bool(g.isfinite().all()) for g in gradients)


@each_pair
def test_captured_is_eager(model, guide):
    parameters, x = Parameters(*pair(model, guide)), data(model)
    inspect_pair(parameters, x)
    leaves = list(parameters.named().values())

    def step(x):
        found = estimate(Trace_ELBO(2, 1, vectorize_particles=True), parameters, x)
        return [found.loss, *torch.autograd.grad(found.surrogate, leaves)]

    with pyro.validation_enabled(False):
        graph = make_fx(step)(x)
        for batch in (x, x.flip(0)):
            pyro.set_rng_seed(3)
            expected = step(batch)
            pyro.set_rng_seed(3)
            for one, other in zip(graph(batch), expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guide", GUIDES)
def test_a_density_is_the_same_with_and_without_what_a_draw_has_cached(guide):
    (program,) = double(build("guides", guide))
    x = data("bernoulli").double()
    with torch.no_grad(), pyro.plate("particles", 3, dim=-2):
        site = poutine.trace(program).get_trace(x).nodes["z"]
        cached = site["fn"].log_prob(site["value"])
        missed = site["fn"].log_prob(site["value"].clone())
        anew = poutine.trace(program).get_trace(x).nodes["z"]["fn"].log_prob(site["value"])
    assert cached.shape == (3, N)
    torch.testing.assert_close(missed, cached, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(anew, cached, rtol=1e-9, atol=1e-9)


def test_a_vamp_prior_trains_and_saves_its_guide_once():
    programs, x = pair("vamp_prior", "mean_field"), data("vamp_prior")
    parameters = Parameters(*programs)
    inspect_pair(parameters, x)
    names = set(parameters.named())
    assert {n for n in names if "encoder" in n} == {
        f"guide.encoder.{n}" for n, _ in programs[1].encoder.named_parameters()
    }
    assert parameters.state_dict().keys() == names
    z = torch.randn(N, LATENT)
    prior_of(programs[0], x).log_prob(z).sum().backward()
    assert all(bool(p.grad.any()) for p in programs[1].parameters())
    with pytest.raises(ValueError, match="guide=guide"):
        build("models", "vamp_prior")
    model, guide = copy.deepcopy(programs)
    assert model.guide[0] is guide


def test_grey_levels_off_the_grid_are_refused():
    x = pyrovae.load_data("digits").test[:20]
    for model in ("categorical", "discretized_logistic"):
        inspect_pair(Parameters(*pair(model, "mean_field")), x)
        with pytest.raises(ValueError, match="outside the support"):
            inspect_pair(Parameters(*pair(model, "mean_field", levels=256)), x)
    with pytest.raises(ValueError, match="outside the support of Poisson"):
        inspect_pair(Parameters(*pair("poisson", "mean_field")), x)
    with pytest.raises(ValueError, match="outside the support of ContinuousBernoulli"):
        inspect_pair(Parameters(*pair("continuous_bernoulli", "mean_field")), 2 * x)


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("models", "laplace", {"scale": 0.0}),
        ("models", "continuous_bernoulli", {"limit": -1.0}),
        ("models", "flow_prior", {"latent": 1}),
        ("models", "categorical", {"levels": 1}),
        ("guides", "flow", {"latent": 1}),
        ("guides", "iaf", {"latent": 1}),
        ("guides", "iaf", {"latent": 9, "width": 8}),
        ("guides", "mixture", {"latent": 31}),
        ("guides", "autoencoder", {"scale": 0.0}),
        ("guides", "convolutional", {"channels": (2, 2, 2, 2)}),
    ],
)
def test_settings_out_of_range_are_refused(kind, name, options):
    with pytest.raises(ValueError, match="Expected"):
        build(kind, name, **options)
