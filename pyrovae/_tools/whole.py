"""Loops that a compiled step calls in one piece, as operators of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

# What runs in one piece, by the name under which a compiled step calls it.
_WHOLE: dict[str, tuple[Callable[..., Tensor], ref[nn.Module]]] = {}
AUTOGRAD = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
AUTOGRAD = AUTOGRAD | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
_UNROLLED = ContextVar("unrolled", default=False)


@contextmanager
def unrolled() -> Iterator[None]:
    """Run what is called in one piece operator by operator, for a record that leaves Python."""
    token = _UNROLLED.set(True)
    try:
        yield
    finally:
        _UNROLLED.reset(token)


def whole(run: Callable[..., Tensor], module: nn.Module, *inputs: Tensor) -> Tensor:
    """``run(module, *inputs)`` in one piece, which a compiled step calls instead of unrolling it.

    A loop over time would become thousands of operators to compile. The backward pass runs it
    again, so that nothing of it is kept until then.

    Args:
        run: A function at the top of a module, without random draws or changes of buffers.
        module: The network whose parameters it uses.
        inputs: Floating-point tensors.
    """
    if _UNROLLED.get():
        return run(module, *inputs)
    key = f"{run.__module__}.{run.__qualname__} {id(module)}"
    _WHOLE[key] = run, ref(module)
    return _whole([*inputs, *module.parameters()], key, len(inputs))


def longest(lengths: Tensor, steps: int) -> int:
    """How many of the steps the longest sequence of a batch has, within a piece that is run whole.

    All of them where the lengths cannot be read: on a GPU the CPU would wait for them, and a record
    has none.
    """
    fake = isinstance(lengths, FakeTensor) or _UNROLLED.get()
    known = lengths.device.type == "cpu" and not fake
    return int(lengths.max().clamp(1, steps)) if known else steps


class _Piece(nn.Module):
    """A function of a module and of tensors, as a module."""

    def __init__(self, run: Callable[..., Tensor], module: nn.Module) -> None:
        super().__init__()
        self.run, self.module = run, module

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(self.module, *inputs)


def _with_weights(tensors: Sequence[Tensor], key: str, inputs: int) -> Tensor:
    """What runs under a key, of its inputs and then its module's parameters."""
    run, known = _WHOLE[key]
    module = known()
    assert module is not None, "the program that holds it is gone"
    piece = _Piece(run, module)
    names = [name for name, _ in piece.named_parameters()]
    weights = dict(zip(names, tensors[inputs:], strict=True))
    return torch.func.functional_call(piece, weights, tuple(tensors[:inputs]))


def _pulled_back(grad: Tensor, tensors: Sequence[Tensor], key: str, inputs: int) -> list[Tensor]:
    with torch.enable_grad():
        given = [tensor.detach().requires_grad_() for tensor in tensors]
        values = _with_weights(given, key, inputs)
        found = torch.autograd.grad(values, given, grad, materialize_grads=True)
    return [torch.empty_like(x).copy_(each) for x, each in zip(tensors, found, strict=True)]


@torch.library.custom_op("pyrovae::whole", mutates_args=())
def _whole(tensors: Sequence[Tensor], key: str, inputs: int) -> Tensor:
    # A compiler takes the strides that the record below has, whatever is cut here.
    return _with_weights(tensors, key, inputs).clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("pyrovae::whole_backward", mutates_args=())
def _whole_backward(grad: Tensor, tensors: Sequence[Tensor], key: str, inputs: int) -> list[Tensor]:
    # Inside of an operator torch leaves autograd out (2.11 to 2.14), and functorch's does not run
    # inside of a recording. No other thread helps: a GPU's nodes are run by the one that waits.
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(include, exclude - AUTOGRAD):
        return _pulled_back(grad, tensors, key, inputs)


@_whole.register_fake
def _(tensors: Sequence[Tensor], key: str, inputs: int) -> Tensor:
    return _with_weights(tensors, key, inputs).contiguous()


@_whole_backward.register_fake
def _(grad: Tensor, tensors: Sequence[Tensor], key: str, inputs: int) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in tensors]


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    tensors, ctx.key, ctx.inputs = inputs
    ctx.save_for_backward(*tensors)


def _back(ctx: Any, grad: Tensor) -> tuple:
    return _whole_backward(grad, [*ctx.saved_tensors], ctx.key, ctx.inputs), None, None


_whole.register_autograd(_back, setup_context=_keep)
