"""One torch optimizer over a pair's parameters, and their average."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import is_
from typing import Any

import pyro
import torch
from pyro.distributions.transforms import BatchNorm
from pyro.optim import PyroLRScheduler, PyroOptim
from pyro.optim.optim import _load_state_dict
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Adam, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyrovae._tools import InputError, InputTypeError, warn
from pyrovae.optim import parts_of, place_counts
from pyrovae.pairs.pair import Pair

# What is added to a norm before it divides, as in the code of arXiv 1705.07120.
TINY = 1e-7
# Where torch has one kernel for all weights of an Adam.
FUSED_ON = ("cpu", "cuda")


class Average:
    r"""An exponential moving average of weights, which may stand in their place for a while.

    .. math:: \bar\theta_t = d_t \bar\theta_{t-1} + (1 - d_t) \theta_t, \qquad
              d_t = \min\bigl(d, \tfrac{t}{t + 9}\bigr)

    so that the first weights are forgotten within the first steps. The running statistics of batch
    normalization are averaged with them: those of the last batches are of other weights.
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise InputError(f"Expected 0 < average < 1, such as 0.999, got {decay}.")
        self.decay, self.shown = decay, False
        # By leaf; while the average is shown, the leaf has it and the weight is here.
        self.of: dict[Tensor, Tensor] = {}
        # A tensor, so that a captured step takes it for an input.
        self.weight, self._filled = torch.zeros(()), 0.0

    def replace(self, old: Iterable[Tensor], leaves: Iterable[Tensor]) -> None:
        """Begin the averages of some leaves at their values, and end others."""
        for leaf in old:
            self.of.pop(leaf, None)
        for leaf in leaves:
            self.of[leaf] = leaf.detach().clone()
            self.weight = self.weight.to(leaf.device)

    def at_step(self, step: int) -> None:
        """Get ready for a step, counted from 0: the weights in their place, and 1 - d."""
        self.show(False)
        weight = 1 - min(self.decay, (step + 1) / (step + 10))
        if weight != self._filled:
            self.weight.fill_(weight)
            self._filled = weight

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards its leaf, in a form that a tracer can record."""
        for leaf, average in self.of.items():
            average.add_((leaf - average) * self.weight)

    @torch.no_grad()
    def show(self, shown: bool) -> None:
        """Put the averages into the leaves, or the weights back, if they are not there yet."""
        for leaf, other in self.of.items() if shown != self.shown else ():
            kept = leaf.clone()
            leaf.copy_(other)
            other.copy_(kept)
        self.shown = shown


class Joint:
    """A Pyro optimizer's torch optimizers, one for each parameter, stepped as a single one.

    In Pyro 1.9.2 these are ``optim.optim_objs``, by leaf, schedulers around them included. They
    stay the owners of options and state, so that one Pyro optimizer given to several SVIs, its
    schedule, ``get_state`` and ``set_state`` mean what they do in Pyro. Leaves whose options are
    equal share a group of :attr:`optimizer`, and entries of its state are theirs.
    """

    def __init__(self, optim: PyroOptim) -> None:
        self.optim = optim
        self.each: dict[Tensor, Optimizer] = {}
        self._optimizer: Optimizer | None = None
        self._names: dict[Tensor, str] = {}
        # What was shared last, for whoever has changed since to be seen.
        self._ours: list[dict] = []
        self._theirs: list[dict] = []
        self._entries: dict[Tensor, dict | None] = {}
        weakref.finalize(optim, _forget, self._names).atexit = False

    @property
    def optimizer(self) -> Optimizer | None:
        """The single optimizer, its options and state up to date; None before there are leaves."""
        self.share()
        return self._optimizer

    def add(self, named: dict[Tensor, str], replaced: Iterable[Tensor]) -> None:
        """Begin to step some leaves, by Pyro's names, in the place of others."""
        self.share()
        self._ours, self._theirs = [], []
        store = pyro.get_param_store()
        self._names |= {leaf: n for leaf, n in named.items() if store.param_name(leaf) is None}
        self.name_leaves()
        for leaf in replaced:
            self.each.pop(leaf, None)
        for leaf in named:
            made = self.optim.optim_objs.get(leaf) or self._make(leaf)
            self.each[leaf] = getattr(made, "optimizer", made)
        if self._optimizer is None:
            self._optimizer = _alike(next(iter(self.each.values())))

    def _make(self, leaf: Tensor) -> Any:
        """What Pyro 1.9.2 makes of a parameter when it steps it first, a loaded state included."""
        optim = self.optim
        made = optim.optim_objs[leaf] = optim._get_optim(leaf)
        optim.grad_clip[leaf] = optim._get_grad_clip(leaf)  # type: ignore[arg-type]
        name = pyro.get_param_store().param_name(leaf)
        state = optim._state_waiting_to_be_consumed.pop(name, None)
        if state is not None:
            _load_state_dict(made, state)
        # A schedule warns if it steps before its optimizer, which is told by this (torch 2.14).
        vars(getattr(made, "optimizer", made))["_opt_called"] = True
        return made

    def name_leaves(self) -> None:
        """Tell Pyro's store the names of leaves that modules own, for ``optim.get_state()``."""
        # A run of the programs takes them away, with the leaves themselves.
        pyro.get_param_store()._param_to_name.update(self._names)

    def share(self) -> None:
        """Bring options and state from the single optimizer to each, or back, as they changed."""
        one = self._optimizer
        if one is None:
            return
        if one.param_groups != self._ours:
            for group in one.param_groups if self._ours else ():
                options = {key: value for key, value in group.items() if key != "params"}
                for leaf in group["params"]:
                    self.each[leaf].param_groups[0].update(options)
        theirs = [each.param_groups[0] for each in self.each.values()]
        if theirs != self._theirs:
            one.param_groups = _grouped(theirs)
            self._ours = [dict(group) for group in one.param_groups]
            self._theirs = [dict(group) for group in theirs]
        for leaf, each in self.each.items():
            ours, entry = one.state.get(leaf), each.state.get(leaf)
            if ours is not self._entries.get(leaf):
                each.state[leaf] = entry = {} if ours is None else ours
            if entry is not ours and entry is not None:
                one.state[leaf] = entry
            self._entries[leaf] = one.state.get(leaf)

    def fill(self, met: Callable[[Tensor], bool]) -> None:
        """Give zeros to leaves that this step met and does not depend on, but an earlier one did.

        Pyro keeps the gradient of such a leaf, as zeros, so that its moments go on.
        """
        for leaf, each in self.each.items():
            if leaf.grad is not None:
                vars(each)["had_gradient"] = True
            elif leaf.requires_grad and hasattr(each, "had_gradient") and met(leaf):
                leaf.grad = torch.zeros_like(leaf)

    def clip(self) -> None:
        """Scale the gradient of each leaf as the optimizer's ``clip_args`` say."""
        for leaf in self.each:
            if leaf.grad is not None and (clip := self.optim.grad_clip.get(leaf)):
                clip(leaf)


def _forget(names: dict[Tensor, str]) -> None:
    store = pyro.get_param_store()
    for leaf, name in names.items():
        if store._params.get(name) is not leaf:
            store._param_to_name.pop(leaf, None)


def _alike(optimizer: Optimizer) -> Optimizer:
    """Another optimizer of the same kind and options, of no parameters yet."""
    made = object.__new__(type(optimizer))
    # A scheduler puts a wrapped step() on the optimizer that it belongs to.
    vars(made).update({key: value for key, value in vars(optimizer).items() if key != "step"})
    made.state, made.param_groups = defaultdict(dict), []
    return made


def _grouped(groups: list[dict]) -> list[dict]:
    """Groups of equal options made one."""
    found: dict[tuple, dict] = {}
    for group in groups:
        plain = {key: value for key, value in group.items() if key != "params"}
        key = tuple((k, id(v) if isinstance(v, Tensor) else repr(v)) for k, v in plain.items())
        found.setdefault(key, plain | {"params": []})["params"] += group["params"]
    return [*found.values()]


class Schedules:
    """The schedules that a Pyro optimizer has for each parameter, stepped and kept as one."""

    def __init__(self, optim: PyroLRScheduler) -> None:
        self.optim = optim

    def step(self, *args: Any) -> None:
        """Step every schedule; arguments as of torch's."""
        self.optim.step(*args)

    def state_dict(self) -> dict[str, Any]:
        """The state of every schedule, in the order of their parameters."""
        return {"each": [s.state_dict() for s in self.optim.optim_objs.values()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        for schedule, own in zip(self.optim.optim_objs.values(), state["each"], strict=True):
            schedule.load_state_dict(own)


class SchedulesOnLoss(Schedules):
    """Schedules that are stepped on a loss, as :class:`ReduceLROnPlateau` is."""


def _schedules(optim: PyroLRScheduler) -> Schedules:
    kind = optim.pt_scheduler_constructor
    on_loss = isinstance(kind, type) and issubclass(kind, ReduceLROnPlateau)
    return SchedulesOnLoss(optim) if on_loss else Schedules(optim)


def in_order(state: dict[str, Any], ours: list[str], theirs: list[str] | None) -> dict[str, Any]:
    """An optimizer's state with its parameters, by name, in the order in which ours has them.

    torch tells them by their numbers alone, and what thawed or was replaced came last.
    """
    if theirs is None or theirs == ours:
        return state
    if sorted(theirs) != sorted(ours):
        more, less = sorted({*theirs} - {*ours}), sorted({*ours} - {*theirs})
        raise InputError(
            f"Expected an optimizer of the pair's parameters, got one that has {more} beside them "
            f"and lacks {less}: freeze with requires_grad_ what was frozen when the state was "
            f"taken, and nothing else."
        )
    places = {n: ours.index(name) for n, name in enumerate(theirs)}
    groups = [g | {"params": sorted(places[n] for n in g["params"])} for g in state["param_groups"]]
    return {"state": {places[n]: e for n, e in state["state"].items()}, "param_groups": groups}


def check_groups(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Refuse a state that is none of this optimizer's, which torch loads as it is."""
    altered = "the state is of another optimizer, or was altered."
    own, given = optimizer.state_dict()["param_groups"], state["param_groups"]
    if (stepped := [g.get("params") for g in given]) != [g["params"] for g in own]:
        raise InputError(
            f"Expected an optimizer of parameters {[g['params'] for g in own]}, got {stepped}: "
            f"{altered}"
        )
    for group, found in zip(own, given, strict=True):
        for name, value in group.items():
            # None lets torch choose, and what a later torch has added is off in an earlier state.
            if value is None or (value is False and name not in found):
                continue
            if name not in found:
                raise InputError(f"Expected the optimizer's {name}, got none: {altered}")
            # A rate may be a number here and a tensor there.
            if found[name] is not None and _kind(value) != _kind(found[name]):
                raise InputError(
                    f"Expected the optimizer's {name} to be like {value!r}, got {found[name]!r}: "
                    f"{altered}"
                )


def _kind(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [*map(_kind, value)]
    if isinstance(value, bool):
        return bool
    return "number" if isinstance(value, int | float | Tensor) else type(value)


class Trained:
    """The parameters of a pair that are trained, and the torch optimizer that steps them.

    Arguments are as for :class:`pyrovae.SVI`.
    """

    def __init__(
        self,
        optim: PyroOptim | Optimizer | Callable,
        pair: Pair,
        clip_norm: float | None = None,
        normalize_gradients: bool = False,
        average: float | None = None,
    ) -> None:
        if not (isinstance(optim, PyroOptim | Optimizer) or callable(optim)):
            raise InputTypeError(f"Expected a Pyro or torch optimizer, got {optim!r}.")
        if clip_norm is not None and not 0 < clip_norm < float("inf"):
            raise InputError(f"Expected clip_norm > 0, got {clip_norm}.")
        if clip_norm is not None and normalize_gradients:
            raise InputError("Expected clip_norm or normalize_gradients, got both: leave one out.")
        self.optim, self.pair, self.clip_norm = optim, pair, clip_norm
        self.normalizes = normalize_gradients
        self.average = None if average is None else Average(average)
        self.named: dict[str, Tensor] = {}
        # How often parameters have come beside those that the optimizer was made with, or others
        # had a gradient than in any step before: then the loss may depend on what is not known.
        self.grown = 0
        self._patterns: set[tuple[bool, ...]] = set()
        self.joint = Joint(optim) if isinstance(optim, PyroOptim) else None
        self.scheduler = _schedules(optim) if isinstance(optim, PyroLRScheduler) else None
        self._optimizer: Optimizer | None = None
        # Whether the weights that a step moves are others than those that are evaluated.
        self.alternates = average is not None
        self._parts: Sequence[Optimizer] = ()
        self._with_modes: list[Any] = []
        self._modules: list[nn.Module] = []
        self._seen: list[Any] | None = None

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of all of them, which :meth:`collect` makes."""
        found = self._optimizer if self.joint is None else self.joint.optimizer
        if found is None:
            raise InputError("There is no optimizer yet: take a step, or call svi.build(x) first.")
        return found

    @property
    def clips(self) -> bool:
        """Whether :meth:`clip` may change a gradient."""
        return self.joint is not None or any(self.clipped().values())

    def clipped(self) -> dict[str, Any]:
        """How gradients are clipped, by name."""
        return {"clip_norm": self.clip_norm, "normalize_gradients": self.normalizes}

    @property
    def leaves(self) -> list[Tensor]:
        """Those parameters that are not frozen."""
        return [p for p in self.named.values() if p.requires_grad]

    @property
    def stepped(self) -> list[str]:
        """The names of what the optimizer steps, in its order."""
        names = {id(leaf): name for name, leaf in self.named.items()}
        leaves = [p for group in self.optimizer.param_groups for p in group["params"]]
        return [names.get(id(leaf), f"parameter {n}") for n, leaf in enumerate(leaves)]

    def is_current(self) -> bool:
        """Whether nothing has come, gone, thawed or been replaced since :meth:`collect`."""
        now, seen = self._look(), self._seen
        return seen is not None and len(now) == len(seen) and all(map(is_, now, seen))

    def _look(self) -> list[Any]:
        """What tells, by identity, which parameters there are."""
        store = pyro.get_param_store()._params
        tensors: list[Tensor | None] = []
        found: list[Any] = []
        for stated in self.pair.found:
            # The store's own leaves may be replaced there without a run of the programs.
            for name, leaf in stated.items():
                tensors.append(leaf if isinstance(leaf, nn.Parameter) else store.get(name))
        for module in self._modules:
            found += module._modules.values()
            tensors += module._parameters.values()
        for tensor in tensors:
            found += (tensor, tensor is not None and tensor.requires_grad)
        return found

    def collect(self, *, needed: bool = False) -> None:
        """Look for parameters that came, thawed or were replaced, for the optimizer to step.

        Where they are ``needed``, a pair that has none raises a ValueError.
        """
        if not self.is_current():
            self._collect()
        if needed and not self.named:
            raise InputError("The pair has no parameters to train.")

    def _collect(self) -> None:
        self._modules = self.pair.modules
        self._seen = self._look()
        known = set(map(id, self.named.values()))
        fresh = {n: p for n, p in self.pair.named().items() if id(p) not in known}
        if not fresh:
            return
        self.grown += bool(self.named)
        replaced = {n: self.named[n] for n in fresh if n in self.named}
        self.named |= fresh
        if self.average is not None:
            new = [b for b in _statistics(self._modules) if b not in self.average.of]
            self.average.replace(replaced.values(), [*fresh.values(), *new])
        if self.joint is not None:
            self.joint.add(self._pyro_names(fresh), replaced.values())
        elif self._optimizer is None:
            self._optimizer = _make_optimizer(self.optim, [*fresh.values()])
            _warn_of_still(self._optimizer, fresh)
        else:
            _enlarge(self._optimizer, fresh, replaced)
        self._parts = parts_of(self.optimizer)
        self._with_modes = [each for each in self._parts if _has_modes(each)]
        self.alternates = self.average is not None or bool(self._with_modes)
        if self._with_modes and (self.joint is not None or self.average is not None):
            raise InputError(
                f"{type(self._with_modes[0]).__name__} keeps averaged weights of its own, which "
                f"goes with no average=... and in no Pyro optimizer: give it alone, as "
                f"optimizer=functools.partial({type(self._with_modes[0]).__name__}, ...)."
            )

    def begin(self, step: int) -> None:
        """Put the weights that a step moves into the pair; steps are counted from 0."""
        if self.average is not None:
            self.average.at_step(step)
        for optimizer in self._with_modes:
            optimizer.train()

    def step(self) -> None:
        """Clip the gradients, step on them, average the weights and clear the gradients."""
        self.collect()
        if not self.named:
            return
        pattern = tuple([p.grad is not None for p in self.named.values()])
        if pattern not in self._patterns:
            self.grown += bool(self._patterns)
            self._patterns.add(pattern)
        if self.clips:
            self.clip()
        # Asked for once: a Pyro optimizer's is brought up to date each time.
        optimizer = self.optimizer
        for each in self._with_modes:
            each.train()
        with _fused(self._parts):
            optimizer.step()
        if self.joint is not None:
            self.joint.share()
            self.joint.name_leaves()
        if self.average is not None:
            self.average.update()
        for parameter in self.named.values():
            parameter.grad = None

    def show_average(self) -> None:
        """Put the average into the pair, ours or the optimizer's, until the next step."""
        if self.average is not None:
            self.average.show(True)
        for optimizer in self._with_modes:
            optimizer.eval()

    def clip(self) -> None:
        """Get gradients ready in place: each as a Pyro optimizer says, then each or all by norm."""
        if self.joint is not None:
            # A leaf without a statement is always met: Pyro would not know of it.
            met, found = self.pair.met, self.pair.found
            stated = {leaf for each in found for leaf in each.values()}
            self.joint.fill(lambda leaf: leaf in met or leaf not in stated)
            self.joint.clip()
        for parameter in self.named.values() if self.normalizes else ():
            if parameter.grad is not None:
                parameter.grad.div_(parameter.grad.norm() + TINY)
        if self.clip_norm is not None:
            if self.joint is not None:
                # Its groups may hold what a recorder sets for a while, not to be shared.
                stepped = [*self.joint.each]
            else:
                stepped = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(stepped, self.clip_norm)

    def _pyro_names(self, fresh: dict[str, Tensor]) -> dict[Tensor, str]:
        """The name that Pyro has for each leaf, or our own where it has none or one for two."""
        spelled = {leaf: name for name, leaf in self.pair.statements}
        taken = [spelled[leaf] for leaf in self.named.values() if leaf in spelled]
        return {
            leaf: spelled[leaf] if leaf in spelled and taken.count(spelled[leaf]) == 1 else name
            for name, leaf in fresh.items()
        }


def make_optim(optimizer: Any, lr: float) -> Any:
    """What :class:`Trained` takes for ``optim``: Adam at ``lr`` if there is none, a class at it."""
    if optimizer is None:
        # Fused is one kernel for all weights: unfused, the update is a fifth of an eager step.
        return partial(torch.optim.Adam, lr=lr, fused=True)
    is_class = isinstance(optimizer, type) and issubclass(optimizer, Optimizer)
    return partial(optimizer, lr=lr) if is_class else optimizer


def _make_optimizer(optim: Optimizer | Callable, leaves: list[Tensor]) -> Optimizer:
    if isinstance(optim, Optimizer):
        return optim
    if getattr(optim, "func", optim) is Muon and any(leaf.dim() != 2 for leaf in leaves):
        raise InputError(
            "torch's Muon steps matrices alone, and the pair has other parameters: give "
            "optimizer=pyrovae.optim.muon, which steps those by Adam."
        )
    made = optim(leaves)
    if not isinstance(made, Optimizer):
        raise InputTypeError(f"Expected a torch optimizer from {optim!r}.")
    return made


def _warn_of_still(optimizer: Optimizer, named: dict[str, Tensor]) -> None:
    """Say of a program that an optimizer steps nothing of it."""
    stepped = {id(leaf) for group in optimizer.param_groups for leaf in group["params"]}
    for program in ("model", "guide"):
        own = [id(leaf) for name, leaf in named.items() if name.startswith(f"{program}.")]
        if own and stepped.isdisjoint(own):
            warn(
                f"The optimizer has no parameter of the {program}, which stays as it is: give it "
                f"those of both programs, or freeze the {program} with requires_grad_(False)."
            )


def _statistics(modules: Iterable[nn.Module]) -> list[Tensor]:
    """What batch normalization remembers of its batches, for evaluation."""
    layers = (m for m in modules if isinstance(m, _BatchNorm | BatchNorm))
    kept = [b for m in layers for b in m.buffers(recurse=False)]
    return [buffer for buffer in kept if buffer.is_floating_point()]


def _has_modes(optimizer: Optimizer) -> bool:
    """Whether an optimizer has to be told when weights are trained and when they are evaluated.

    Those of the package schedulefree have other weights for the one than for the other.
    """
    return hasattr(optimizer, "train") and hasattr(optimizer, "eval")


@contextmanager
def _fused(parts: Sequence[Optimizer]) -> Iterator[None]:
    """Let torch's Adam step all weights by one kernel, unless its options say otherwise.

    It takes half the time of one operator after another, and rounds otherwise than they do.
    """
    plain = [each for each in parts if type(each) in (Adam, AdamW)]
    groups = [group for each in plain for group in each.param_groups]
    tensors = [tensor for group in groups for tensor in group["params"]]
    told = [g for g in groups if g["fused"] is not None or g["foreach"] is not None]
    if told or not all(t.device.type in FUSED_ON and t.is_floating_point() for t in tensors):
        groups = []
    groups = [group for group in groups if not group["differentiable"]]
    for group in groups:
        group["fused"] = True
    try:
        yield
        for each in parts:
            if each.param_groups[0]["params"][0].is_cuda:
                place_counts(each)
    finally:
        for group in groups:
            group["fused"] = None


def _enlarge(optimizer: Optimizer, fresh: dict[str, Tensor], replaced: dict[str, Tensor]) -> None:
    """Let a torch optimizer step further leaves, some in the place of others."""
    groups = optimizer.param_groups
    for name, leaf in fresh.items():
        old = replaced.get(name)
        group = next((g for g in groups if any(p is old for p in g["params"])), groups[-1])
        # Not a group of its own, which a schedule made before would not know.
        group["params"] = [p for p in group["params"] if p is not old] + [leaf]
        if old is not None:
            optimizer.state.pop(old, None)
