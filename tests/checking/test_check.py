"""The check passes sound pairs, finds one mistake at a time, and leaves nothing behind."""

import random
import re
import time
import warnings
from contextlib import suppress

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyrovae
from broken_pairs import BROKEN
from pairs import LATENT, PAIRS, SHAPE, PlainGuide, PlainModel, binary, shipped_bernoulli
from pyrovae.checking import CHECKS, Report, Row, check, quick
from pyrovae.guides.mean_field import MeanField
from pyrovae.nn import MLP
from pyrovae.runs.programs import find_program
from pyrovae.training.monitor import NonFiniteLoss

X = binary()


def named(report, status):
    return {row.name for row in report.rows if row.status == status}


@pytest.mark.parametrize("name", BROKEN)
def test_each_mistake_fails_its_row_and_says_how_to_fix_it(name):
    broken = BROKEN[name]
    pyro.set_rng_seed(0)
    report = check(*broken.make(), broken.data())
    assert not report.passed
    assert named(report, "failed") == {broken.row, *broken.also}, report
    row = report[broken.row]
    assert re.search(broken.words, row.message), row
    if broken.line:
        assert any(broken.line in where for where in row.where), row
    for where in row.where:
        assert re.match(r"(tests/helpers|guides)/\w+\.py:\d+: \S", where), where


def test_every_row_has_a_mistake_that_fails_it():
    limits = {"reparameterized", "analytic KL"}
    assert {broken.row for broken in BROKEN.values()} == {each.name for each in CHECKS} - limits


def test_rows_wait_for_those_that_they_need():
    before = set()
    for each in CHECKS:
        assert before >= set(each.needs), each.name
        before.add(each.name)


class Stateful(PlainGuide):
    """A guide with buffers, dropout, a count, a parameter of the store, and one it changes."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.calls = nn.BatchNorm1d(16), nn.Dropout(), 0
        self.decay = nn.Parameter(torch.ones(()))

    def forward(self, x):
        self.calls += 1
        random.random(), np.random.rand()
        with torch.no_grad():
            self.decay.mul_(0.9)
        shift = pyro.param("shift", torch.randn(16)) + 0 * self.decay
        x = self.drop(self.norm(x.flatten(1)) + shift).reshape(x.shape)
        super().forward(x)


def everything(model, guide):
    """All that a check could disturb, in values that compare."""
    state = model.state_dict() | {f"guide.{n}": v for n, v in guide.state_dict().items()}
    store = pyro.get_param_store()
    return {
        "values": {name: value.numpy().tobytes() for name, value in state.items()},
        "leaves": [(id(p), p.grad) for m in (model, guide) for p in m.parameters()],
        "modes": [m.training for root in (model, guide) for m in root.modules()],
        "calls": guide.calls,
        "store": {n: (id(leaf), leaf.tolist()) for n, leaf in store._params.items()},
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "validation": (pyro.infer.util.is_validation_enabled(), dist.is_validation_enabled()),
    }


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("run", [check, quick])
def test_nothing_is_left_behind(run, validate):
    model, guide = PlainModel(), Stateful()
    guide.drop.eval()
    pyro.param("other", torch.ones(2))
    with pyro.validation_enabled(validate):
        before = everything(model, guide)
        run(model, guide, X)
        assert everything(model, guide) == before
        guide(X)
        assert everything(model, guide) != before


@pytest.mark.parametrize("name", ["misspelt_latent", "squeezed_batch", "value_read_back"])
def test_nothing_is_left_behind_by_a_broken_pair(name):
    pyro.param("other", torch.ones(2))
    state = torch.get_rng_state(), random.getstate(), list(pyro.get_param_store())
    pair = BROKEN[name].make()
    weights = [p.clone() for m in pair if isinstance(m, nn.Module) for p in m.parameters()]
    torch.set_rng_state(state[0])
    assert not check(*pair, X).passed
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), list(pyro.get_param_store())) == state[1:]
    after = [p for m in pair if isinstance(m, nn.Module) for p in m.parameters()]
    assert all(map(torch.equal, after, weights))


def test_a_check_repeats_itself():
    pair = shipped_bernoulli()
    first = check(*pair, X, seed=3)
    torch.rand(5), random.random()
    assert check(*pair, X, seed=3) == first
    assert check(*pair, X, seed=4) != first


@pytest.mark.parametrize("name", BROKEN)
def test_fit_says_what_the_check_says(name):
    """A table of mistakes: fit refuses what cannot be right, and warns of what trains all the same.

    What it is silent about needs averages over many draws, data that are not there yet, or limits
    evaluation and compiling alone.
    """
    broken = BROKEN[name]
    pyro.set_rng_seed(0)
    data, words = broken.data(), broken.words.replace("11", "12")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        try:
            options = {"epochs": 1, "compile": False, "progress": False, "seed": 0}
            # Of a gradient that is no number it warns before the weights are none.
            with suppress(NonFiniteLoss):
                pyrovae.fit(*broken.make(), data, **options)
            done = "warns" if found else "trains"
            told = " ".join(str(each.message) for each in found)
        except pyrovae.InputError as error:
            done, told = "refuses", str(error)
    assert done == broken.fit, told
    if done != "trains":
        assert re.search(words, told), told
        assert broken.line in told
    assert ("run pyrovae.check" in told) == (done == "warns")


def test_the_table_has_the_mistakes_of_newcomers():
    assert len(BROKEN) >= 33
    assert sum(broken.fit == "trains" for broken in BROKEN.values()) <= 10


class Conditional(PlainGuide):
    """A guide that also sees what another network predicts, which is trained elsewhere."""

    def __init__(self):
        super().__init__()
        self.baseline = MLP(SHAPE, SHAPE, (8,))

    def forward(self, x):
        with torch.no_grad():
            predicted = self.baseline(x)
        super().forward(x + predicted)


def test_a_network_kept_outside_of_the_gradients_is_no_mistake():
    """As in Pyro's example of a conditional VAE; frozen, nothing is left to say."""
    guide = Conditional()
    report = check(PlainModel(), guide, X)
    assert report.passed, report
    assert report["gradients"].status == "warned"
    assert "guide.baseline.layers.0" in report["gradients"].message
    assert any("torch.no_grad()" in where for where in report["gradients"].where)
    with pytest.warns(UserWarning, match=r"guide\.baseline.*If this is meant, freeze"):
        quick(PlainModel(), guide, X)
    guide.baseline.requires_grad_(False)
    assert check(PlainModel(), guide, X)["gradients"].status == "passed"
    quick(PlainModel(), guide, X)


def test_the_baseline_of_a_score_function_is_no_mistake():
    """TraceGraph_ELBO alone trains such a network, which no site depends on."""
    model, guide = PAIRS["discrete"]()
    net = nn.Linear(16, 1)
    run = guide.forward if isinstance(guide, nn.Module) else guide

    class WithBaseline(nn.Module):
        def __init__(self):
            super().__init__()
            self.guide, self.net = guide, net

        def forward(self, x):
            about = {"nn_baseline": self.net, "nn_baseline_input": x.flatten(1)}
            with pyro.poutine.infer_config(config_fn=lambda site: {"baseline": about}):
                run(x)

    report = check(model, WithBaseline(), X)
    assert report.passed, report
    quick(model, WithBaseline(), X)


def test_a_gradient_that_goes_another_way_is_no_mistake():
    """A straight-through step stops one path of two."""

    class Straight(PlainModel):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
                z = z + (z.round() - z).detach()
                pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(3), obs=x)

    report = check(Straight(), PlainGuide(), X)
    assert report["gradients"].status == "passed", report
    quick(Straight(), PlainGuide(), X)


def test_whole_numbers_that_are_looked_up_are_data():
    words, guess, decode = nn.Embedding(7, 8), nn.Linear(8, 2 * LATENT), nn.Linear(LATENT, 35)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            logits = decode(z).unflatten(-1, (5, 7))
            pyro.sample("x", dist.Categorical(logits=logits).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            loc, log_scale = guess(words(x).mean(-2)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    tokens = torch.randint(7, (12, 5), generator=torch.Generator().manual_seed(0))
    report = check(model, guide, tokens)
    assert report.passed, report
    fit = pyrovae.fit(model, guide, tokens, epochs=1, seed=0, progress=False)
    assert torch.isfinite(torch.tensor(fit.elbo))


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ((PlainModel, PlainGuide()), r"got the class PlainModel: make one, PlainModel\("),
        ((PlainModel(), None), "Expected a program as the guide, got None"),
    ],
)
def test_what_is_no_program_is_named(pair, words):
    for run in (check, quick):
        with pytest.raises(TypeError, match=words):
            run(*pair, X)


@pytest.mark.parametrize("name", PAIRS)
def test_the_quick_check_passes_sound_pairs(name):
    quick(*PAIRS[name](), X)


def test_the_quick_check_costs_less_than_ten_steps():
    model, guide = PlainModel(), PlainGuide()
    model.net, guide.net = MLP(LATENT, (1, 28, 28), (400,)), MLP((1, 28, 28), (2, LATENT), (400,))
    x = torch.bernoulli(torch.full((128, 1, 28, 28), 0.3))
    svi = pyrovae.SVI(model, guide, torch.optim.Adam, Trace_ELBO(), compile=False)

    def least(run):
        times = []
        for _ in range(5):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        return min(times)

    assert least(lambda: quick(model, guide, x)) < 10 * least(lambda: svi.step(x))


def test_context_goes_with_its_data():
    class Model(PlainModel):
        def forward(self, x, y):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
                logits = self.net(z) + y[:, None, None, None]
                pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)

    class Guide(PlainGuide):
        def forward(self, x, y):
            super().forward(x + y[:, None, None, None])

    y = torch.arange(len(X)) % 3
    report = check(Model(), Guide(), X, y)
    assert report.passed, report
    quick(Model(), Guide(), X, y)
    report = check(Model(), Guide(), X)
    assert "takes (x, y), and it is given x alone" in report["runs"].message


def test_latents_that_are_summed_over_pass():
    class Model(PlainModel):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                enumerate_ = {"enumerate": "parallel"}
                y = pyro.sample("y", dist.Categorical(torch.ones(2) / 2), infer=enumerate_)
                prior = dist.Normal(y[..., None] - torch.zeros(LATENT), 1.0).to_event(1)
                z = pyro.sample("z", prior)
                pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(3), obs=x)

    report = check(Model(), PlainGuide(), X)
    assert report.passed, report
    assert report["sites"].message == "latents z; observed x; summed over y"
    assert "TraceEnum_ELBO" in report["analytic KL"].message


def test_a_guide_in_another_order_is_warned_of():
    def guide(x):
        with pyro.plate("data", len(x)):
            low = pyro.sample("low", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("top", dist.Normal(low, 1.0).to_event(1))

    report = check(PAIRS["two_latents"]()[0], guide, X)
    assert report.passed, report
    assert report["analytic KL"].status == "warned"
    assert "The model samples top, low and the guide low, top" in report["analytic KL"].message
    assert report["estimators agree"].status == "skipped"


def test_a_model_that_reads_its_data_is_warned_of():
    class Copies(PlainModel):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
                logits = self.net(z) + x
                pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)

    report = check(Copies(), PlainGuide(), X)
    assert report.passed, report
    assert report["samples"].status == "warned"
    assert "reads x beside observing it" in report["samples"].message


@pytest.mark.parametrize("seen", [False, True])
def test_a_site_that_only_some_batches_have_counts_nothing_elsewhere(seen):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            if bool((x.sum(1) > 5).any()):
                with pyro.poutine.mask(mask=torch.tensor([seen]).expand(len(x))):
                    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.ones(len(x)))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7).to_event(1))

    x = torch.tensor([[1.0, 2.0], [4.0, 5.0], [0.0, 1.0], [2.0, 2.0], [1.0, 0.0]])
    row = pyrovae.check(model, guide, x)["independent data"]
    assert row.status == ("failed" if seen else "passed")
    assert not seen or "at site 'y' of the model changes by" in row.message


def test_a_guide_that_ignores_the_data_is_no_mistake():
    def guide(x):
        loc = pyro.param("loc", torch.zeros(LATENT))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    assert check(PlainModel(), guide, X).passed


def test_data_that_are_no_numbers_are_counted():
    x = X.clone()
    x[5:7] = torch.nan
    message = check(PlainModel(), PlainGuide(), x)["data in support"].message
    assert message.startswith("2 of 12 data hold NaN or infinity, first in row 5")


def test_all_data_are_held_against_the_support():
    x = binary(200)
    x[150, 0, 0, 0] = 0.5
    assert check(PlainModel(), PlainGuide(), x)["data in support"].status == "failed"


def test_bad_arguments_are_refused():
    pair = shipped_bernoulli()
    for run in (check, quick):
        with pytest.raises(TypeError, match=r"\.train"):
            run(*pair, {"x": X})
        with pytest.raises(ValueError, match="one datum"):
            run(*pair, X[:0])
    with pytest.raises(ValueError, match="particles >= 2"):
        check(*pair, X, particles=1)
    assert check(*pair, X[:1]).passed


TABLE = """\
passed   runs                on 61 data
FAILED   plates and events   Site 'x' has batch shape [61, 1, 4, 4] in the plate 'data' of 61, so 3
                             of its dimensions belong to no plate: end its distribution in
                             .to_event(3).
                             model.py:9: pyro.sample("x", likelihood, obs=x)
warned   capture             eagerly
skipped  analytic KL         no closed form
skipped  the rest            needs plates and events: numbers, samples
1 passed, 1 warned, 1 failed, 3 skipped"""


def test_the_table_reads_as_it_should():
    text = (
        "Site 'x' has batch shape [61, 1, 4, 4] in the plate 'data' of 61, so 3 of its dimensions "
        "belong to no plate: end its distribution in .to_event(3)."
    )
    rows = (
        Row("runs", "passed", "on 61 data"),
        Row(
            "plates and events",
            "failed",
            text,
            ('model.py:9: pyro.sample("x", likelihood, obs=x)',),
        ),
        Row("numbers", "skipped", "needs plates and events", needs="plates and events"),
        Row("capture", "warned", "eagerly"),
        Row("analytic KL", "skipped", "no closed form"),
        Row("samples", "skipped", "needs plates and events", needs="plates and events"),
    )
    assert str(Report(rows)) == TABLE
    assert Report(rows)["capture"].message == "eagerly"
    assert not Report(rows).passed
    assert Report(rows[2:]).passed


def test_the_documents_show_what_is_printed(repository, tmp_path, monkeypatch):
    text = (repository / "docs" / "check.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \|.*\|.*\|$", text, re.MULTILINE)
    assert rows[1:] == [each.name for each in CHECKS]
    source = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[1]
    shown = re.findall(r"```text\n(.*?)\n```", text, re.DOTALL)[0]
    (tmp_path / "my_model.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    model = find_program("my_model.py", "model").build((1, 8, 8), {"latent": 5})
    guide = MeanField((1, 8, 8), 5, (8,))
    x = torch.bernoulli(torch.full((70, 1, 8, 8), 0.5))
    assert str(check(model, guide, x)) == shown


def test_the_line_that_calls_the_check_is_not_blamed():
    """A site in a library's own code has no line of the user's; the caller of check() is none."""
    source = "def model(x):\n with pyro.plate('data', len(x)): pyro.sample('z', fn)"
    library = {"__name__": "pyro.elsewhere", "pyro": pyro, "fn": dist.Normal(0.0, 1.0)}
    exec(compile(source, "elsewhere.py", "exec"), library)
    row = check(library["model"], library["model"], X)["sites"]
    assert "observes nothing" in row.message
    assert row.where == ()
