"""What the trial of particles found is kept while nothing that it depends on has changed."""

import gc

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrovae
from pairs import PAIRS, binary
from pyrovae.pairs import trial
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.pair import Pair

WIDTH, LATENT = 6, 3
X = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """Hides which dimension its softmax is taken over while its last weights are zero."""

    def __init__(self):
        super().__init__()
        self.net, self.last, self.dim = nn.Linear(LATENT, WIDTH), nn.Linear(WIDTH, WIDTH), 1
        nn.init.zeros_(self.last.weight)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            loc = self.last(5 * torch.softmax(self.net(z), dim=self.dim))
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


class Guide(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(WIDTH, LATENT)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), 0.5).to_event(1))


@pytest.fixture
def tries(monkeypatch):
    """The pairs that were tried, one after another."""
    found = []
    once = trial._try
    monkeypatch.setattr(trial, "_try", lambda pair, rows: found.append(pair) or once(pair, rows))
    return found


@pytest.fixture
def programs():
    torch.manual_seed(1)
    return Model(), Guide()


def folds(model, guide, x=X):
    pair = Pair(model, guide)
    inspect_pair(pair, x)
    return pair.folds


def test_weights_that_hid_a_dimension_and_do_no_longer_are_tried_again(programs, tries):
    model, guide = programs
    assert [folds(model, guide) for _ in range(2)] == [False, False]
    assert len(tries) == 1
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    (model.last(torch.ones(WIDTH)) * torch.arange(WIDTH)).sum().backward()
    optimizer.step()
    assert [folds(model, guide) for _ in range(2)] == [True, True]
    assert len(tries) == 2
    pair = Pair(model, guide)
    inspect_pair(pair, X)
    with torch.no_grad():
        values, _ = pair.draw((X,), 3)
        scores, _ = pair.score_model((X,), 3, values)
        for k in range(3):
            alone, _ = pair.score_model((X,), None, {"z": values["z"][k]})
            torch.testing.assert_close(scores["x"][k], alone["x"][0])


CHANGES = {
    "an attribute": lambda model, guide: setattr(model, "dim", -1),
    "another layer": lambda model, guide: setattr(model, "last", nn.LayerNorm(WIDTH)),
    "a buffer": lambda model, guide: model.register_buffer("shift", torch.ones(2)),
    "the guide's weights": lambda model, guide: guide.net.bias.data.add_(1.0),
    "a hook": lambda model, guide: model.last.register_forward_hook(lambda *a: None),
    "an object": lambda model, guide: setattr(model, "config", {"dim": 1}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_it_may_depend_on_is_noticed(change, programs, tries):
    folds(*programs)
    change(*programs)
    folds(*programs)
    assert len(tries) == 2


def test_rows_of_another_shape_and_another_guide_are_tried(programs, tries):
    model, guide = programs
    folds(model, guide)
    folds(model, guide, X[:3])
    folds(model, Guide(), X[:3])
    assert len(tries) == 3


def test_a_guide_of_the_size_of_all_rows_is_tried_on_all_of_them():
    """Pyro's AutoNormal has a posterior for each datum, and can be run on no fewer."""
    model = Model()
    guide = pyro.infer.autoguide.AutoNormal(model)
    pyro.set_rng_seed(0)
    found = pyrovae.elbo(model, guide, X, particles=2000, seed=1).mean
    pyro.set_rng_seed(1)
    loss = pyro.infer.Trace_ELBO(2000, vectorize_particles=True, max_plate_nesting=1)
    assert found == pytest.approx(-loss.loss(model, guide, X) / len(X), abs=0.05)


def test_functions_are_tried_each_time(tries):
    """What a closure holds may change unseen."""
    pair = PAIRS["functions"]()
    for _ in range(2):
        folds(*pair, binary())
    assert len(tries) == 2


def test_a_shipped_pair_is_tried_once_and_forgotten_with_its_model(tries):
    pair = PAIRS["shipped_bernoulli"]()
    gc.collect()
    before = len(trial._KEPT)
    for _ in range(3):
        pyrovae.log_likelihood(*pair, binary(), num_samples=10, seed=0)
    assert len(tries) == 1
    assert len(trial._KEPT) == before + 1
    tries.clear()
    del pair
    gc.collect()
    assert len(trial._KEPT) == before
