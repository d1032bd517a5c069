"""Every module that the two programs reach is found: its mode, its parameters, its buffers."""

import weakref
from argparse import Namespace
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrovae
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.parameters import owners

N, WIDTH = 6, 4
KEPT = []  # what no program refers to
NETS = {}


class Centred(nn.Module):
    """Takes off a mean, a buffer that follows the data in train mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(8))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().reshape(-1, 8).mean(0), 0.1)
        return x - self.mean


def network():
    """A decoder that shows its mode, with a buffer that is saved."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 8), Centred(), nn.Dropout(0.5), nn.Linear(8, WIDTH))


def guide(x):
    loc = pyro.param("loc", torch.zeros(N, 2))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 0.1).to_event(1))


def likelihood(decode, x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(decode(z), 1.0).to_event(1), obs=x)


def registered_module(net):
    class Registered(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            likelihood(self.net, x)

    return Registered()


def list_of_a_module(net):
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = [net]

        def forward(self, x):
            likelihood(self.nets[0], x)

    return Listed()


def closed_dictionary(net):
    nets = {"by name": {"decoder": net}}
    return lambda x: likelihood(nets["by name"]["decoder"], x)


def plain_object(net):
    held = Namespace(nets=Namespace(decoder=net))
    return lambda x: likelihood(held.nets.decoder, x)


def bound_method(net):
    class Plain:
        def __init__(self):
            self.nets = (net,)

        def model(self, x):
            self.observe(x)

        def observe(self, x):
            likelihood(self.nets[0], x)

    return Plain().model


def object_within_an_object(net):
    class Inner:
        def __init__(self):
            self.net = net

    class Outer:
        def __init__(self):
            self.inner = Inner()

        def __call__(self, x):
            likelihood(self.inner.net, x)

    return Outer()


def attribute_of_a_class(net):
    class Shared:
        nets = [net]  # noqa: RUF012

        def model(self, x):
            likelihood(self.nets[0], x)

    return Shared().model


def global_dictionary(net):
    NETS["decoder"] = net

    def model(x):
        def decode(z):
            return NETS["decoder"](z)

        likelihood(decode, x)

    return model


def partial_arguments(net):
    return partial(lambda nets, x: likelihood(nets[0], x), [net])


def default_argument(net):
    def model(x, decode=net):
        likelihood(decode, x)

    return model


def pyro_module_alone(net):
    KEPT.append(net)
    hidden = weakref.ref(net)

    def model(x):
        likelihood(pyro.module("decoder", hidden()), x)

    return model


PLACES = (
    list_of_a_module, closed_dictionary, plain_object, bound_method, object_within_an_object,
    attribute_of_a_class, global_dictionary, partial_arguments, default_argument, pyro_module_alone,
)  # fmt: skip
X = torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(0))
everywhere = pytest.mark.parametrize("place", PLACES, ids=[place.__name__ for place in PLACES])


@everywhere
def test_a_module_is_scored_in_eval_mode_and_gets_its_mode_back(place):
    net = network()
    program = place(net)
    expected = pyrovae.elbo(registered_module(network()), guide, X, seed=0).elbo
    torch.testing.assert_close(pyrovae.elbo(program, guide, X, seed=0).elbo, expected)
    found = pyrovae.log_likelihood(program, guide, X, num_samples=20, seed=0).log_prob
    alone = pyrovae.log_likelihood(registered_module(network()), guide, X, num_samples=20, seed=0)
    torch.testing.assert_close(found, alone.log_prob)
    assert all(module.training for module in net.modules())


@everywhere
def test_a_module_is_trained_and_its_buffers_are_kept(place):
    program, plain = place(network()), registered_module(network())
    states = []
    for model in (program, plain):
        pyro.clear_param_store()
        torch.manual_seed(0)
        svi = pyrovae.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
        for _ in range(3):
            svi.step(X)
        state = svi.pair.state_dict()
        states.append({name.rpartition(".")[::2]: value for name, value in state.items()})
        if model is program:
            svi.pair.load_state_dict({name: 0 * value for name, value in state.items()})
            assert not any(bool(value.any()) for value in svi.pair.state_dict().values())
    ours, theirs = (sorted(s.values(), key=lambda v: (v.shape, v.sum().item())) for s in states)
    assert len(ours) == len(theirs)
    for one, another in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, another)


def test_names_of_what_is_held_follow_its_owner():
    assert {
        name.rpartition(".")[0] for name in Pair(list_of_a_module(network()), guide).named()
    } == {
        "model.nets.0.0",
        "model.nets.0.3",
    }


def test_a_module_that_is_registered_as_it_runs_joins_every_mode_that_is_open():
    net = network()
    pair = Pair(pyro_module_alone(net), guide)
    net.train()
    with pair.mode(training=False):
        with pair.mode(training=True):
            pair.run_model(X)
            assert net[2].training
        assert not net[2].training
    assert net[2].training


def test_a_module_that_is_held_and_registered_counts_once():
    net = network()
    owner = registered_module(net)
    owner.parts = [net[0], {"last": net[3]}]
    assert [*Pair(owner, guide).roots] == ["model"]
    assert owners(lambda x: (owner(x), owner.parts)) == [owner]


def test_a_guide_that_keeps_its_model_owns_its_own_parameters():
    model = registered_module(network())
    auto = pyro.infer.autoguide.AutoDiagonalNormal(model)
    auto(X)
    pair = Pair(model, auto)
    assert [*pair.roots] == ["model", "guide"]
    assert {name.split(".")[0] for name in pair.named()} == {"model", "guide"}


def test_what_libraries_keep_is_not_the_programs():
    other = network()
    logger = pytest.importorskip("logging").getLogger("pyrovae.tests")
    logger.net = other
    model = registered_module(network())
    model.log = logger
    assert [*Pair(model, guide).roots] == ["model"]
    del logger.net


def test_modules_in_a_list_meet_nothing_of_the_store():
    class Scaled(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__("scaled")
            self.scale = pyro.nn.PyroParam(torch.ones(WIDTH))

        def forward(self, z):
            return self.scale * z.sum(-1, keepdim=True)

    pyro.param("scaled.scale", torch.full((WIDTH,), 7.0))
    net = Scaled()
    Pair(list_of_a_module(net), guide).run_model(X)
    torch.testing.assert_close(net.scale, torch.ones(WIDTH))
