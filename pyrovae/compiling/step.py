"""Training steps as compiled graphs: when to make one, when it holds, and what it returns."""

from __future__ import annotations

import functools
import math
import re
import time
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from itertools import islice, repeat, takewhile
from types import FunctionType, MethodType
from typing import Any, NamedTuple, Protocol

import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from pyrovae._tools import should_compile, warn
from pyrovae._tools.seeding import seeded, undone
from pyrovae.compiling.graph import CaptureError, Graph, compare, form
from pyrovae.compiling.reads import (
    VALUES,
    Entry,
    ProgramWatch,
    Seen,
    Walk,
    assigned,
    is_library,
    kept,
)
from pyrovae.compiling.update import Average, OptionsWatch, Update, UpdateError
from pyrovae.objectives import Estimate, Objective, estimate
from pyrovae.pairs.pair import Pair

# A start takes some 9 s with an empty cache and 3 s with what was compiled before; a compiled step
# saves 3 ms or more. So this loses 3 s the first time and wins 3 s later (docs/benchmarks.md).
PAYS_AFTER = 2_000
# Another shape of batch than the first, or another state, is compiled once it came so often.
AGAIN_AFTER = 500
# Batches whose shape changes each time must not fill the memory with counts.
REMEMBERED = 64
# A compiled step is compared with the eager one at these calls and at every AUDIT-th, so that a
# program that depends on what is no state of its own (a file, a C library) is found out. An audit
# costs an eager step and a compiled one: 0.6% of a long run, 4% where a step takes 1.4 ms.
FIRST_AUDITS, AUDIT = (1, 2, 4, 8, 16, 32), 500
# Of every module, as torch.nn.modules.module.register_module_forward_hook adds them: private in
# torch 2.11 to 2.14.
HOOKS = [v for n, v in vars(nn.modules.module).items() if re.match("_global.*_hooks$", n)]
# To tell a unit on its kink from a wrong gradient: how often the weights are moved, and by how many
# units of rounding. A sum of 784 products is off by some 10; a move misses a kink's other side in 1
# of 2, 8 of them in 1 of 256.
NUDGES, NUDGE = 8, 32


class Step(NamedTuple):
    """A step's estimate, its gradient for each leaf, and whether the leaves are updated with it."""

    estimate: Estimate
    gradients: tuple[Tensor | None, ...]
    updated: bool = False


class Steps(NamedTuple):
    """Steps taken one after another: the loss and each term of it, by name, in the columns."""

    names: list[str]
    numbers: Tensor


class _Trainable(Protocol):
    """What :class:`pyrovae.training.optimizer.Trained` is here: a pair's parameters by name."""

    named: dict[str, Tensor]

    @property
    def clips(self) -> bool: ...

    @property
    def average(self) -> Average | None: ...

    @property
    def optimizer(self) -> Optimizer: ...

    def clip(self) -> None: ...

    def clipped(self) -> dict[str, Any]: ...


class Call:
    """A step's arguments: tensors are a graph's ``inputs``, all else is a part of its ``form``.

    Floats become tensors without dimensions if ``numbers`` says so: a factor that changes from
    step to step is an input then.
    """

    def __init__(self, args: tuple, kwargs: dict[str, Any], numbers: bool) -> None:
        self.args, self.kwargs = args, kwargs
        leaves: Sequence[Any] = args
        self._spec: pytree.TreeSpec | None = None
        if kwargs or not all(type(arg) is Tensor for arg in args):
            if any(isinstance(arg, PackedSequence) for arg in (*args, *kwargs.values())):
                raise CaptureError("an argument is a PackedSequence, whose lengths are read back")
            leaves, self._spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors:
            raise CaptureError("it is called without a tensor")
        if any(each.requires_grad for each in tensors):
            raise CaptureError("an argument carries a gradient")
        self.has_numbers = any(type(leaf) is float for leaf in leaves)
        if self.has_numbers and numbers:
            # In float64, so that products are rounded as with Python's number.
            made = functools.partial(torch.tensor, dtype=torch.float64, device=tensors[0].device)
            leaves = [made(leaf) if type(leaf) is float else leaf for leaf in leaves]
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.inputs, self._leaves = tuple(tensors), leaves
        self.form = (self._spec, *map(_form, leaves))

    def rebuilt(self, inputs: tuple[Tensor, ...]) -> tuple[tuple, dict[str, Any]]:
        """The arguments with other tensors in the places of these."""
        if self._spec is None:
            return inputs, {}
        rest = iter(inputs)
        leaves = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return args, kwargs


def _form(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    if not isinstance(leaf, (*VALUES, float)):
        raise CaptureError(f"an argument is of the type {type(leaf).__name__}, no tensor or number")
    return type(leaf), repr(leaf)  # repr() tells NaN from all else, and -0.0 from 0.0.


class _Key(NamedTuple):
    """What a capture is for: a form of arguments, ``load`` and ``update``, and two states."""

    form: tuple
    options: int | None = None
    state: int | None = None


class CompiledSteps:
    """The compiled steps of an objective and its pair, made where that pays.

    There is one for each form of the arguments and each state of what the programs read. The first
    is made at once, or after 2,000 eager steps if ``compile`` is ``"auto"`` and ``steps`` are not
    that many; others when they have come 500 times. What cannot be captured runs eagerly from then
    on, with one warning that says why, and is None in ``captures``.
    """

    def __init__(
        self,
        objective: Any,
        pair: Pair,
        trained: _Trainable,
        compile: bool | str = True,
        steps: int = 0,
    ) -> None:
        self.objective, self.pair, self.trained = objective, pair, trained
        # Called with a text before and after something is compiled.
        self.announce: Callable[[str], object] = lambda text: None
        self.captures: dict[_Key, Capture | None] = {}
        self._watches: dict[Hashable, list[ProgramWatch]] = {}
        self._wait = 0 if should_compile(compile, steps >= PAYS_AFTER) else PAYS_AFTER
        self._seen: dict[Hashable, int] = {}
        self._said: set[str] = set()
        self._records_updates = self._takes_numbers = True
        # Why the optimizer steps eagerly beside a compiled gradient.
        self._unrecorded: str | None = None

    def __call__(
        self, args: tuple, kwargs: dict[str, Any], load: Callable | None, update: bool, number: int
    ) -> Step | None:
        """Take the compiled step of a batch, if there is one or it is time to make it.

        Arguments are as for :meth:`pyrovae.SVI.update`, with ``update`` for whether the parameters
        may be updated too: if they are not, their gradients are added to their ``.grad``. Messages
        call it step ``number``.
        """
        if self._wait > 0:
            self._wait -= 1
            return None
        leaves = [p for p in self.trained.named.values() if p.requires_grad]
        if not leaves:
            return None
        wanted, update = update, update and self._can_update()
        if update and not Update.is_ready(self.trained.optimizer):
            # The first step is an eager one: a captured step writes to tensors that are there.
            return None
        key: _Key | None = None
        try:
            if _PYRO_STACK:
                raise CaptureError("it is called inside a handler of Pyro's")
            call = Call(args, kwargs, self._takes_numbers)
            key = self._find(_Key((call.form, load, update)))
            if key not in self.captures and self._pays(key):
                key = self._capture(key, call, leaves)
            if key not in self.captures:
                self._warn(self._change(key))
                return None
            captured = self.captures[key]
            step = None if captured is None else captured(call, number)
            if wanted and not update and step is not None:
                self._warn(self._unrecorded)
        except CaptureError as error:
            if key in self.captures:
                self.captures[key] = None
            self._warn(f"The pair runs eagerly, not compiled: {error}.")
            return None
        if step is not None and not step.updated:
            for leaf, gradient in zip(leaves, step.gradients, strict=True):
                if gradient is not None:
                    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        return step

    def many(
        self, batches: Sequence[Tensor], load: Callable, begin: Callable[[], None]
    ) -> Steps | None:
        """Take the compiled steps of the first batches, with nothing looked at in between.

        There are none where the next step is none of a capture with the update, or is audited, or
        ``begin``, called before each, may change what Python reads. Batches are of the first one's
        form, and end before an audit and with a loss that is not finite (on a CPU, where it can be
        read).
        """
        known = any(each and each.update for each in self.captures.values())
        if not (known and self._can_update() and self._moves_in_place() and not _PYRO_STACK):
            return None
        try:
            call = Call((batches[0],), {}, self._takes_numbers)
            captured = self.captures.get(self._find(_Key((call.form, load, True))))
            if captured is None:
                return None
            alike = takewhile(lambda batch: form(batch) == form(batches[0]), batches)
            return captured.many([*islice(alike, captured.unaudited)], begin)
        except CaptureError:
            # It is told where the step is tried alone.
            return None

    def _can_update(self) -> bool:
        """Whether a graph may have the update of the parameters."""
        optimizer = self.trained.optimizer
        if not (self._records_updates and Update.can_record(optimizer)):
            if self._records_updates:
                self._step_eagerly("it has hooks, or is not one of torch's that can be compiled")
            return False
        # A gradient that waits to be added to would be lost in a graph that has it.
        return all(p.grad is None for p in self.trained.named.values())

    def _step_eagerly(self, why: str) -> None:
        name = type(self.trained.optimizer).__name__
        self._unrecorded = f"{name} steps eagerly beside a compiled loss and gradient: {why}."

    def _moves_in_place(self) -> bool:
        """Whether what an objective does before a step is known to change tensors alone."""
        if not isinstance(self.objective, Objective):
            return True
        called = [self.objective.at_step, *filter(callable, vars(self.objective).values())]
        return all(
            isinstance(each, FunctionType | MethodType) and is_library(each.__module__)
            for each in called
        )

    @cached_property
    def _watch_options(self) -> OptionsWatch:
        return OptionsWatch(self.trained.optimizer, self.trained.clipped)

    def _find(self, key: _Key) -> _Key:
        """The key in the state of now: one that is captured, if there is."""
        if key.form[-1]:
            key = key._replace(options=self._watch_options())
        for watch in self._watches.get(key.form, ()):
            key = key._replace(state=watch())
            if key in self.captures:
                break
        return key

    def _pays(self, key: Hashable) -> bool:
        if len(self._seen) > REMEMBERED:
            self._seen.clear()
        self._seen[key] = self._seen.get(key, 0) + 1
        return not self.captures or self._seen[key] >= AGAIN_AFTER

    def _capture(self, key: _Key, call: Call, leaves: list[Tensor]) -> _Key:
        """Capture a step; its key, under which there is None until that has succeeded."""
        _, load, update = key.form
        # Should it not be known what the programs read, this holds for any state.
        self.captures[key] = None
        clip = self.trained.clip if self.trained.clips else None
        started = time.perf_counter()
        self.announce("compiling the step")
        try:
            optimizer, average = self.trained.optimizer, self.trained.average
            updates = Update(optimizer, leaves, clip, average) if update else None
            capture = Capture(self.objective, self.pair, leaves, call, load, updates)
            watches = self._watches.setdefault(key.form, [])
            known = [each for each in watches if each.covers(capture.watch)]
            watches += [] if known else [capture.watch]
            del self.captures[key]
            key = key._replace(state=(known or watches)[-1].keep())
            self.captures[key] = None
            capture.compile(call)
        except CaptureError as error:
            if isinstance(error.__cause__, UpdateError):
                # Loss and gradients may be captured still, without the update.
                self._records_updates = False
                self._step_eagerly(str(error))
            elif not (call.has_numbers and self._takes_numbers):
                raise
            else:
                # A program may branch on a number, or hand it to Python: it is fixed then.
                self._takes_numbers = False
            del self.captures[key]
            return key
        finally:
            self.announce(f"compiled in {time.perf_counter() - started:.0f} s")
        self.captures[key] = capture
        return key

    def _change(self, key: _Key) -> str | None:
        """What has changed since steps of this form were compiled, if they were."""
        others = [k for k, c in self.captures.items() if c is not None and k.form == key.form]
        if not others:
            return None
        if key.options == others[-1].options:
            what = self._watches[key.form][-1].changed(others[-1].state)
        else:
            what = self._watch_options.changed(others[-1].options)
            # An option that a schedule moves is no constant: the optimizer then steps eagerly.
            self._records_updates &= not self._watch_options.moves
        return (
            f"The pair runs eagerly: {what} has changed since its step was compiled. It is "
            f"compiled anew after {AGAIN_AFTER} steps in one state."
        )

    def _warn(self, text: str | None) -> None:
        if text is not None and text not in self._said:
            self._said.add(text)
            warn(text)


class Slot:
    """What a program assigns anew: the entry, and the tensors for it that a graph knows."""

    def __init__(self, path: str, entry: Entry) -> None:
        self.path, self.entry = path, entry
        made = [tensor.detach().clone() for tensor in _tensors(entry.value)]
        self.tensors = made
        self.value = tuple(made) if isinstance(entry.value, tuple) else made[0]
        # Whether a step reads it before it assigns it.
        self.is_read = True

    @property
    def now(self) -> Any:
        """What is assigned."""
        return self.entry.entries.get(self.entry.key)

    def assign(self, value: Any) -> None:
        """Assign something else."""
        self.entry.entries[self.entry.key] = value

    def adopt(self) -> bool:
        """Copy what is assigned to the graph's tensors and assign those, if it has their form."""
        if self.now is not self.value:
            given = _tensors(self.now)
            if [*map(form, given)] == [*map(form, self.tensors)]:
                for ours, theirs in zip(self.tensors, given, strict=True):
                    ours.copy_(theirs.detach())
            elif self.is_read:
                return False
            self.assign(self.value)
        return True


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, tuple) else (value,)
    return [each for each in values if isinstance(each, Tensor)]


class Capture:
    """The compiled step of an objective, from arguments of one form to gradients for ``leaves``.

    ``load``, which makes the programs' arguments, and ``update``, which steps the leaves, are in
    the graph if they are given. A step that comes out otherwise than the eager one raises
    :class:`CaptureError`, as does a pair whose steps do in Python what no graph can do.
    """

    def __init__(
        self,
        objective: Any,
        pair: Pair,
        leaves: list[Tensor],
        call: Call,
        load: Callable | None = None,
        update: Update | None = None,
    ) -> None:
        self.objective, self.pair, self.leaves = objective, pair, leaves
        self.load, self.update = load, update
        self.names: list[str] = []
        self.present: list[bool] = []
        self.calls = self.sound = 0
        self.device = call.inputs[0].device
        self.roots = {"model": pair.model, "guide": pair.guide, "the objective": objective}
        self.roots |= {"the parameters": pair.found, "load": load, "torch's hooks": HOOKS}
        if any(leaf._post_accumulate_grad_hooks for leaf in leaves):
            raise CaptureError("a parameter has a hook that runs once its .grad is there")
        # What the code reads is known once it has run; what it writes, once it has run again.
        with kept(self.roots), undone(pair.modules, self.device):
            seen = Seen(lambda: self.eager(call.args, call.kwargs))
        before = Walk(self.roots, seen)
        with kept(self.roots), undone(pair.modules, self.device):
            self.eager(call.args, call.kwargs)
            found = assigned(before, Walk(self.roots, seen))
        # Written to in place from now on, as batch normalization writes to its buffers.
        entries = {(id(e.entries), e.key): (path, e) for path, e in found.items()}
        self.slots = [Slot(*each) for each in entries.values()]
        self.watch = ProgramWatch(self.roots, seen, found)

    def compile(self, call: Call) -> None:
        """Record the step from arguments of this form, and compile the record."""
        # With the update inside, nobody keeps the gradients: only the numbers are copied out.
        copied = 1 if self.update else None
        for slot in self.slots:
            slot.adopt()
        with kept(self.roots):
            flat = functools.partial(self._flat, call)
            self.graph = Graph(flat, call.inputs, self.pair, self._changed, copied)
        held = {tensor.data_ptr() for tensor in self.graph.constants}
        for slot in self.slots:
            slot.is_read = any(tensor.data_ptr() in held for tensor in _tensors(slot.now))
            if slot.is_read and slot.now is not slot.value:
                raise CaptureError(f"it assigns {slot.path} in another shape or type")

    def __call__(self, call: Call, number: int) -> Step | None:
        """Run the captured step; now and then, first beside the eager one.

        There is none where a tensor that it reads and assigns anew has another shape by now.
        """
        if not all(slot.adopt() for slot in self.slots):
            return None
        self.calls += 1
        if self.calls in FIRST_AUDITS or self.calls % AUDIT == 0:
            try:
                self._audit_again(call, number)
            except CaptureError as error:
                first, last = self.sound + 1, number - 1
                if not 1 < first <= last:
                    raise
                raise CaptureError(
                    f"{error}; steps {first} to {last}, which ran compiled, may have been wrong"
                ) from error
            self.sound = number
        return self._run(call.inputs)

    @property
    def unaudited(self) -> int:
        """How many calls there are before the next audit."""
        due = [*(n for n in FIRST_AUDITS if n > self.calls), (self.calls // AUDIT + 1) * AUDIT]
        return min(due) - self.calls - 1

    @torch.no_grad()
    def many(self, batches: Sequence[Tensor], begin: Callable[[], None]) -> Steps | None:
        """Take steps as :meth:`CompiledSteps.many` says."""
        if self.update is None or not batches or not all(slot.adopt() for slot in self.slots):
            return None
        self.update.refresh()
        counts = self.update.counts
        run, assigned = self.graph.bound(counts), self._assigned
        ahead = repeat(None) if counts is None else self.update.ahead(len(batches))
        made_from, read = sum(self.present), self.device.type == "cpu"
        rows: list[Any] = []
        for batch, count in zip(batches, ahead, strict=False):
            begin()
            self.calls += 1
            numbers, *found = run(count, (batch,))
            for tensor, made in zip(assigned, found[made_from:], strict=True):
                tensor.copy_(made)
            rows.append(numbers.tolist() if read else numbers)
            if read and not math.isfinite(rows[-1][0]):
                break
        values = torch.tensor(rows, dtype=numbers.dtype) if read else torch.stack(rows)
        return Steps(["loss", *self.names], values)

    def eager(self, args: tuple, kwargs: dict[str, Any]) -> Step:
        """The same loss and gradients through Pyro's handlers."""
        args = self.load(*args) if self.load else args
        found = estimate(self.objective, self.pair, *args, **kwargs)
        if found.surrogate is None:
            raise CaptureError("the objective propagates its gradient itself")
        gradients = torch.autograd.grad(found.surrogate, self.leaves, allow_unused=True)
        return Step(found._replace(surrogate=None), gradients)

    @property
    def _changed(self) -> tuple[Tensor, ...]:
        """What a step writes to, beside buffers that it changes in place."""
        updated = () if self.update is None else self.update.changed
        return (*updated, *self._assigned)

    @cached_property
    def _assigned(self) -> list[Tensor]:
        return [tensor for slot in self.slots for tensor in slot.tensors]

    def _flat(self, call: Call, *inputs: Tensor) -> list[Tensor]:
        before = [slot.now for slot in self.slots]
        try:
            step = self.eager(*call.rebuilt(inputs))
            made = [tensor.detach() for slot in self.slots for tensor in _tensors(slot.now)]
        finally:
            for slot, value in zip(self.slots, before, strict=True):
                slot.assign(value)
        self.names = list(step.estimate.terms)
        self.present = [g is not None for g in step.gradients]
        if self.update is not None:
            # A loss that is not finite changes no weight: its gradients become zeros.
            finite = step.estimate.loss.isfinite()
            self.update.record(
                [None if g is None else torch.where(finite, g, 0.0) for g in step.gradients]
            )
        found = [g for g in step.gradients if g is not None]
        numbers = torch.stack([step.estimate.loss, *step.estimate.terms.values()])
        return [numbers, *found, *made]

    def _run(self, inputs: tuple[Tensor, ...]) -> Step:
        if self.update is not None:
            self.update.refresh()
        numbers, *found = self.graph(*inputs)
        loss, *terms = numbers.unbind()
        rest = iter(found)
        gradients = tuple(next(rest) if present else None for present in self.present)
        with torch.no_grad():
            for tensor, made in zip(self._assigned, rest, strict=True):
                tensor.copy_(made)
        named = dict(zip(self.names, terms, strict=True))
        return Step(Estimate(loss, None, named), gradients, self.update is not None)

    def _state(self) -> dict[str, Tensor]:
        """A copy of each buffer and of what else the programs assign."""
        found = {
            f"{type(module).__name__}.{name} ({number})": buffer
            for number, module in enumerate(self.pair.modules)
            for name, buffer in module.named_buffers(recurse=False)
        }
        for slot in self.slots:
            found |= {f"{slot.path} ({n})": each for n, each in enumerate(_tensors(slot.now))}
        return {name: tensor.detach().clone() for name, tensor in found.items()}

    def _audit_again(self, call: Call, number: int) -> None:
        """Audit, and where the two differ, from other noise too: in one of four they may again.

        A sample that is drawn by its weight, as a discrete latent is, may lie on the threshold
        between two. Rounding then decides, and the whole step is another one: with IWAE's gradient
        through 5 of 50 samples, of 100 data, in 7 of 100 audits.
        """
        try:
            return self._audit(call)
        except CaptureError as error:
            differs = [error]
        for other in range(1, 5):
            try:
                with seeded(number, self.device, other):
                    self._audit(call)
            except CaptureError as error:
                differs.append(error)
            if len(differs) > 2:
                raise differs[0]
        return None

    def _audit(self, call: Call) -> None:
        """Compare the captured step with the eager one, from the same noise."""
        changed = self._changed
        with undone(self.pair.modules, self.device, changed):
            expected = self.eager(call.args, call.kwargs)
            state = self._state()
        for slot in self.slots:
            slot.assign(slot.value)
        before = [tensor.detach().clone() for tensor in changed]
        with undone(self.pair.modules, self.device, changed):
            found = self._run(call.inputs)
            after = [tensor.detach().clone() for tensor in changed]
            reached = self._state()
            averaged = [(b, b.clone()) for b in (self.update.buffers if self.update else ())]
        compare("the loss", found.estimate.loss, expected.estimate.loss)
        ours, theirs = map(self._filled, (found.gradients, expected.gradients))
        try:
            _compare_gradients(ours, theirs)
        except CaptureError:
            _compare_gradients(ours, self._nearest(ours, theirs, call))
        for name, value in state.items():
            compare(f"{name}, after the step,", reached[name], value)
        if self.update is None:
            return
        # The update is compared with the optimizer's own, from the same gradients.
        with undone(self.pair.modules, self.device, changed):
            for buffer, value in averaged:
                buffer.copy_(value)
            self.update(found.gradients)
            for old, one, other in zip(before, after, self.update.changed, strict=False):
                what = f"the update of a tensor of shape {list(old.shape)}"
                moved = other.detach() - old
                slack = self.update.slack(other) * moved.abs().max() + 1e-6 * old.abs().max()
                compare(what, one - old, moved, slack)

    def _filled(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        pairs = zip(self.leaves, gradients, strict=True)
        return [torch.zeros_like(leaf) if g is None else g for leaf, g in pairs]

    def _nearest(self, ours: list[Tensor], theirs: list[Tensor], call: Call) -> list[Tensor]:
        """Of the eager gradients at weights moved by rounding, those nearest to the captured.

        Where a unit of a ReLU lies on its kink, rounding decides which of two gradients it has.
        The eager step has to repeat itself at the weights as they are.
        """
        low, high = [g.clone() for g in theirs], [g.clone() for g in theirs]
        generator = torch.Generator()
        for number in range(NUDGES + 1):
            generator.manual_seed(number)
            with undone(self.pair.modules, self.device, (*self._changed, *self.leaves)):
                for leaf in self.leaves if number else ():
                    moved = torch.rand(leaf.shape, generator=generator).to(leaf) * 2 - 1
                    leaf.detach().mul_(1 + NUDGE * torch.finfo(leaf.dtype).eps * moved)
                found = self._filled(self.eager(call.args, call.kwargs).gradients)
            for slot in self.slots:
                slot.assign(slot.value)
            if not number:
                for one, other in zip(found, theirs, strict=True):
                    compare("an eager gradient", one, other)
            torch._foreach_minimum_(low, found)
            torch._foreach_maximum_(high, found)
        return [g.clamp(a, b) for g, a, b in zip(ours, low, high, strict=True)]


def _compare_gradients(ours: list[Tensor], theirs: list[Tensor]) -> None:
    largest = torch.stack([g.abs().max() for g in theirs]).max()
    for one, other in zip(ours, theirs, strict=True):
        compare(f"the gradient of shape {list(one.shape)}", one, other, 1e-5 * largest)
