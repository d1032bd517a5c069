"""A watched state has another number when, and only when, it is another state."""

import copy
import cProfile

import pytest
import torch
from pyro.infer import Trace_ELBO

from pairs import binary, published_example, same_names
from pyrovae.compiling.graph import CaptureError
from pyrovae.compiling.reads import MOST_ITEMS, ProgramWatch, Seen, Walk, kept
from pyrovae.compiling.update import OptionsWatch
from pyrovae.objectives import estimate, make_objective
from pyrovae.pairs.pair import Pair

X = binary()


def _watched(make=same_names, objective=None):
    torch.manual_seed(0)
    model, guide = make()
    pair, objective = Pair(model, guide), objective or Trace_ELBO()
    roots = {"model": model, "guide": guide, "objective": objective}
    return model, guide, ProgramWatch(roots, Seen(lambda: estimate(objective, pair, X)))


CHANGES = {
    "attribute": lambda m: setattr(m, "encodes", m.encodes + 0.5),
    "mode": lambda m: m.eval(),
    "frozen": lambda m: next(m.parameters()).requires_grad_(False),
    "parameter": lambda m: setattr(m.net, "extra", torch.nn.Parameter(torch.ones(1))),
    "module": lambda m: m.add_module("extra", torch.nn.Dropout()),
    "buffer": lambda m: m.register_buffer("extra", torch.ones(1)),
    "dtype": lambda m: m.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_pair_has_another_number(change):
    model, _, watch = _watched()
    before = watch()
    assert watch() == before
    CHANGES[change](model)
    assert watch() != before


def test_values_written_in_place_are_the_same_state():
    model, guide, watch = _watched()
    before = watch()
    with torch.no_grad():
        for parameter in (*model.parameters(), *guide.parameters()):
            parameter.mul_(2)
    assert watch() == before


def test_a_state_that_comes_back_has_its_number_again():
    model, _, watch = _watched()
    before = watch.keep()
    for _ in range(100):  # Of states that are not kept, the watch forgets the oldest.
        model.encodes += 1
        watch()
    model.encodes = False
    assert watch() == before


def test_what_no_code_names_is_no_part_of_the_state():
    model, _, watch = _watched()
    before = watch()
    model.nobody_reads_this = 1
    assert watch() == before


@pytest.mark.parametrize("value", [0.0, float("nan"), 1, True, (1,), "1"])
def test_numbers_are_told_apart_by_type_and_value(value):
    model, _, watch = _watched()
    seen = set()
    for model.encodes in (value, -0.0, 1.0):
        seen.add(watch())
        seen.add(watch())
    model.encodes = copy.copy(value)
    assert watch() in seen
    assert len(seen) == 3


def test_an_attribute_of_the_objective_is_watched():
    objective = make_objective("iwae", particles=3)
    _, _, watch = _watched(objective=objective)
    before = watch()
    objective.particles = 4
    assert watch() != before
    objective.particles = 3
    assert watch() == before


def test_a_state_is_described_only_where_an_object_differs(monkeypatch):
    model, _, watch = _watched()
    watch()
    described = []
    describe = watch.describe
    monkeypatch.setattr(watch, "describe", lambda: described.append(1) or describe())
    assert watch() == watch() == watch()
    assert not described
    model.encodes = 2
    watch()
    assert len(described) == 1


def test_objects_are_given_back_as_they_were():
    class Holder:
        beta, names = 1.0, {"a"}

    holder = Holder()
    holder.items, holder.table, holder.inner = [1, [2]], {"a": {"b": 1}}, Holder()
    with kept({"holder": holder}):
        holder.items[1].append(3)
        holder.items.append(4)
        del holder.table["a"]["b"]
        holder.table["c"] = holder.late = 1
        holder.inner.beta, Holder.beta = 2.0, 3.0
        holder.names.add("b")
    assert (holder.items, holder.table) == ([1, [2]], {"a": {"b": 1}})
    assert (holder.inner.beta, Holder.beta, holder.names) == (1.0, 1.0, {"a"})
    assert not hasattr(holder, "late")


def test_more_than_can_be_compared_is_refused():
    many = list(range(MOST_ITEMS + 1))
    with pytest.raises(CaptureError, match="many, which holds 20,001 values"):
        Walk({"many": many}, Seen(lambda: many[0]))


def test_an_optimizer_is_watched_but_for_what_is_an_input():
    vae = published_example()[0].__self__
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.1)
    watch = OptionsWatch(optimizer)
    before = watch()
    optimizer.param_groups[0] |= {"lr": 0.2, "betas": (0.5, 0.6), "eps": 0.1}
    assert watch() == before
    optimizer.param_groups[0]["weight_decay"] = 0.5
    changed = watch()
    assert changed != before
    optimizer.param_groups[0]["weight_decay"] = 0.6
    assert watch() == changed
    for parameter in vae.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    begun = watch()
    assert begun != changed
    optimizer.step()
    assert watch() == begun
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert watch() != begun


def test_a_learning_rate_is_no_part_of_an_optimizers_state():
    optimizer = torch.optim.SGD(published_example()[0].__self__.parameters(), lr=0.1)
    watch = OptionsWatch(optimizer)
    before = watch()
    optimizer.param_groups[0] |= {"momentum": 0.5}
    changed = watch()
    optimizer.param_groups[0] |= {"momentum": 0, "lr": 0.3}
    assert watch() == before
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]
    assert watch() not in (before, changed)


def test_what_runs_is_seen_under_a_profiler_too():
    profile = cProfile.Profile()
    profile.enable()
    seen = Seen(lambda: binary(2))
    sum(binary(2).shape)
    profile.disable()
    assert binary.__code__ in seen.ran
    assert any(each.code is binary.__code__ for each in profile.getstats())
