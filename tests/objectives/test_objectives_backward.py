"""A gradient through a few of many samples: its mean over every choice, exactly, and the choice."""

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from test_objectives import gradients, linear, value
from test_objectives_discrete import Small
from test_objectives_gradients import Chain
from test_objectives_plates import Grid
from torch import nn
from torch.nn import functional
from zoo import ZOO

import pyrovae
from pairs import LATENT, PAIRS, SHAPE, binary
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.bernoulli import Bernoulli
from pyrovae.objectives import estimate, make_objective
from pyrovae.objectives.log_weights import Few, weigh
from pyrovae.pairs.pair import Pair

X = binary()
K = 4
KINDS = {
    "iwae": {},
    "stl": {"gradient": "stl", "alpha": 1.0},
    "dreg": {"gradient": "dreg"},
    "renyi": {"gradient": "dreg", "alpha": 0.5},
    "ciwae": {"gradient": "dreg", "beta": 0.3},
    "miwae": {"groups": 2},
}


def programs(pair, x):
    return (pair.model, pair.guide), x


def one(kind):
    """A pair and a datum of a single cell, in float64."""
    if kind == "linear":
        model, guide, x = linear()
        return (model, guide), x[:1]
    if kind == "cells":
        return programs(Grid(top=True), torch.tensor([[0.3, -1.0, 0.8]], dtype=torch.float64))
    if kind == "summed":
        return programs(Summed(), torch.tensor([0.4], dtype=torch.float64))
    if kind == "folded":
        torch.manual_seed(0)
        return programs(Halves(), torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0, 0.0]]).double())
    if kind == "discrete":
        return programs(Small(mixed=True), torch.ones(1, dtype=torch.float64))
    chain = Chain(kind)
    with torch.no_grad():
        chain.weight += torch.tensor([0.2, -0.3, 0.2])
    return programs(chain, torch.tensor([0.7], dtype=torch.float64))


class Summed(nn.Module):
    """A switch that the model alone has and sums over, beside a latent of both."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64))

    @config_enumerate
    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            y = pyro.sample("y", dist.Categorical(logits=self.table))
            pyro.sample("x", dist.Normal(z + self.table[y], 0.5), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.table[1] * x, 0.8))


class Halves(nn.Module):
    """A model that counts its dimensions from the left, and takes particles as rows alone."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = nn.Linear(4, 6).double(), nn.Linear(6, 8).double()

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
            logits = self.decoder(torch.cat([z[:, :2], z[:, 2:].tanh()], 1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


PROBLEMS = [
    (k, kind) for k in ("linear", "up", "down", "cells", "summed", "folded") for kind in KINDS
]
PROBLEMS += [("discrete", kind) for kind in ("iwae", "miwae")]


def over_choices(pair, args, options, monkeypatch):
    """The gradient through all samples, and its mean over every choice of one, by parameter."""

    def slopes(objective):
        objective.prepare(parameters, args)
        pyro.set_rng_seed(3)
        found = estimate(objective, parameters, *args)
        leaves = parameters.named()
        slopes = torch.autograd.grad(found.surrogate, list(leaves.values()), allow_unused=True)
        zeros = (torch.zeros_like(leaf) for leaf in leaves.values())
        filled = (z if s is None else s for s, z in zip(slopes, zeros, strict=True))
        return found, dict(zip(leaves, filled, strict=True))

    parameters = Pair(*pair)
    whole, expected = slopes(make_objective("iwae", **options))
    mean = dict.fromkeys(expected, 0.0)
    for k in range(options.get("groups", 1) * options["particles"]):
        weight = []

        def chosen(weights, number, k=k, weight=weight):
            assert number == 1
            weight.append(weights[k].squeeze())
            every = torch.arange(len(weights)).reshape(-1, *(1,) * (weights.dim() - 1))
            return Few((every == k).expand(weights.shape).unsqueeze(0))

        with monkeypatch.context() as patch:
            patch.setattr(Few, "in_proportion", chosen)
            found, slope = slopes(make_objective("iwae", backward=1, **options))
        # What is reported is of all samples.
        torch.testing.assert_close(found.loss, whole.loss)
        assert found.terms.keys() == whole.terms.keys()
        for name, term in whole.terms.items():
            torch.testing.assert_close(found.terms[name], term)
        for name in mean:
            mean[name] = mean[name] + weight[-1] * slope[name]
    return expected, mean


@pytest.mark.parametrize(("problem", "kind"), PROBLEMS)
def test_the_mean_over_every_choice_is_the_gradient_of_all(problem, kind, monkeypatch):
    pair, x = one(problem)
    expected, mean = over_choices(pair, (x,), {"particles": K} | KINDS[kind], monkeypatch)
    for name, slope in expected.items():
        torch.testing.assert_close(mean[name], slope, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    ("name", "gradient"),
    [(name, "plain") for name in ZOO]
    + [(name, "dreg") for name in ZOO if "iwae_dreg" in ZOO[name].objectives],
)
def test_so_it_is_for_every_pair(name, gradient, monkeypatch):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide, args = ZOO[name].make()
    options = {"particles": 3, "gradient": gradient}
    args = tuple(each[:1] for each in args)
    expected, mean = over_choices((model, guide), args, options, monkeypatch)
    assert any(bool(slope.any()) for slope in expected.values())
    for key, slope in expected.items():
        size = slope.abs().max().item() + 1e-3
        torch.testing.assert_close(mean[key], slope, rtol=1e-4, atol=1e-4 * size, msg=key)


def test_samples_are_chosen_in_proportion_to_their_weights():
    weights = torch.tensor([[0.5, 0.0], [0.25, 0.1], [0.0, 0.0], [0.25, 0.9]])
    pyro.set_rng_seed(0)
    counts = torch.stack([Few.in_proportion(weights, 4).chosen.sum(0) for _ in range(500)])
    # One in each quarter of the sum: what fills whole quarters is chosen as often, always.
    assert counts[:, :, 0].unique(dim=0).tolist() == [[2, 1, 0, 1]]
    assert not counts[:, [0, 2], 1].any()
    assert counts[:, 1, 1].float().mean().item() == pytest.approx(0.4, abs=0.08)
    assert set(counts[:, 1, 1].tolist()) == {0, 1}


def test_the_choice_of_each_datum_and_cell_is_its_own():
    pyro.set_rng_seed(0)
    chosen = Few.in_proportion(torch.full((50, 40, 1), 0.02), 1).chosen
    assert chosen.shape == (1, 50, 40, 1)
    assert (chosen.sum(1) == 1).all()
    assert len(chosen[0, :, :, 0].int().argmax(0).unique()) > 15


@pytest.mark.parametrize("name", ["iwae", "iwae_dreg", "iwae_stl", "renyi", "miwae", "ciwae"])
@pytest.mark.parametrize("make", ["shipped_gaussian", "two_latents", "same_names"])
def test_bounds_and_losses_are_those_of_all_samples(name, make):
    pair = PAIRS[make]()
    all_of, few = (make_objective(name, particles=3, **more) for more in ({}, {"backward": 2}))
    torch.testing.assert_close(value(few, pair, X), value(all_of, pair, X))
    one, other = (gradients(objective, pair, X)[0] for objective in (all_of, few))
    torch.testing.assert_close(one.loss, other.loss)


@pytest.mark.parametrize("n", [1, 8])
def test_what_folds_its_particles_trains(n):
    pyro.set_rng_seed(0)
    pair, x = Halves(), torch.bernoulli(torch.full((n, 6), 0.4)).double()
    one, other = (
        gradients(make_objective("iwae_dreg", particles=5, **more), (pair.model, pair.guide), x)[0]
        for more in ({}, {"backward": 2})
    )
    torch.testing.assert_close(one.loss, other.loss)


class Between(Bernoulli):
    """A model with something between its decoder's layers, noise in training for example."""

    def __init__(self, between):
        super().__init__(SHAPE, LATENT, (8,))
        self.between = between

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.zero, 1.0).to_event(1))
            z = self.between(z, self.training)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(3), obs=x)


def of(module):
    return lambda z, training: module.train(training)(z)


NOISES = {
    "noise": lambda z, training: z + torch.randn(()),
    "training noise": lambda z, training: z + torch.randn_like(z) if training else z,
    "functional dropout": lambda z, training: functional.dropout(z, 0.5, training),
    "dropout": of(nn.Dropout(0.2)),
    "rrelu": of(nn.RReLU(0.0, 1.0)),
    "batch norm": lambda z, training: functional.batch_norm(
        z.flatten(0, -2), None, None, training=True
    ).reshape(z.shape),
}


@pytest.mark.parametrize("gradient", ["plain", "dreg"])
@pytest.mark.parametrize("between", NOISES.values(), ids=NOISES)
def test_a_model_that_is_another_when_run_again_is_refused(between, gradient):
    guide = PAIRS["shipped_bernoulli"]()[1]
    objective = make_objective("iwae", particles=3, backward=1, gradient=gradient)
    with pytest.raises(ValueError, match="ln p of the same samples differs by"):
        estimate(objective, Pair(Between(between), guide), X)


class Above(MeanField):
    """A guide whose second latent is drawn from the first, behind something."""

    def __init__(self, between):
        super().__init__(SHAPE, LATENT, (8,))
        self.between, self.last = between, nn.Linear(LATENT, LATENT)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).unbind(-2)
            z = pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
            loc = self.last(self.between(z, self.training))
            pyro.sample("y", dist.Normal(loc, 1.0).to_event(1))


class Below(Bernoulli):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(self.zero, 1.0).to_event(1))
            z = pyro.sample("z", dist.Normal(self.zero, 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(3), obs=x)


@pytest.mark.parametrize("backward", [None, 1])
@pytest.mark.parametrize(
    ("between", "n"),
    [(NOISES[name], n) for name in NOISES for n in (1, 12) if (name, n) != ("batch norm", 1)],
)
def test_a_guide_that_is_another_when_run_again_is_refused(between, backward, n):
    pair, x = Pair(Below(SHAPE, LATENT, (8,)), Above(between)), binary(n)
    with pytest.raises(ValueError, match="ln q of the same samples differs by"):
        estimate(make_objective("iwae_dreg", particles=3, backward=backward), pair, x)
    # Of plain gradients the guide runs once.
    assert estimate(make_objective("iwae", particles=3, backward=backward), pair, x).loss.isfinite()


class Normalizing(MeanField):
    """A guide that normalizes what it reads by the batch, which takes no single row in training."""

    def __init__(self):
        super().__init__(SHAPE, LATENT, (8,))
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x):
        super().forward(self.norm(x.flatten(1)).reshape(x.shape))


@pytest.mark.parametrize("n", [1, 12])
def test_batch_normalization_of_what_a_guide_reads_is_no_noise(n):
    guide, x = Normalizing(), binary(n)
    with Pair(None, guide).mode(training=n > 1):
        pair = Pair(Bernoulli(SHAPE, LATENT, (8,)), guide)
        objective = make_objective("iwae_dreg", particles=3, backward=1)
        assert estimate(objective, pair, x).loss.isfinite()


def test_buffers_are_what_they_were():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("runs", torch.zeros(()))

        def forward(self, z, training):
            self.runs += 1
            return z

    between = Counting()
    pair = Pair(Between(between), PAIRS["shipped_bernoulli"]()[1])
    objective = make_objective("iwae", particles=3, backward=1)
    objective.prepare(pair, (X,))
    runs = between.runs.item()
    objective.prepare(pair, (X,))
    # As many as another objective's look: what the check runs in training mode is undone.
    before = between.runs.item()
    make_objective("iwae", particles=3).prepare(pair, (X,))
    assert before - runs == between.runs.item() - before


def test_a_switch_that_is_summed_over_is_no_noise():
    pair, x = Summed(), torch.linspace(-2, 2, 40, dtype=torch.float64)
    objective = make_objective("iwae", particles=3, backward=1)
    assert estimate(objective, Pair(pair.model, pair.guide), x).loss.isfinite()


def test_dropout_of_no_share_is_none():
    pair = Pair(Between(of(nn.Dropout(0.0))), PAIRS["shipped_bernoulli"]()[1])
    assert estimate(make_objective("iwae", particles=3, backward=1), pair, X).loss.isfinite()


@pytest.mark.parametrize("backward", [0, 6, 7, -1, 1.0, True, "2"])
def test_a_number_that_is_no_part_of_the_samples_is_refused(backward):
    with pytest.raises(ValueError, match="integer backward from 1 to 5"):
        make_objective("miwae", particles=3, groups=2, backward=backward)


@pytest.mark.parametrize("name", ["iwae_dreg", pytest.param("iwae", marks=pytest.mark.inductor)])
def test_training_compiled_is_training_eagerly(name, request, monkeypatch):
    """The record of a step, and what Inductor makes of one of a pair without hidden layers."""
    flat = "inductor" in request.keywords
    if not flat:
        monkeypatch.setattr("pyrovae.compiling.graph._compile", lambda graph, inputs: graph)
    weights = []
    for how in (False, True):
        torch.manual_seed(0)
        pair, x = PAIRS["two_latents"](), binary(40)
        if flat:
            pair = Bernoulli(SHAPE, LATENT, ()), MeanField(SHAPE, LATENT, ())
        objective = make_objective(name, particles=5, backward=2)
        pyrovae.fit(*pair, x, objective=objective, epochs=3, batch_size=16, seed=0, compile=how)
        weights.append(torch.cat([p.flatten() for p in pair[0].parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_the_model_has_no_gradient_from_all_samples():
    parameters = Pair(*PAIRS["two_latents"]())
    make_objective("iwae", particles=4, backward=1).prepare(parameters, (X,))
    guide_trace = parameters.trace_guide(X, particles=4)
    found = weigh(parameters, guide_trace, (X,), 4, forward=True)
    assert not found.log_p.requires_grad
    assert all(log_q.requires_grad for log_q in found.guide.values())


def test_an_objective_is_pickled_without_the_pairs_that_it_knows():
    pair, objective = PAIRS["two_latents"](), make_objective("iwae_dreg", particles=4, backward=2)
    first = gradients(objective, pair, X)[0]
    again = pickle.loads(pickle.dumps(objective))
    assert (again.particles, again.gradient, again.backward) == (4, "dreg", 2)
    torch.testing.assert_close(gradients(again, pair, X)[0].loss, first.loss)
