"""SVI means what Pyro's means: optimizers, parameters that come and go, programs of any kind."""

import io
from copy import deepcopy
from functools import partial
from itertools import cycle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI as PyroSVI
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceTMC_ELBO
from pyro.nn import PyroModule, PyroParam, pyro_method
from torch import nn
from torch.distributions import constraints
from torch.utils._python_dispatch import TorchDispatchMode

import pyrovae
from pairs import binary, shipped_bernoulli
from pyrovae.training.optimizer import Trained

X = torch.linspace(-1.0, 1.0, 12).reshape(6, 2)
BOTH = pytest.mark.parametrize("kind", [PyroSVI, pyrovae.SVI], ids=["Pyro", "here"])


class Two(nn.Module):
    """A model and a guide whose encoder has two heads, of which a batch uses one."""

    def __init__(self):
        super().__init__()
        pyro.set_rng_seed(0)
        self.one, self.two, self.decoder = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(3, 2)

    def model(self, x, which):
        pyro.module("two", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x, which):
        pyro.module("two", self)
        head = self.one if which else self.two
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(head(x), 0.5).to_event(1))

    def auxiliary(self, x, which):
        pyro.module("two", self)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(self.one(x), 1.0).to_event(1), obs=x.new_ones(len(x), 3))

    def nothing(self, x, which):
        pass


class Plain(nn.Module):
    """Modules without a statement, which Pyro would not train."""

    def __init__(self):
        super().__init__()
        pyro.set_rng_seed(0)
        self.encoder, self.decoder = nn.Linear(2, 2), nn.Linear(2, 2)

    def model(self, x, which):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x, which):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.5).to_event(1))


class Stated(Plain):
    """The same with a statement, for Pyro to train it."""

    def guide(self, x, which):
        pyro.module("two", self)
        super().guide(x, which)


class Local(PyroModule):
    """A guide of two heads, with parameters that count only where they are looked up."""

    def __init__(self):
        super().__init__()
        pyro.set_rng_seed(0)
        self.one, self.two = PyroModule[nn.Linear](2, 2), PyroModule[nn.Linear](2, 2)
        self.scale = PyroParam(torch.tensor(0.5), constraint=constraints.positive)

    @pyro_method
    def model(self, x, which):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    @pyro_method
    def guide(self, x, which):
        head = self.one if which else self.two
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(head(x), self.scale).to_event(1))


def functions():
    """A model and a guide whose parameters are in Pyro's store; the second comes late."""

    def model(x, which):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            shift = pyro.param("shift", torch.zeros(2)) if which else 0.0
            pyro.sample("x", dist.Normal(z + shift, 1.0).to_event(1), obs=x)

    def guide(x, which):
        loc = pyro.param("loc", torch.full((2,), 0.1))
        scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return model, guide


def values(thing=None):
    """A copy of the parameters of a module, or of the store."""
    store = dict(pyro.get_param_store().named_parameters())
    found = store if thing is None else dict(thing.named_parameters())
    return {name: leaf.detach().clone() for name, leaf in found.items()}


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-7)


def take(svis, batches, after=lambda step: None):
    """The losses of steps that several SVIs take in turn."""
    losses = []
    for step, (svi, which) in enumerate(zip(cycle(svis), batches, strict=False)):
        pyro.set_rng_seed(step)
        losses.append(svi.step(X, which))
        after(step)
    return losses


def adam(**options):
    return pyro.optim.Adam({"lr": 0.05, "betas": (0.7, 0.9)} | options)


@pytest.mark.parametrize("make", [Two, Local], ids=["pyro.module", "PyroModule"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("optim", [pyro.optim.Adam, pyro.optim.SGD, pyro.optim.ClippedAdam])
def test_what_a_step_leaves_out_is_stepped_where_pyro_does(make, decay, optim):
    """Pyro steps what was met, with a zero gradient once it has had one."""
    found = []
    for kind in (PyroSVI, pyrovae.SVI):
        pyro.clear_param_store()
        pair = make()
        options = {"lr": 0.05, "weight_decay": decay}
        svi = kind(pair.model, pair.guide, optim(options), Trace_ELBO())
        losses = take([svi], [True, True, False, True, False, False, True])
        found.append((losses, values(pair)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    same(found[0][1], found[1][1])


def schedule():
    return pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.7}
    )


@pytest.mark.parametrize("make", [adam, schedule], ids=["Adam", "schedule"])
def test_two_losses_share_one_optimizer(make):
    """As an auxiliary loss does beside the ELBO."""
    found = []
    for kind in (PyroSVI, pyrovae.SVI):
        pyro.clear_param_store()
        pair, optim = Two(), make()
        svis = [
            kind(pair.model, pair.guide, optim, Trace_ELBO()),
            kind(pair.auxiliary, pair.nothing, optim, Trace_ELBO()),
        ]
        step = optim.step if make is schedule else lambda: None
        losses = take(svis, [True] * 4 + [False] * 4, after=lambda _, step=step: step())
        found.append((losses, values(pair)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    same(found[0][1], found[1][1])


@pytest.fixture
def recorded(monkeypatch):
    """Run what a compiler is given, without the compiler."""
    monkeypatch.setattr("pyrovae.compiling.graph._compile", lambda graph, inputs: graph)


@pytest.mark.usefixtures("recorded")
def test_compiled_steps_share_an_optimizer_too():
    """What one loss leaves out gets its zeros inside the graph."""
    found = []
    for kind, options in ((PyroSVI, {}), (pyrovae.SVI, {"compile": True})):
        pyro.clear_param_store()
        pair, optim = Two(), adam()
        svis = [
            kind(partial(pair.model, which=True), partial(pair.guide, which=True), optim,
                 Trace_ELBO(), **options),
            kind(partial(pair.auxiliary, which=True), partial(pair.nothing, which=True), optim,
                 Trace_ELBO(), **options),
        ]  # fmt: skip
        for step, svi in enumerate([*svis, svis[1]] * 5):
            pyro.set_rng_seed(step)
            svi.step(X)
        found.append(values(pair))
    assert [c.calls for svi in svis for c in svi.compiled.captures.values()] == [4, 9]
    same(*found)


@pytest.mark.usefixtures("recorded")
@pytest.mark.filterwarnings("ignore:The pair runs eagerly.*compiled anew:UserWarning")
@pytest.mark.parametrize("optim", [pyro.optim.Adam, pyro.optim.SGD])
def test_a_compiled_step_finds_the_stores_new_parameters(optim):
    found = []
    for options in ({"compile": False}, {"compile": True}):
        pyro.clear_param_store()
        model, guide = functions()
        svi = pyrovae.SVI(
            partial(model, which=True), partial(guide, which=True), optim({"lr": 0.01}),
            Trace_ELBO(), **options,
        )  # fmt: skip
        losses = []
        for step in range(12):
            if step == 6:
                pyro.clear_param_store()
            pyro.set_rng_seed(step)
            losses.append(svi.step(X))
        found.append((losses, values()))
    assert [c.calls for c in svi.compiled.captures.values()] == [5]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    same(found[0][1], found[1][1])


@pytest.mark.usefixtures("recorded")
def test_what_a_recorder_sets_for_a_while_stays_out_of_pyros_options():
    pair, optim = Two(), pyro.optim.RMSprop({"lr": 0.01})
    svi = pyrovae.SVI(
        partial(pair.model, which=True), partial(pair.guide, which=True), optim, Trace_ELBO(),
        clip_norm=1.0, compile=True,
    )  # fmt: skip
    svi.step(X)
    before = [each.state_dict()["param_groups"] for each in optim.optim_objs.values()]
    for _ in range(3):
        svi.step(X)
    assert [c.calls for c in svi.compiled.captures.values()] == [3]
    assert before == [each.state_dict()["param_groups"] for each in optim.optim_objs.values()]


def test_a_schedule_begins_with_each_parameter_and_is_seen_by_both():
    found = []
    for kind in (PyroSVI, pyrovae.SVI):
        pyro.clear_param_store()
        optim = schedule()
        svi = kind(*functions(), optim, Trace_ELBO())
        take([svi], [False] * 3 + [True] * 3, after=lambda _, optim=optim: optim.step())
        rates = {
            pyro.get_param_store().param_name(leaf): each.optimizer.param_groups[0]["lr"]
            for leaf, each in optim.optim_objs.items()
        }
        found.append((rates, values()))
    assert found[0][0] == pytest.approx(found[1][0])
    assert len(set(found[1][0].values())) == 2
    same(found[0][1], found[1][1])


def on_loss():
    return pyro.optim.ReduceLROnPlateau(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "patience": 0, "threshold": 9.0}
    )


@pytest.mark.parametrize("make", [schedule, on_loss], ids=["epochs", "loss"])
def test_a_fit_steps_pyros_schedules_and_goes_on_from_their_state(make):
    def fit(**options):
        pair = Plain()
        each = partial(pair.model, which=True), partial(pair.guide, which=True)
        result = pyrovae.fit(*each, X, batch_size=3, seed=0, optimizer=make(), **options)
        return result, values(pair), [row["lr"] for row in result.history]

    _, expected, rates = fit(epochs=4)
    half, *_ = fit(epochs=2)
    _, found, again = fit(epochs=4, state=deepcopy(half.state_dict()))
    assert again == rates
    assert rates[-1] < rates[0]
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_rates_that_somebody_sets_are_stepped_at():
    pyro.clear_param_store()
    optim = adam()
    svi = pyrovae.SVI(*functions(), optim, Trace_ELBO())
    svi.step(X, False)
    for each in optim.optim_objs.values():
        each.param_groups[0]["lr"] = 0.0
    before = values()
    svi.step(X, False)
    same(before, values())
    svi.optimizer.param_groups[0]["lr"] = 0.1
    svi.step(X, False)
    assert not torch.equal(before["loc"], values()["loc"])
    assert {each.param_groups[0]["lr"] for each in optim.optim_objs.values()} == {0.1}


@pytest.mark.parametrize("make", [adam, schedule], ids=["Adam", "schedule"])
@pytest.mark.parametrize(
    ("first", "then"), [(PyroSVI, pyrovae.SVI), (pyrovae.SVI, PyroSVI)], ids=["to", "from"]
)
def test_saved_states_of_an_optimizer_are_interchangeable(make, first, then):
    def begin(kind, optim):
        pyro.clear_param_store()
        pair = Two()
        return pair, kind(pair.model, pair.guide, optim, Trace_ELBO())

    found = []
    for kinds in ((PyroSVI, PyroSVI), (first, then)):
        half, rest = make(), make()
        pair, svi = begin(kinds[0], half)
        take([svi], [True, False])
        written = io.BytesIO()
        torch.save(half.get_state(), written)
        weights = deepcopy(pair.state_dict())
        assert set(half.get_state()) == {f"two$$${name}" for name in weights}
        pair, svi = begin(kinds[1], rest)
        pair.load_state_dict(weights)
        rest.set_state(torch.load(io.BytesIO(written.getvalue()), weights_only=False))
        take([svi], [False, True, True])
        found.append(values(pair))
    same(*found)


def test_a_state_of_the_one_optimizer_is_everybodys():
    pyro.clear_param_store()
    optim = adam()
    svi = pyrovae.SVI(*functions(), optim, Trace_ELBO())
    svi.step(X, False)
    state = deepcopy(svi.optimizer.state_dict())
    for _ in range(3):
        svi.step(X, False)
    svi.optimizer.load_state_dict(state)
    svi.step(X, False)
    counts = [each["state"][0]["step"].item() for each in optim.get_state().values()]
    assert counts == [2.0, 2.0]


def test_options_and_clipping_for_each_parameter():
    """Pyro 1.9.2 fails where clip_value meets no gradient: every parameter is used."""
    asked = []

    def options(name):
        asked.append(name)
        return {"lr": 0.1 if "decoder" in name else 0.01}

    def clip(module, name):
        return {"clip_value": 0.1} if "bias" in name else {"clip_norm": 0.01}

    found = []
    for kind in (PyroSVI, pyrovae.SVI):
        pyro.clear_param_store()
        pair, optim = Stated(), pyro.optim.SGD(options, clip)
        take([kind(pair.model, pair.guide, optim, Trace_ELBO())], [True, True])
        found.append(values(pair))
    assert sorted(asked) == sorted([f"two.{name}" for name in found[0]] * 2)
    same(*found)


def _cleared(state):
    pyro.clear_param_store()


def _set(state):
    pyro.get_param_store().set_state(state)


def _deleted(state):
    del pyro.get_param_store()["loc"]


@pytest.mark.parametrize("replace", [_cleared, _set, _deleted])
def test_parameters_of_the_store_may_be_replaced(replace):
    found = []
    for kind in (PyroSVI, pyrovae.SVI):
        pyro.clear_param_store()
        svi = kind(*functions(), adam(), Trace_ELBO())
        losses = take([svi], [True])
        params = {name: leaf.requires_grad_() for name, leaf in values().items()}
        state = pyro.get_param_store().get_state() | {"params": params}
        losses += take([svi], [True, True])
        replace(state)
        losses += take([svi], [True, True])
        found.append((losses, values()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    same(found[0][1], found[1][1])


def test_a_step_tells_that_the_store_has_other_parameters_before_the_programs_run():
    """A compiled step runs no program that could meet them."""
    pyro.clear_param_store()
    svi = pyrovae.SVI(*functions(), adam(), Trace_ELBO())
    svi.step(X, True)
    assert svi.trained.is_current()
    pyro.clear_param_store()
    assert not svi.trained.is_current()
    svi.step(X, True)
    assert svi.trained.is_current()


def torch_adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05)


OPTIMIZERS = pytest.mark.parametrize("optim", [adam, lambda: torch_adam], ids=["Pyro", "torch"])


@OPTIMIZERS
@pytest.mark.parametrize("thawed_first", [True, False])
def test_modules_thaw(optim, thawed_first):
    pair = Plain()
    svi = pyrovae.SVI(pair.model, pair.guide, optim(), Trace_ELBO())
    pair.encoder.requires_grad_(thawed_first)
    svi.step(X, True)
    pair.encoder.requires_grad_(False)
    frozen = values(pair.encoder)
    take([svi], [True] * 3)
    same(frozen, values(pair.encoder))
    pair.encoder.requires_grad_(True)
    take([svi], [True] * 3)
    assert all(not torch.equal(v, values(pair.encoder)[n]) for n, v in frozen.items())


@OPTIMIZERS
@pytest.mark.parametrize("average", [None, 0.5])
def test_a_layer_in_the_place_of_another_is_trained(optim, average):
    pair = Plain()
    svi = pyrovae.SVI(pair.model, pair.guide, optim(), Trace_ELBO(), average=average)
    take([svi], [True] * 2)
    old, pair.encoder = pair.encoder, nn.Linear(2, 2)
    before, left = values(pair.encoder), values(old)
    take([svi], [True] * 3)
    assert all(not torch.equal(v, values(pair.encoder)[n]) for n, v in before.items())
    same(left, values(old))
    stepped = [id(p) for group in svi.optimizer.param_groups for p in group["params"]]
    assert sorted(stepped) == sorted(map(id, pair.parameters()))


def test_nets_of_one_name_are_both_trained():
    class One(PyroModule):
        def __init__(self, samples_x):
            super().__init__()
            self.net, self.samples_x = PyroModule[nn.Linear](2, 2), samples_x

        def forward(self, x):
            with pyro.plate("data", len(x)):
                if self.samples_x:
                    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                    pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)
                else:
                    pyro.sample("z", dist.Normal(self.net(x), 0.5).to_event(1))

    pair, optim = (One(True), One(False)), adam()
    before = [values(each) for each in pair]
    svi = pyrovae.SVI(*pair, optim, Trace_ELBO())
    svi.step(X)
    for one, old in zip(pair, before, strict=True):
        assert all(not torch.equal(v, values(one)[n]) for n, v in old.items())
    assert len(optim.get_state()) == 4


@BOTH
def test_what_poutine_block_hides_is_frozen(kind):
    pyro.clear_param_store()
    pair = Two()
    guide = poutine.block(pair.guide, hide_types=["param"])

    def model(x, which):
        pyro.module("decoder", pair.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(pair.decoder(z), 1.0).to_event(1), obs=x)

    before = values(pair)
    take([kind(model, guide, adam(), Trace_ELBO())], [True] * 2)
    moved = {n.split(".")[0] for n, v in values(pair).items() if not torch.equal(v, before[n])}
    assert moved == {"decoder"}


@BOTH
def test_a_parameter_of_the_store_that_is_hidden_is_frozen(kind):
    pyro.clear_param_store()
    model, guide = functions()
    svi = kind(model, poutine.block(guide, hide=["loc"]), adam(), Trace_ELBO())
    take([svi], [True] * 2)
    moved = values()
    assert torch.equal(moved["loc"], torch.full((2,), 0.1))
    assert not torch.equal(moved["scale"], torch.tensor(0.5).log())


@BOTH
def test_leaves_that_a_program_makes_and_graphs_that_come_with_data_are_left_alone(kind):
    """A step of Newton's inside the guide, and an encoder that somebody else trains."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    encoder = nn.Linear(2, 2)

    def model(x, code):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("prior", torch.zeros(2)), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x, code):
        point = torch.zeros(2, requires_grad=True)
        (slope,) = torch.autograd.grad((point - x).pow(2).sum(), point, create_graph=True)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(code["of"] + point - slope, 1.0).to_event(1))

    svi = kind(model, guide, adam(), Trace_ELBO())
    svi.step(X, {"of": encoder(X)})
    assert encoder.weight.grad.abs().sum() > 0
    svi.step(X, code={"of": encoder(X)})


def test_a_forgotten_module_is_still_refused():
    layers = cycle([nn.Linear(2, 2)])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(next(layers)(x), 1.0).to_event(1))

    with pytest.raises(ValueError, match="neither the model nor the guide owns"):
        pyrovae.SVI(model, guide, adam(), Trace_ELBO()).step(X)


def test_a_module_in_the_place_of_another_is_refused_where_nobody_knows_of_it():
    held = {"net": nn.Linear(2, 2)}

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(held["net"](x), 1.0).to_event(1))

    svi = pyrovae.SVI(model, guide, adam(), Trace_ELBO())
    svi.step(X)
    held["net"] = nn.Linear(2, 2)
    svi.step(X)
    with pytest.raises(ValueError, match="neither the model nor the guide owns"):
        svi.step(X)


def _fixed():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    return model, guide


def test_a_pair_without_parameters_has_a_loss_and_no_fit():
    losses = []
    for kind in (PyroSVI, pyrovae.SVI):
        pyro.set_rng_seed(0)
        losses.append(kind(*_fixed(), adam(), Trace_ELBO()).step(X))
    assert losses[0] == pytest.approx(losses[1])
    with pytest.raises(ValueError, match="no parameters to train"):
        pyrovae.fit(*_fixed(), X, epochs=1, batch_size=6)


@BOTH
@pytest.mark.filterwarnings("ignore:.*ound no sample sites configured for enum:UserWarning")
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO, TraceTMC_ELBO])
def test_programs_without_a_site_have_loss_zero(kind, elbo):
    svi = kind(lambda x: None, lambda x: None, adam(), elbo())
    for value in (svi.step(X), svi.evaluate_loss(X)):
        assert value == 0.0
        assert isinstance(value, float)


@BOTH
def test_the_face_of_pyros_svi(kind):
    pyro.clear_param_store()
    pair, elbo = Two(), Trace_ELBO()
    with pytest.warns(FutureWarning, match="num_samples"), pytest.warns(match="num_steps"):
        svi = kind(pair.model, pair.guide, adam(), elbo, num_samples=3, num_steps=2)
    assert isinstance(svi, PyroSVI)
    pyro.set_rng_seed(1)
    expected = svi.evaluate_loss(X, True)
    pyro.set_rng_seed(1)
    assert svi.loss(pair.model, pair.guide, X, True) == pytest.approx(expected)
    pyro.set_rng_seed(1)
    assert svi.loss_and_grads(pair.model, pair.guide, X, True) == pytest.approx(expected)
    assert pair.decoder.weight.grad.abs().sum() > 0
    pair.zero_grad()
    before = values(pair)
    with pytest.warns(FutureWarning, match="run"):
        traces = svi.run(X, True).exec_traces
    assert len(traces) == 3
    assert all("z" in trace.nodes and "x" in trace.nodes for trace in traces)
    assert not torch.equal(before["decoder.weight"], values(pair)["decoder.weight"])


def test_a_function_as_loss_with_its_own_gradient():
    pair, calls = Two(), []

    def loss_and_grads(model, guide, *args):
        calls.append(args)
        return Trace_ELBO().loss_and_grads(model, guide, *args)

    svi = pyrovae.SVI(pair.model, pair.guide, adam(), Trace_ELBO().loss, loss_and_grads)
    before = values(pair)
    svi.step(X, True)
    assert len(calls) == 1
    assert not torch.equal(before["decoder.weight"], values(pair)["decoder.weight"])


def _misspelt(model_too):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("zz", dist.Normal(loc, 1.0).to_event(1))
            if not model_too:
                pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    return model, guide


def test_a_latent_that_each_program_spells_its_own_way_is_refused():
    pyro.clear_param_store()
    svi = pyrovae.SVI(*_misspelt(True), adam(), Trace_ELBO())
    with (
        pytest.warns(UserWarning, match="vars in"),
        pytest.raises(ValueError, match=r"\['zz'\].*\['z'\].*did you mean 'z'"),
    ):
        svi.step(X)
    assert torch.equal(pyro.param("loc"), torch.zeros(2))


def test_a_latent_too_many_is_pyros_warning():
    pyro.clear_param_store()
    svi = pyrovae.SVI(*_misspelt(False), adam(), Trace_ELBO())
    with pytest.warns(UserWarning, match="Found non-auxiliary vars in guide"):
        svi.step(X)


def test_names_of_an_optimizer_that_is_gone_are_forgotten():
    pyro.clear_param_store()
    pair = Two()
    svi = pyrovae.SVI(pair.model, pair.guide, adam(), Trace_ELBO())
    svi.step(X, True)
    assert len(pyro.get_param_store()._param_to_name) == 6
    del svi
    assert not pyro.get_param_store()._param_to_name


def test_telling_what_is_trained_asks_for_no_program():
    trained = Trained(adam(), pyrovae.SVI(*functions(), adam(), Trace_ELBO()).pair)
    assert not trained.is_current()
    trained.collect()
    assert trained.is_current()
    with pytest.raises(ValueError, match="no optimizer yet"):
        _ = trained.optimizer


class Kernels(TorchDispatchMode):
    """Notes the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "fused"),
    [({}, True), ({"fused": False}, False), ({"foreach": True}, False), ({"amsgrad": True}, True)],
)
@pytest.mark.parametrize("own", [True, False], ids=["torch", "Pyro"])
def test_adam_steps_all_weights_by_one_kernel_unless_told_otherwise(options, fused, own):
    given = {"lr": 0.01, **options}
    pair = Plain()
    optim = partial(torch.optim.Adam, **given) if own else pyro.optim.Adam(given)
    svi = pyrovae.SVI(pair.model, pair.guide, optim, Trace_ELBO(), compile=False)
    plain = Plain()
    plainly = partial(torch.optim.Adam, **{"foreach": False, **given, "fused": False})
    other = pyrovae.SVI(plain.model, plain.guide, plainly, Trace_ELBO(), compile=False)
    with Kernels() as kernels:
        for each in (svi, other):
            pyro.set_rng_seed(1)
            for _ in range(5):
                each.step(X, True)
    assert ("_fused_adam_" in kernels.names) is fused
    assert {group["fused"] for group in svi.optimizer.param_groups} == {given.get("fused")}
    for one, two in zip(pair.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_a_step_walks_through_no_module_where_the_store_is_empty(monkeypatch):
    pyro.clear_param_store()
    pair = shipped_bernoulli()
    svi = pyrovae.SVI(*pair, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), compile=False)
    svi.step(binary())
    monkeypatch.setattr("pyrovae.pairs.pair._pyro_param_names", None)
    svi.step(binary())
