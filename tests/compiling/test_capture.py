"""A captured step is the eager step, or it is not taken."""

import copy
import gc
import itertools
import random
import warnings
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.fx._symbolic_trace import is_fx_tracing
from torch.nn.functional import binary_cross_entropy_with_logits

import pyrovae
from pairs import (
    LATENT,
    SHAPE,
    binary,
    functions,
    plain_modules,
    published_example,
    same_names,
    shipped_bernoulli,
    two_latents,
)
from pyrovae.compiling.graph import CaptureError, drawn_at_once, record, without_log1p
from pyrovae.compiling.update import Update, UpdateError
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.bernoulli import Bernoulli
from pyrovae.nn import MLP
from pyrovae.optim import Combined, muon
from pyrovae.pairs.pair import Pair

X = binary()


@pytest.fixture(autouse=True)
def _recorded(request, monkeypatch):
    """Run the record itself; the tests marked ``inductor`` run what Inductor makes of it."""
    if "inductor" not in request.keywords:
        monkeypatch.setattr("pyrovae.compiling.graph._compile", lambda graph, inputs: graph)


def _flat():
    """A pair without hidden layers, with half as many parameters to step."""
    return Bernoulli(SHAPE, LATENT, ()), MeanField(SHAPE, LATENT, ())


def _losses(make, loss, compile, steps=9, batches=(X,), **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pair = make()
    optim = pyro.optim.Adam({"lr": 0.01})
    svi = pyrovae.SVI(*pair, optim, loss, compile=compile, **options)
    losses = [svi.step(x) for _ in range(steps) for x in batches]
    return losses, svi


def _both(make, loss, weights=True, **options):
    eager, plain = _losses(make, loss, False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured, svi = _losses(make, loss, True, **options)
    assert [c for c in svi.compiled.captures.values() if c is not None]
    assert captured == pytest.approx(eager, rel=1e-5)
    ours, theirs = svi.pair.state_dict(), plain.pair.state_dict()
    for name, value in ours.items() if weights else ():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)
    return svi


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (published_example, Trace_ELBO(3, max_plate_nesting=1, vectorize_particles=True)),
        (same_names, TraceMeanField_ELBO()),
        (functions, Trace_ELBO()),
        (two_latents, TraceMeanField_ELBO()),
    ],
    ids=["published", "same-names", "functions", "two-latents"],
)
def test_captured_training_is_eager_training(make, loss):
    svi = _both(make, loss)
    assert next(iter(svi.compiled.captures.values())).calls == 8


class Stateful(nn.Module):
    """Dropout and batch normalization in the model, and a weight that a person may change."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(LATENT, 8), nn.Dropout(0.5), MLP(8, SHAPE, ()))
        self.norm = nn.BatchNorm1d(16)
        self.beta = 1.0

    def forward(self, x):
        self.norm(x.flatten(1))
        with pyro.plate("data", len(x)):
            with pyro.poutine.scale(scale=self.beta):
                z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(3), obs=x)


def _stateful():
    return Stateful(), MeanField(SHAPE, LATENT, ())


@pytest.mark.inductor
def test_dropout_and_batch_statistics_are_those_of_the_eager_run():
    svi = _both(_stateful, Trace_ELBO())
    assert svi.model.norm.num_batches_tracked.item() == 9


@pytest.fixture
def _again_at_once(monkeypatch):
    monkeypatch.setattr("pyrovae.compiling.step.AGAIN_AFTER", 1)


def _captured_gradients(make, calls=2):
    """An SVI whose loss and gradients are captured, and have been audited for the last time."""
    _, svi = _losses(make, Trace_ELBO(), True, steps=1)
    for _ in range(calls):
        svi.gradients(X)
        svi.optimizer.zero_grad()
    return svi


def _assert_captured_anew(svi):
    """The pair as it is now runs captured, and as it does eagerly."""
    found = []
    compiled = svi.compiled
    for svi.compiled in (compiled, None):
        pyro.set_rng_seed(5)
        loss = svi.gradients(X).loss
        found.append(
            [loss, *(p.grad.clone() for p in svi.model.parameters() if p.grad is not None)]
        )
        svi.optimizer.zero_grad()
    assert len([c for c in compiled.captures.values() if c is not None]) == 2
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_again_at_once")
def test_a_changed_attribute_is_captured_anew():
    svi = _captured_gradients(_stateful)
    svi.model.eval()
    svi.model.beta = 0.25
    _assert_captured_anew(svi)


@pytest.mark.usefixtures("_again_at_once")
def test_a_buffer_set_anew_is_captured_anew():
    class Weighted(Stateful):
        def __init__(self):
            super().__init__()
            del self.beta
            self.register_buffer("beta", torch.tensor(1.0))

    svi = _captured_gradients(lambda: (Weighted(), MeanField(SHAPE, LATENT, (8,))))
    svi.model.beta = torch.tensor(0.2)
    _assert_captured_anew(svi)


class Normalized(nn.Module):
    """A bias before batch normalization: its gradient is zero but for rounding."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(LATENT, 16), nn.BatchNorm1d(16))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(1), obs=x.flatten(1))


def test_gradients_that_are_zero_but_for_rounding_stay_captured():
    svi = _both(
        lambda: (Normalized(), MeanField(SHAPE, LATENT, (8,))), Trace_ELBO(), weights=False, steps=9
    )
    assert svi.model.net[1].num_batches_tracked.item() == 9


@pytest.mark.usefixtures("_again_at_once")
@pytest.mark.filterwarnings("ignore:.*requires_grad=False")
@pytest.mark.parametrize("frozen", ["guide", "model guide"])
def test_a_frozen_parameter_stays_where_it_is(frozen):
    _, svi = _losses(_stateful, Trace_ELBO(), True, steps=3)
    parameters = [p for program in frozen.split() for p in getattr(svi, program).parameters()]
    for parameter in parameters:
        parameter.requires_grad_(False)
    before = [p.clone() for p in parameters]
    svi.optimizer.zero_grad()
    for _ in range(4):  # Two of them eager, to see which parameters there are.
        svi.step(X)
    for old, new in zip(before, parameters, strict=True):
        assert torch.equal(old, new)


def test_an_attribute_that_changes_each_step_runs_eagerly():
    _, svi = _losses(_stateful, Trace_ELBO(), True, steps=3)
    svi.model.beta = 0.05
    with pytest.warns(UserWarning, match=r"model\.beta has changed"):
        svi.step(X)
    for step in range(5):
        svi.model.beta = 0.1 * (step + 1)
        svi.step(X)
    assert len(svi.compiled.captures) == 1


def _with_model(model):
    _, guide = _stateful()
    return lambda: (model, guide)


def _plain(net, logits):
    def model(x):
        pyro.module("decoder", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=logits(net(z))).to_event(3), obs=x)

    return model


@pytest.mark.parametrize(
    ("logits", "words"),
    [
        (lambda y: y if y.sum().item() > 0 else 2 * y, "reads a value back"),
        (lambda y: y if y.mean() > 0 else 2 * y, "reads a value back"),
        (lambda y: y if torch.equal(y, y.abs()) else 2 * y, "reads a value back"),
        (lambda y: y * random.random(), "random numbers that are not torch's"),
    ],
    ids=["item", "branch", "equal", "random"],
)
def test_what_cannot_be_captured_runs_eagerly_with_one_warning(logits, words):
    pyro.set_rng_seed(1)
    model = _plain(MLP(LATENT, SHAPE, (8,)), logits)
    with pytest.warns(UserWarning, match=words) as caught:
        losses, svi = _losses(_with_model(model), Trace_ELBO(), True, steps=6)
    assert len([w for w in caught if "runs eagerly" in str(w.message)]) == 1
    assert list(svi.compiled.captures.values()) == [None]
    assert len(losses) == 6


@pytest.mark.inductor
def test_code_that_does_not_run_leaves_the_eager_step(monkeypatch):
    """As that of an LSTM on a CPU, of torch 2.11 to 2.14."""

    def broken(graph, inputs):
        def run(*inputs):
            raise TypeError("expected Tensor() for op: mkldnn_rnn_layer")

        return run

    monkeypatch.setattr("pyrovae.compiling.graph.compiled", broken)
    with pytest.warns(UserWarning, match="not compiled: the compiler failed: expected Tensor"):
        losses, _ = _losses(shipped_bernoulli, Trace_ELBO(), True, steps=3)
    assert losses == _losses(shipped_bernoulli, Trace_ELBO(), False, steps=3)[0]


def test_a_number_that_changes_unseen_is_found_by_the_audit(tmp_path):
    pyro.set_rng_seed(1)
    hidden = tmp_path / "weight"
    hidden.write_text("1")
    model = _plain(MLP(LATENT, SHAPE, (8,)), lambda y: y * float(hidden.read_text()))
    _, svi = _losses(_with_model(model), Trace_ELBO(), True, steps=4)
    hidden.write_text("3")
    with pytest.warns(UserWarning, match="came out otherwise"):
        svi.step(X)
    pyro.set_rng_seed(3)
    found = svi.step(X)
    svi.compiled = None
    assert found == pytest.approx(_repeat(svi), rel=0.05)


class OnItsKink(nn.Module):
    """A decoder with a ReLU at zero, where rounding decides whether its gradient is zero."""

    def __init__(self):
        super().__init__()
        self.net = MLP(LATENT, SHAPE, (8,))
        self.one, self.other = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            logits = self.net(z) + (self.one - self.other).relu()
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("wrong", [1.0, 1.01])
def test_rounding_at_a_kink_is_no_difference_but_another_gradient_is(monkeypatch, sign, wrong):
    def rounded(graph, inputs):
        def run(*inputs):
            moved = [
                t * (1 + (-1) ** n * sign * 1e-6) if t.is_floating_point() else t
                for n, t in enumerate(inputs)
            ]
            numbers, *gradients = graph(*moved)
            return [numbers, *(wrong * g for g in gradients)]

        return run

    monkeypatch.setattr("pyrovae.compiling.graph._compile", rounded)
    pyro.set_rng_seed(1)
    _, svi = _losses(_with_model(OnItsKink()), Trace_ELBO(), True, steps=1)
    svi.optimizer.zero_grad()
    if wrong == 1:
        svi.gradients(X)
        assert None not in svi.compiled.captures.values()
    else:
        with pytest.warns(UserWarning, match="the gradient of shape .* came out otherwise"):
            svi.gradients(X)


@pytest.mark.parametrize("flips", [{3}, {3, 5}, {3, 5, 7}])
def test_a_draw_that_rounding_decides_is_no_difference_but_one_in_other_noise_is(
    monkeypatch, flips
):
    """The compiled step is another one in some of its runs, of which 3 to 7 are an audit."""
    runs = itertools.count(1)

    def flipped(graph, inputs):
        def run(*inputs):
            numbers, *gradients = graph(*inputs)
            return [numbers * (2 if next(runs) in flips else 1), *gradients]

        return run

    monkeypatch.setattr("pyrovae.compiling.graph._compile", flipped)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses, svi = _losses(shipped_bernoulli, Trace_ELBO(), True, steps=3)
    eager = _losses(shipped_bernoulli, Trace_ELBO(), False, steps=3)[0]
    assert losses == pytest.approx(eager, rel=1e-4)
    assert (None in svi.compiled.captures.values()) == (len(flips) > 2)
    assert any("the loss came out otherwise" in str(w.message) for w in caught) == (len(flips) > 2)


OPAQUE = random.Random(0)


def test_what_runs_when_garbage_is_collected_is_no_part_of_a_step():
    called = []

    def collected(phase, info):
        called.append(OPAQUE)

    gc.callbacks.append(collected)
    thresholds = gc.get_threshold()
    gc.set_threshold(20, 10**6, 10**6)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, svi = _losses(shipped_bernoulli, Trace_ELBO(), True, steps=3)
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(collected)
    assert called
    assert gc.isenabled()
    assert None not in svi.compiled.captures.values()


@pytest.mark.parametrize(
    "found",
    [
        lambda call, x, y: [x * call],
        lambda call, x, y: [x.exp() if call else x],
        lambda call, x, y: [[x, y][call].exp()],
        lambda call, x, y: [x.exp(), x.log()][:: 2 * call - 1],
    ],
    ids=["a number", "an operator", "an argument", "the order of results"],
)
def test_what_differs_from_call_to_call_is_refused(found):
    calls, pair = itertools.chain([0], itertools.repeat(1)), Pair(*plain_modules())
    with pytest.raises(CaptureError, match="changes from call to call"):
        record(lambda *args: found(next(calls), *args), (X, X + 1), pair)


def test_a_program_may_do_something_else_where_it_is_recorded():
    graph = record(lambda x: [x.exp() if is_fx_tracing() else x], (X,), Pair(*plain_modules()))
    assert torch.equal(graph(X)[0], X.exp())


class Square(nn.Module):
    """A decoder with as many latents as values."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(16, 16)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(16), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(1), obs=x.flatten(1))


def _square():
    return Square(), MeanField(SHAPE, 16, (8,))


@pytest.mark.parametrize(
    ("move", "fixed", "words"),
    [
        (lambda w: 1.5 * w, False, None),
        (lambda w: 1.5 * w, True, None),
        (lambda w: w.T.contiguous().T, False, "lies elsewhere"),
    ],
    ids=["moved", "moved from a CUDA graph", "of other strides"],
)
def test_a_weight_that_has_moved_is_the_one_that_is_trained(move, fixed, words):
    found = []
    for compile in (False, True):
        _, svi = _losses(_square, Trace_ELBO(), compile, steps=5)
        svi.model.net.weight.data = move(svi.model.net.weight.data)
        for capture in svi.compiled.captures.values() if compile and fixed else ():
            # The recording, which has the old address, is left for what was recorded.
            capture.graph._launched, capture.graph.run = capture.graph.run, None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            losses = [svi.step(X) for _ in range(5)]
        found.append((torch.tensor(losses), svi.model.net.weight.detach()))
    assert [words in str(w.message) for w in caught] == [True] * (words is not None)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def _repeat(svi):
    pyro.set_rng_seed(3)
    return svi.step(X)


def _rows(index):
    noise = torch.randint(-(2**62), 2**62, (len(index), 4))
    return ((X[index].flatten(1) + (noise.view(torch.int16)[:, :16] > 30_000) > 0).float()
            .view(-1, *SHAPE),)  # fmt: skip


@pytest.mark.parametrize(
    ("optimizer", "inside"),
    [
        (lambda p: torch.optim.Adam(p, lr=0.01), True),
        (lambda p: torch.optim.Adam(p, lr=0.01, fused=True, weight_decay=0.1), True),
        (lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True), True),
        (lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3, betas=(0.8, 0.9)), True),
        (lambda p: torch.optim.Adam(p, lr=0.01, eps=0.1, weight_decay=0.3), True),
        (lambda p: torch.optim.RMSprop(p, lr=0.01), True),
        (lambda p: torch.optim.SGD(p, lr=0.001), True),
        (lambda p: torch.optim.SGD(p, 0.001, 0.9, weight_decay=0.1, nesterov=True), True),
        (lambda p: torch.optim.SGD(p, lr=0.001, momentum=0.9, dampening=0.5), True),
        (lambda p: torch.optim.ASGD(p, lr=0.001, lambd=0.1, t0=3, weight_decay=0.1), True),
        (muon, True),
        (lambda p: muon(p, weight_decay=0.3, momentum=0.8), True),
        (lambda p: Combined(torch.optim.SGD(p[:3], 0.001, 0.5), torch.optim.AdamW(p[3:])), True),
        (pyro.optim.SGD({"lr": 0.001, "momentum": 0.9}), True),
        (lambda p: torch.optim.Rprop(p, lr=0.001), False),
        (lambda p: Combined(torch.optim.RMSprop(p[:3]), torch.optim.Adam(p[3:], 0.01)), False),
        (pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.9}), False),
    ],
    ids=[
        "adam", "fused-adam", "amsgrad", "adamw", "decay", "rmsprop", "sgd", "nesterov", "dampened",
        "asgd", "muon", "decayed-muon", "sgd-and-adamw", "pyro-sgd", "rprop", "rmsprop-and-adam",
        "clipped-adam",
    ],
)  # fmt: skip
def test_the_whole_step_is_the_eager_step(optimizer, inside):
    """From rows' numbers to updated weights, clipped, with a learning rate for every step."""
    found = []
    for compile in (True, False):
        pyro.set_rng_seed(3)
        optim = optimizer if callable(optimizer) else copy.deepcopy(optimizer)
        svi = pyrovae.SVI(*_flat(), optim, Trace_ELBO(), clip_norm=5.0, compile=compile)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(20):
                svi.update(torch.arange(step, step + 6) % len(X), load=_rows)
                for group in svi.optimizer.param_groups if inside else ():
                    group["lr"] *= (step + 1) / (step + 2)
        found.append(svi)
        said = [str(each.message) for each in caught]
        assert ["steps eagerly beside" in text for text in said] == [True] * (compile > inside)
    captured = [c for c in found[0].compiled.captures.values() if c is not None]
    assert [c.update is not None for c in captured] == [inside]
    ours, theirs = (svi.pair.state_dict() for svi in found)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-5)
    one, other = (svi.optimizer.state_dict() for svi in found)
    assert one["param_groups"] == other["param_groups"]
    for index, state in other["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(one["state"][index][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "make", [torch.optim.Adam, lambda p: torch.optim.SGD(p, 0.01, momentum=0.9)]
)
def test_moments_of_gradients_that_stay_zero_are_no_subnormal_numbers(make):
    """A CPU takes ten times as long with those; the weights are the optimizer's own."""
    found = []
    for ours in (True, False):
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = make([weight])
        weight.grad = torch.tensor([1.0, 1e-3, 0.0])
        optimizer.step()
        optimizer.state[weight].get("exp_avg_sq", torch.zeros(3))[2] = 1e-39
        update = Update(optimizer, [weight], None)
        for _ in range(1_200):
            weight.grad = torch.zeros(3)
            if ours:
                update.refresh()
                update.record([weight.grad])
            else:
                optimizer.step()
        moments = [v for v in optimizer.state[weight].values() if v.shape == weight.shape]
        small = [(m != 0) & (m.abs() < torch.finfo(m.dtype).tiny) for m in moments]
        found.append((weight.detach(), bool(torch.stack(small).any())))
    (weights, is_slow), (expected, would_be) = found
    assert would_be
    assert not is_slow
    torch.testing.assert_close(weights, expected)


def _one_cycle(optimizer):
    highest = 5 * optimizer.defaults["lr"]
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, 10, pct_start=0.5)


def _decaying(optimizer):
    def decay(step):
        for group in optimizer.param_groups:
            moved = {"weight_decay": 0.5 / (step + 1), "eps": 1e-3 * (step + 1)}
            group.update({name: value for name, value in moved.items() if name in group})
        return 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, decay)


@pytest.mark.parametrize(
    ("optimizer", "schedule", "inside"),
    [
        (lambda p: torch.optim.Adam(p, lr=0.01), _one_cycle, [True]),
        (lambda p: torch.optim.AdamW(p, lr=0.01), _one_cycle, [True]),
        (lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.3), _decaying, [True]),
        (lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3), _decaying, [True]),
        (lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5), _one_cycle, [True, False]),
        (lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True), _one_cycle, [True, False]),
        (lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.5), _one_cycle, [True]),
        (lambda p: torch.optim.SGD(p, lr=1e-4, weight_decay=0.3), _decaying, [True]),
    ],
    ids=["adam", "adamw", "decay", "decoupled", "rmsprop", "amsgrad", "sgd", "decaying-sgd"],
)
def test_a_schedule_moves_a_compiled_steps_options(optimizer, schedule, inside, monkeypatch):
    """They are inputs of the update; where they cannot be, the optimizer comes to step eagerly."""
    monkeypatch.setattr("pyrovae.compiling.step.AGAIN_AFTER", 2)
    found = []
    for compile in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        svi = pyrovae.SVI(*_flat(), optimizer, Trace_ELBO(), compile=compile)
        svi.build(X)
        scheduler, losses = schedule(svi.optimizer), []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(9):
                losses.append(svi.step(X))
                scheduler.step()
        found.append((svi, losses, [str(w.message) for w in caught]))
    (ours, losses, said), (theirs, expected, _) = found
    assert losses == pytest.approx(expected, rel=1e-4)
    for name, value in ours.pair.state_dict().items():
        torch.testing.assert_close(value, theirs.pair.state_dict()[name], rtol=1e-3, atol=1e-4)
    captured = [c for c in ours.compiled.captures.values() if c is not None]
    assert [c.update is not None for c in captured] == inside
    assert captured[-1].calls >= 3
    assert ["of the optimizer's group 0 has changed" in text for text in said] == [True] * (
        len(inside) - 1
    )


def test_a_wrong_update_is_found_by_the_audit(monkeypatch):
    def halved(graph, inputs):
        for node in graph.graph.nodes:
            if "aten.sqrt" in str(node.target):
                node.target = torch.ops.aten.exp.default
        graph.recompile()
        return graph

    monkeypatch.setattr("pyrovae.compiling.graph._compile", halved)
    with pytest.warns(UserWarning, match="the update of a tensor"):
        _, svi = _losses(published_example, Trace_ELBO(), True, steps=3)
    eager, _ = _losses(published_example, Trace_ELBO(), False, steps=4)
    assert svi.step(X) == pytest.approx(eager[-1], rel=0.2)


def test_a_smaller_last_batch_is_not_worth_a_capture():
    svi = _both(published_example, Trace_ELBO(), batches=(X, X[:5]), steps=4)
    assert len(svi.compiled.captures) == 1


def test_auto_compiles_long_runs_alone():
    _, short = _losses(published_example, Trace_ELBO(), "auto", steps=3)
    assert not short.compiled.captures
    svi = pyrovae.SVI(*published_example(), torch.optim.Adam, Trace_ELBO(), steps=2_000)
    svi.step(X)
    svi.step(X)
    assert len(svi.compiled.captures) == 1
    with pytest.raises(ValueError, match="compile='auto'"):
        pyrovae.SVI(*published_example(), torch.optim.Adam, Trace_ELBO(), compile="yes")


def test_gradients_before_the_first_step_are_eager_and_there_is_no_optimizer():
    svi = pyrovae.SVI(*published_example(), torch.optim.Adam, Trace_ELBO(), compile=True)
    with pytest.raises(pyrovae.InputError, match=r"call svi\.build\(x\) first"):
        _ = svi.optimizer
    for _ in range(3):
        svi.gradients(X)
    assert not svi.compiled.captures
    svi.step(X)
    svi.gradients(X)
    assert len(svi.compiled.captures) == 1


def test_an_update_that_cannot_be_recorded_leaves_the_gradients_captured(monkeypatch):
    def refused(update, gradients):
        raise UpdateError("reads a value back")

    monkeypatch.setattr("pyrovae.compiling.update.Update.record", refused)
    eager, _ = _losses(published_example, Trace_ELBO(), False, steps=4)
    with pytest.warns(UserWarning, match="Adam steps eagerly .*: reads a value back"):
        found, svi = _losses(published_example, Trace_ELBO(), True, steps=4)
    assert found == pytest.approx(eager, rel=1e-5)
    assert [capture.update for capture in svi.compiled.captures.values()] == [None]


def test_an_optimizer_of_the_guide_alone_leaves_the_gradients_captured():
    """As it does eagerly, the model stays where it is."""
    found = []
    for compile in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, guide = plain_modules()
        adam = torch.optim.Adam(guide.parameters(), 0.01)
        svi = pyrovae.SVI(model, guide, adam, Trace_ELBO(), compile=compile)
        before = [p.clone() for p in model.parameters()]
        still = pytest.warns(match="no parameter of the model, which stays as it is")
        told = pytest.warns(match="it steps some of the parameters alone")
        with still, told if compile else nullcontext():
            found.append([svi.step(X) for _ in range(5)])
        assert all(map(torch.equal, model.parameters(), before))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert [capture.update for capture in svi.compiled.captures.values()] == [None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bernoullis_loss_is_the_same_without_log1p(dtype):
    logits = torch.tensor([[-200.0, -20.0, -3.0, -1e-4], [0.0, 1e-4, 17.0, 200.0]], dtype=dtype)
    values = torch.tensor([[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]], dtype=dtype)

    def losses(logits, values):
        fn = dist.Bernoulli(logits=logits)
        (slope,) = torch.autograd.grad(fn.log_prob(values).sum(), logits)
        weighted = binary_cross_entropy_with_logits(logits, values, weight=values, reduction="none")
        mean = binary_cross_entropy_with_logits(logits, values)
        return [fn.log_prob(values), slope, weighted, mean]

    logits.requires_grad_()
    found = record(losses, (logits, values), Pair(*shipped_bernoulli()))
    expected = losses(logits, values)
    spelled = without_log1p(found)
    kept = spelled.graph.find_nodes(op="call_function", target=LOSS)
    assert len(kept) == 2
    for one, other in zip(spelled(logits, values), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_no_compiled_step_has_a_bernoullis_log1p(monkeypatch):
    compiled = []

    def kept(graph, inputs):
        compiled.append(graph)
        return graph

    monkeypatch.setattr("pyrovae.compiling.graph._compile", kept)
    expected, _ = _losses(shipped_bernoulli, Trace_ELBO(), False, steps=4)
    found, _ = _losses(shipped_bernoulli, Trace_ELBO(), True, steps=4)
    assert [len(g.graph.find_nodes(op="call_function", target=LOSS)) for g in compiled] == [0]
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_numbers_of_several_sites_are_drawn_at_once_and_are_the_same(dtype):
    def drawn(x):
        one, two, three = (torch.empty(16, n, dtype=dtype).normal_() for n in (1, 5, 2))
        # Five numbers are no blocks; others between two draws come from the same stream.
        few, later = torch.empty(5).normal_(), torch.empty(16).normal_()
        uniform, last = torch.rand(3), [torch.empty(2, 8, n).normal_() for n in (2, 1)]
        return [one + x.mean(), two.mul_(2), three.T, few, later, uniform, *last]

    found = record(drawn, (X,), Pair(*shipped_bernoulli()))
    fewer = drawn_at_once(copy.deepcopy(found))
    normal = [len(g.graph.find_nodes(op="call_function", target=NORMAL)) for g in (found, fewer)]
    assert normal == [7, 4]
    for run in (found, fewer):
        torch.manual_seed(1)
        expected = drawn(X)
        torch.manual_seed(1)
        assert all(map(torch.equal, run(X), expected))


NORMAL = torch.ops.aten.normal_.default
LOSS = torch.ops.aten.binary_cross_entropy_with_logits.default
