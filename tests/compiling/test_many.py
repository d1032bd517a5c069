"""Compiled steps taken at once are the steps taken one by one."""

import pyro
import pytest
import torch

import pyrovae
from pairs import LATENT, SHAPE, binary
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.bernoulli import Bernoulli
from pyrovae.objectives.beta import BetaELBO
from pyrovae.training.monitor import NonFiniteLoss

X = torch.cat([binary()] * 7)
HIDDEN = ()


@pytest.fixture(autouse=True)
def _recorded(monkeypatch):
    """Run the record itself, which takes no compiler."""
    monkeypatch.setattr("pyrovae.compiling.graph._compile", lambda graph, inputs: graph)


@pytest.fixture
def taken(monkeypatch):
    """How many steps were taken at once, each time."""
    found, many = [], pyrovae.SVI.update_many

    def count(self, *args):
        steps = many(self, *args)
        found.append(0 if steps is None else len(steps.numbers))
        return steps

    monkeypatch.setattr(pyrovae.SVI, "update_many", count)
    return found


def _fit(data=X, *, model=Bernoulli, epochs=3, batch_size=8, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pair = model(SHAPE, LATENT, HIDDEN), MeanField(SHAPE, LATENT, HIDDEN)
    options = {"objective": "trace_mean_field_elbo", "compile": True} | options
    return pyrovae.fit(*pair, data, epochs=epochs, batch_size=batch_size, seed=0, **options)


def _states(fit):
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in fit.history]
    return history, fit.svi.pair.state_dict()


def _assert_equal(one, other):
    assert one[0] == other[0]
    for name, value in one[1].items():
        assert torch.equal(value, other[1][name]), name


@pytest.mark.parametrize(
    "options",
    [
        lambda: {"objective": BetaELBO(warm_up=11), "average": 0.9, "schedule": "cosine"},
        lambda: {"optimizer": torch.optim.RMSprop, "clip_norm": 1.0, "batch_size": 10},
        lambda: {"model": Counting, "optimizer": pyro.optim.Adam({"lr": 1e-2})},
    ],
    ids=["warm-up", "rmsprop", "assigns"],
)
def test_steps_at_once_are_the_steps_one_by_one(options, taken, monkeypatch):
    at_once = _states(_fit(**options()))
    assert max(taken) >= 7
    monkeypatch.setattr(pyrovae.SVI, "update_many", lambda *args: None)
    _assert_equal(at_once, _states(_fit(**options())))


class Counting(Bernoulli):
    """A model that assigns a tensor at each step, which the next one reads."""

    def __init__(self, *args):
        super().__init__(*args)
        self.steps = torch.zeros(())

    def forward(self, x, mask=True):
        self.steps = self.steps + 1
        with pyro.poutine.scale(scale=1 / self.steps):
            super().forward(x, mask)


def test_a_training_at_once_resumes_byte_for_byte(taken):
    whole = _states(_fit())
    first = _fit(epochs=2)
    again = _fit(state=first.state_dict())
    assert max(taken) >= 7
    _assert_equal(whole, _states(again))


def test_audits_come_at_the_same_steps(taken, monkeypatch):
    def audited(fit):
        (capture,) = (c for c in fit.svi.compiled.captures.values() if c)
        return capture.calls, capture.sound

    at_once = audited(_fit(epochs=3))
    assert max(taken) >= 7
    monkeypatch.setattr(pyrovae.SVI, "update_many", lambda *args: None)
    assert audited(_fit(epochs=3)) == at_once


def test_what_a_callback_changes_is_seen_in_the_next_step(taken):
    def change(fit):
        fit.model.factor = 1.0 + len(fit.history)

    class Scaled(Bernoulli):
        factor = 1.0

        def forward(self, x, mask=True):
            with pyro.poutine.scale(scale=self.factor):
                super().forward(x, mask)

    options = {"model": Scaled, "on_epoch": change, "epochs": 3}
    with pytest.warns(UserWarning, match="factor has changed"):
        compiled = _fit(**options)
    eager = _fit(**options, compile=False)
    for one, other in zip(compiled.history, eager.history, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
    assert max(taken) > 1


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_float64_weights_are_stepped_by_float64_numbers(optimizer):
    weights = []
    for how in (False, True):
        torch.manual_seed(0)
        pair = (kind(SHAPE, LATENT, HIDDEN).double() for kind in (Bernoulli, MeanField))
        fit = pyrovae.fit(
            *pair, X.double(), optimizer=optimizer, lr=0.01, epochs=3, batch_size=8, seed=0,
            objective="trace_elbo", compile=how,
        )  # fmt: skip
        weights.append(torch.cat([p.flatten() for p in fit.model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-13)


class Tempered(BetaELBO):
    """An objective whose factor is a number that Python reads."""

    def at_step(self, step):
        # Not at a step that is audited.
        self.factor = 1.0 + step // 13

    def estimate(self, pair, *args):
        found = super().estimate(pair, *args)
        return found._replace(
            loss=self.factor * found.loss, surrogate=self.factor * found.surrogate, terms={}
        )


@pytest.mark.filterwarnings("ignore:The pair runs eagerly")
def test_an_objective_that_moves_a_number_is_asked_at_every_step(taken):
    compiled, eager = (_fit(objective=Tempered(), compile=each, epochs=2) for each in (True, False))
    assert set(taken) == {0}
    for one, other in zip(compiled.history, eager.history, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)


class Breaking(Bernoulli):
    """A model whose likelihood is no number once so many steps are done."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x, mask=True):
        self.steps += 1
        with pyro.poutine.scale(scale=torch.where(self.steps > BREAKS, torch.nan, 1.0)):
            super().forward(x, mask)


BREAKS = 19


def test_a_loss_that_is_no_number_names_its_step_and_changes_nothing_more(taken, monkeypatch):
    said, fits = [], []
    for many in (pyrovae.SVI.update_many, lambda *args: None):
        monkeypatch.setattr(pyrovae.SVI, "update_many", many)
        with pytest.raises(NonFiniteLoss) as caught:
            _fit(model=Breaking, epochs=3, on_epoch=fits.append)
        said.append(str(caught.value))
    assert max(taken) > 4
    assert said[0] == said[1]
    assert "epoch 2" in said[0]
    _assert_equal(_states(fits[0]), _states(fits[-1]))


def test_an_interrupt_comes_between_two_steps(taken):
    class Stops(BetaELBO):
        pass

    Stops.__module__ = BetaELBO.__module__
    objective, begin = Stops(warm_up=33), BetaELBO.at_step
    steps = []

    def at_step(self, step):
        steps.append(step)
        if step == 20:
            raise KeyboardInterrupt
        begin(self, step)

    at_step.__module__, Stops.at_step = BetaELBO.__module__, at_step
    done = []
    with pytest.raises(KeyboardInterrupt):
        _fit(objective=objective, epochs=3, on_epoch=done.append)
    assert steps[-3:] == [18, 19, 20]
    counts = {int(entry["step"]) for entry in done[-1].svi.optimizer.state.values()}
    assert counts == {20}
