"""Split a function that is called many times: what some arguments decide is computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import getitem
from threading import local

import torch
from torch import Tensor
from torch.fx import Graph as Trace
from torch.fx import GraphModule, Node

from pyrovae.compiling.graph import Graph, record
from pyrovae.pairs.pair import Pair

ATEN = torch.ops.aten
# What is worth to be kept from call to call; a compiler fuses all else with what reads it.
PRODUCTS = {
    ATEN.mm.default,
    ATEN.addmm.default,
    ATEN.bmm.default,
    ATEN.baddbmm.default,
    ATEN.convolution.default,
}


class Hoisted:
    """A compiled function f(*args, *still) whose last arguments stay the same over many calls.

    The matrix products that those and the weights decide (an encoder's, of the data) are computed
    again only where other tensors are given for them, in each thread by itself; whoever changes
    them or weights in place has to make another one. Arguments else, and ``draws``, as for
    :class:`~pyrovae.compiling.graph.Graph`.
    """

    def __init__(
        self, function: Callable[..., list[Tensor]], args: tuple, still: tuple, pair: Pair
    ) -> None:
        self.count, self._kept = len(args), local()
        parts = split(record(function, (*args, *still), pair), self.count)
        if parts is None:
            self.first, self.rest = None, Graph(function, (*args, *still), pair)
            self.draws = self.rest.draws
            return
        before, after = parts
        self.first = Graph(before, still, pair)
        self.rest = Graph(after, (*args, *still, *before(*still)), pair)
        self.draws = False

    def __call__(self, *args: Tensor) -> list[Tensor]:
        if self.first is None:
            return self.rest(*args)
        still, kept = args[self.count :], vars(self._kept)
        if [*map(id, still)] != [*map(id, kept.get("still", ()))]:
            kept |= {"still": still, "found": self.first(*still)}
        return self.rest(*args, *kept["found"])


def split(record: GraphModule, count: int) -> tuple[GraphModule, GraphModule] | None:
    """The part of a record that does not depend on its first arguments, and the rest.

    The first takes the other arguments and gives what the rest takes after all of them. None where
    there is nothing to win, or where something is changed in place or drawn.
    """
    nodes = list(record.graph.nodes)
    if any(map(_is_impure, nodes)):
        return None
    given = [node for node in nodes if node.op == "placeholder"]
    moving: set[Node] = {*given[:count]}
    heavy: set[Node] = set()
    for node in nodes:
        if moving.intersection(node.all_input_nodes) or node.op == "output":
            moving.add(node)
        elif node.target in PRODUCTS or heavy.intersection(node.all_input_nodes):
            heavy.add(node)
    kept = [node for node in nodes if node in heavy and moving.intersection(node.users)]
    if not kept or not all(isinstance(node.meta["val"], Tensor) for node in kept):
        return None
    return _copy(record, given[count:], kept, moving), _copy(record, given, None, heavy, kept)


def _is_impure(node: Node) -> bool:
    """Whether a call writes to its arguments or draws, so that it must stay where it is."""
    if node.op in ("placeholder", "get_attr", "output") or node.target is getitem:
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    drawn = torch.Tag.nondeterministic_seeded in node.target.tags
    return node.target._schema.is_mutable or drawn


def _copy(
    record: GraphModule,
    given: list[Node],
    wanted: list[Node] | None,
    left: set[Node],
    kept: Sequence[Node] = (),
) -> GraphModule:
    """A part of a record: from these arguments, and what was kept, to the nodes wanted."""
    trace = Trace()
    made: dict[Node, Node] = {}
    for node in [*given, *kept]:
        made[node] = trace.placeholder(node.name)
    for node in record.graph.nodes:
        if node.op == "output":
            ends = node.args[0] if wanted is None else wanted
            trace.output([made[end] for end in ends])
        elif node not in made and node not in left and node.op != "placeholder":
            made[node] = trace.node_copy(node, made.__getitem__)
    trace.eliminate_dead_code()
    return GraphModule(record, trace)
