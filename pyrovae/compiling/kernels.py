"""The kernel of each float32 matrix product of a graph, chosen by timing it on this processor."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

__all__ = ["choose_kernels", "onednn_wins"]

WORTH = 1.3
SMALLEST = 5_000_000
ROUNDS = 7


def choose_kernels(graph: GraphModule, inputs: list[Tensor]) -> int:
    """Give a recorded graph's products on the CPU to oneDNN, where that is much faster than BLAS.

    Both give the same float32 numbers up to rounding. Only a lead of 1.3 times counts, so that
    the noise of a measurement decides nothing and runs repeat each other bit for bit.

    Args:
        graph: A record of ATen operations, changed in place.
        inputs: What it is called with; on another device than the CPU nothing is done.

    Returns:
        How many products changed hands.
    """
    if not inputs or inputs[0].device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return 0
    changed = 0
    for node in list(graph.graph.nodes):
        if node.target not in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            continue
        bias, left, right = (None, *node.args) if len(node.args) == 2 else node.args
        shapes = _shapes(left, right)
        if shapes is not None and not node.kwargs and _vector(bias) and onednn_wins(*shapes):
            _hand_over(graph, node, bias, left, right)
            changed += 1
    graph.recompile()
    return changed


@functools.cache
def onednn_wins(
    left: tuple[tuple[int, ...], tuple[int, ...]], right: tuple[tuple[int, ...], tuple[int, ...]]
) -> bool:
    """Whether oneDNN multiplies two float32 matrices at least 1.3 times as fast as BLAS does.

    Args:
        left: Shape and strides of the first factor.
        right: Shape and strides of the second.
    """
    a, b = (torch.empty_strided(*each).fill_(0.5) for each in (left, right))
    blas, onednn = (lambda: a @ b), (lambda: _onednn()(a, b, None))
    pairs = [(_seconds(blas), _seconds(onednn)) for _ in range(ROUNDS)][1:]
    return min(p[0] for p in pairs) > WORTH * min(p[1] for p in pairs)


@functools.cache
def _onednn() -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """A product by oneDNN as an operator of its own, which the compiler leaves as it is."""

    @torch.library.custom_op("pyrovae::onednn_addmm", mutates_args=())
    def product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")

    @product.register_fake
    def _(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        return left.new_empty(left.shape[0], right.shape[1])

    return torch.ops.pyrovae.onednn_addmm.default


def _seconds(product: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    product()
    return time.perf_counter() - started


def _shapes(left: Node, right: Node) -> tuple | None:
    """Shapes and strides of a large float32 product; None of any other."""
    found = [node.meta.get("val", node.meta.get("tensor_meta")) for node in (left, right)]
    if any(value is None or value.dtype != torch.float32 for value in found):
        return None
    (m, k), (_, n) = (tuple(value.shape) for value in found)
    if 2 * m * k * n < SMALLEST:
        return None
    return tuple((tuple(v.shape), tuple(_stride(v))) for v in found)


def _stride(value: object) -> tuple[int, ...]:
    return value.stride() if callable(value.stride) else value.stride


def _vector(bias: Node | None) -> bool:
    value = None if bias is None else bias.meta.get("val", bias.meta.get("tensor_meta"))
    return bias is None or (value is not None and len(value.shape) == 1)


def _hand_over(graph: GraphModule, node: Node, bias: Node | None, left: Node, right: Node) -> None:
    with graph.graph.inserting_before(node):
        product = graph.graph.call_function(_onednn(), (left, right, bias))
    node.replace_all_uses_with(product)
    graph.graph.erase_node(node)
