"""What long trainings are made of: averaged weights, schedules, normalized gradients, gates."""

import copy
import math
from contextlib import nullcontext
from functools import partial

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from schedulefree import AdamWScheduleFree as ScheduleFree
from torch import nn
from torch.optim.lr_scheduler import StepLR

import pyrovae
from pairs import LATENT, SHAPE, binary, functions, shipped_bernoulli
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.bernoulli import Bernoulli
from pyrovae.nn import MLP
from pyrovae.objectives import make_objective
from pyrovae.optim import Combined, muon
from pyrovae.pairs.pair import Pair
from pyrovae.training.schedules import make_schedule


def _data(rows=48):
    return pyrovae.Dataset("x", torch.Size(SHAPE), binary(rows), binary(16, 2), binary(8, 3))


def _flat():
    """A pair without hidden layers: half as much to compile."""
    return Bernoulli(SHAPE, LATENT, ()), MeanField(SHAPE, LATENT, ())


def _gated():
    options = {"latent": LATENT, "hidden": (8, 8), "activation": "GLU"}
    return Bernoulli(SHAPE, **options), MeanField(SHAPE, **options)


def _fit(make=shipped_bernoulli, data=None, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(11)
    options = {"batch_size": 16, "seed": 3, "compile": False, "progress": False} | options
    return pyrovae.fit(*make(), _data() if data is None else data, **options)


def _with_states(**options):
    """A training, and what a checkpoint after each of its epochs holds."""
    states = []
    return _fit(on_epoch=lambda r: states.append(copy.deepcopy(r.state_dict())), **options), states


def _weights(result):
    return result.svi.pair.state_dict()


def _same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def _history(result):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in result.history]


def _recorded(patch):
    """Run the record itself, not what Inductor makes of it."""
    patch.setattr("pyrovae.compiling.graph._compile", lambda graph, inputs: graph)


EVERYTHING = {"average": 0.9, "schedule": "cosine", "lr_warm_up": 2, "normalize_gradients": True}
OPTIONS = {
    "average": {"average": 0.9},
    "cosine": {"schedule": "cosine", "lr_warm_up": 1},
    "iwae": {"schedule": "iwae"},
    "plateau": {"schedule": "plateau", "valid_samples": 5},
    "torch": {"schedule": partial(StepLR, step_size=2), "average": 0.5},
    "normalized": {"normalize_gradients": True},
    "kl": {"objective": "warm_up_elbo", "average": 0.9},
    "stopped": {"patience": 2, "valid_samples": 5, "average": 0.9, "lr": 0.2, "epochs": 6},
    "everything": EVERYTHING | {"objective": "warm_up_elbo", "make": _gated},
    "functions": {"average": 0.9, "make": functions},
    "batch statistics": {"average": 0.9, "make": lambda: _normed()},
}
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=1e-3),
    "momentum": partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    "asgd": partial(torch.optim.ASGD, lr=1e-3, lambd=0.1, t0=2),
    "muon": partial(muon, lr=0.01),
    "schedule-free": partial(ScheduleFree, lr=0.01),
    "parts": lambda p: Combined(ScheduleFree(p[:2], lr=0.01), torch.optim.Adam(p[2:])),
}


def _options(name):
    options = dict(OPTIONS[name])
    if options.get("objective"):
        options["objective"] = make_objective(options["objective"], warm_up=9)
    return options


def test_a_state_that_goes_on_otherwise_than_asked_says_so():
    half = _fit(epochs=2, lr=3e-3).state_dict()
    with pytest.warns(match="lr=0.001 is not used: the state goes on from lr=0.003"):
        resumed = _fit(epochs=3, state=half)
    assert resumed.history[-1]["lr"] == 3e-3
    assert resumed.state_dict()["asked"] == {"lr": 3e-3, "epochs": 3}
    done = _fit(epochs=2, schedule="cosine").state_dict()
    with pytest.warns(match="of 2 epochs goes on as one of 4: the learning rate jumps from 0 to 0"):
        _fit(epochs=4, schedule="cosine", state=done)
    rise = _fit(epochs=3, schedule="none", lr_warm_up=2).state_dict()
    _fit(epochs=4, schedule="none", lr_warm_up=2, state=rise)  # the same rates, and no word


@pytest.mark.parametrize("name", OPTIONS)
def test_each_of_them_resumes_bit_identical(name):
    options = {"epochs": 4} | _options(name)
    whole, states = _with_states(**options)
    for state in (states[0], states[2]):
        resumed = _fit(state=state, **_options(name) | {"epochs": options["epochs"]})
        assert _same(_weights(whole), _weights(resumed))
        assert _history(whole) == _history(resumed)


def test_looking_at_a_checkpoint_changes_nothing():
    plain = _fit(epochs=3, **_options("everything"))
    looked = _fit(epochs=3, on_epoch=lambda r: r.state_dict(), **_options("everything"))
    assert _same(_weights(plain), _weights(looked))


@pytest.mark.parametrize("name", ["average", "normalized", "everything"])
def test_a_compiled_step_is_the_eager_one(name, monkeypatch):
    _recorded(monkeypatch)
    options = {"epochs": 4, "make": _flat}
    eager, captured = (_fit(**options | _options(name), compile=how) for how in (False, True))
    (capture,) = captured.svi.compiled.captures.values()
    assert capture.calls == 11
    assert capture.update is not None
    for name, value in _weights(eager).items():
        torch.testing.assert_close(_weights(captured)[name], value, rtol=1e-4, atol=1e-5)
    raw = eager.state_dict()["weights"]
    for name, value in captured.state_dict()["weights"].items():
        torch.testing.assert_close(value, raw[name], rtol=1e-4, atol=1e-5)


def test_a_compiled_run_with_everything_resumes_bit_identical():
    options = {"compile": True, "make": _flat, **EVERYTHING}
    warm = partial(make_objective, "warm_up_elbo", warm_up=7)
    whole, states = _with_states(epochs=4, objective=warm(), **options)
    resumed = _fit(epochs=4, objective=warm(), state=states[1], **options)
    assert [c.calls for c in whole.svi.compiled.captures.values()] == [11]
    assert [c.calls for c in resumed.svi.compiled.captures.values()] == [6]
    assert _same(_weights(whole), _weights(resumed))
    assert _same(whole.state_dict()["weights"], resumed.state_dict()["weights"])


@pytest.mark.parametrize(
    ("name", "compile"),
    [*((name, False) for name in OPTIMIZERS), ("sgd", True), ("muon", True), ("parts", True)],
)
def test_each_optimizer_resumes_bit_identical(name, compile, monkeypatch):
    _recorded(monkeypatch)
    options = {"optimizer": OPTIMIZERS[name], "epochs": 3, "compile": compile, "schedule": "cosine"}
    options["make"] = _flat
    free, states = compile and name == "parts", []
    with pytest.warns(match="steps eagerly") if free else nullcontext():
        whole = _fit(on_epoch=lambda r: states.append(copy.deepcopy(r.state_dict())), **options)
        resumed = _fit(state=states[0], **options)
    assert _same(_weights(whole), _weights(resumed))
    assert _history(whole) == _history(resumed)
    if compile:
        (capture,) = whole.svi.compiled.captures.values()
        assert (capture.update is None) == free


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")
def test_a_run_resumes_where_a_layer_was_replaced_or_thawed_in_it():
    def pair():
        model, guide = shipped_bernoulli()
        model.decoder.layers[0].weight.requires_grad_(False)
        return model, guide

    def change(result):
        if len(result.history) == 1:
            result.model.decoder.layers[0].weight.requires_grad_(True)
            layers = result.guide.encoder.layers
            layers[0] = copy.deepcopy(layers[0])
        states.append(copy.deepcopy(result.state_dict()))

    states = []
    options = {"epochs": 4, "lr": 0.01}
    whole = _fit(pair, on_epoch=change, **options)
    assert _same(_weights(whole), _weights(_fit(state=states[2], **options)))
    with pytest.raises(ValueError, match=r"has \['model.decoder.layers.0.weight'\] beside them"):
        _fit(pair, state=states[2], **options)


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")
@pytest.mark.parametrize("compile", [False, True])
def test_what_was_frozen_in_a_run_stays_frozen_when_it_resumes(compile, monkeypatch):
    _recorded(monkeypatch)

    def freeze(result):
        if len(result.history) == 2:
            result.guide.encoder.requires_grad_(False)
        states.append(copy.deepcopy(result.state_dict()))

    states, options = [], {"epochs": 4, "lr": 0.01, "compile": compile}
    with pytest.warns(match="compiled anew after 500 steps") if compile else nullcontext():
        whole = _fit(on_epoch=freeze, **options)
    resumed = _weights(_fit(state=states[1], **options))
    # The whole run steps eagerly at first in its new state, the resumed one is compiled for it.
    slack = {"rtol": 1e-5, "atol": 1e-6} if compile else {"rtol": 0, "atol": 0}
    for name, weight in _weights(whole).items():
        torch.testing.assert_close(resumed[name], weight, **slack)
    assert states[1]["weights"]["guide.encoder.layers.0.weight"].equal(
        whole.guide.encoder.layers[0].weight
    )


def test_a_schedule_free_optimizer_is_told_when_its_weights_are_evaluated():
    seen = []

    def look(result):
        group = result.svi.optimizer.param_groups[0]
        seen.append((group["train_mode"], result.elbo, result.validate((_data().valid,))))

    result = _fit(epochs=3, optimizer=partial(ScheduleFree, lr=0.01), on_epoch=look)
    assert [(mode, found["valid_elbo"]) for mode, _, found in seen] == [
        (False, elbo) for _, elbo, _ in seen
    ]
    svi, averaged = result.svi, _weights(result)
    svi.step(binary(16))
    assert svi.optimizer.param_groups[0]["train_mode"]
    moved = _weights(result)
    svi.trained.show_average()
    # y = (1 - β) z + β x, of which the step moves y and z.
    for name, leaf in svi.trained.named.items():
        y, x, z = moved[name], _weights(result)[name], svi.optimizer.state[leaf]["z"]
        torch.testing.assert_close(y, 0.1 * z + 0.9 * x, rtol=1e-4, atol=1e-6)
        assert not torch.equal(x, averaged[name])
    for options in (
        {"average": 0.9, "optimizer": ScheduleFree},
        {"optimizer": pyro.optim.PyroOptim(ScheduleFree, {"lr": 0.01})},
    ):
        with pytest.raises(pyrovae.InputError, match="AdamWScheduleFree keeps averaged weights"):
            _fit(epochs=1, **options)


class Counting(torch.optim.Optimizer):
    """An optimizer whose state has a number beside tensors, and not the same of each leaf."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        with torch.no_grad():
            for leaf in self.param_groups[0]["params"]:
                state = self.state[leaf]
                state["step"] = state.get("step", 0) + 1
                if leaf.dim() > 1:
                    state["last"] = leaf.grad.clone()
                leaf.sub_(self.param_groups[0]["lr"] / state["step"] * leaf.grad.sign())


@pytest.mark.parametrize("optimizer", [partial(muon, lr=1e-3), partial(Counting, lr=1e-3)])
def test_a_run_of_any_optimizer_is_opened_and_goes_on(optimizer, tmp_path):
    how = {"optimizer": optimizer, "compile": False, "seed": 0}
    pair, x = shipped_bernoulli(), binary(32)
    state = {name: value.clone() for name, value in Pair(*pair).state_dict().items()}
    whole = pyrovae.fit(*pair, x, epochs=3, **how)
    Pair(*pair).load_state_dict(state)
    pyrovae.fit(*pair, x, epochs=2, out=tmp_path / "run", **how)
    found = pyrovae.load(tmp_path / "run").state
    resumed = pyrovae.fit(*pair, x, epochs=3, out=tmp_path / "run", state=found, **how)
    assert [r["train_loss"] for r in resumed.history] == [r["train_loss"] for r in whole.history]


def test_muon_steps_matrices_alone_and_says_so():
    with pytest.raises(pyrovae.InputError, match=r"optimizer=pyrovae\.optim\.muon"):
        _fit(epochs=1, optimizer=torch.optim.Muon)
    before = _weights(_fit(epochs=1, lr=1e-12))
    result = _fit(epochs=1, data=binary(16), optimizer=partial(muon, lr=0.01))
    matrices, rest = result.svi.optimizer.parts
    assert {leaf.dim() for leaf in matrices.param_groups[0]["params"]} == {2}
    assert {leaf.dim() for leaf in rest.param_groups[0]["params"]} == {1}
    # Adam's first step moves an entry by the rate, Muon's by a fifth of it, whatever the gradient.
    for name, value in _weights(result).items():
        moved = (value - before[name]).square().mean().sqrt().item()
        assert moved == pytest.approx(0.01 if value.dim() < 2 else 0.002, rel=0.5)
    with pytest.raises(pyrovae.InputError, match="a matrix for Muon"):
        muon([nn.Parameter(torch.zeros(3))])
    with pytest.raises(pyrovae.InputError, match="got none"):
        Combined()


def test_the_average_is_that_of_the_weights_after_each_step():
    pyro.set_rng_seed(11)
    pair, x = shipped_bernoulli(), binary(16)
    svi = pyrovae.SVI(*pair, partial(torch.optim.Adam, lr=0.01), pyro.infer.Trace_ELBO(),
                      average=0.8)  # fmt: skip
    svi.build(x)
    expected = svi.pair.state_dict()
    for step in range(1, 60):
        svi.step(x)
        weights, decay = svi.pair.state_dict(), min(0.8, step / (step + 9))
        expected = {n: decay * v + (1 - decay) * weights[n] for n, v in expected.items()}
    svi.trained.show_average()
    for name, value in svi.pair.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    svi.trained.average.show(False)
    assert _same(svi.pair.state_dict(), weights)


def test_what_is_validated_kept_and_returned_is_the_average():
    seen = []
    result = _fit(epochs=3, average=0.9, on_epoch=lambda r: seen.append(_weights(r)))
    plain = _fit(epochs=3)
    assert _same(seen[-1], _weights(result))
    state = result.state_dict()
    assert _same(state["average"], _weights(result))
    assert _same(state["weights"], _weights(plain))
    assert not _same(state["average"], state["weights"])
    assert result.history[-1]["train_elbo"] == plain.history[-1]["train_elbo"]
    assert result.elbo == result.validate((_data().valid,))["valid_elbo"] != plain.elbo


def test_early_stopping_is_by_the_bound_of_several_samples():
    states = {}
    result = _fit(
        epochs=60, lr=0.05, patience=3, valid_samples=20,
        on_epoch=lambda r: states.update({len(r.history): _weights(r)}),
    )  # fmt: skip
    bounds = [row["valid_bound"] for row in result.history]
    assert len(bounds) < 60
    assert result.best_epoch == 1 + bounds.index(max(bounds)) == len(bounds) - 3
    assert all(row["valid_bound"] > row["valid_elbo"] - 0.2 for row in result.history)
    assert _same(states[result.best_epoch], _weights(result))


def test_a_normalized_gradient_has_length_one_for_each_parameter():
    options = {"optimizer": partial(torch.optim.SGD, lr=0.1), "data": binary(16)}
    pyro.set_rng_seed(11)
    before = pyrovae.SVI(*shipped_bernoulli(), torch.optim.Adam, pyro.infer.Trace_ELBO()).pair
    after = _weights(_fit(epochs=1, normalize_gradients=True, **options))
    for name, value in before.state_dict().items():
        assert (after[name] - value).norm().item() == pytest.approx(0.1, rel=1e-4)
    with pytest.raises(ValueError, match="clip_norm or normalize_gradients"):
        _fit(epochs=1, normalize_gradients=True, clip_norm=1.0, **options)


def test_gradients_of_svi_are_normalized_for_an_optimizer_of_pyros_and_of_torchs():
    """The same step by either, and Adam's ε shows that its gradient was g / (‖g‖ + 1e-7)."""
    options, found = {"lr": 0.1, "eps": 0.1}, []
    for optim in (pyro.optim.Adam(options), partial(torch.optim.Adam, **options)):
        pyro.clear_param_store()
        pyro.set_rng_seed(11)
        svi = pyrovae.SVI(*shipped_bernoulli(), optim, Trace_ELBO(), normalize_gradients=True)
        svi.gradients(binary(16))
        gradients = {name: leaf.grad.clone() for name, leaf in svi.pair.named().items()}
        before = svi.pair.state_dict()
        svi.trained.collect()
        svi.apply_gradients()
        found.append(svi.pair.state_dict())
    assert _same(*found)
    for name, gradient in gradients.items():
        g = gradient / (gradient.norm() + 1e-7)
        expected = before[name] - 0.1 * g / (g.abs() + 0.1)
        torch.testing.assert_close(found[0][name], expected, rtol=1e-4, atol=1e-6)


def _rates(schedule, epochs, warm_up=0):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    made = make_schedule(schedule, optimizer, epochs, warm_up)
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    return rates


def test_the_ladder_has_three_times_as_many_passes_at_each_stage():
    rates = _rates("iwae", 3280)
    stages = [round(-7 * math.log10(rate)) for rate in rates]
    assert stages == [stage for stage in range(8) for _ in range(3**stage)]
    assert rates[0] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    # Shorter trainings have the same shares of them.
    assert [round(-7 * math.log10(rate)) for rate in _rates("iwae", 82)].count(7) == 54


def test_a_warm_up_goes_before_a_named_schedule():
    rates = _rates("cosine", 6, warm_up=2)
    cosine = [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    assert rates == pytest.approx([1 / 3, 2 / 3, *cosine])
    assert _rates("none", 4, warm_up=1) == pytest.approx([0.5, 1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"schedule": "cosine", "lr_warm_up": 2}, "lr_warm_up < 2 epochs"),
        ({"schedule": "plateau", "lr_warm_up": 1}, "no lr_warm_up with"),
        ({"average": 1.0}, "0 < average < 1"),
        ({"valid_samples": 0}, "valid_samples >= 1"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        _fit(epochs=2, **options)


def test_a_gated_layer_is_h_times_the_sigmoid_of_g():
    pyro.set_rng_seed(0)
    net = MLP(5, 3, (4, 6), gated=True)
    x = h = torch.randn(2, 7, 5)
    for layer in (net.layers[0], net.layers[2]):
        signal, gate = layer(h).chunk(2, -1)
        h = signal * gate.sigmoid()
    assert h.shape[-1] == 6
    torch.testing.assert_close(net(x), net.last(h))
    assert MLP(5, 3, (), gated=True).last.weight.shape == (3, 5)


def test_a_residual_block_adds_what_two_layers_make():
    pyro.set_rng_seed(0)
    net = MLP(5, 3, (4, 6), "Tanh", blocks=2)
    x = h = torch.randn(2, 7, 5)
    layers = iter(net.layers[:-1])
    for width in (4, 6):
        h = next(layers)(h)
        h = next(layers)(h)
        assert h.shape[-1] == width
        for _ in range(2):
            first, bend, second = next(layers).layers
            assert isinstance(bend, nn.Tanh)
            h = h + second(first(h).tanh())
    torch.testing.assert_close(net(x), net.last(h))
    assert MLP(5, 3, (4,), gated=True, blocks=1)(x).shape == (2, 7, 3)


class _Normed(Bernoulli):
    def __init__(self):
        super().__init__(SHAPE, latent=LATENT)
        self.decoder = MLP(LATENT, SHAPE, (8,), "Tanh", blocks=1, batch_norm=True)


class _NormedGuide(MeanField):
    def __init__(self):
        super().__init__(SHAPE, latent=LATENT)
        self.encoder = MLP(SHAPE, (2, LATENT), (8,), "Tanh", batch_norm=True)


def _normed():
    return _Normed(), _NormedGuide()


def test_batch_normalization_is_of_all_particles_in_training_and_of_none_in_evaluation():
    pyro.set_rng_seed(0)
    net, x = MLP(5, 3, (4,), "Tanh", batch_norm=True), torch.randn(6, 7, 5)
    linear, norm, _, last = net.layers
    assert linear.bias is None
    h = linear(x)
    mean, var = h.mean((0, 1)), h.var((0, 1), unbiased=False)
    torch.testing.assert_close(net(x), last(((h - mean) / (var + norm.eps).sqrt()).tanh()))
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    net.eval()
    torch.testing.assert_close(net(x)[2, 3:4], net(x[2, 3:4]))
    # Through fit and the estimates: a datum's numbers do not depend on the others.
    result = _fit(_normed, epochs=3, particles=3, lr=0.01)
    pair, x = (result.model, result.guide), binary(16, 2)
    every, half = (pyrovae.encode(result.guide, x[:n])["z"] for n in (16, 8))
    torch.testing.assert_close(every[:8], half)
    norms = [m for m in result.svi.pair.modules if isinstance(m, nn.BatchNorm1d)]
    assert len(norms) == 3
    before = [m.running_mean.clone() for m in norms]
    beside = torch.cat([x[:8], 1 - x[8:]])
    ll = [pyrovae.log_likelihood(*pair, y, num_samples=9, seed=0).log_prob for y in (x, beside)]
    torch.testing.assert_close(ll[0][:8], ll[1][:8])
    assert all(map(torch.equal, before, [m.running_mean for m in norms]))
    assert {int(m.num_batches_tracked) for m in norms} == {9}


def test_a_compiled_step_with_batch_normalization_is_the_eager_one(monkeypatch):
    _recorded(monkeypatch)
    options = {"epochs": 2, "particles": 2, "average": 0.9}
    eager, captured = (_fit(_normed, compile=c, **options) for c in (False, True))
    (capture,) = captured.svi.compiled.captures.values()
    assert capture.update is not None
    for each in ("weights", "average"):
        ours, theirs = (result.state_dict()[each] for result in (captured, eager))
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)


class _NormedPrior(Bernoulli):
    def __init__(self):
        super().__init__(SHAPE, latent=LATENT)
        self.norm = pyro.distributions.transforms.BatchNorm(LATENT)

    def forward(self, x):
        base = pyro.distributions.Normal(self.zero, 1.0).to_event(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro.distributions.TransformedDistribution(base, [self.norm]))
            logits = self.decoder(z)
            pyro.sample("x", pyro.distributions.Bernoulli(logits=logits).to_event(3), obs=x)


@pytest.mark.parametrize(
    ("make", "kind", "statistic"),
    [
        (_normed, nn.BatchNorm1d, "running_var"),
        (lambda: (_NormedPrior(), MeanField(SHAPE, latent=LATENT)),
         pyro.distributions.transforms.BatchNorm, "moving_variance"),
    ],
    ids=["torch", "pyro"],
)  # fmt: skip
def test_statistics_of_batches_are_averaged_with_the_weights(make, kind, statistic):
    """As AveragedModel(use_buffers=True) has it: the last ones belong to the last weights."""
    svi = pyrovae.SVI(*make(), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), average=0.9)
    svi.build(x := binary(16))
    norms = [m for m in svi.pair.modules if isinstance(m, kind)]
    expected = [getattr(m, statistic).clone() for m in norms]
    for step in range(1, 5):
        svi.step(x)
        last = [getattr(m, statistic).clone() for m in norms]
        decay = min(0.9, step / (step + 9))
        expected = [decay * e + (1 - decay) * v for e, v in zip(expected, last, strict=True)]
    svi.trained.show_average()
    for norm, average, value in zip(norms, expected, last, strict=True):
        torch.testing.assert_close(getattr(norm, statistic), average)
        assert not torch.allclose(average, value)
    svi.trained.begin(4)
    assert all(map(torch.equal, last, [getattr(m, statistic) for m in norms]))


def test_a_state_is_the_same_after_a_run_went_on_from_it():
    options = {"epochs": 4, "lr": 0.01, "average": 0.9}
    state = _fit(shipped_bernoulli, **options | {"epochs": 2}).state_dict()
    once, again = (_fit(shipped_bernoulli, state=state, **options) for _ in range(2))
    assert _same(_weights(once), _weights(again))
