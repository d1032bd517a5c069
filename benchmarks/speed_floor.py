"""The floor: the matrix products of a step alone, each by the fastest kernel at hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from speed_hand import VAE, cuda_graph
from speed_problem import Problem, Race
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["decoder_products", "fastest", "flops", "floor"]

PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten.convolution_backward.default,
)
TRIES = 7


class Product(tuple):
    """A call that multiplies: its operator, and its arguments with their strides."""

    __slots__ = ()

    @property
    def kernels(self) -> dict[str, Callable[[], object]]:
        """The ways to make it, by name."""
        operator, *args = self
        if operator not in PRODUCTS[:2]:
            return {"PyTorch": lambda: operator(*args)}
        left, right = args[-2:]
        out = left.new_empty(len(left), right.shape[1])
        ways = {"BLAS": lambda: torch.mm(left, right, out=out)}
        if left.device.type == "cpu" and torch.backends.mkldnn.is_available():
            onednn, weight = torch.ops.mkldnn._linear_pointwise.default, right.t()
            ways["oneDNN"] = lambda: onednn(left, weight, None, "none", [], "")
        return ways


class _Listen(TorchDispatchMode):
    """Keeps every product that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Product] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        if func in PRODUCTS:
            kept = (_copy(arg) if isinstance(arg, Tensor) else arg for arg in args)
            self.heard.append(Product((func, *kept)))
        return func(*args, **(kwargs or {}))


def _copy(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor.detach()).copy_(tensor.detach())


def products(problem: Problem, images: Tensor) -> list[Product]:
    """Those of one step: forward, and backward to every weight."""
    vae, listen = VAE(problem), _Listen()
    with listen:
        vae(images[: problem.batch].float() / 255).backward()
    return listen.heard


def decoder_products(problem: Problem, rows: int) -> list[Product]:
    """Those of the decoder for so many latents."""
    vae, listen = VAE(problem), _Listen()
    with listen, torch.no_grad():
        vae.decoder(torch.randn(rows, problem.latent, device=problem.device))
    return listen.heard


def flops(made: list[Product]) -> int:
    """Floating-point operations, two for a multiplication and its addition."""
    with FlopCounterMode(display=False) as counter:
        for operator, *args in made:
            operator(*args)
    return counter.get_total_flops()


def fastest(made: list[Product]) -> tuple[Callable[[], None], dict[str, int]]:
    """All products, each by its fastest kernel, and how many each kind of kernel won."""
    chosen, won = [], {}
    for product in made:
        times = {name: _seconds(kernel) for name, kernel in product.kernels.items()}
        name = min(times, key=times.get)
        chosen.append(product.kernels[name])
        won[name] = won.get(name, 0) + 1
    apart, together = (lambda: [kernel() for kernel in chosen]), _in_one_graph(made)
    if together is not None and _seconds(together) < _seconds(apart):
        return together, {"Inductor": len(made)}
    return apart, won


def floor(problem: Problem, images: Tensor) -> Race:
    """The products of each step and nothing else, on CUDA as one graph; the losses are none."""
    run, _ = fastest(products(problem, images))
    if problem.device == "cuda":
        run, _ = cuda_graph(run)

    def race(index: Tensor) -> Tensor:
        for _ in index:
            run()
        return torch.full((len(index),), torch.nan)

    return race


def _in_one_graph(made: list[Product]) -> Callable[[], object] | None:
    """All of them compiled by Inductor, free to write matrix kernels of its own."""
    if any(operator not in PRODUCTS[:2] for operator, *_ in made):
        return None
    lefts, rights = zip(*(args[-2:] for _, *args in made), strict=True)

    def multiply(lefts: tuple, rights: tuple) -> list[Tensor]:
        return [a @ b for a, b in zip(lefts, rights, strict=True)]

    fast = torch.compile(multiply, options={"max_autotune": True})
    return lambda: fast(lefts, rights)


def _seconds(kernel: Callable[[], object]) -> float:
    kernel()
    times = []
    for _ in range(TRIES):
        started = time.perf_counter()
        kernel()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)
