"""An objective and its gradients as one graph, captured from a pair's handlers and compiled.

Pyro's effect handlers, PyTorch's autograd and the programs themselves run once, under a tracer that
records what they ask of the device; Inductor compiles the record. A captured step is held against
the eager one for the same noise at its calls 1, 2, 4, 8, … and at every 500th.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule

from pyrovae.objectives import Estimate, estimate
from pyrovae.params import Parameters

__all__ = ["Capture", "CaptureError", "Graph", "Step", "compare", "signature", "undone"]

AUDIT = 500
SCALARS = (bool, int, float, str, type(None))


class CaptureError(RuntimeError):
    """A program cannot be captured; the message says why and what to change."""


class Step(NamedTuple):
    """An estimate, and the gradient of its surrogate for each leaf."""

    estimate: Estimate
    gradients: tuple[Tensor | None, ...]


class Graph:
    """A function of tensors as one compiled graph, run without gradients.

    What else the function reads (weights, buffers) becomes an input as well, so that later changes
    in place are seen.

    Args:
        function: Takes tensors and returns a list of tensors; may draw and differentiate.
        args: Tensors of the shapes to compile for.
        parameters: The pair whose buffers and random streams are given back as they were.

    Raises:
        CaptureError: If the function reads values back, changes from call to call, or does not
            compile.
    """

    def __init__(
        self, function: Callable[..., list[Tensor]], args: tuple, parameters: Parameters
    ) -> None:
        graph, self.constants = _lift(_trace(function, args, parameters))
        self.compiled = _compile(graph, [*self._held(), *args])

    @torch.no_grad()
    def __call__(self, *args: Tensor) -> list[Tensor]:
        return self.compiled(*self._held(), *args)

    def _held(self) -> list[Tensor]:
        return [tensor.detach() for tensor in self.constants]


class Capture:
    """The compiled step of an objective for batches of one shape.

    Args:
        objective: A Pyro ELBO or a function, as :func:`pyrovae.objectives.estimate` takes it.
        parameters: The pair.
        leaves: The parameters to differentiate for.
        args: A batch of the shape to capture, with the programs' further arguments.

    Raises:
        CaptureError: As :class:`Graph`, and if a step comes out otherwise than the eager one.
    """

    def __init__(
        self, objective: Any, parameters: Parameters, leaves: list[Tensor], args: tuple
    ) -> None:
        self.objective, self.parameters, self.leaves = objective, parameters, leaves
        self.names: list[str] = []
        self.present: list[bool] = []
        self.calls = 0
        self.graph = Graph(self._flat, args, parameters)

    def __call__(self, args: tuple) -> Step:
        """Run the captured step; now and then, first beside the eager one."""
        self.calls += 1
        if self.calls & (self.calls - 1) == 0 or self.calls % AUDIT == 0:
            self._audit(args)
        return self._run(args)

    def _audit(self, args: tuple) -> None:
        with undone(self.parameters, args):
            expected = self.eager(args)
        with undone(self.parameters, args):
            found = self._run(args)
        compare("the loss", found.estimate.loss, expected.estimate.loss)
        ours, theirs = (
            [
                torch.zeros_like(p) if g is None else g
                for p, g in zip(self.leaves, step, strict=True)
            ]
            for step in (found.gradients, expected.gradients)
        )
        largest = torch.stack([g.abs().max() for g in theirs]).max()
        for one, other in zip(ours, theirs, strict=True):
            compare(f"the gradient of shape {list(one.shape)}", one, other, 1e-5 * largest)

    def eager(self, args: tuple) -> Step:
        """The same step through Pyro's handlers."""
        found = estimate(self.objective, self.parameters, *args)
        if found.surrogate is None:
            raise CaptureError("the objective propagates its gradient itself")
        gradients = torch.autograd.grad(found.surrogate, self.leaves, allow_unused=True)
        return Step(found._replace(surrogate=None), gradients)

    def _flat(self, *args: Tensor) -> list[Tensor]:
        step = self.eager(args)
        self.names = list(step.estimate.terms)
        self.present = [g is not None for g in step.gradients]
        found = [g for g in step.gradients if g is not None]
        return [step.estimate.loss, *step.estimate.terms.values(), *found]

    def _run(self, args: tuple) -> Step:
        loss, *rest = self.graph(*args)
        terms = dict(zip(self.names, rest, strict=False))
        found = iter(rest[len(terms) :])
        gradients = tuple(next(found) if present else None for present in self.present)
        return Step(Estimate(loss, None, terms), gradients)


def signature(objective: Any, parameters: Parameters, args: tuple) -> Hashable | None:
    """What a captured step is good for; None if no batch is described by it.

    Shapes, dtypes and devices of the arguments, which parameters and buffers there are and which
    are frozen, and every number, flag and loose tensor that is an attribute of the objective or
    of a module: a change of one asks for another capture.
    """
    if not args or not all(isinstance(arg, Tensor) and not arg.requires_grad for arg in args):
        return None
    shapes = tuple((arg.shape, arg.dtype, arg.device) for arg in args)
    held = (
        *parameters.leaves(),
        *(b for root in parameters.roots.values() for b in root.buffers()),
    )
    tensors = tuple((id(t), t.dtype, t.requires_grad) for t in held)
    objects = [objective, *(m for root in parameters.roots.values() for m in root.modules())]
    return shapes, tensors, tuple(_state(thing) for thing in objects)


def _state(thing: Any) -> tuple:
    attributes = getattr(thing, "__dict__", {})
    return tuple(
        (name, value if isinstance(value, SCALARS) else id(value))
        for name, value in attributes.items()
        if isinstance(value, (*SCALARS, Tensor))
    )


def _trace(
    function: Callable[..., list[Tensor]], args: tuple, parameters: Parameters
) -> GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx

    graphs = []
    for _ in range(2):
        with undone(parameters, args), pyro.validation_enabled(False):
            try:
                graphs.append(make_fx(function)(*args))
            except (RuntimeError, NotImplementedError, ValueError) as error:
                raise CaptureError(_reason(error)) from error
    if graphs[0].code != graphs[1].code:
        raise CaptureError("its trace changes from call to call: sample the same sites each time")
    return graphs[0]


def _lift(graph: GraphModule) -> tuple[GraphModule, list[Tensor]]:
    """Make every tensor that the record refers to an input, each once, before its arguments."""
    constants: dict[int, tuple[Tensor, Any]] = {}
    first = next(iter(graph.graph.nodes))
    for node in [n for n in graph.graph.nodes if n.op == "get_attr"]:
        tensor = getattr(graph, node.target)
        if id(tensor) not in constants:
            with graph.graph.inserting_before(first):
                constants[id(tensor)] = tensor, graph.graph.placeholder(f"held_{len(constants)}")
        node.replace_all_uses_with(constants[id(tensor)][1])
        graph.graph.erase_node(node)
    graph.recompile()
    return graph, [tensor for tensor, _ in constants.values()]


def _compile(graph: GraphModule, inputs: list[Tensor]) -> Callable:
    from torch._inductor.compile_fx import compile_fx

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return compile_fx(graph, inputs, config_patches={"fallback_random": True})
        except Exception as error:
            raise CaptureError(f"the compiler failed: {_reason(error)}") from error


def compare(what: str, found: Tensor, expected: Tensor, slack: Tensor | float = 0.0) -> None:
    """Hold a captured value against the eager one, to the rounding of its type.

    Args:
        what: What to call it.
        found: The captured value.
        expected: The eager one.
        slack: What rounding may add to a value that is zero but for rounding.

    Raises:
        CaptureError: If they differ by more; values that are not finite say nothing.
    """
    scale = expected.abs().max()
    tolerance = 1e-3 if expected.dtype == torch.float32 else 1e-5
    close = (found - expected).abs().max() <= tolerance * scale + slack + 1e-6
    if bool(scale.isfinite()) and not bool(close):
        raise CaptureError(
            f"{what} came out otherwise than through the handlers: the program may depend on "
            f"something that changes between calls and is no tensor"
        )


@contextmanager
def undone(parameters: Parameters, args: tuple) -> Iterator[None]:
    """Run a block and give buffers and random streams back as they were."""
    before = [
        (module, name, buffer, buffer.clone())
        for root in parameters.roots.values()
        for module in root.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    device = args[0].device
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices, device_type="cuda"):
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in before:
                setattr(module, name, buffer)
                buffer.copy_(value)


def _reason(error: Exception) -> str:
    text = str(error)
    if "_local_scalar_dense" in text or "data-dependent" in text or ".item()" in text:
        return "it reads a value back from a tensor (.item(), if tensor:): keep it on the device"
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__
