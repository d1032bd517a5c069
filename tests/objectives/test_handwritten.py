"""The hand-written VAE of benchmarks/ against Pyro and pyrovae, in float64, to rounding."""

import pyro
import pytest
import torch
from elbo_spread import scaling, spread
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import Normal

import pyrovae
from handwritten import (
    VAE,
    adam,
    copy_from_pair,
    copy_to_pair,
    log_bernoulli,
    log_normal,
    pair_parameters,
    step,
    train,
)
from pyrovae._tools.seeding import subseed
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.bernoulli import Bernoulli
from pyrovae.models.gaussian import Gaussian
from pyrovae.objectives import estimate
from pyrovae.pairs.pair import Pair

SHAPE, LATENT, HIDDEN, ROWS = (1, 3, 3), 2, 5, 7
MODELS = {"bernoulli": Bernoulli, "gaussian": Gaussian}
PYRO = {"A": Trace_ELBO, "B": TraceMeanField_ELBO}

every_decoder = pytest.mark.parametrize("likelihood", MODELS)
every_estimator = pytest.mark.parametrize("estimator", PYRO)


def make_pair(likelihood, dtype=torch.float64, seed=0):
    pyro.clear_param_store()
    torch.manual_seed(seed)
    model = MODELS[likelihood](SHAPE, LATENT, (HIDDEN,)).to(dtype)
    return model, MeanField(SHAPE, LATENT, (HIDDEN,)).to(dtype)


def make_vae(likelihood, pair):
    dtype = next(pair[0].parameters()).dtype
    return copy_from_pair(VAE(SHAPE, LATENT, HIDDEN, likelihood).to(dtype), *pair)


def batch(likelihood):
    x = torch.rand(ROWS, *SHAPE, dtype=torch.float64)
    return (x < 0.2).double() if likelihood == "bernoulli" else x


def measure(loss, decoder, parameters):
    """A loss, its gradients, and the z that met the decoder, under one seed."""
    met = []
    hook = decoder.register_forward_pre_hook(lambda _, inputs: met.append(inputs[0].detach()))
    torch.manual_seed(3)
    value = loss()
    hook.remove()
    gradients = torch.autograd.grad(value, list(parameters.values()))
    return value.detach(), dict(zip(parameters, gradients, strict=True)), met[-1]


@every_decoder
@every_estimator
@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("against", ["pyro", "pyrovae"])
def test_value_and_every_gradient(likelihood, estimator, particles, against):
    model, guide = make_pair(likelihood)
    vae, x = make_vae(likelihood, (model, guide)), batch(likelihood)
    elbo = PYRO[estimator](particles, max_plate_nesting=1, vectorize_particles=particles > 1)

    def by_hand():
        return -vae.elbo(x, vae.noise(x, particles), estimator).sum()

    def by_pyro():
        return elbo.differentiable_loss(model, guide, x)

    def by_pyrovae():
        return estimate(elbo, Pair(model, guide), x).surrogate

    value, gradients, z = measure(by_hand, vae.decoder, dict(vae.named_parameters()))
    program = by_pyro if against == "pyro" else by_pyrovae
    theirs = measure(program, model.decoder, pair_parameters(model, guide))
    assert torch.equal(z, theirs[2].reshape(z.shape))
    assert abs(value - theirs[0]) < 1e-10 * abs(value)
    assert gradients.keys() == theirs[1].keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        assert (gradient - theirs[1][name]).abs().max() < 1e-10 * gradient.abs().max()


@every_decoder
@every_estimator
def test_training_curves_coincide(likelihood, estimator):
    batches = [batch(likelihood) for _ in range(30)]

    def curve(advance):
        torch.manual_seed(5)
        return torch.tensor([advance(x) for x in batches], dtype=torch.float64)

    def by_svi(svi):
        adam_of_pyro = pyro.optim.Adam({"lr": 1e-2})
        return curve(svi(*make_pair(likelihood), adam_of_pyro, loss=PYRO[estimator]()).step)

    vae = make_vae(likelihood, make_pair(likelihood))
    optimizer = adam(vae, 1e-2)
    hand = curve(lambda x: step(vae, optimizer, x, estimator, particles=1))
    assert hand[-10:].mean() < hand[:10].mean() - 1
    for svi in (pyro.infer.SVI, pyrovae.SVI):
        torch.testing.assert_close(by_svi(svi), hand, rtol=1e-11, atol=0)


@every_estimator
def test_the_trainer_draws_what_fit_draws(estimator):
    data = pyrovae.load_data("digits", binarize="dynamic")
    model, guide = Bernoulli(data.shape, 3, (8,)), MeanField(data.shape, 3, (8,))
    vae = copy_from_pair(VAE(data.shape, 3, 8), model, guide)
    objective = {"A": "trace_elbo", "B": "trace_mean_field_elbo"}[estimator]
    fit = pyrovae.fit(model, guide, data, objective=objective, epochs=3, seed=4, progress=False)
    seeds = [subseed(4, epoch) for epoch in (1, 2, 3)]
    history = train(vae, data.batch, len(data.train), seeds, estimator=estimator)
    assert [row["train_elbo"] for row in fit.history] == pytest.approx(history, rel=1e-5)
    for name, parameter in pair_parameters(model, guide).items():
        torch.testing.assert_close(parameter, vae.get_parameter(name), rtol=0, atol=1e-4)


def test_the_error_falls_with_particles_and_the_estimators_agree():
    vae, x = make_vae("gaussian", make_pair("gaussian")), batch("gaussian")
    spreads = {n: spread(vae, lambda: x, n, pairs=150) for n in (1, 4, 16)}
    for of in ("value", "gradient"):
        found = scaling(spreads, of)
        for estimator in PYRO:
            error = found[f"± {estimator}"]
            assert error < 0.05
            assert abs(found[f"slope {estimator}"] + 0.5) < 4 * error
        assert abs(found["A - B"]) < 4


@every_decoder
def test_weights_go_there_and_back(likelihood):
    model, guide = make_pair(likelihood, torch.float32)
    vae = make_vae(likelihood, (model, guide))
    other = copy_to_pair(vae, *make_pair(likelihood, torch.float32, seed=1))
    assert other[0] is not model
    for ours, theirs in zip((model, guide), other, strict=True):
        for name, parameter in ours.named_parameters():
            assert torch.equal(parameter, theirs.get_parameter(name)), name


def test_weights_of_another_layout_are_refused():
    with pytest.raises(ValueError, match="Expected parameters"):
        copy_from_pair(VAE(SHAPE, LATENT + 1, HIDDEN), *make_pair("bernoulli"))
    with pytest.raises(ValueError, match="log_scale"):
        copy_from_pair(VAE(SHAPE, LATENT, HIDDEN, "gaussian"), *make_pair("bernoulli"))


def test_log_likelihoods_are_those_of_appendix_c():
    x, logits = batch("bernoulli").flatten(1), torch.randn(4, ROWS, 9, dtype=torch.float64)
    y = logits.sigmoid()
    expected = (x * y.log() + (1 - x) * (1 - y).log()).sum(-1)
    torch.testing.assert_close(log_bernoulli(x, logits), expected)
    loc, log_scale = torch.randn(2, ROWS, 9, dtype=torch.float64)
    expected = Normal(loc, log_scale.exp()).log_prob(x).sum(-1)
    torch.testing.assert_close(log_normal(x, loc, log_scale), expected)
