"""Whether a pair's programs take a plate of particles, by trying a few.

The answer may depend on the weights: a layer of zeros hides that a softmax is taken over the wrong
dimension. So it is kept only while everything that it depends on is known to be as it was: the
programs, every plain attribute of their modules, and every parameter and buffer by its norm and its
sum, which any step of training changes. Then another trial would be the same computation on other
data of the same shape. Pairs with more state than that (a function's closure, a list of objects, a
hook) are tried each time. Not seen is a global that a module's code reads.
"""

from __future__ import annotations

import warnings
from types import BuiltinFunctionType, MethodType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
from pyro.poutine import Trace
from torch import Tensor, nn

from pyrovae._tools.seeding import seeded, undone
from pyrovae.pairs.traces import Values, drawn, site_scores

if TYPE_CHECKING:
    from pyrovae.pairs.pair import Pair

# On how many rows and particles a plate of particles is tried, and how far rounding, or a flow
# that is inverted numerically, may move a score there, in nats and as a share of it.
ROWS, PARTICLES, TOLERANCE = 5, 3, 1e-3
# What was found, by the module of the model: the state of the pair, and the answer.
_KEPT: WeakKeyDictionary[nn.Module, tuple[tuple, bool]] = WeakKeyDictionary()
# What torch keeps at every module, none of it a choice of the program but hooks.
_OWN = vars(nn.Module()).keys()
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def takes_a_plate(pair: Pair, rows: tuple) -> bool:
    """Whether a draw scores among K particles, left of the batch, as it does without a plate.

    A few rows are tried, in eval mode; all of them where the programs take no fewer. The answer is
    kept for rows of these shapes while the pair's state is what it was.
    """
    state, anchor = _state(pair, rows), _anchor(pair.model)
    kept = _KEPT.get(anchor) if anchor is not None else None
    if state is not None and kept is not None and kept[0] == state:
        pair.folds = False
        return kept[1]
    found = _try(pair, rows)
    if state is not None and anchor is not None:
        _KEPT[anchor] = state, found
    return found


def _try(pair: Pair, rows: tuple) -> bool:
    few = (r[:ROWS] if isinstance(r, Tensor) and len(r) == len(rows[0]) else r for r in rows)
    pair.folds = False
    with (
        torch.no_grad(),
        pair.mode(training=False),
        undone(pair.modules, rows[0].device),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        known = False
        for some in (tuple(few), rows):
            try:
                with seeded(0, rows[0].device):
                    alone = pair.trace(*some, sums=True)
            except Exception:
                continue
            try:
                return _scores_alike(pair, some, alone)
            except Exception:
                known = True  # unless it is only that a guide's sites have the size of all rows
    return not known  # nothing is known of a pair that runs with particles alone


def _scores_alike(pair: Pair, rows: tuple, alone: tuple[Trace, Trace]) -> bool:
    layout, size = pair.known, len(rows[0])
    values: Values = {}
    for name, site in drawn(alone[1]).items():
        rank = site["fn"].event_dim - layout.particle_dim - 1
        value = site["value"][(None,) * (rank - site["value"].dim())]
        # The other particles are draws for other data: particle 0 is to take no notice.
        batch = layout.dim - site["fn"].event_dim
        values[name] = torch.stack([value.roll(k, batch) for k in range(PARTICLES)])
    model, _ = pair.score_model(rows, PARTICLES, values)
    try:
        guide = pair.score_guide(rows, PARTICLES, values)
    except (NotImplementedError, KeyError):  # a flow that knows its own draws alone
        with seeded(0, rows[0].device):
            trace = pair.trace_guide(*rows, particles=1)
        guide = site_scores(trace, layout, 1, size)
    for scores, trace in zip((model, guide), alone, strict=True):
        expected = site_scores(trace, layout, None, size)
        for name, score in scores.items():
            if not torch.allclose(
                score[0], expected[name][0], TOLERANCE, TOLERANCE, equal_nan=True
            ):
                return False
    return True


def _anchor(program: Any) -> nn.Module | None:
    """The module that a program is, or is a method of."""
    owner = program.__self__ if isinstance(program, MethodType) else program
    return owner if isinstance(owner, nn.Module) else None


def _state(pair: Pair, rows: tuple) -> tuple | None:
    """All that the answer depends on, as far as it shows; None where more may hide."""
    owners = _anchor(pair.model), _anchor(pair.guide)
    if None in owners or not all(isinstance(row, Tensor) for row in rows):
        return None
    modules, plain, tensors = pair.modules, [], []
    for module in modules:
        if any(getattr(module, name) for name in _HOOKS):
            return None
        tensors += [*module._parameters.values(), *module._buffers.values()]
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                tensors.append(value)
            elif name not in _OWN and not name.startswith("_pyro_"):
                known, value = _plain(value)
                if not known:
                    return None
                plain.append((name, value))
    names = tuple(getattr(program, "__name__", "") for program in (pair.model, pair.guide))
    shapes = tuple((row.shape, row.dtype, row.device) for row in rows)
    held = [tensor.detach() for tensor in tensors if tensor is not None]
    if any(tensor.is_complex() or tensor.layout != torch.strided for tensor in held):
        return None
    classes = tuple(map(type, modules))
    return tuple(map(ref, owners)), names, shapes, classes, tuple(plain), _digest(held)


def _plain(value: Any) -> tuple[bool, Any]:
    """Whether a value is all that it seems to be, and the value in a form that compares."""
    if isinstance(value, tuple | list):
        inner = [_plain(each) for each in value]
        return all(known for known, _ in inner), tuple(each for _, each in inner)
    if isinstance(value, nn.Module):  # one of the pair's, or part of none of its programs
        return True, id(value)
    kinds = (int, float, str, torch.dtype, torch.device, BuiltinFunctionType)
    return value is None or isinstance(value, kinds), value


def _digest(tensors: list[Tensor]) -> tuple:
    """The shape of each tensor, its sum and its norm."""
    numbers = [f(t.float()) for t in tensors for f in (torch.sum, torch.linalg.vector_norm)]
    values = torch.stack(numbers).tolist() if numbers else []
    return tuple(tensor.shape for tensor in tensors), tuple(values)
