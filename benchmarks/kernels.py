"""Whether a compiled step gains if each matrix product goes to the kernel that timing finds faster.

    OMP_NUM_THREADS=2 python benchmarks/kernels.py [--rounds R]

Inductor calls BLAS for float32 products. Here a captured graph is rewritten before it is compiled:
a product goes to oneDNN where timing says that this is faster by WORTH. Steps with BLAS, with the
choice, and with BLAS again (what two equal graphs differ by) take turns; results/kernels.json has
medians, and ratios within a round with their quartiles.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from json import dumps, loads
from pathlib import Path
from statistics import median, quantiles
from unittest import mock

import torch
from pyro.infer import TraceMeanField_ELBO
from speed_problem import LR, SHAPE, Problem
from tables import machine, show, write
from torch import Tensor
from torch.fx import GraphModule, Node

import pyrovae
from pyrovae.compiling import graph as compiling

HOME = Path(__file__).resolve().parent
PROBLEMS = (Problem("784-400-20", 128), Problem("784-200-200-50", 100))
THREADS = (2, 1)
BLAS, CHOSEN, AGAIN = "BLAS", "chosen", "BLAS again"
WARM_UP, TURN = 40, 10
WORTH, SMALLEST, TIMED = 1.3, 5_000_000, 7
"""A lead that noise does not make; floating-point operations of a product worth a look; timings."""
ATEN = torch.ops.aten


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--one", nargs=2, metavar=("THREADS", "PROBLEM"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        threads, which = map(int, options.one)
        torch.set_num_threads(threads)
        print(dumps(row(PROBLEMS[which], options.rounds)))
        return
    rows = [
        measured(threads, which, options.rounds)
        for threads in THREADS if threads <= (os.cpu_count() or 1)
        for which in range(len(PROBLEMS))
    ]  # fmt: skip
    show(rows, ".4g")
    write(HOME / "results" / "kernels.json", {"about": machine(), "steps": rows})


def measured(threads: int, which: int, rounds: int) -> dict:
    """A row from a process of its own: Inductor's code is for a number of threads."""
    command = [sys.executable, __file__, "--rounds", str(rounds), "--one", str(threads), str(which)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {"threads": threads} | loads(done.stdout)


def row(problem: Problem, rounds: int) -> dict:
    """Milliseconds a step, and the time with chosen kernels over that with BLAS."""
    torch.manual_seed(0)
    x = (torch.rand(problem.batch, *SHAPE) > 0.5).float()
    steps: dict[str, Callable[[Tensor], object]] = {}
    for name in (BLAS, CHOSEN, AGAIN):
        svi = pyrovae.SVI(*problem.pair(), _adam, TraceMeanField_ELBO(), compile=True)
        with mock.patch.object(compiling, "_compile", _choosing if name == CHOSEN else _compile):
            for _ in range(WARM_UP):
                svi.step(x)
        steps[name] = svi.update
    turns: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name in sorted(steps, reverse=bool(number % 2)):
            started = time.perf_counter()
            for _ in range(TURN):
                steps[name](x)
            turns[name].append(1e3 * (time.perf_counter() - started) / TURN)
    found: dict = {"networks": problem.networks, "batch": problem.batch, "products moved": moved[0]}
    found |= {f"{name}, ms": median(times) for name, times in turns.items()}
    for name in (CHOSEN, AGAIN):
        ratios = [ours / blas for ours, blas in zip(turns[name], turns[BLAS], strict=True)]
        found[f"{name} / BLAS"] = median(ratios)
        found[f"{name} / BLAS, quartiles"] = quantiles(ratios, n=4)[::2]
    return found


def _adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=LR, fused=True)


_compile = compiling._compile
moved = [0]


def _choosing(graph: GraphModule, inputs: list[Tensor]) -> Callable:
    """Compile a graph whose products have gone to oneDNN where that is faster."""
    for node in list(graph.graph.nodes):
        if node.target not in (ATEN.mm.default, ATEN.addmm.default) or node.kwargs:
            continue
        bias, left, right = (None, *node.args) if len(node.args) == 2 else node.args
        shapes = tuple((tuple(v.shape), v.stride()) for v in map(_value, (left, right)))
        size = 2 * shapes[0][0][0] * shapes[0][0][1] * shapes[1][0][1]
        if size < SMALLEST or (bias is not None and _value(bias).dim() != 1):
            continue
        if _onednn_wins(*shapes):
            with graph.graph.inserting_before(node):
                product = graph.graph.call_function(_onednn(), (left, right, bias))
            node.replace_all_uses_with(product)
            graph.graph.erase_node(node)
            moved[0] += 1
    graph.recompile()
    return _compile(graph, inputs)


def _value(node: Node) -> Tensor:
    return node.meta["val"]


@functools.cache
def _onednn_wins(*shapes: tuple) -> bool:
    a, b = (torch.empty_strided(*each).fill_(0.5) for each in shapes)
    times = [(_seconds(lambda: a @ b), _seconds(lambda: _onednn()(a, b, None)))
             for _ in range(TIMED)][1:]  # fmt: skip
    return min(t[0] for t in times) > WORTH * min(t[1] for t in times)


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


if __name__ == "__main__":
    main()
