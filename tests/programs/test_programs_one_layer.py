"""Programs with one latent layer, beside the laws of all pairs: each model goes with each guide."""

import copy

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

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
    prior_of,
)
from pyrovae.objectives import estimate
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import site_scores


def last_bias(program):
    """What is added to each output of a program's network."""
    network = program.encoder if hasattr(program, "encoder") else program.decoder
    return [value for name, value in network.named_parameters() if name.endswith("bias")][-1]


@pytest.mark.parametrize("model", MODELS)
def test_any_model_goes_with_any_guide(model):
    x = data(model)
    for guide in GUIDES:
        parameters = Pair(*pair(model, guide))
        if model == "vamp_prior" and guide in FLOWS:
            with pytest.raises(ValueError, match="got a flow"):
                inspect_pair(parameters, x)
            continue
        layout = inspect_pair(parameters, x)
        assert (layout.latents, layout.observed) == (("z",), ("x",))
        with torch.no_grad():
            trace = parameters.trace_guide(x, particles=2)
            model_trace = parameters.replay_model(trace, x, particles=2)
            scores = [site_scores(t, layout, 2, N) for t in (trace, model_trace)]
        for score in (scores[0]["z"], scores[1]["z"], scores[1]["x"]):
            assert score.shape == (2, N)
            assert bool(score.isfinite().all())


@each_pair
def test_every_output_of_a_network_is_used(model, guide):
    programs, x = pair(model, guide), data(model, n=11)
    found = estimate(Trace_ELBO(), Pair(*programs), x)
    biases = [last_bias(program) for program in programs]
    slopes = torch.autograd.grad(found.surrogate, biases)
    unused = [int((slope == 0).sum()) for slope in slopes]
    assert unused == [0, LATENT * (LATENT - 1) / 2 if guide == "full_covariance" else 0]


@each_pair
def test_a_copied_pair_is_the_same(model, guide):
    programs, x = pair(model, guide), data(model)
    expected = pyrovae.log_likelihood(*programs, x, num_samples=9, seed=0).log_prob
    copied = copy.deepcopy(programs)
    assert torch.equal(pyrovae.log_likelihood(*copied, x, num_samples=9, seed=0).log_prob, expected)


@each_pair
def test_nothing_is_lost_at_extreme_data(model, guide):
    parameters = Pair(*pair(model, guide))
    counts = model in ("poisson", "negative_binomial")
    for value in (0.0, 1.0, *([200.0] if counts else [])):
        x = torch.full((4, *SHAPE), value)
        inspect_pair(parameters, x)
        found = estimate(Trace_ELBO(), parameters, x)
        assert bool(found.loss.isfinite())
        leaves = list(parameters.named().values())
        gradients = torch.autograd.grad(found.surrogate, leaves)
        assert all(bool(g.isfinite().all()) for g in gradients)


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
    parameters = Pair(*programs)
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
        inspect_pair(Pair(*pair(model, "mean_field")), x)
        with pytest.raises(ValueError, match="outside the support"):
            inspect_pair(Pair(*pair(model, "mean_field", levels=256)), x)
    with pytest.raises(ValueError, match="outside the support of Poisson"):
        inspect_pair(Pair(*pair("poisson", "mean_field")), x)
    with pytest.raises(ValueError, match="uint8 is read as levels over 255"):
        inspect_pair(Pair(*pair("poisson", "mean_field")), (3 * x).ceil() / 255)
    with pytest.raises(ValueError, match="outside the support of ContinuousBernoulli"):
        inspect_pair(Pair(*pair("continuous_bernoulli", "mean_field")), 2 * x)


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
