"""What is exported of a pair, as functions of tensors, and these as one module for any batch."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.fx import GraphModule, Node

from pyrovae._tools.seeding import seeded
from pyrovae._tools.whole import unrolled
from pyrovae.compiling.graph import CaptureError, lift, record
from pyrovae.evidence.proposals import Proposal, joint_density
from pyrovae.exporting.noise import Noise
from pyrovae.pairs.contract import argument_names
from pyrovae.pairs.generation import element_of
from pyrovae.pairs.pair import Given, Pair
from pyrovae.pairs.traces import Site, Values, is_bookkeeping, samples

# What may be said of a distribution beside its parameters, by the ending of an output's name.
PARTS: dict[str, Callable[[Site], Tensor]] = {
    "mean": lambda site: site["fn"].mean,
    "sd": lambda site: site["fn"].variance.sqrt(),
    "probs": lambda site: element_of(site["fn"]).probs,
    "draw": lambda site: site["value"],
}
# The sizes of the batch that are recorded.
SIZES = 3, 5


class Task:
    """A function of a pair: what it takes, ``[N, ...]`` by name, and what it gives, likewise.

    ``rows`` are the arguments of both programs, ``latents`` values of these. ``single`` are the
    shapes of what one datum draws, None where all data share a draw, and ``draws`` says over how
    many of each datum the function goes, None where it takes one.
    """

    takes_latents = False

    def __init__(self, pair: Pair, rows: tuple[Tensor, ...], draws: int | None = None) -> None:
        self.pair, self.rows, self.draws = pair, rows, draws
        # Where a latent may be observed as well, an argument may be called as the latent is.
        taken = pair.layout.latents if self.takes_latents else ()
        names = argument_names(pair.model, rows)
        names = [f"{name}_argument" if name in taken else name for name in names]
        self.inputs = dict(zip(names, rows, strict=True))
        with seeded(0):
            drawn = samples(pair.trace_guide(*rows))
        rank, dim = (lambda s: s["value"].dim() - s["fn"].event_dim), pair.layout.dim
        # Where the batch is in a latent's values, and these with the batch first.
        self.places = {name: rank(drawn[name]) + dim for name in pair.layout.latents}
        self.latents = {n: drawn[n]["value"].movedim(d, 0) for n, d in self.places.items()}
        self.inputs |= self.latents if self.takes_latents else {}
        self.known: dict[str, list[str]] = {}
        shapes = []
        for size in (1, 2):
            with seeded(0), Noise() as counted:
                found = self.run(*(each[:size] for each in self.inputs.values()))
            shapes.append(counted.shapes)
        self.outputs = list(found)
        self.single = [None if one == two else one for one, two in zip(*shapes, strict=False)]
        with seeded(0):
            size = sum(each.numel() for each in self.single if each is not None)
            shape = len(rows[0]), *([draws] if draws else []), size // self.particles
            self.inputs["noise"] = torch.randn(shape)

    @property
    def particles(self) -> int:
        """How many draws of each datum a run makes."""
        return self.draws or 1

    def run(self, *batch: Tensor) -> Values:
        """The function's values ``[N, ...]`` by name."""
        raise NotImplementedError

    def with_noise(self, *args: Tensor) -> Values:
        """The function of its inputs, the noise among them."""
        *batch, noise = args
        with Noise(noise.reshape(len(noise), self.particles, -1), self.single):
            return self.run(*batch)

    def described(self, sites: dict[str, Site]) -> Values:
        """What is known of the distributions of sites, by the names of the outputs."""
        found: Values = {}
        for name, site in sites.items():
            if name not in self.known:
                self.known[name] = self.look(site)
            place = len(site["fn"].batch_shape) + self.pair.layout.dim
            for part in self.known[name]:
                found[f"{name}_{part}"] = _part(site, part).movedim(place, 0)
        return found

    def look(self, site: Site) -> list[str]:
        """Which parts of a site's distribution are known; a draw where none is."""
        if isinstance(element_of(site["fn"]), Categorical):
            return ["probs"]
        return [part for part in ("mean", "sd") if _is_known(site, part)] or ["draw"]


class Encoder(Task):
    """The moments of q(z | x), site by site."""

    def run(self, *batch: Tensor) -> Values:
        """By latent."""
        sites = samples(self.pair.trace_guide(*batch))
        return self.described({name: sites[name] for name in self.pair.layout.latents})


class Decoder(Task):
    """The mean and the parameters of p(x | z), site by site."""

    takes_latents = True

    def run(self, *batch: Tensor) -> Values:
        """By observed site."""
        rows, values = batch[: len(self.rows)], batch[len(self.rows) :]
        placed = {
            name: value.movedim(0, place)
            for (name, place), value in zip(self.places.items(), values, strict=True)
        }
        trace = self.pair.trace_given(self.pair.run_model, rows, None, Given(placed))
        observed = {n: s for n, s in samples(trace).items() if s["is_observed"]}
        return self.described({n: s for n, s in observed.items() if not is_bookkeeping(s)})

    def look(self, site: Site) -> list[str]:
        """The mean, and the parameters that the distribution was made of."""
        element = element_of(site["fn"])
        if isinstance(element, Categorical):
            return ["probs"]
        given = [n for n in element.arg_constraints if isinstance(vars(element).get(n), Tensor)]
        given = given[: 1 if {"probs", "logits"} == {*given} else None]
        if not _is_known(site, "mean"):
            return given or ["draw"]
        mean = site["fn"].mean
        return ["mean", *(n for n in given if not torch.equal(_part(site, n), mean))]


class Evidence(Task):
    """The estimate of log p(x) from K draws of the guide, and its standard error."""

    def run(self, *batch: Tensor) -> Values:
        """By the delta method, as :class:`pyrovae.evidence.weights.Sums` has it."""
        k = self.particles
        values, own = Proposal(self.pair).draw(batch, k)
        found = joint_density(self.pair, batch, k, values)
        log_weight = found.prior + found.likelihood - own
        peak = log_weight.amax(0)
        shift = torch.where(peak.isinf(), 0.0, peak)
        weight = (log_weight - shift).exp()
        mean = weight.mean(0)
        log_prob = torch.where(peak.isinf(), peak, shift + mean.log())
        if k == 1:
            return {"log_prob": log_prob}
        error = ((weight - mean).square().mean(0) / (k - 1)).sqrt() / mean
        return {"log_prob": log_prob, "standard_error": error}


class Program(nn.Module):
    """A task as a module of its own, over a batch of any size.

    The task is recorded for two sizes of the batch. Numbers in which the records differ are those
    of the batch, as N or K N are, and are made of its size.

    Args:
        task: The task.

    Raises:
        CaptureError: If the pair's programs cannot be recorded, or their record depends on the
            batch in another way.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        with unrolled():
            (graph, held), (other, others) = (_recorded(task, size) for size in SIZES)
        _require_alike(held, others)
        _generalize(graph, other, len(held))
        places = [node for node in graph.graph.nodes if node.op == "placeholder"]
        used = [bool(node.users) for node in places]
        for node, wanted in zip(places, used, strict=True):
            if not wanted:
                graph.graph.erase_node(node)
        graph.recompile()
        self.graph, self.names, self.outputs = graph, [], task.outputs
        leaves = {leaf.data_ptr(): name for name, leaf in task.pair.named().items()}
        for number, (tensor, wanted) in enumerate(zip(held, used, strict=False)):
            if wanted:
                # A view of a parameter lies where the parameter does.
                name = leaves.pop(tensor.data_ptr(), f"constant_{number}").replace(".", "__")
                # Of its own storage, as torch.export's files keep whole storages.
                own = tensor.detach().clone(memory_format=torch.contiguous_format)
                self.register_buffer(name, own)
                self.names.append(name)
        inputs = zip(task.inputs.items(), used[len(held) :], strict=True)
        self.inputs = {name: value for (name, value), wanted in inputs if wanted}
        if task.takes_latents and next(iter(task.inputs)) in self.inputs:
            raise CaptureError("its likelihood reads the x that it observes")

    def forward(self, *inputs: Tensor) -> Values:
        """The task's values for each of N data."""
        held = [getattr(self, name) for name in self.names]
        return dict(zip(self.outputs, self.graph(*held, *inputs), strict=True))


def _recorded(task: Task, size: int) -> tuple[GraphModule, list[Tensor]]:
    """What a task asks of the device for so many data, and the tensors that it holds."""

    def run(*args: Tensor) -> list[Tensor]:
        return [*task.with_noise(*args).values()]

    from torch.fx.experimental.proxy_tensor import make_fx

    args = tuple(each[:size] for each in task.inputs.values())
    graph, held = lift(record(run, args, task.pair, calls=1))
    # Where nothing is written in place, what no output depends on can be left out.
    graph = make_fx(torch.func.functionalize(graph))(*held, *args)
    # What squeezes every dimension of size 1 (Pyro's sums over enumerated latents do) would take
    # a batch of one datum with it.
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.squeeze.default):
        shape = node.args[0].meta["tensor_meta"].shape
        node.target = torch.ops.aten.squeeze.dims
        node.args = node.args[0], [dim for dim, size in enumerate(shape) if size == 1]
        if not node.args[1]:  # ONNX has none of no dimension
            node.replace_all_uses_with(node.args[0])
    graph.graph.eliminate_dead_code()
    return graph, held


def _require_alike(held: list[Tensor], others: list[Tensor]) -> None:
    """Refuse constants that depend on the batch or change from call to call."""
    if len(held) != len(others):
        raise CaptureError("it uses other constants for another size of the batch")
    for one, two in zip(held, others, strict=True):
        if one.shape != two.shape or not torch.equal(one, two):
            raise CaptureError(
                f"a constant of it, of shape {list(one.shape)}, depends on the size of the batch, "
                f"or changes from call to call"
            )


def _generalize(graph: GraphModule, other: GraphModule, held: int) -> None:
    """Make what differs between two sizes of the batch a multiple of the size, plus a number."""
    nodes, others = [*graph.graph.nodes], [*other.graph.nodes]
    if [(n.op, str(n.target)) for n in nodes] != [(n.op, str(n.target)) for n in others]:
        raise CaptureError("it does otherwise for another size of the batch, or from call to call")
    inputs = [node for node in nodes if node.op == "placeholder"][held:]
    first = next((node for node in inputs if node.users), inputs[-1])
    with graph.graph.inserting_after(first):
        batch = graph.graph.call_function(torch.ops.aten.sym_size.int, (first, 0))

    def merged(one: Any, two: Any) -> Any:
        if isinstance(one, tuple | list):
            if len(one) == len(two):
                return type(one)(map(merged, one, two))
        elif one == two or (isinstance(one, Node) and one.name == two.name) or one != one:
            return one
        elif type(one) is type(two) is int:
            slope, rest = divmod(two - one, SIZES[1] - SIZES[0])
            if not rest:
                scaled = graph.graph.call_function(operator.mul, (batch, slope))
                offset = one - slope * SIZES[0]
                return graph.graph.call_function(operator.add, (scaled, offset))
        raise CaptureError(f"it depends on the size of the batch by a number, {one} or {two}")

    for node, twin in zip(nodes, others, strict=True):
        with graph.graph.inserting_before(node):
            if node.op == "call_function":
                node.args = merged(node.args, twin.args)
                values = (merged(value, twin.kwargs[name]) for name, value in node.kwargs.items())
                node.kwargs = dict(zip(node.kwargs, values, strict=True))


def _is_known(site: Site, part: str) -> bool:
    try:
        return not bool(PARTS[part](site).isnan().any())
    except NotImplementedError:
        return False


def _part(site: Site, part: str) -> Tensor:
    """A part of a site's distribution, with the shape of its batch before that of an event."""
    element, fn = element_of(site["fn"]), site["fn"]
    if part in PARTS and part not in element.arg_constraints:
        return PARTS[part](site)
    value = getattr(element, part)
    own = element.arg_constraints[part].event_dim
    batch = fn.shape()[: len(fn.shape()) - element.event_dim]
    return value.expand(batch + value.shape[value.dim() - own :])
