"""What the ranks find on their rows adds up to what one process finds on all of them."""

from contextlib import contextmanager

import pyro
import pytest
import torch
from processes import divided, subsampled
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pairs import binary, functions, same_names, shipped_bernoulli, two_latents
from pyrovae.objectives import Estimate, make_objective
from pyrovae.pairs.contract import inspect_pair
from pyrovae.training.distributed import Diverged, World
from pyrovae.training.svi import SVI

X = binary(13)
PAIRS = {
    make.__name__: make
    for make in (shipped_bernoulli, same_names, functions, two_latents, subsampled, divided)
}


class Job:
    """Ranks that run one after another in this process; the last one has the sums."""

    def __init__(self):
        self.sent, self.others = [], []

    def all_reduce(self, flat):
        self.sent.append(flat.clone())
        flat.copy_(sum(self.sent))

    def all_gather_object(self, values, value):
        values[:] = self.others or [value] * len(values)


@pytest.fixture
def job(monkeypatch):
    job = Job()
    monkeypatch.setattr(torch.distributed, "all_reduce", job.all_reduce)
    monkeypatch.setattr(torch.distributed, "all_gather_object", job.all_gather_object)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda values, source: None)
    return job


@contextmanager
def noise(rows):
    """Give the guides' normal draws from outside: the same for a row, whichever rank runs it."""
    draws = iter(range(100))

    def standard_normal(shape, dtype, device):
        generator = torch.Generator().manual_seed(next(draws))
        whole = torch.randn(*shape[:-2], len(X), shape[-1], generator=generator, dtype=dtype)
        return whole[..., rows, :]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributions.normal, "_standard_normal", standard_normal)
        yield


def gradients(svi, world, x=X):
    """The loss, its terms and the gradients of a batch, summed over the ranks so far."""
    rows = world.rows(torch.arange(len(x)))
    leaves = list(svi.pair.named().values())
    for leaf in leaves:
        leaf.grad = None
    with noise(rows):
        found = svi.gradients(x[rows])
    if world.size > 1:
        found = world.reduce(found, leaves)
    return [found.loss, *found.terms.values(), *found.parts, *(leaf.grad for leaf in leaves)]


def made(pair, loss):
    pyro.clear_param_store()
    svi = SVI(*pair, torch.optim.Adam, loss, compile=False)
    svi.build(X)
    inspect_pair(svi.pair, X)
    for root in svi.pair.roots.values():
        root.eval()
    return svi


def require_same(ours, theirs):
    assert len(ours) == len(theirs)
    largest = max(value.abs().max() for value in theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=float(1e-6 * largest))


def compare(pair, loss, size, x=X):
    svi = made(pair, loss)
    whole = gradients(svi, World(), x)
    for rank in range(size):
        world = World(rank, size)
        world.prepare(svi, (X,))
        found = gradients(svi, world, x)
    assert svi.reduce == world.reduce
    require_same(found, whole)


@pytest.mark.parametrize(("name", "size"), [*((name, 2) for name in PAIRS), ("subsampled", 5)])
def test_gradients_of_the_ranks_add_up(name, size, job):
    compare(PAIRS[name](), Trace_ELBO(max_plate_nesting=1), size)


OBJECTIVES = {
    "mean-field": lambda: TraceMeanField_ELBO(2, vectorize_particles=True, max_plate_nesting=1),
    "importance": lambda: make_objective("iwae", 4),
    "beta": lambda: make_objective("beta_elbo", 2),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("make", [two_latents, subsampled])
def test_gradients_of_other_objectives_add_up(make, name, job):
    compare(make(), OBJECTIVES[name](), 3)


@pytest.mark.parametrize("make", [shipped_bernoulli, subsampled])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_batch_too_small_to_split_counts_once(rows, make, job):
    compare(make(), Trace_ELBO(max_plate_nesting=1), 2, X[:rows])


def test_a_scale_of_each_datum_is_left_as_it_is(job):
    def weighted(program):
        return lambda x: pyro.poutine.scale(program, scale=x.flatten(1).sum(1) / 16)(x)

    pair = tuple(map(weighted, shipped_bernoulli()))
    compare(pair, Trace_ELBO(max_plate_nesting=1), 3)


@pytest.mark.parametrize("total", [4, 7, 13, 128])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_the_rows_of_the_ranks_tile_the_batch(total, size):
    index = torch.randperm(total)
    parts = [World(rank, size).rows(index) for rank in range(size)]
    if total < 2 * size:
        assert all(torch.equal(part, index) for part in parts)
    else:
        assert torch.equal(torch.cat(parts), index)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("mixed", [False, True])
def test_a_scale_that_cannot_be_shared_is_refused(mixed, job):
    model, guide = shipped_bernoulli()

    def scaled(x):
        return pyro.poutine.scale(model, scale=1 / len(x) if mixed else len(x) ** 2.0)(x)

    svi = made((scaled, guide), Trace_ELBO())
    told = r"model's z has scale (0\.1667|36) for 6 rows and (0\.07692|169) for 13:"
    with pytest.raises(ValueError, match=told):
        World(0, 2).prepare(svi, (X,))


def test_a_factor_that_every_rank_would_count_is_refused(job):
    model, guide = shipped_bernoulli()

    def penalized(x):
        pyro.factor("penalty", -sum(p.square().sum() for p in model.parameters()))
        return model(x)

    svi = made((penalized, guide), Trace_ELBO())
    World(0, 1).prepare(svi, (X,))
    with pytest.raises(ValueError, match="'penalty' lies outside the data's plate, so that each"):
        World(0, 2).prepare(svi, (X,))


def test_a_batch_of_too_few_rows_is_refused(job):
    svi = made(shipped_bernoulli(), Trace_ELBO())
    with pytest.raises(ValueError, match="two rows for each of the 7 processes, got 13"):
        World(0, 7).prepare(svi, (X,))


def test_ranks_that_were_asked_for_different_things_are_refused(job):
    svi = made(shipped_bernoulli(), Trace_ELBO())
    job.others = [{"epochs": 3, "batch_size": 8}, {"epochs": 3, "batch_size": 9}]
    with pytest.raises(ValueError, match="Rank 1 has batch_size = 9, rank 0 has 8: every machine"):
        World(0, 2).prepare(svi, (X,), epochs=3, batch_size=8)


def parameters(*gradients):
    leaves = [nn.Parameter(torch.zeros(1)) for _ in gradients]
    for leaf, gradient in zip(leaves, gradients, strict=True):
        leaf.grad = None if gradient is None else torch.tensor([gradient])
    return leaves


def estimate(value, dtype=torch.float32):
    return Estimate(torch.tensor(value, dtype=dtype), None, {"x": torch.tensor(value)})


def test_a_parameter_has_a_gradient_if_any_rank_has_one(job):
    first, second = parameters(1.0, None, None), parameters(2.0, 4.0, None)
    World(0, 2).reduce(estimate(1.0), first)
    World(1, 2).reduce(estimate(2.0), second)
    assert [None if p.grad is None else p.grad.item() for p in second] == [3, 4, None]
    job.sent = job.sent[1:]
    World(0, 2).reduce(estimate(1.0), first)
    assert [None if p.grad is None else p.grad.item() for p in first][1:] == [4, None]


def test_a_share_that_does_not_count_adds_nothing_where_it_is_no_number(job):
    World(0, 2).reduce(estimate(7.0), parameters(4.0))
    world, (leaf,) = World(1, 2), parameters(float("nan"))
    world.rows(torch.arange(3))
    found = world.reduce(estimate(float("nan")), [leaf])
    assert (found.loss.item(), found.terms["x"].item(), leaf.grad.item()) == (7, 7, 4)


def test_a_site_that_the_rows_of_a_rank_lack_counts_nothing_there(job):
    def seen(rank, *names):
        terms = {name: torch.tensor(10.0 * rank + len(name)) for name in names}
        return worlds[rank].reduce(Estimate(torch.tensor(1.0), None, terms), parameters(1.0)).terms

    worlds = [World(0, 2), World(1, 2)]
    job.others = [["x", "label"], ["bb", "x"]]
    seen(0, "x", "label")
    assert seen(1, "bb", "x") == {"x": 12.0, "label": 5.0, "bb": 12.0}
    with pytest.raises(ValueError, match=r"sites \['late'\] on this batch, and not on the first"):
        seen(1, "x", "late")


def test_processes_agree_on_their_sites_once(job, monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch.distributed, "all_gather_object",
        lambda values, value: (asked.append(value), job.all_gather_object(values, value)),
    )  # fmt: skip
    for terms in ({}, {"x": torch.tensor(1.0)}):
        world, job.sent = World(0, 2), []
        for _ in range(3):
            world.reduce(Estimate(torch.tensor(1.0), None, terms), parameters(1.0))
    assert asked == [[], ["x"]]


def test_float64_is_summed_in_float64(job):
    leaf = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    for rank in range(2):
        leaf.grad = torch.full((1,), 1 + 1e-12, dtype=torch.float64)
        found = World(rank, 2).reduce(estimate(3.0, torch.float64), [leaf, *parameters(1.0)])
    assert leaf.grad.item() == 2 + 2e-12
    assert (found.loss.dtype, found.terms["x"].dtype) == (torch.float64, torch.float32)


def test_weights_that_differ_are_named_with_their_rank(job):
    pair = made(shipped_bernoulli(), Trace_ELBO()).pair
    norms = {name: weight.double().norm().item() for name, weight in pair.named().items()}
    name = list(norms)[2]
    job.others = [norms, norms, norms | {name: norms[name] * 1.0001}]
    with pytest.raises(Diverged, match=f"Rank 2 strayed from rank 0, seen in {name}:"):
        World(1, 3).settle(pair)
    job.others = [norms] * 3
    World(1, 3).settle(pair)
