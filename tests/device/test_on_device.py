"""The mission on another device: `pytest -m gpu --device cuda`. On a CPU the same laws hold."""

import pyro
import pytest
import torch
from test_fake_cuda import PLACED
from zoo import ZOO

import pyrovae
from pyrovae.data import Dataset, Splits
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.pair import Pair

pytestmark = pytest.mark.gpu
COMPILED = (
    "bernoulli-mean_field",
    "bernoulli-flow",
    "two_layer",
    "conditional",
    "masked",
    "sequence",
)
each = pytest.mark.parametrize("name", PLACED)
each_compiled = pytest.mark.parametrize("name", COMPILED)


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))


def make(name, device, dtype=torch.float32):
    """A pair of the zoo and its batch, on a device and of a type."""
    pyro.set_rng_seed(0)
    model, guide, args = ZOO[name].make()
    args = [arg.to(device, dtype if arg.is_floating_point() else None) for arg in args]
    return model.to(device, dtype), guide.to(device, dtype), args


def data(x, *context):
    splits = Splits(context, (), ()) if context else None
    return Dataset("batch", x.shape[1:], x, context=splits)


def agree(found, expected):
    """Sums over data, within four standard errors of their difference."""
    noise = (found.standard_error.cpu().square() + expected.standard_error.cpu().square()).sum()
    difference = (found.log_prob.cpu() - expected.log_prob.cpu()).sum()
    assert difference.abs() < 4 * noise.sqrt() + 1e-3 * len(found.log_prob)


@each
def test_scores_of_the_same_draws_are_those_of_the_cpu(name, device):
    home = Pair(*make(name, "cpu")[:2])
    model, guide, args = make(name, device)
    away = Pair(model, guide)
    rows = tuple(arg.cpu() for arg in args)
    with torch.no_grad(), pyro.validation_enabled(False):
        for pair, batch in ((home, rows), (away, args)):
            with pair.mode(training=False):
                inspect_pair(pair, *batch)
        with home.mode(training=False), away.mode(training=False):
            values, _ = home.draw(rows, 5)
            moved = {site: value.to(device) for site, value in values.items()}
            here = home.score_model(rows, 5, values)[0] | home.score_guide(rows, 5, values)
            there = away.score_model(args, 5, moved)[0] | away.score_guide(args, 5, moved)
    for site, score in here.items():
        assert there[site].device.type == device.type
        torch.testing.assert_close(there[site].cpu(), score, rtol=1e-4, atol=1e-3)


@each
def test_log_likelihood_and_bound_agree_with_the_cpu(name, device):
    home, away = make(name, "cpu"), make(name, device)
    estimates = [
        pyrovae.log_likelihood(model, guide, *args, num_samples=2000, seed=seed)
        for seed, (model, guide, args) in enumerate((home, away))
    ]
    if all(found.khat.nan_to_num(0).max() < 0.6 for found in estimates):
        agree(*estimates)
    bounds = [
        pyrovae.elbo(model, guide, *args, particles=500, seed=seed).mean
        for seed, (model, guide, args) in enumerate((home, away))
    ]
    assert bounds[0] == pytest.approx(bounds[1], abs=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("compile", [False, True])
@each_compiled
def test_training_lowers_the_loss_and_resumes_to_the_last_bit(name, compile, dtype, device):
    def train(epochs, state=None):
        model, guide, args = make(name, device, dtype)
        objective = "trace_elbo" if name == "two_layer" else "trace_mean_field_elbo"
        return pyrovae.fit(
            model, guide, data(*args), objective=objective, epochs=epochs, batch_size=4, lr=1e-2,
            compile=compile, seed=3, state=state, progress=False,
        )  # fmt: skip

    whole, part = train(6), train(3)
    resumed = train(6, part.state_dict())
    losses = [row["train_loss"] for row in whole.history]
    assert losses == [row["train_loss"] for row in resumed.history]
    assert losses[-1] < losses[0]
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert one.device.type == device.type
        assert torch.equal(one, other)


@each_compiled
def test_compiled_evaluation_is_the_eager_one(name, device):
    model, guide, args = make(name, device)
    eager, compiled = (
        pyrovae.log_likelihood(model, guide, *args, num_samples=256, seed=1, compile=compile)
        for compile in (False, True)
    )
    torch.testing.assert_close(compiled.log_prob, eager.log_prob, rtol=1e-4, atol=1e-3)


@each_compiled
def test_annealing_agrees_with_importance_sampling(name, device):
    model, guide, args = make(name, device)
    chains = {"num_chains": 64, "num_temperatures": 8, "num_steps": 3, "compile": name == "masked"}
    annealed = pyrovae.annealed_log_likelihood(model, guide, *args, **chains, seed=4)
    agree(annealed, pyrovae.log_likelihood(model, guide, *args, num_samples=5000, seed=1))


@each
def test_samples_and_reconstructions_lie_on_the_device(name, device):
    model, guide, (x, *context) = make(name, device)
    drawn = pyrovae.sample(model, *context, like=x, n=len(x) if context else 4)
    seen = pyrovae.reconstruct(model, guide, x, *context)
    for value in (drawn, seen):
        for part in value.values() if isinstance(value, dict) else [value]:
            assert part.device.type == device.type
            assert part.isfinite().all()
