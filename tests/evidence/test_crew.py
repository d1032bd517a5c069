"""Tiles of data that threads take side by side: the same numbers, errors and ends."""

import threading
from itertools import count

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrovae
from pairs import binary, shipped_bernoulli
from pyrovae._tools.seeding import ALONE, Stream, lend, seeded, turn
from pyrovae.compiling.graph import Graph
from pyrovae.evidence.tiles import Evaluation
from pyrovae.pairs.pair import Pair

X = binary(300)
FEW = {"num_chains": 6, "num_temperatures": 2, "compile": True, "seed": 3}


@pytest.fixture
def crews(monkeypatch):
    """The sizes of the crews that are called together, where torch has two threads."""
    seen, before = [], Evaluation._by_crew

    def by_crew(self, crew, *args):
        assert torch.get_num_threads() == 1
        seen.append(crew)
        before(self, crew, *args)

    monkeypatch.setattr(Evaluation, "_by_crew", by_crew)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield seen
    torch.set_num_threads(threads)


@pytest.fixture
def recorded(monkeypatch):
    """Run the record itself: what a crew does with it is no matter of its kernels."""
    monkeypatch.setattr("pyrovae.compiling.graph._compile", lambda graph, inputs: graph)


def sampled(pair, x=X, **how):
    return pyrovae.log_likelihood(
        *pair, x, **{"num_samples": 300, "compile": True, "seed": 3} | how
    )


def alone(function, *args, **how):
    """The same by one thread."""
    torch.set_num_threads(1)
    found = function(*args, **how)
    torch.set_num_threads(2)
    return found


def working():
    """The threads of crews, and of other tests' executors."""
    return {each for each in threading.enumerate() if each.name.startswith("ThreadPool")}


def same(found, expected):
    for name in ("log_prob", "standard_error", "ess", "khat"):
        each = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(*each, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.curve.log_prob, expected.curve.log_prob)


@pytest.mark.parametrize("how", [{}, {"defensive": 0.3}, {"num_samples": 7}], ids=str)
def test_log_likelihood_is_that_of_one_thread(crews, how):
    pair, before = shipped_bernoulli(), torch.get_rng_state()
    found = sampled(pair, **how)
    assert crews == [2]
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), before)
    same(found, alone(sampled, pair, **how))
    assert crews == [2]


@pytest.mark.parametrize("rows", [2048, 260], ids=["whole", "in parts"])
def test_annealing_is_that_of_one_thread(crews, rows):
    """Six chains at once, or four by a graph and two eagerly."""
    pair, how = shipped_bernoulli(), FEW | {"max_rows": rows}
    found = pyrovae.annealed_log_likelihood(*pair, X[:150], **how)
    assert crews == [2]
    expected = alone(pyrovae.annealed_log_likelihood, *pair, X[:150], **how)
    same(found, expected)
    assert torch.equal(found.acceptance, expected.acceptance)


@pytest.mark.usefixtures("recorded")
def test_both_bounds_are_those_of_one_thread(crews):
    pair, how = shipped_bernoulli(), FEW | {"like": X[:64], "n": 150}
    found = pyrovae.bidirectional(*pair, **how)
    assert crews == [2]
    expected = alone(pyrovae.bidirectional, *pair, **how)
    same(found.lower, expected.lower)
    assert torch.equal(found.upper, expected.upper)


@pytest.mark.usefixtures("recorded")
def test_what_no_crew_is_called_for(crews):
    """Too few tiles, eager programs, and a proposal that is made for each tile."""
    pair, two = shipped_bernoulli(), X[:128]
    sampled(pair, X[:64])
    sampled(pair, two, compile=False)
    sampled(pair, two, refine_steps=2, num_samples=20)
    pyrovae.annealed_log_likelihood(*pair, two, **FEW | {"compile": False, "num_temperatures": 1})
    assert crews == []


@pytest.mark.usefixtures("recorded")
def test_a_model_that_draws_where_it_is_scored_is_left_to_one_thread(crews):
    class Noisy(nn.Module):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                off = z + 0.1 * torch.randn(z.shape)
                pyro.sample("x", dist.Normal(off, 1.0), obs=x)

    class Guide(nn.Module):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.5 * x, 0.7))

    pair, x = (Noisy(), Guide()), torch.randn(200)
    found = sampled(pair, x)
    assert crews == []
    same(found, alone(sampled, pair, x))


@pytest.mark.usefixtures("recorded")
def test_an_error_names_its_datum_and_ends_all_threads(crews):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            # Positive for the rows that are looked at before, at their latents.
            pyro.sample("x", dist.Normal(z, torch.where(x < 100, 1.0, torch.nan)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    x, others = torch.zeros(300), working()
    x[70] = x[130] = x[200] = 200.0  # in the tiles of both threads
    with (
        pyro.validation_enabled(False),
        pytest.raises(ValueError, match="'x' in the model is NaN for datum 70"),
    ):
        sampled((model, guide), x)
    assert crews == [2]
    assert working() <= others
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("recorded")
def test_a_stopped_crew_ends_soon_and_goes_on_later(crews, monkeypatch, tmp_path):
    how, file = {"x": binary(600), "num_samples": 3_000}, tmp_path / "checkpoint"
    pair = shipped_bernoulli()
    expected = sampled(pair, **how)
    kept, ticks, before = count(), [], (Evaluation.keep, Evaluation._tick)

    def keep(self, index, found):
        if next(kept) == 2:
            raise KeyboardInterrupt
        before[0](self, index, found)

    def tick(self, work=1):
        ticks.append(work)
        before[1](self, work)

    monkeypatch.setattr(Evaluation, "keep", keep)
    monkeypatch.setattr(Evaluation, "_tick", tick)
    others = working()
    with pytest.raises(KeyboardInterrupt):
        sampled(pair, **how, checkpoint=file)
    assert working() <= others
    # Ten tiles of 24 ticks: three were asked for, and two threads were somewhere in the next ones.
    assert len(ticks) < 8 * 24
    same(sampled(pair, **how, checkpoint=file), expected)
    assert crews == [2, 2, 2]


def test_threads_that_work_for_one_take_turns_among_themselves():
    inside, most = [], []

    def work():
        join()
        for _ in range(200):
            with turn():
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    with ALONE:
        join = lend()
        threads = [threading.Thread(target=work) for _ in range(3)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(60)
            assert not each.is_alive()
    assert max(most) == 1


def test_a_stream_goes_on_where_it_was_left():
    stream, device = Stream(5, torch.device("cpu"), 1), torch.device("cpu")
    with stream(), stream():
        found = [torch.randn(3)]
    torch.rand(7)
    with stream():
        found.append(torch.randn(20))
    with seeded(5, device, 1):
        expected = [torch.randn(3), torch.randn(20)]
    assert torch.equal(torch.cat(found), torch.cat(expected))


def test_each_thread_of_a_crew_is_one_thread_without_gradients(crews):
    def find(index, rows):
        found.add((torch.get_num_threads(), torch.is_grad_enabled()))
        return {"log_prob": rows[0].sum((1, 2, 3)).double()}

    found, task = set(), Evaluation(*shipped_bernoulli(), (X,), 0)
    with task.opened():
        task.each(find, lambda rows: True)
        assert torch.equal(task.found()["log_prob"], X.sum((1, 2, 3)).double())
    assert crews == [2]
    assert found == {(1, False)}


def test_other_threads_run_during_a_kernel():
    """Or else those of a crew would wait for each other's."""
    x, counted, done = torch.randn(4_000_000), count(), threading.Event()

    def function(x):
        for _ in range(12):
            x = (x.sin() + 1).log1p()
        return [x]

    def work():
        while not done.wait(0.001):
            next(counted)

    with torch.no_grad():
        graph = Graph(function, (x,), Pair(*shipped_bernoulli()))
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    before = next(counted)
    graph(x)
    after = next(counted)
    done.set()
    thread.join()
    assert after - before > 20
