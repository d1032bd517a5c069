"""Compiled steps are the eager ones after every change of what Python reads in a step."""

import argparse
import collections
import dataclasses
import enum
import functools
import itertools
import re
import time
import types
import warnings
import weakref

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from torch import nn

import pyrovae
from pairs import LATENT, SHAPE, binary
from pyrovae.guides.mean_field import MeanField
from pyrovae.nn import MLP

X = binary()
FACTOR = 1.0


@pytest.fixture(autouse=True)
def _recorded(monkeypatch):
    """Run the record itself, which takes no compiler."""
    monkeypatch.setattr("pyrovae.compiling.graph._compile", lambda graph, inputs: graph)


class Decoder(PyroModule):
    """A model whose logits are multiplied by what ``factor()`` reads."""

    def __init__(self, factor):
        super().__init__()
        self.net, self.factor = MLP(LATENT, SHAPE, ()), factor

    def forward(self, x, *context):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            logits = self.factor(*context) * self.net(z)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)


class Guide(MeanField):
    def forward(self, x, beta=None):
        super().forward(x)


def _make(model, seed=0):
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    return model(), Guide(SHAPE, LATENT, ())


def _train(svi, steps, x=X, *context):
    return [svi.step(x, *context) for _ in range(steps)]


def _svi(pair, compile, **options):
    optim = options.pop("optim", lambda p: torch.optim.Adam(p, lr=0.01))
    return pyrovae.SVI(*pair, optim, Trace_ELBO(), compile=compile, **options)


def _live(svi):
    return [c for c in svi.compiled.captures.values() if c is not None]


class Level(enum.Enum):
    LOW, HIGH = 1.0, 3.0


@dataclasses.dataclass
class Config:
    beta: float = 1.0


class Plain:
    beta = 3.0


class Slotted:
    __slots__ = ("beta",)


def _attribute(holder, made=float, read=float):
    return (lambda: read(holder.beta)), (lambda value: setattr(holder, "beta", made(value)))


def _item(container, key):
    return (lambda: container[key]), (lambda value: container.__setitem__(key, value))


def _module_global():
    def write(value):
        global FACTOR
        FACTOR = value

    return (lambda: FACTOR), write


def _cell():
    beta = 1.0

    def write(value):
        nonlocal beta
        beta = value

    return (lambda: beta), write


def _function():
    def read():
        return read.beta

    return read, lambda value: setattr(read, "beta", value)


def _defaults():
    def inner(beta=1.0):
        return beta

    return (lambda: inner()), (lambda value: setattr(inner, "__defaults__", (value,)))


def _helper():
    def helper():
        return functools.reduce(lambda a, b: a * b, holder["betas"])

    holder = {"betas": [1.0]}

    def write(value):
        holder["betas"][1:] = [] if value == 1 else [value]

    return (lambda: helper()), write


def _class_attribute():
    kind = type("Kind", (Plain,), {})
    return (lambda: kind().beta), (lambda value: setattr(kind, "beta", value))


def _hiding():
    """An attribute of an object in the place of its class's, which is 3."""
    holder = Plain()

    def write(value):
        holder.beta = 1.0
        if value == 3:
            del holder.beta

    return (lambda: holder.beta), write


def _hidden():
    """An attribute of a class in whose place an object gets one."""
    holder = type("Kind", (), {"beta": 1.0})()

    def write(value):
        if value == 3:
            holder.beta = value
        else:
            vars(holder).clear()

    return (lambda: holder.beta), write


def _method():
    holder = type("Kind", (), {})()
    return (lambda: holder.scaled()), lambda v: setattr(type(holder), "scaled", lambda self: v)


def _partial():
    betas = [1.0]
    return functools.partial(lambda b: b[0], betas), lambda value: betas.__setitem__(0, value)


def _hook():
    layer, handles = nn.Identity(), []

    def write(value):
        if value == 3:
            handles.append(layer.register_forward_hook(lambda module, args, out: 3.0 * out))
        elif handles:
            handles.pop().remove()

    return (lambda: layer(torch.tensor(1.0))), write


def _hook_of_all():
    """A hook of torch's own, which it calls for every module."""
    layer, handles = nn.Identity(), []

    def triple(module, args, out):
        return 3.0 * out if module is layer else None

    def write(value):
        if value == 3:
            handles.append(nn.modules.module.register_module_forward_hook(triple))
        elif handles:
            handles.pop().remove()

    return (lambda: layer(torch.tensor(1.0))), write


def _by_name():
    holder = types.SimpleNamespace()
    return (lambda: getattr(holder, f"beta{1}")), (lambda v: setattr(holder, "beta1", v))


def _set():
    values = set()
    return (
        lambda: float(len(values))
    ), lambda v: values.update(range(int(v))) or (values.intersection_update(range(int(v))))


TENSORS = {value: torch.tensor(value) for value in (1.0, 3.0)}
CHANGES = {
    "number": lambda: _attribute(nn.Module()),
    "numpy number": lambda: _attribute(nn.Module(), np.float32),
    "tuple": lambda: _attribute(nn.Module(), lambda v: (v, 2.0), lambda t: t[0]),
    "nested tuple": lambda: _attribute(Plain(), lambda v: ((v,), 2), lambda t: t[0][0]),
    "enum": lambda: _attribute(nn.Module(), Level, lambda e: e.value),
    "namespace": lambda: _attribute(types.SimpleNamespace()),
    "parsed arguments": lambda: _attribute(argparse.Namespace()),
    "dataclass": lambda: _attribute(Config()),
    "slots": lambda: _attribute(Slotted()),
    "imported module": lambda: _attribute(types.ModuleType("somebodys_settings")),
    "tensor": lambda: _attribute(types.SimpleNamespace(), TENSORS.get, lambda t: t),
    "integer for number": lambda: _attribute(Plain(), lambda v: v if v == 1 else 3),
    "dict": lambda: _item({}, "beta"),
    "default dict": lambda: _item(collections.defaultdict(float), "beta"),
    "list": lambda: _item([1.0], 0),
    "deque": lambda: _item(collections.deque([1.0]), 0),
    "array in place": lambda: _item(np.array([1.0, 2.0]), 0),
    "set": _set,
    "function": _function,
    "module global": _module_global,
    "closure cell": _cell,
    "default": _defaults,
    "helper of a helper": _helper,
    "class attribute": _class_attribute,
    "attribute taken from before its class's": _hiding,
    "attribute put before its class's": _hidden,
    "method": _method,
    "partial": _partial,
    "hook": _hook,
    "hook of all modules": _hook_of_all,
    "attribute of a tensor": lambda: _attribute(torch.zeros(())),
    "attribute by name": _by_name,
}


@pytest.fixture(scope="module")
def compiled():
    """One pair that reads all of it, compiled, and how each is written."""
    reads, writes = zip(*(make() for make in CHANGES.values()), strict=True)
    for write in writes:
        write(1.0)

    def factor():
        product = 1.0
        for read in reads:
            product = product * read()
        return product

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyrovae.compiling.graph._compile", lambda graph, inputs: graph)
        svi = _svi(_make(lambda: Decoder(factor)), True)
        _train(svi, 3)
        return svi, dict(zip(CHANGES, writes, strict=True))


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.filterwarnings("ignore:The pair runs eagerly.* has changed since:UserWarning")
def test_a_changed_state_is_seen_before_the_next_step(compiled, case):
    svi, writes = compiled
    (capture,) = _live(svi)
    for value, runs in ((3.0, 0), (1.0, 1)):
        calls = capture.calls
        writes[case](value)
        pyro.set_rng_seed(3)
        expected = svi.evaluate_loss(X)
        pyro.set_rng_seed(3)
        assert svi.step(X) == pytest.approx(expected, rel=1e-5)
        assert capture.calls == calls + runs
    assert _live(svi) == [capture]


def _set_clip_norm(svi):
    svi.trained.clip_norm = 0.1


def _hook_gradient(svi):
    weight = svi.model.net.last.weight
    weight.register_hook(lambda gradient: gradient * (weight > 0))


def _hook_accumulated(svi):
    def shorten(weight):
        weight.grad *= 0.1

    svi.model.net.last.weight.register_post_accumulate_grad_hook(shorten)


@pytest.mark.parametrize("change", [_set_clip_norm, _hook_gradient, _hook_accumulated])
@pytest.mark.parametrize("compiled_steps", [0, 3])
@pytest.mark.filterwarnings("ignore:The pair runs eagerly:UserWarning")
def test_what_changes_gradients_does_so_in_the_next_step(change, compiled_steps):
    weights = []
    for compile in (True, False):
        options = {"optim": lambda p: torch.optim.SGD(p, 1e-3), "clip_norm": 1e4}
        svi = _svi(_make(lambda: Decoder(lambda: 1.0)), compile, **options)
        _train(svi, compiled_steps)
        change(svi)
        _train(svi, 3)
        weights.append(torch.cat([p.flatten() for p in svi.model.parameters()]))
    assert torch.allclose(*weights, atol=1e-6)


def test_a_hook_on_a_gradient_that_keeps_what_it_sees_runs_eagerly():
    pair, norms = _make(lambda: Decoder(lambda: 1.0)), []
    pair[0].net.last.weight.register_hook(lambda gradient: norms.append(gradient.norm()))
    svi = _svi(pair, True)
    with pytest.warns(UserWarning, match="it changes norms while it runs"):
        _train(svi, 4)
    assert len({float(norm) for norm in norms}) == 4


def test_a_pair_that_runs_compiled_no_longer_says_what_has_changed():
    pair = _make(lambda: Decoder(lambda: config["beta"]))
    config = {"beta": 1.0}
    svi = _svi(pair, True)
    _train(svi, 3)
    config["beta"] = 2.0
    with pytest.warns(UserWarning, match=r"config\['beta'\] has changed since its step"):
        svi.step(X)
    config["beta"] = 3.0  # It is said once.
    svi.step(X)


def test_a_change_of_what_no_step_reads_leaves_it_compiled():
    pair = _make(lambda: Decoder(lambda: 1.0))
    pair[0].history, pair[0].note = [], "a"
    svi = _svi(pair, True)
    for number in range(6):
        svi.step(X)
        pair[0].history.append(number)
        pair[0].note += "b"
    assert _live(svi)[0].calls == 5


def _compare(make, steps=(X, X, X, X, X[:5], X, X), during=lambda svi, number: None, **options):
    """Losses and buffers of an eager and a compiled run; the compiled SVI and its warnings."""
    found = []
    for compile in (False, True):
        pair = _make(make)
        svi = _svi(pair, compile, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            losses = []
            for number, x in enumerate(steps):
                during(svi, number)
                losses.append(svi.step(*x) if isinstance(x, tuple) else svi.step(x))
        found.append((losses, pair[0]))
    (eager, one), (compiled, other) = found
    assert compiled == pytest.approx(eager, rel=1e-5)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    return one, other, svi, [str(w.message) for w in caught]


class Recurrent(Decoder):
    """Buffers, attributes and entries that are assigned anew."""

    def __init__(self):
        super().__init__(self.read)
        self.register_buffer("mean", torch.zeros(SHAPE))
        self.stash, self.cache = None, {"last": torch.zeros(())}

    def read(self):
        return 1.0 + self.mean + self.cache["last"]

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        self.stash = 2 * x, x.sum()
        super().forward(x)
        self.cache["last"] = x.mean()


def test_what_is_assigned_anew_is_assigned_by_compiled_steps():
    batches = [torch.bernoulli(torch.full((n, *SHAPE), 0.1 * n)) for n in (3, 7, 7, 7, 3, 7, 7)]
    one, other, svi, said = _compare(Recurrent, batches)
    assert _live(svi)[0].calls == 5
    assert said == []
    assert torch.equal(other.cache["last"], one.cache["last"])
    for ours, theirs in zip(other.stash, one.stash, strict=True):
        assert torch.equal(ours, theirs)


class Planar(nn.Module):
    """A guide with a flow of Pyro's, which keeps its last input and output on itself."""

    def __init__(self):
        super().__init__()
        self.net = MLP(SHAPE, (2, LATENT), (8,))
        self.flow = dist.transforms.Planar(LATENT)

    def forward(self, x):
        self.gone = weakref.ref(nn.Identity())  # as the inverse of a transform is in torch 2.11
        with pyro.plate("data", len(x)):
            loc, log_scale = self.net(x).unbind(-2)
            base = dist.Normal(loc, log_scale.exp()).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))


def test_a_planar_flow_runs_compiled():
    found = []
    for compile in (False, True):
        model, _ = _make(lambda: Decoder(lambda: 1.0))
        svi = _svi((model, Planar()), compile)
        found.append(_train(svi, 6))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert _live(svi)[0].calls == 5


class Counting(Decoder):
    def __init__(self, effect):
        super().__init__(lambda: 1.0)
        self.count, self.log, self.effect = 0, [], effect

    def forward(self, x):
        self.effect(self, x)
        super().forward(x)


def _count(self, x):
    self.count += 1


TOLD = []


def _list_of_tensors(self, x):
    self.log = [x.mean()]


EFFECTS = {
    "counter": (_count, "changes model.count while it runs"),
    "list": (lambda self, x: self.log.append(len(x)), r"changes model\.log"),
    "global list": (lambda self, x: TOLD.append(len(x)), "changes TOLD"),
    "tensors in a list": (_list_of_tensors, r"changes model\.log\[0\]"),
    "print": (lambda self, x: print("step"), r"calls print\(\)"),
    "random": (lambda self, x: np.random.rand(), "random numbers that are not torch's"),
    "iterator": (lambda self, x: next(NUMBERS), "NUMBERS, a count, which may change unseen"),
    "time": (lambda self, x: time.time(), r"calls time\(\)"),
}
NUMBERS = itertools.count()


@pytest.mark.parametrize("case", EFFECTS)
def test_what_programs_do_beside_is_done_as_often_as_eagerly(case, capsys):
    effect, words = EFFECTS[case]
    TOLD.clear()
    _, other, svi, said = _compare(lambda: Counting(effect), steps=[X] * 5)
    assert not _live(svi)
    assert [bool(re.search(words, text)) for text in said] == [True]
    assert (other.count, len(other.log), len(TOLD)) == {
        "counter": (5, 0, 0), "list": (0, 5, 0), "global list": (0, 0, 10),
        "tensors in a list": (0, 1, 0),
    }.get(case, (0, 0, 0))  # fmt: skip
    assert capsys.readouterr().out == ("step\n" * 10 if case == "print" else "")


def test_a_failed_audit_says_which_steps_may_have_been_wrong(tmp_path):
    file = tmp_path / "beta"
    file.write_text("1")
    svi = _svi(_make(lambda: Decoder(lambda: float(file.read_text()))), True)
    _train(svi, 5)  # The steps 2 to 5 are compiled, of which 2, 3 and 5 are audited.
    file.write_text("3")
    _train(svi, 3)
    with pytest.warns(UserWarning, match="steps 6 to 8, which ran compiled, may have been wrong"):
        svi.step(X)


def test_an_audit_compares_buffers_after_the_step(tmp_path):
    file = tmp_path / "beta"
    file.write_text("1")

    def effect(self, x):
        self.seen.add_(float(file.read_text()))

    def make():
        model = Counting(effect)
        model.register_buffer("seen", torch.zeros(()))
        return model

    svi = _svi(_make(make), True)
    _train(svi, 4)
    file.write_text("3")
    with pytest.warns(UserWarning, match=r"Counting\.seen .*after the step, came out otherwise"):
        svi.step(X)


class Annealed(Decoder):
    def __init__(self):
        super().__init__(lambda: 1.0)

    def forward(self, x, beta=None):
        with pyro.poutine.scale(scale=1.0 if beta is None else beta):
            super().forward(x)


ARGUMENTS = {
    "float": ((1.0, 2.0, 3.0, 1.0, 1.0, 1.0), 5),
    "integer": ((1, 1, 1, 1, 1, 1), 5),
    "none": ((None,) * 6, 5),
    "bool": ((True,) * 6, 5),
}


@pytest.mark.parametrize("case", ARGUMENTS)
@pytest.mark.parametrize("keyword", [False, True])
def test_numbers_and_keywords_are_inputs_or_constants(case, keyword):
    values, calls = ARGUMENTS[case]
    found = []
    for compile in (False, True):
        svi = _svi(_make(lambda: Annealed()), compile)
        losses = []
        for value in values:
            losses.append(svi.step(X, beta=value) if keyword else svi.step(X, value))
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert [capture.calls for capture in _live(svi)] == [calls]


class Warm(Decoder):
    """A model that reads its buffer back into Python."""

    def __init__(self, read):
        super().__init__(lambda: read(self.beta))
        self.register_buffer("beta", torch.ones(1))


@pytest.mark.parametrize(
    "read",
    [
        float,
        lambda b: b.tolist()[0],
        lambda b: float(b.numpy()[0]),
        lambda b: [1.0, 3.0][int(b) > 1],
    ],
    ids=["float", "tolist", "numpy", "int"],
)
def test_a_buffer_that_python_reads_is_no_constant(read):
    def during(svi, number):
        if number == 3:
            svi.model.beta.fill_(3.0)

    _, _, svi, said = _compare(lambda: Warm(read), [X] * 5, during)
    assert not _live(svi)
    assert ["reads a value back" in text for text in said] == [True]


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda svi: svi.step(X, object()), "an argument is of the type object"),
        (lambda svi: svi.step(X, X.clone().requires_grad_()), "an argument carries a gradient"),
        (
            lambda svi: svi.step(X, nn.utils.rnn.pack_sequence([X[0], X[1]])),
            "a PackedSequence, whose lengths are read back",
        ),
    ],
    ids=["object", "gradient", "packed"],
)
def test_arguments_that_are_no_inputs_run_eagerly_with_one_warning(step, words):
    class Deaf(Annealed):
        def forward(self, x, context):
            super().forward(x)

    svi = _svi(_make(Deaf), True)
    step(svi)
    with pytest.warns(UserWarning, match=words) as caught:
        assert step(svi) > 0
    step(svi)
    assert len(caught) == 1
    assert not _live(svi)


def test_a_handler_around_a_step_is_no_part_of_the_capture():
    found = []
    for compile in (False, True):
        svi = _svi(_make(lambda: Decoder(lambda: 1.0)), compile)
        losses = _train(svi, 3)
        with warnings.catch_warnings(record=True) as caught, pyro.poutine.scale(scale=2.0):
            warnings.simplefilter("always")
            losses += _train(svi, 2)
        found.append(losses + _train(svi, 1))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert ["inside a handler of Pyro's" in str(w.message) for w in caught] == [True]
    assert _live(svi)[0].calls == 3
