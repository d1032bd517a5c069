"""A watched state has another number when, and only when, it is another state."""

import copy

import pytest
import torch

from pairs import published_example, same_names
from pyrovae.compiling.step import Watch, watch_optimizer, watch_pair
from pyrovae.objectives import make_objective
from pyrovae.pairs.pair import Pair


def _watched(make=same_names):
    torch.manual_seed(0)
    model, guide = make()
    return model, guide, watch_pair(None, Pair(model, guide))


CHANGES = {
    "attribute": lambda m: setattr(m, "encodes", m.encodes + 0.5),
    "mode": lambda m: m.eval(),
    "frozen": lambda m: next(m.parameters()).requires_grad_(False),
    "parameter": lambda m: setattr(m.net, "extra", torch.nn.Parameter(torch.ones(1))),
    "module": lambda m: m.add_module("extra", torch.nn.Dropout()),
    "buffer": lambda m: m.register_buffer("extra", torch.ones(1)),
    "dtype": lambda m: m.double(),
    "loose tensor": lambda m: setattr(m, "loose", torch.ones(1)),
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
    before = watch()
    model.eval()
    watch()
    model.train()
    assert watch() == before


def test_a_number_in_the_place_of_another_is_seen():
    model, _, watch = _watched()
    model.beta, seen = 0.5, set()
    for step in range(50):
        model.beta = 0.5 + step / 100
        seen.add(watch())
    assert len(seen) == 50


def test_an_optimizer_is_watched_but_for_its_learning_rate():
    vae = published_example()[0].__self__
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.1)
    watch = watch_optimizer(optimizer)
    before = watch()
    optimizer.param_groups[0]["lr"] = 0.2
    assert watch() == before
    optimizer.param_groups[0]["weight_decay"] = 0.5
    changed = watch()
    assert changed != before
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
    watch = watch_optimizer(optimizer)
    before = watch()
    optimizer.param_groups[0] |= {"weight_decay": 0.5}
    changed = watch()
    optimizer.param_groups[0] |= {"weight_decay": 0, "lr": 0.3}
    assert watch() == before
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]
    assert watch() not in (before, changed)


def test_an_attribute_of_the_objective_is_watched():
    objective = make_objective("iwae", particles=3)
    watch = watch_pair(objective, Pair(*same_names()))
    before = watch()
    objective.particles = 4
    assert watch() != before
    objective.particles = 3
    assert watch() == before


def test_a_state_is_described_only_where_an_object_differs():
    held, described = [1.5, "a"], []
    watch = Watch(lambda: list(held), lambda: described.append(1) or tuple(held))
    assert watch() == watch() == watch()
    assert len(described) == 1
    held[1] = "b"
    watch()
    assert len(described) == 2
