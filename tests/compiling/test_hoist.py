"""What some arguments decide is computed once, and nothing else is."""

from threading import Thread

import pytest
import torch
from torch import nn

from pairs import shipped_bernoulli
from pyrovae.compiling.graph import record
from pyrovae.compiling.hoist import Hoisted, split
from pyrovae.pairs.pair import Pair

ADDMM, MM = torch.ops.aten.addmm.default, torch.ops.aten.mm.default


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr("pyrovae.compiling.graph._compile", lambda graph, inputs: graph)
    with torch.no_grad():
        yield


def products(graph):
    return sum(node.target in (ADDMM, MM) for node in graph.graph.nodes)


@pytest.mark.usefixtures("uncompiled")
def test_products_of_what_stays_are_made_once_for_each():
    torch.manual_seed(0)
    pair, inner, outer = Pair(*shipped_bernoulli()), nn.Linear(5, 4), nn.Linear(4, 2)

    def function(moving, still, other):
        hidden = inner(still).tanh() + other
        return [outer(hidden * moving), hidden.exp(), moving + still.sum()]

    args = torch.randn(3, 4), torch.randn(3, 5), torch.randn(3, 4)
    first, rest = split(record(function, args, pair), 1)
    assert (products(first), products(rest)) == (1, 1)
    hoisted = Hoisted(function, args[:1], args[1:], pair)
    calls = []
    run = hoisted.first
    hoisted.first = lambda *still: calls.append(1) or run(*still)
    second = torch.randn(3, 5), torch.randn(3, 4)
    for still in (args[1:], args[1:], second, second, args[1:]):
        moving = torch.randn(3, 4)
        for found, expected in zip(hoisted(moving, *still), function(moving, *still), strict=True):
            torch.testing.assert_close(found, expected)
    assert len(calls) == 3


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("odd", ["nothing", "draws", "writes"])
def test_what_cannot_be_split_stays_whole(odd):
    pair, inner = Pair(*shipped_bernoulli()), nn.Linear(5, 4)

    def function(moving, still):
        if odd == "nothing":
            return [moving * still.sum()]
        hidden = inner(still)
        if odd == "draws":
            return [hidden + torch.rand_like(moving)]
        return [hidden.add_(moving)]

    args = torch.randn(3, 4), torch.randn(3, 5)
    assert split(record(function, args, pair), 1) is None
    hoisted = Hoisted(function, args[:1], args[1:], pair)
    for _ in range(2):
        torch.manual_seed(1)
        (found,) = hoisted(*args)
        torch.manual_seed(1)
        torch.testing.assert_close(found, function(*args)[0])


@pytest.mark.usefixtures("uncompiled")
def test_each_thread_keeps_what_its_own_arguments_decide():
    torch.manual_seed(0)
    pair, inner = Pair(*shipped_bernoulli()), nn.Linear(5, 4)
    args, other = (torch.randn(3, 4), torch.randn(3, 5)), torch.randn(3, 5)
    hoisted = Hoisted(lambda moving, still: [inner(still) * moving], args[:1], args[1:], pair)
    first, made = hoisted.first, []
    hoisted.first = lambda *still: made.append(still) or first(*still)
    (before,) = hoisted(*args)
    thread = Thread(target=lambda: hoisted(args[0], other))
    thread.start()
    thread.join()
    (after,) = hoisted(*args)
    assert torch.equal(before, after)
    assert len(made) == 2
