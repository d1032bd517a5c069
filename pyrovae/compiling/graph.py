"""Compile a function over a pair's programs into one graph.

The handlers, autograd and the programs run once, under a tracer (make_fx) that records what they
ask of the device; Inductor compiles the record, and on CUDA a CUDA graph replays it.
"""

# What is private in torch here was the same in 2.11 to 2.14.

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from itertools import count
from operator import getitem
from typing import Any

import pyro
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx import GraphModule, Node
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from pyrovae._tools import warn
from pyrovae._tools.seeding import seeded, undone
from pyrovae.compiling.inductor import compiled
from pyrovae.pairs.pair import Pair

# torch's kernels for packed sequences read lengths where no tracer sees it.
PACKING = ("_pack_padded_sequence", "_pad_packed_sequence")
# Methods of a tensor that give its values to Python.
READING = {"item", "tolist", "numpy", "__array__", "__float__", "__int__", "__bool__", "__index__"}
READING |= {"__complex__", "__repr__", "__format__"}
READ_BACK = "it reads a value back from a tensor (.item(), if tensor:): keep it on the device"
ATEN = torch.ops.aten
# What makes a tensor, and does nothing else; batch normalization writes, and does not say so.
MADE = {ATEN.lift_fresh_copy.default, ATEN.detach.default, ATEN.arange.default}
# Of the losses of torch: 1 is the mean and 2 the sum.
NO_REDUCTION = 0
# torch draws normal numbers on a CPU in blocks of so many.
DRAWN = 16
# Calls before a CUDA graph is recorded, in which cuBLAS and the like allocate what they keep;
# torch's notes on CUDA graphs take three.
WARM_UP = 3


class CaptureError(RuntimeError):
    """A program cannot be captured; the message says why and what to change."""


class Graph:
    """A function of tensors as one compiled graph, run without gradients.

    What else the function reads (weights, buffers, data) becomes an input as well, so that later
    changes in place are seen, and what it changes in place is changed in place. Capturing leaves
    buffers, random streams and ``changed``, what else is written to, as they were. A later call
    does not overwrite the first ``copied`` outputs; None is all. What cannot be captured raises
    :class:`CaptureError`. ``draws`` says whether it may draw random numbers.
    """

    def __init__(
        self,
        function: Callable[..., list[Tensor]],
        args: tuple,
        pair: Pair,
        changed: tuple[Tensor, ...] = (),
        copied: int | None = None,
    ) -> None:
        graph, self.constants = lift(record(function, args, pair, changed))
        self._views: list[Tensor] = []
        self._places: list[int] = []
        self._launched: Callable[..., list[Tensor]] | None = None
        self._strides = [arg.stride() for arg in args]
        self.draws = not all(map(_is_certain, graph.graph.nodes))
        with undone(pair.modules, args[0].device, changed), torch.no_grad():
            self.run = _compile(drawn_at_once(without_log1p(graph)), [*self._held(), *args])
            if args[0].device.type == "cuda":
                self._launched = self.run
                self.run = _replayed(self._launched, self._held(), args, copied)

    @torch.no_grad()
    def __call__(self, *args: Tensor) -> list[Tensor]:
        held = self._held()
        return self.run(*held, *map(_laid, args, self._strides))

    def bound(self, changing: Tensor | None = None) -> Callable[..., list[Tensor]]:
        """The same function of arguments and of a held tensor, with what it holds bound for good.

        Called without gradients; its first argument stands in the place of ``changing``, if that is
        held.
        """
        held: list[Tensor | None] = [*self._held()]
        run, strides = self.run, self._strides
        place = None if changing is None else changing.data_ptr()
        there = [n for n, tensor in enumerate(self.constants) if tensor.data_ptr() == place]

        def call(value: Tensor | None, args: tuple[Tensor, ...]) -> list[Tensor]:
            for n in there:
                held[n] = value
            return run(*held, *map(_laid, args, strides))

        return call

    def _held(self) -> list[Tensor]:
        """What the function holds, without gradients; made anew where a tensor has moved."""
        # A person may set a weight's .data, or move a module: the record has the old tensor's
        # strides, and a CUDA graph, which is then left, its address.
        places = [tensor.data_ptr() for tensor in self.constants]
        if places != self._places:
            views = [tensor.detach() for tensor in self.constants]
            if self._views and [*map(form, views)] != [*map(form, self._views)]:
                raise CaptureError("a tensor that it uses lies elsewhere than when it was captured")
            if self._views and self._launched is not None:
                self.run = self._launched
            self._places, self._views = places, views
        return self._views


def record(
    function: Callable[..., list[Tensor]],
    args: tuple,
    pair: Pair,
    changed: tuple[Tensor, ...] = (),
    calls: int = 2,
) -> GraphModule:
    """What a function asks of the device, the same in so many calls; arguments as for Graph."""
    # make_fx sees ATen operations below Pyro and autograd, so that handlers may do what they like
    # in Python. It takes for constants whatever is no tensor: a second call finds what changes.
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    # Else make_fx makes a mode, and looks at the stack for it, for each value that it records.
    context = TracingContext(FakeTensorMode())

    def call(traced: Callable = make_fx) -> tuple[Any, list]:
        asked = _Asked()

        def inside(*args: Tensor) -> list[Tensor]:
            # Modes entered here are asked before make_fx's own.
            asked.note("given", args)
            with _Spelled(), asked:
                found = function(*args)
            asked.note("found", found)
            return found

        # Pyro's validation asks whether values are in a support, which reads them back.
        with undone(pair.modules, args[0].device, changed), pyro.validation_enabled(False):
            try:
                with tracing(context):
                    return traced(inside)(*args), asked.calls
            except (RuntimeError, NotImplementedError, ValueError) as error:
                raise CaptureError(_reason(error)) from error

    graph, asked = call()
    # To listen takes a twentieth of the time; a program may also ask whether it is recorded.
    if calls > 1 and call(lambda inside: inside)[1] != asked and call()[0].code != graph.code:
        raise CaptureError("its trace changes from call to call: sample the same sites each time")
    return graph


class _Asked(TorchDispatchMode):
    """Notes which operators are called, and with what: tensors by the call that they come from.

    It refuses those that read values back, for which make_fx has no class of error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self._names, self._unused = WeakTensorKeyDictionary(), count()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.note(func, (args, kwargs))
        if torch.Tag.dynamic_output_shape in func.tags and not _is_indexed_by_numbers(func, args):
            raise CaptureError(
                "the shape of a tensor depends on values (a mask as an index, nonzero): "
                "use torch.where"
            )
        try:
            found = func(*args, **(kwargs or {}))
        except RuntimeError as error:
            if torch.Tag.data_dependent_output in func.tags:
                raise DataDependentOutputException(func) from error
            raise
        for place, value in enumerate(tree_leaves(found)):
            if isinstance(value, Tensor):
                self._names[value] = len(self.calls), place
        return found

    def note(self, what: Any, given: Any) -> None:
        """Note that something was called with these arguments."""
        leaves, form = tree_flatten(given)
        self.calls.append((what, form, [*map(self._name, leaves)]))

    def _name(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return repr(value)
        if value not in self._names:
            self._names[value] = next(self._unused)
        return self._names[value]


def _is_indexed_by_numbers(func: Any, args: tuple) -> bool:
    if func is not torch.ops.aten.index.Tensor:
        return False
    return not any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])


class _Spelled(TorchFunctionMode):
    """Spells functions so that they can be recorded and come out as they do eagerly.

    one_hot looks at its values on a CPU. bernoulli becomes a comparison with uniform draws, which
    Inductor of torch 2.11 may move before draws that come earlier; drawn in place, as torch itself
    does it, it stays where it is.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.nn.functional.one_hot and len(args) == 2:
            index, size = args
            return (index.unsqueeze(-1) == torch.arange(size, device=index.device)).long()
        name = getattr(func, "__name__", "")
        if name in PACKING:
            raise CaptureError("it packs sequences, whose lengths are read back")
        if name in READING and getattr(torch.Tensor, name, None) is func:
            # Of a weight or a buffer, make_fx would take the value for a constant.
            raise CaptureError(READ_BACK)
        if func is torch.bernoulli and len(args) == 1 and not kwargs:
            return torch.empty_like(args[0]).bernoulli_(args[0])
        return func(*args, **(kwargs or {}))


def lift(graph: GraphModule) -> tuple[GraphModule, list[Tensor]]:
    """Make every tensor that the record refers to an input, each once, before its arguments.

    make_fx keeps them as attributes, and Inductor would fold those into its code as constants: a
    weight that is updated would stay what it was. What is made and not used goes: each plate of
    Pyro's (1.9.2) makes a tensor on the CPU, which a CUDA graph could not hold.
    """
    for node in reversed([*graph.graph.nodes]):
        if not node.users and (node.op == "get_attr" or node.target in MADE):
            graph.graph.erase_node(node)
    held: dict[tuple, Tensor] = {}
    inputs: dict[tuple, Any] = {}
    first = next(iter(graph.graph.nodes))
    for node in [n for n in graph.graph.nodes if n.op == "get_attr"]:
        tensor = getattr(graph, node.target)
        place = _place(tensor)
        if place not in held:
            with graph.graph.inserting_before(first):
                inputs[place] = graph.graph.placeholder(f"held_{len(held)}")
                inputs[place].meta = dict(node.meta)
        if place not in held or isinstance(tensor, Parameter):
            held[place] = tensor
        node.replace_all_uses_with(inputs[place])
        graph.graph.erase_node(node)
    return GraphModule({}, graph.graph), list(held.values())


def _place(tensor: Tensor) -> tuple:
    """Where a tensor lies; a parameter and what autograd keeps of it lie in one place."""
    if not tensor.numel():
        return (id(tensor),)
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def form(tensor: Tensor) -> tuple:
    """What of a tensor a compiled graph takes for fixed."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _laid(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The tensor as a graph takes it, which was compiled for one order in memory."""
    if tensor.stride() == stride:
        return tensor
    return tensor.new_empty_strided(tensor.shape, stride).copy_(tensor)


def without_log1p(graph: GraphModule) -> GraphModule:
    r"""The same record with the losses of Bernoullis at logits l spelled by a plain logarithm.

    .. math:: -\ln p(x) = \max(l, 0) - x l + \ln(1 + e^{-|l|})

    What is lost is less than the rounding of 1, some 1e-7 nats. log1p takes ten times as long on a
    CPU as all else of such a loss: a seventh of a step (Inductor of torch 2.14, AVX-512).
    """
    call, loss = graph.graph.call_function, ATEN.binary_cross_entropy_with_logits.default
    for node in graph.graph.find_nodes(op="call_function", target=loss):
        logits, value, *rest = node.args
        precise = node.meta["val"].dtype in (torch.float32, torch.float64)
        if rest != [None, None, NO_REDUCTION] or not precise:
            continue
        with graph.graph.inserting_before(node):
            straight = call(ATEN.clamp_min.default, (logits, 0.0))
            straight = call(ATEN.sub.Tensor, (straight, call(ATEN.mul.Tensor, (value, logits))))
            bent = call(ATEN.neg.default, (call(ATEN.abs.default, (logits,)),))
            bent = call(ATEN.add.Scalar, (call(ATEN.exp.default, (bent,)), 1.0))
            found = call(ATEN.add.Tensor, (straight, call(ATEN.log.default, (bent,))))
        node.replace_all_uses_with(found)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph


def drawn_at_once(graph: GraphModule) -> GraphModule:
    """The same record with normal numbers of several sites drawn by one call each, and then cut.

    On a CPU these are the same numbers, as torch makes them in blocks. A call, and the tensors that
    it makes, take 4 µs.
    """
    draws: list[Node] = []
    for node in list(graph.graph.nodes):
        if _can_be_drawn_with(node, draws):
            draws.append(node)
        elif node.op == "output" or not _is_certain(node):
            _draw_at_once(graph, draws)
            draws = [node] if _can_be_drawn_with(node, []) else []
    graph.recompile()
    return graph


def _is_certain(node: Node) -> bool:
    """Whether a node is known to draw nothing."""
    if not isinstance(node.target, OpOverload):
        return node.op != "call_function" or node.target is getitem
    return node.target.namespace == "aten" and torch.Tag.nondeterministic_seeded not in (
        node.target.tags
    )


def _can_be_drawn_with(node: Node, draws: list[Node]) -> bool:
    """Whether a node fills a new tensor with standard normal numbers, as these do, in blocks."""
    if node.target is not ATEN.normal_.default or len(node.args) > 1 or node.kwargs:
        return False
    made, value = node.args[0], node.meta["val"]
    return (
        isinstance(made, Node)
        and made.target is ATEN.empty.memory_format
        and len(made.users) == 1
        and value.device.type == "cpu"
        and value.numel() > 0
        and value.numel() % DRAWN == 0
        and value.is_contiguous()
        and all(value.dtype == each.meta["val"].dtype for each in draws)
        and _is_drawn_in_blocks(value.dtype)
    )


@functools.cache
def _is_drawn_in_blocks(dtype: torch.dtype) -> bool:
    """Whether several calls draw the same as one for as many numbers."""
    whole, parts = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    sizes = (DRAWN, 3 * DRAWN, 2 * DRAWN)
    each = [torch.empty(size, dtype=dtype).normal_(generator=parts) for size in sizes]
    at_once = torch.empty(sum(sizes), dtype=dtype).normal_(generator=whole)
    return torch.equal(torch.cat(each), at_once)


def _draw_at_once(graph: GraphModule, draws: list[Node]) -> None:
    if len(draws) < 2:
        return
    values, call = [node.meta["val"] for node in draws], graph.graph.call_function
    sizes = [value.numel() for value in values]
    how = {"dtype": values[0].dtype, "device": values[0].device}
    with graph.graph.inserting_before(draws[0]):
        made = call(ATEN.empty.memory_format, ([sum(sizes)],), how)
        parts = call(ATEN.split_with_sizes.default, (call(ATEN.normal_.default, (made,)), sizes))
        for number, (node, value) in enumerate(zip(draws, values, strict=True)):
            part = call(ATEN.view.default, (call(getitem, (parts, number)), list(value.shape)))
            node.replace_all_uses_with(part)
    for node in draws:
        unused = node.all_input_nodes
        for each in (node, *unused):
            graph.graph.erase_node(each)


def _compile(graph: GraphModule, inputs: list[Tensor]) -> Any:
    try:
        run = compiled(graph, inputs)
        # The first run tunes kernels and allocates, and shows whether the code runs at all: it does
        # not with an LSTM of torch 2.11 to 2.14 on a CPU. What it writes is undone by the caller.
        run(*inputs)
        return run
    except Exception as error:
        raise CaptureError(f"the compiler failed: {_reason(error)}") from error


def _replayed(run: Callable, held: list[Tensor], args: tuple, copied: int | None) -> Callable:
    """The compiled function recorded as a CUDA graph: one launch a call, no work on the host."""
    if any(tensor.device.type != "cuda" for tensor in (*held, *args)):
        warn("The compiled step is launched kernel by kernel: it reads a tensor on the CPU.")
        return run
    # Inputs lie still: a call's arguments are copied over those of the recording.
    still = [arg.clone() for arg in args]
    # Streams are those of the current device.
    with torch.cuda.device(args[0].device):
        # Not on the default stream, from which nothing can be recorded.
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        try:
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    run(*held, *still)
            here.wait_stream(side)
            recording = torch.cuda.CUDAGraph()
            # A thread that reads data ahead may ask for pinned memory meanwhile.
            with torch.cuda.graph(recording, stream=side, capture_error_mode="thread_local"):
                outputs = run(*held, *still)
        except RuntimeError as error:
            # A recording that fails leaves its stream the current one (torch 2.11 to 2.14).
            torch.cuda.set_stream(here)
            warn(f"The compiled step is launched kernel by kernel, not as a CUDA graph: {error}")
            return run

    def replay(*inputs: Tensor) -> list[Tensor]:
        for there, arg in zip(still, inputs[len(held) :], strict=True):
            there.copy_(arg)
        recording.replay()
        return [o.clone() for o in outputs[:copied]] + list(outputs[len(outputs[:copied]) :])

    return replay


def audited(
    function: Callable[..., list[Tensor]],
    args: tuple,
    pair: Pair,
    named: Iterable[tuple[str, float]],
) -> Graph:
    """A graph of a function, whose results have to be the function's own under one seed.

    ``named`` says what each result is and which share of its values may differ.
    """
    graph, results = Graph(function, args, pair), []
    for run in (function, graph):
        with seeded(0, args[0].device):
            results.append(run(*args))
    for (what, share), expected, found in zip(named, *results, strict=False):
        compare(what, found, expected, share=share)
    return graph


def compare(
    what: str,
    found: Tensor,
    expected: Tensor,
    slack: Tensor | float = 0.0,
    *,
    share: float = 0.0,
) -> None:
    """Refuse a captured value that is not the eager one, up to rounding of its type and ``slack``.

    A ``share`` of it may be; values that are not finite say nothing.
    """
    # Compiled sums add in another order: a thousandth leaves room for long ones in float32, and a
    # program that has changed differs by more.
    if not expected.numel():
        return
    tolerance = 1e-3 if expected.dtype == torch.float32 else 1e-5
    if not (expected.is_floating_point() or expected.is_complex()):
        found, expected = found.double(), expected.double()
    scale = expected.abs().max()
    other = ~((found - expected).abs() <= tolerance * scale + slack + 1e-6)
    if bool(scale.isfinite()) and bool(other.double().mean() > share):
        raise CaptureError(
            f"{what} came out otherwise than through the handlers: the program may depend on "
            f"something that changes between calls and is no tensor"
        )


def _reason(error: Exception) -> str:
    if isinstance(error, DataDependentOutputException):
        return READ_BACK
    text = str(error)
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__
