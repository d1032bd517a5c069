"""What several processes find on their rows adds up to what one finds on all of them."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from processes import convolved, divided, subsampled
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pairs import PAIRS, SHAPE, binary
from pyrovae.nn import MLP
from pyrovae.objectives import estimate, make_objective
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import site_scale, trace_guide
from pyrovae.training.draws import Part, Size
from pyrovae.training.sharding import Sharding

X = binary(13)
DROPPED = {make.__name__: make for make in (convolved, subsampled, divided)}


def particles(count, loss=Trace_ELBO):
    return loss(count, vectorize_particles=count > 1, max_plate_nesting=1)


def numbers(loss, parameters, x):
    """The loss, its terms and the gradients, from the same stream each time."""
    pyro.set_rng_seed(3)
    found = estimate(loss, parameters, x)
    leaves = list(parameters.named().values())
    gradients = torch.autograd.grad(found.surrogate, leaves, allow_unused=True)
    zeros = map(torch.zeros_like, leaves)
    filled = [z if g is None else g for z, g in zip(zeros, gradients, strict=True)]
    return [found.loss, *found.terms.values(), *filled]


def shard(parameters, rank, size, loss):
    """The pair as one process of several has it."""
    sharding = Sharding(rank, size)
    parameters.run_model = sharding.wrap(parameters.run_model)
    parameters.run_guide = sharding.wrap(parameters.run_guide)
    sharding.learn(lambda rows: estimate(loss, parameters, X[:rows]))
    return sharding


def summed(loss, parameters, size, x=X):
    """The sum of what processes find, one after another."""
    programs, total = (parameters.run_model, parameters.run_guide), None
    for rank in range(size):
        sharding = shard(parameters, rank, size, loss)
        with sharding.batch(len(x)):
            found = numbers(loss, parameters, x[sharding.mine])
            if sharding.counts:
                total = (
                    found if total is None else [a + b for a, b in zip(total, found, strict=True)]
                )
        parameters.run_model, parameters.run_guide = programs
    return total


def same(ours, theirs):
    largest = max(value.abs().max() for value in theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=float(1e-6 * largest))


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", [*PAIRS, *DROPPED])
def test_shares_add_up(name, count, size):
    parameters = Pair(*(PAIRS | DROPPED)[name]())
    loss = particles(count)
    estimate(loss, parameters, X)
    same(summed(loss, parameters, size), numbers(loss, parameters, X))


@pytest.mark.parametrize(
    "loss",
    [
        particles(2, TraceMeanField_ELBO),
        make_objective("miwae", 3),
        make_objective("reweighted_wake_sleep", 3),
        make_objective("wake_sleep", 3),
    ],
    ids=["mean-field", "groups", "reweighted", "dreams"],
)
def test_shares_of_other_objectives_add_up(loss):
    parameters = Pair(*PAIRS["two_latents"]())
    same(summed(loss, parameters, 3), numbers(loss, parameters, X))


def test_a_batch_too_small_to_split_counts_once():
    parameters, loss = Pair(*PAIRS["shipped_bernoulli"]()), particles(1)
    estimate(loss, parameters, X)
    for rows in (1, 3):
        same(summed(loss, parameters, 2, X[:rows]), numbers(loss, parameters, X[:rows]))


@pytest.mark.parametrize("total", [4, 7, 13, 128])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_parts_tile_the_batch(total, size):
    parts = [Sharding(rank, size).split(total) for rank in range(size)]
    if total < 2 * size:
        assert parts == [Part(0, total, total)] * size
    else:
        assert [row for part in parts for row in range(part.start, part.stop)] == list(range(total))
        assert max(part.rows for part in parts) - min(part.rows for part in parts) <= 1


def test_the_captured_draws_are_those_of_the_whole_batch():
    parameters, loss = Pair(*convolved()), particles(3)
    estimate(loss, parameters, X)
    sharding = shard(parameters, 1, 2, loss)
    leaves = list(parameters.named().values())

    def step(x):
        found = estimate(loss, parameters, x)
        return [found.loss, *torch.autograd.grad(found.surrogate, leaves)]

    with sharding.batch(len(X)):
        x = X[sharding.mine]
        with pyro.validation_enabled(False):
            graph = make_fx(step)(x)
        pyro.set_rng_seed(5)
        expected = step(x)
    pyro.set_rng_seed(5)
    for one, other in zip(graph(x), expected, strict=True):
        assert torch.equal(one, other)


def test_outside_a_batch_nothing_changes():
    parameters, loss = Pair(*subsampled()), particles(1)
    estimate(loss, parameters, X)
    expected = numbers(loss, parameters, X)
    shard(parameters, 1, 2, loss)
    for one, other in zip(numbers(loss, parameters, X), expected, strict=True):
        assert torch.equal(one, other)


def learned(program, size=2):
    """A function of rows alone, as each of several processes has it."""
    found = []
    for rank in range(size):
        sharding = Sharding(rank, size)
        run = sharding.wrap(program)
        sharding.learn(lambda rows, run=run: run(torch.arange(float(rows))))
        found.append((sharding, run))
    return found


def drawn(program, total=11, size=2):
    """What each process draws for its rows, from the same stream."""
    found = []
    for sharding, run in learned(program, size):
        pyro.set_rng_seed(1)
        with sharding.batch(total):
            found.append(run(torch.arange(float(total))[sharding.mine]))
    return found


EXACT = {
    "normal": lambda x: torch.randn(4, len(x), 3),
    "uniform": lambda x: torch.rand_like(x),
    "integers": lambda x: torch.randint(-(2**63), 2**63 - 1, (len(x), 2)),
    "transposed": lambda x: torch.empty(3, len(x)).t().normal_(),
    "exponential": lambda x: x.new_empty(len(x), 2).exponential_(2.0),
    "by parameters": lambda x: torch.bernoulli(x / 20),
    "expanded": lambda x: torch.bernoulli(torch.tensor([0.2, 0.8]).expand(len(x), 2)),
    "by location": lambda x: torch.normal(x, 0.1),
    "categories": lambda x: torch.multinomial((x[:, None] + torch.arange(1.0, 5.0)).exp(), 1),
    "dropout": lambda x: nn.functional.dropout(torch.ones(len(x), 5), 0.4),
    "of one size": lambda x: torch.randn(6, 6).sum() + torch.randn(len(x), 6),
}


@pytest.mark.parametrize("name", EXACT)
def test_rows_have_the_draws_of_one_process(name):
    pyro.set_rng_seed(1)
    whole = EXACT[name](torch.arange(11.0))
    dim = whole.shape.index(11)
    assert torch.equal(torch.cat(drawn(EXACT[name]), dim), whole)


def test_what_does_not_follow_the_batch_is_drawn_as_it_is():
    for program in (lambda x: torch.randn(3), lambda x: torch.randn(())):
        first, second = drawn(program)
        assert torch.equal(first, second)
    shuffled = drawn(lambda x: torch.randperm(len(x)))
    assert [sorted(rows.tolist()) for rows in shuffled] == [list(range(6)), list(range(5))]


def test_draws_by_rejection_are_right_in_distribution():
    def gamma(x):
        return dist.Gamma(1.0 + x, 2.0).sample()

    first, second = drawn(gamma, total=40_000)
    expected = (1 + torch.arange(40_000.0)) / 2
    found = torch.cat([first, second])
    error = (found - expected) / (expected / 2).sqrt()
    assert abs(error.mean()) < 4 / 200
    assert error.var() == pytest.approx(1, rel=0.05)
    first, second = drawn(lambda x: dist.Gamma(x * 0 + 3.0, 1.0).sample(), total=2000)
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.15


def test_a_scale_that_cannot_be_shared_is_refused():
    model, guide = PAIRS["shipped_bernoulli"]()

    def squared(x):
        return pyro.poutine.scale(model, scale=len(x) ** 2.0)(x)

    with pytest.raises(ValueError, match=r"'z' has scale 4\.0 for 2 data and 9\.0 for 3"):
        shard(Pair(squared, guide), 0, 2, particles(1))


def test_a_scale_of_each_datum_is_left_as_it_is():
    model, guide = PAIRS["shipped_bernoulli"]()

    def weighted(program):
        return lambda x: pyro.poutine.scale(program, scale=x.flatten(1).sum(1) / 16)(x)

    parameters, loss = Pair(weighted(model), weighted(guide)), particles(1)
    estimate(loss, parameters, X)
    same(summed(loss, parameters, 3), numbers(loss, parameters, X))


def test_plates_right_of_the_batch_keep_their_place():
    class Columns(nn.Module):
        def __init__(self, encodes):
            super().__init__()
            self.encodes = encodes
            self.net = MLP(SHAPE, (4, 3), (8,)) if encodes else MLP(3, 4, (8,))

        def forward(self, x):
            with pyro.plate("data", len(x), dim=-2), pyro.plate("columns", 4, dim=-1):
                if self.encodes:
                    pyro.sample("z", dist.OneHotCategorical(logits=self.net(x)))
                else:
                    z = pyro.sample("z", dist.OneHotCategorical(logits=torch.zeros(3)))
                    rows = dist.Bernoulli(logits=self.net(z)).to_event(1)
                    pyro.sample("x", rows, obs=x[:, 0])

    parameters = Pair(Columns(False), Columns(True))
    loss = Trace_ELBO(3, vectorize_particles=True, max_plate_nesting=2)
    estimate(loss, parameters, X)
    same(summed(loss, parameters, 2), numbers(loss, parameters, X))


def test_a_subsampled_plate_stands_for_as_many_data():
    parameters, loss = Pair(*subsampled()), particles(1)
    layout = inspect_pair(parameters, X)
    sharding = shard(parameters, 0, 2, loss)
    with sharding.batch(len(X)):
        site = trace_guide(parameters, X[sharding.mine]).nodes["z"]
    assert site["scale"] == pytest.approx(0.5 * 1000 / len(X))
    assert site_scale(site, layout) == pytest.approx(0.5)


def test_a_step_that_fails_leaves_nothing_behind():
    sharding = Sharding(0, 2)
    run = sharding.wrap(lambda x: torch.randn(len(x)) / 0 if len(x) < 9 else 1 / 0)
    sharding.learn(lambda rows: run(torch.zeros(rows)))
    with pytest.raises(ZeroDivisionError), sharding.batch(20):
        run(torch.zeros(10))
    assert sharding.part is None
    with sharding.batch(12):
        assert len(run(torch.zeros(6))) == 6


def test_a_size_knows_its_rows():
    assert Size((4, 6, 2), 1, 3).at(5) == (4, 15, 2)
    assert Size((4, 6)).at(5) == (4, 6)
