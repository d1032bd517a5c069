"""fit(): what it minimizes, what it records, and when it stops."""

import math
from contextlib import nullcontext
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau, StepLR

import pyrovae
from pairs import LATENT, SHAPE, binary, discrete, functions, shipped_bernoulli, shipped_gaussian
from pyrovae._tools import InputError, precision
from pyrovae._tools.precision import matmul_precision
from pyrovae._tools.seeding import subseed
from pyrovae.guides.linear_gaussian import LinearGaussian as ExactGuide
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.bernoulli import Bernoulli
from pyrovae.models.linear_gaussian import LinearGaussian
from pyrovae.training.monitor import Monitor, NonFiniteLoss
from pyrovae.training.schedules import make_schedule

X = binary(40)


def _data(n=40, valid=16):
    return pyrovae.Dataset("x", torch.Size(SHAPE), binary(n), binary(valid, 2), binary(8, 3))


def _weights(result):
    return result.svi.pair.state_dict()


def _same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_bound_reaches_the_maximum_likelihood_on_linear_data():
    pyro.set_rng_seed(1)
    truth = LinearGaussian((6,), 2, scale=0.5)
    x = pyrovae.sample(truth, like=torch.zeros(1, 6), n=500, seed=0)
    best = LinearGaussian((6,), 2).fit_exact(x).log_prob(x).mean().item()
    model, guide = LinearGaussian((6,), 2), ExactGuide((6,), 2)
    result = pyrovae.fit(model, guide, x, epochs=100, batch_size=125, lr=0.03, seed=0)
    found = model.log_prob(x).mean().item()
    assert best - 0.05 < found <= best + 1e-4
    assert abs(result.elbo - found) < 0.1


def test_recorded_terms_add_up_and_match_an_evaluation():
    model, guide = shipped_bernoulli()
    data = _data()
    result = pyrovae.fit(model, guide, data, epochs=3, batch_size=8, seed=0)
    for row in result.history:
        for split in ("train", "valid"):
            parts = row[f"{split}_reconstruction"] - row[f"{split}_kl"]
            assert row[f"{split}_elbo"] == pytest.approx(parts, abs=1e-4)
    many = pyrovae.elbo(model, guide, data.valid, particles=300, seed=5)
    one = result.history[-1]
    spread = 4 * many.elbo.std().item() / math.sqrt(len(data.valid))
    assert abs(one["valid_elbo"] - many.mean) < max(spread, 0.5)


def test_training_bound_is_per_datum_whatever_the_last_batch():
    frozen = partial(torch.optim.SGD, lr=0.0)
    means = []
    for batch_size in (40, 16, 7):
        pair = shipped_bernoulli_seeded()
        result = pyrovae.fit(
            *pair, X, epochs=1, batch_size=batch_size, particles=200, optimizer=frozen, seed=0
        )
        means.append(result.history[0]["train_elbo"])
    expected = pyrovae.elbo(*shipped_bernoulli_seeded(), X, particles=2000, seed=1).mean
    assert means == pytest.approx([expected] * 3, abs=0.1)


@pytest.mark.parametrize("batch_size", [39, 16])
def test_the_scale_of_a_plate_over_all_data_is_that_of_each_batch(batch_size):
    """The last batch of one row counts 40 times, the first hardly more than once."""

    def run(subsampled):
        def plate(x):
            if subsampled:
                return pyro.plate("data", 40, subsample=torch.arange(len(x)))
            return pyro.plate("data", len(x))

        def model(x):
            with plate(x):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        def guide(x):
            loc = pyro.param("loc", torch.zeros(3))
            with plate(x):
                pyro.sample("z", dist.Normal(loc + x, 1.0).to_event(1))

        pyro.clear_param_store()
        frozen = partial(torch.optim.SGD, lr=0.0)
        x = torch.linspace(-1.0, 1.0, 120).reshape(40, 3)
        result = pyrovae.fit(model, guide, x, epochs=1, batch_size=batch_size, optimizer=frozen,
                             seed=0)  # fmt: skip
        return result.history[0]

    found, expected = run(True), run(False)
    for name in ("train_loss", "train_elbo", "train_reconstruction", "train_kl"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)


def shipped_bernoulli_seeded():
    pyro.set_rng_seed(11)
    return shipped_bernoulli()


def test_what_a_training_is_called_in_does_not_stop_it():
    """Under no_grad(), a step of Pyro's computes a loss and moves nothing."""
    results, x = [], X.clone().requires_grad_()
    for around in (nullcontext(), torch.no_grad(), torch.inference_mode()):
        pair = shipped_bernoulli_seeded()
        with around:
            results.append(_weights(pyrovae.fit(*pair, x, epochs=1, batch_size=20, seed=0)))
    assert all(_same(results[0], other) for other in results[1:])
    assert x.grad is None


def test_equal_seeds_train_equally_and_leave_the_global_stream_alone():
    results = []
    for seed in (0, 0, 1):
        pair = shipped_bernoulli_seeded()
        before = torch.get_rng_state()
        results.append(_weights(pyrovae.fit(*pair, X, epochs=2, batch_size=16, seed=seed)))
        assert torch.equal(before, torch.get_rng_state())
    assert _same(results[0], results[1])
    assert not _same(results[0], results[2])


@pytest.mark.parametrize("make", [shipped_bernoulli, shipped_gaussian, functions])
def test_going_on_from_a_state_is_bit_identical(make):
    def start():
        pyro.clear_param_store()
        pyro.set_rng_seed(11)
        return make()

    options = {"batch_size": 16, "seed": 3, "schedule": lambda o: CosineAnnealingLR(o, 6)}
    whole = pyrovae.fit(*start(), _data(), epochs=6, **options)
    half = pyrovae.fit(*start(), _data(), epochs=3, **options).state_dict()
    resumed = pyrovae.fit(*start(), _data(), epochs=6, state=half, **options)
    assert _same(_weights(whole), _weights(resumed))
    plain = [{k: v for k, v in row.items() if k != "seconds"} for row in whole.history]
    assert plain == [{k: v for k, v in row.items() if k != "seconds"} for row in resumed.history]


def test_a_captured_run_resumes_bit_identical(monkeypatch):
    """Every step but the very first is of a graph, the first after a resume as well.

    Graphs run as they were recorded; test_recipe.py resumes one that is compiled.
    """
    monkeypatch.setattr("pyrovae.compiling.graph._compile", lambda graph, inputs: graph)
    options = {"batch_size": 16, "seed": 3, "compile": True}

    def start():
        pyro.set_rng_seed(11)
        return Bernoulli(SHAPE, LATENT, ()), MeanField(SHAPE, LATENT, ())

    whole = pyrovae.fit(*start(), _data(48), epochs=4, **options)
    half = pyrovae.fit(*start(), _data(48), epochs=2, **options).state_dict()
    resumed = pyrovae.fit(*start(), _data(48), epochs=4, state=half, **options)
    assert [c.calls for c in whole.svi.compiled.captures.values()] == [11]
    assert [c.calls for c in resumed.svi.compiled.captures.values()] == [6]
    assert _same(_weights(whole), _weights(resumed))


def test_early_stopping_restores_the_best_weights():
    model, guide = shipped_bernoulli()
    data = _data(16, 16)
    states = {}
    result = pyrovae.fit(
        model, guide, data, epochs=400, batch_size=16, lr=0.05, patience=5, seed=0,
        on_epoch=lambda r: states.update({len(r.history): _weights(r)}),
    )  # fmt: skip
    elbos = [row["valid_elbo"] for row in result.history]
    assert len(elbos) < 400
    assert result.best_epoch == 1 + elbos.index(max(elbos)) == len(elbos) - 5
    assert _same(states[result.best_epoch], _weights(result))
    with pytest.raises(ValueError, match="patience"):
        pyrovae.fit(model, guide, X, epochs=1, batch_size=8, patience=2)


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.Adam,
        partial(torch.optim.RMSprop, lr=1e-3),
        pyro.optim.Adam({"lr": 1e-3}),
        pyro.optim.Adam(lambda name: {"lr": 1e-2 if "decoder" in name else 1e-3}),
        pyro.optim.ClippedAdam({"lr": 1e-3, "clip_norm": 1.0}),
        pyro.optim.Adam({"lr": 1e-3}, {"clip_norm": 1.0}),
    ],
    ids=["torch", "partial", "pyro", "per-name", "clipped", "clip-args"],
)
def test_optimizers_train(optimizer):
    model, guide = shipped_bernoulli()
    result = pyrovae.fit(model, guide, X, optimizer=optimizer, epochs=10, batch_size=8, seed=0)
    assert result.history[-1]["train_elbo"] > result.history[0]["train_elbo"]


def test_one_optimizer_steps_as_pyros_one_per_parameter():
    """Our SVI and Pyro's, side by side on the same noise."""
    pairs = [shipped_bernoulli_seeded() for _ in range(2)]
    options = {"lr": 0.01, "betas": (0.8, 0.99)}
    ours = pyrovae.SVI(*pairs[0], pyro.optim.Adam(options, {"clip_norm": 0.5}), Trace_ELBO())
    theirs = pyro.infer.SVI(*pairs[1], pyro.optim.Adam(options, {"clip_norm": 0.5}), Trace_ELBO())
    for step in range(5):
        losses = []
        for svi in (ours, theirs):
            pyro.set_rng_seed(step)
            losses.append(svi.step(X))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    pyro.set_rng_seed(9)
    expected = theirs.evaluate_loss(X)
    pyro.set_rng_seed(9)
    assert ours.evaluate_loss(X) == pytest.approx(expected, rel=1e-5)


def test_per_parameter_options_reach_their_parameters():
    model, guide = shipped_bernoulli()
    rates = {"decoder": 0.0, "encoder": 0.1}
    optimizer = pyro.optim.Adam(lambda name: {"lr": rates[name.split(".")[0]]})
    before = [p.clone() for p in (*model.parameters(), *guide.parameters())]
    pyrovae.fit(model, guide, X, optimizer=optimizer, epochs=1, batch_size=40, seed=0)
    after = [*model.parameters(), *guide.parameters()]
    still = [torch.equal(p, q) for p, q in zip(before, after, strict=True)]
    assert still == [True] * 4 + [False] * 4


def test_schedules_change_the_rate_each_epoch():
    def rates(**options):
        how = {"epochs": 4, "batch_size": 20, "seed": 0} | options
        return [row["lr"] for row in pyrovae.fit(*shipped_bernoulli(), _data(), **how).history]

    step = rates(lr=1.0e-2, schedule=lambda o: StepLR(o, 2, gamma=0.1))
    assert step == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3])
    plateau = rates(lr=1e-3, schedule=lambda o: ReduceLROnPlateau(o, patience=0, threshold=1.0))
    assert plateau[-1] < plateau[0]
    theirs = pyro.optim.StepLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}, "step_size": 2, "gamma": 0.1}
    )
    assert rates(optimizer=theirs) == pytest.approx(step)


def test_the_gradient_is_clipped_as_a_whole():
    model, guide = shipped_bernoulli()
    optimizer = partial(torch.optim.SGD, lr=1.0)
    before = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
    pyrovae.fit(
        model, guide, X, optimizer=optimizer, clip_norm=0.01, epochs=1, batch_size=40, seed=0
    )
    moved = zip((*model.parameters(), *guide.parameters()), before, strict=True)
    norm = torch.cat([(p.detach() - q).flatten() for p, q in moved]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_losses_of_many_steps_are_few_tensors():
    """Each tensor that stays costs kilobytes of memory that cannot be used beside it."""
    monitor = Monitor(None, None, 1)
    for step in range(250):
        site = ["x"] if step < 130 else ["x", "z"]  # a later batch has another site
        monitor._keep(["loss", *site], torch.full((1, 1 + len(site)), float(step)), 1.0)
    assert len(monitor.values) == 52
    assert monitor.totals() == {"loss": 31125, "x": 31125, "z": sum(range(130, 250))}
    with pytest.raises(NonFiniteLoss, match="epoch 1, step 251"):
        monitor._keep(["loss", "x", "z"], torch.full((1, 3), torch.nan), 1.0)


@pytest.mark.filterwarnings("ignore:No other site of the model depends on latent z")
def test_a_non_finite_loss_stops_with_epoch_step_and_site():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(LATENT))
            self.calls = 0

        def forward(self, x):
            self.calls += self.training
            bad = math.nan if self.calls == 7 else 1.0
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1))
                logits = torch.zeros(len(x), *SHAPE) + bad
                pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)

    for validate in (True, False):
        _, guide = shipped_bernoulli()
        kept = []
        with (
            pyro.validation_enabled(validate),
            pytest.raises(NonFiniteLoss, match=r"epoch 2, step 2: .*'x'") as caught,
        ):
            pyrovae.fit(
                _always_after(Breaks()) if validate else Breaks(), guide, X, epochs=3, batch_size=8,
                seed=0, on_epoch=lambda r, kept=kept: kept.append(len(r.history)),
            )  # fmt: skip
        assert kept == [1]
        assert all(p.isfinite().all() for p in guide.parameters())
        assert "learning rate" in str(caught.value)


def _always_after(model):
    """NaN from the seventh call on, so that a second look finds the site again."""
    forward = type(model).forward

    class Stays(type(model)):
        def forward(self, x):
            self.calls = min(self.calls, 6)
            forward(self, x)

    model.__class__ = Stays
    return model


@pytest.mark.filterwarnings("ignore:No gradient reaches model.norm")
def test_modules_train_in_train_mode_and_are_scored_in_eval_mode():
    seen = []

    class Watched(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.norm = inner, nn.BatchNorm1d(16)

        def forward(self, x):
            seen.append(self.training)
            self.norm(x.flatten(1))
            self.inner(x)

    model, guide = shipped_bernoulli()
    watched = Watched(model)
    pyrovae.fit(watched, guide, _data(), epochs=1, batch_size=20, seed=0)
    count = watched.norm.num_batches_tracked.item()
    assert count == 2
    seen.clear()
    pyrovae.log_likelihood(watched, guide, X, num_samples=10)
    pyrovae.sample(watched, like=X, n=3)
    assert not any(seen)
    assert watched.training
    assert watched.norm.num_batches_tracked.item() == count


class Normalizing(nn.Module):
    """A shipped program behind batch normalization of the data."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.norm = inner, nn.BatchNorm1d(16, affine=False)

    def forward(self, x):
        self.norm(x.flatten(1))
        self.inner(x)


@pytest.mark.parametrize("batch_size", [13, 39, 1])
def test_a_last_batch_of_one_row_is_refused_before_the_epoch_that_batch_norm_would_end(batch_size):
    model, guide = shipped_bernoulli()
    seen = []
    with pytest.raises(InputError, match=r"Of 40 .*: choose another batch_size\.$"):
        pyrovae.fit(
            model, Normalizing(guide), X, epochs=1, batch_size=batch_size, seed=0,
            on_epoch=seen.append,
        )  # fmt: skip
    assert not seen
    normalizing = Normalizing(guide)
    pyrovae.fit(model, normalizing, X, epochs=1, batch_size=20, seed=0)
    pyrovae.fit(model, guide, X, epochs=1, batch_size=batch_size, seed=0)
    assert normalizing.norm.num_batches_tracked.item() == 2


def test_enumeration_trains_with_pyros_own_objective():
    model, guide = discrete()
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    result = pyrovae.fit(
        model, pyro.infer.config_enumerate(guide), X, objective=loss, epochs=30, batch_size=20,
        lr=0.02, seed=0,
    )  # fmt: skip
    assert result.history[-1]["train_elbo"] > result.history[0]["train_elbo"] + 0.5
    first = result.history[0]
    parts = first["train_reconstruction"] - first["train_kl"]
    assert first["train_elbo"] == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch size between 1 and the 40"),
        ({"batch_size": 41}, "batch size between 1 and the 40"),
        ({"epochs": 0}, "epochs >= 1"),
        ({"epochs": 2.0}, r"an integer epochs >= 1, got 2\.0"),
        ({"batch_size": 8.0}, r"batch size between 1 and the 40 .*, got 8\.0"),
        ({"particles": 0}, "particles >= 1"),
        ({"patience": 0}, "patience >= 1"),
        ({"lr": 0.0}, "learning rate > 0"),
        ({"clip_norm": -1.0}, "clip_norm > 0"),
        ({"clip_norm": math.nan}, "clip_norm > 0"),
        ({"objective": "trace_elb"}, "did you mean 'trace_elbo'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_moves(options, words):
    model, guide = shipped_bernoulli()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=words):
        pyrovae.fit(model, guide, _data(), **({"batch_size": 8, "epochs": 1} | options))
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_nan_data_are_refused():
    x = torch.randn(20, *SHAPE)
    x[13, 0, 1, 1] = math.nan
    model, guide = shipped_gaussian()
    for call in (
        lambda: pyrovae.fit(model, guide, x, epochs=1, batch_size=5),
        lambda: pyrovae.log_likelihood(model, guide, x.numpy(), num_samples=2),
        lambda: pyrovae.encode(guide, x),
    ):
        with pytest.raises(ValueError, match=r"1 of 20 .* row 13.*load_data\(x, missing='mask'\)"):
            call()
    data = pyrovae.load_data(x.numpy(), missing="mask")
    fit = pyrovae.fit(model, guide, data, epochs=1, batch_size=5)
    assert math.isfinite(fit.history[0]["train_elbo"])
    found = pyrovae.log_likelihood(model, guide, *data.split("train"), num_samples=2)
    assert found.log_prob.isfinite().all()


def test_a_bound_that_stays_is_no_rise():
    frozen = partial(torch.optim.SGD, lr=0.0)
    result = pyrovae.fit(
        *shipped_bernoulli(), _data(), epochs=9, batch_size=20, optimizer=frozen, patience=2, seed=0
    )
    assert result.best_epoch == 1
    assert len(result.history) == 3


def test_epochs_draw_anew_and_are_validated_alike():
    frozen = partial(torch.optim.SGD, lr=0.0)
    one, two = pyrovae.fit(
        *shipped_bernoulli(), _data(), epochs=2, batch_size=20, optimizer=frozen, seed=0
    ).history
    assert one["train_loss"] != two["train_loss"]
    assert one["valid_elbo"] == two["valid_elbo"]


def test_a_non_finite_loss_is_not_stepped_on():
    model, guide = shipped_bernoulli()
    thrown = partial(torch.optim.SGD, lr=1e30)
    with pyro.validation_enabled(False), pytest.raises(NonFiniteLoss, match="epoch 1, step 2"):
        pyrovae.fit(model, guide, X, epochs=1, batch_size=8, optimizer=thrown, seed=0)
    assert all(p.isfinite().all() for p in (*model.parameters(), *guide.parameters()))


@pytest.mark.parametrize("objective", ["trace_elbo", "trace_mean_field_elbo"])
def test_validation_is_by_the_estimator_of_the_objective(objective):
    pair, data = shipped_bernoulli(), _data()
    result = pyrovae.fit(*pair, data, objective=objective, epochs=1, batch_size=20, seed=3)
    found = pyrovae.elbo(*pair, data.valid, objective=objective, seed=subseed(3, 0))
    row = result.history[0]
    assert row["valid_elbo"] == pytest.approx(found.mean)
    assert row["valid_kl"] == pytest.approx(found.kl.double().mean().item())


def test_a_rate_on_a_plateau_stays_while_the_bound_rises():
    history = pyrovae.fit(
        *shipped_bernoulli_seeded(), _data(), epochs=4, batch_size=20, lr=1e-3, seed=0,
        schedule=lambda o: ReduceLROnPlateau(o, patience=0, threshold=0.0),
    ).history  # fmt: skip
    elbos = [row["valid_elbo"] for row in history]
    assert elbos == sorted(elbos)
    assert [row["lr"] for row in history] == [1e-3] * 4


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA device here"):
        pyrovae.fit(*shipped_bernoulli(), X, epochs=1, batch_size=8, device="cuda:0")


@pytest.mark.parametrize("loss", [90.0, -29.0])
def test_the_plateau_of_a_density_is_one_too(loss):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = make_schedule("plateau", optimizer, 30, 0)
    rates = []
    for epoch in range(12):
        optimizer.step()
        schedule.step(loss + 1e-4 * epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [1.0] * 11 + [0.5]


@pytest.mark.parametrize(
    ("loss", "known"),
    [(TraceGraph_ELBO(), True), (type("Own", (TraceGraph_ELBO,), {})(), False)],
    ids=["Pyro's", "somebody's"],
)
def test_the_history_has_an_elbo_where_the_loss_is_one(loss, known):
    """A loss without terms is minus the ELBO if Pyro wrote it; a subclass may be anything."""
    result = pyrovae.fit(*shipped_bernoulli(), X, objective=loss, epochs=1, batch_size=8, seed=0)
    row = result.history[0]
    assert row["train_elbo"] == (-row["train_loss"] if known else None)
    assert row["train_kl"] is None


def test_a_fit_begins_without_gradients_that_somebody_left():
    """As where a part of the pair was trained before."""
    found = []
    for left in (False, True):
        pyro.set_rng_seed(0)
        pair = shipped_bernoulli()
        if left:
            pair[0](X)
            sum(p.sum() for p in pair[0].parameters()).backward()
        pyrovae.fit(*pair, X, epochs=1, batch_size=len(X), seed=0)
        found.append([p.detach().clone() for p in pair[0].parameters()])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("still", ["model", "guide"])
def test_an_optimizer_that_steps_nothing_of_a_program_is_told(still):
    model, guide = shipped_bernoulli()
    stepped = guide if still == "model" else model
    with pytest.warns(UserWarning, match=f"no parameter of the {still}, which stays as it is"):
        pyrovae.fit(model, guide, X, epochs=1, optimizer=torch.optim.Adam(stepped.parameters()))


def test_a_precision_that_changes_nothing_is_told(monkeypatch):
    for told, rounds in ((True, False), (False, True)):
        monkeypatch.setattr(precision, "rounds", lambda *_, rounds=rounds: rounds)
        with pytest.warns(UserWarning, match="bf16' changes nothing") if told else nullcontext():
            pyrovae.fit(*shipped_bernoulli(), X, epochs=1, precision="bf16", seed=0)


@pytest.mark.parametrize("where", ["matmul", "conv"])
def test_torchs_newer_settings_of_the_precision_are_read_and_given_back(where):
    """torch.get_float32_matmul_precision() raises where they say what it has no word for."""
    found = {"matmul": torch.backends.cuda.matmul, "conv": torch.backends.cudnn.conv}
    setting, value = found[where], {"matmul": "tf32", "conv": "ieee"}[where]
    before = setting.fp32_precision
    try:
        setting.fp32_precision = value
        settings = precision.precision_settings()
        pyrovae.fit(*shipped_bernoulli(), X, epochs=1, compile=True, seed=0)
        assert precision.precision_settings() == settings
    finally:
        setting.fp32_precision = before
        assert torch.backends.cudnn.allow_tf32 in (True, False)


def test_precision_is_given_back_and_named():
    before = torch.get_float32_matmul_precision()
    convolves = torch.backends.cudnn.allow_tf32
    with matmul_precision("bf16"):
        assert torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "medium"
        with matmul_precision("float32"):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before
    assert torch.backends.cudnn.allow_tf32 == convolves
    with pytest.raises(ValueError, match="did you mean 'bf16'"), matmul_precision("bf61"):
        pass


@pytest.mark.parametrize("out", [False, True])
def test_weights_that_are_no_numbers_end_a_training_whose_losses_are(out, tmp_path):
    """The density of a very narrow normal is finite, and torch's gradient of it is none."""
    model, guide = shipped_bernoulli()
    last = guide.encoder.layers[-1]
    with torch.no_grad():
        last.bias.reshape(2, -1)[1].fill_(-46.0)
        last.weight.zero_()
    folder = tmp_path / "run" if out else None
    with pytest.raises(NonFiniteLoss, match=r"epoch 1: the parameter '.*' is not finite, though"):
        pyrovae.fit(model, guide, X, epochs=1, batch_size=len(X), seed=0, out=folder)


@pytest.mark.parametrize("beaten", [True, False])
def test_a_run_that_goes_on_without_patience_keeps_its_last_weights(beaten):
    states, data = [], _data()
    options = {"batch_size": 20, "seed": 0, "progress": False}
    model, guide = shipped_bernoulli()
    pyrovae.fit(
        model, guide, data, epochs=3, patience=2, **options,
        on_epoch=lambda fit: states.append(fit.state_dict()),
    )  # fmt: skip
    assert states[-1]["best_state"] is not None
    if not beaten:
        states[-1]["history"][states[-1]["best_epoch"] - 1]["valid_elbo"] = 0.0
    result = pyrovae.fit(*shipped_bernoulli(), data, epochs=6, state=states[-1], **options)
    valid = result.validate((data.valid,))["valid_elbo"]
    assert valid == pytest.approx(result.history[-1]["valid_elbo"])
    assert (result.best_epoch > 3) == beaten
    assert (result.state_dict()["best_state"] is None) == beaten
