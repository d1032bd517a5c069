"""One torch optimizer over a pair's parameters, their average, and the precision of products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from pyro.optim import PyroLRScheduler, PyroOptim
from pyro.params import param_store
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyrovae._tools import InputError, InputTypeError
from pyrovae.data.sources import unknown
from pyrovae.pairs.pair import Pair

# What is added to a norm before it divides, as in the code of arXiv 1705.07120.
TINY = 1e-7
PRECISIONS = {"float32": "highest", "tf32": "high", "bf16": "medium"}


class Average:
    r"""An exponential moving average of weights, which may stand in their place for a while.

    .. math:: \bar\theta_t = d_t \bar\theta_{t-1} + (1 - d_t) \theta_t, \qquad
              d_t = \min\bigl(d, \tfrac{t}{t + 9}\bigr)

    so that the first weights are forgotten within the first steps.
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise InputError(f"Expected 0 < average < 1, such as 0.999, got {decay}.")
        self.decay, self.shown = decay, False
        # By leaf; while the average is shown, the leaf has it and the weight is here.
        self.of: dict[Tensor, Tensor] = {}
        # A tensor, so that a captured step takes it for an input.
        self.weight, self._filled = torch.zeros(()), 0.0

    def add(self, leaves: Iterable[Tensor]) -> None:
        """Begin the averages of some leaves at their values."""
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
        # How often parameters have come beside those that the optimizer was made with.
        self.grown = 0
        self._optimizer: Optimizer | None = None
        self.scheduler: LRScheduler | None = None
        own = bool(getattr(optim, "pt_clip_args", None))
        self.clips = own or normalize_gradients or clip_norm is not None
        self._met = -1

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of all of them, which :meth:`collect` makes."""
        if self._optimizer is None:
            raise InputError("There is no optimizer yet: take a step, or call svi.build(x) first.")
        return self._optimizer

    @property
    def leaves(self) -> list[Tensor]:
        """Those parameters that are not frozen."""
        return [p for p in self.named.values() if p.requires_grad]

    def collect(self) -> None:
        """Look for parameters that the programs have made since, for the optimizer to step."""
        # A pyro.param statement makes its parameter at the first run that gets there: only their
        # number has to be looked at from step to step.
        met = len(self.pair.statements)
        if self._optimizer is not None and met == self._met:
            return
        self._met = met
        fresh = {n: p for n, p in self.pair.named().items() if n not in self.named}
        self.named |= fresh
        if self.average is not None:
            self.average.add(fresh.values())
        spelled = self._pyro_names(fresh)
        if self._optimizer is None:
            self._optimizer = _make_optimizer(self.optim, spelled)
            if isinstance(self.optim, PyroOptim):
                self._lend(self.optim, next(iter(fresh.values())))
        elif fresh:
            self.grown += 1
            for group in [] if isinstance(self.optim, Optimizer) else _groups(self.optim, spelled):
                self._optimizer.add_param_group(group)

    def step(self) -> None:
        """Clip the gradients, step on them, average the weights and clear the gradients."""
        self.collect()
        if self.clips:
            self.clip()
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
        for parameter in self.named.values():
            parameter.grad = None

    def show_average(self) -> None:
        """Put the average into the pair, if there is one, until the next step."""
        if self.average is not None:
            self.average.show(True)

    def clip(self) -> None:
        """Scale gradients in place: each as a Pyro optimizer says, then each or all by norm."""
        options = self.optim.pt_clip_args if isinstance(self.optim, PyroOptim) else {}
        for name, parameter in self._pyro_names(self.named).items() if options else ():
            if parameter.grad is not None:
                own = options(*_split(name)) if callable(options) else options
                # What Pyro 1.9.2 does before a step of its own, which is not taken here.
                PyroOptim._clip_grad(parameter, **own)
        for parameter in self.named.values() if self.normalizes else ():
            if parameter.grad is not None:
                parameter.grad.div_(parameter.grad.norm() + TINY)
        if self.clip_norm is not None:
            stepped = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(stepped, self.clip_norm)

    def _lend(self, optim: PyroOptim, key: Tensor) -> None:
        """Let ``optim.step()`` of Pyro's schedulers reach the one optimizer."""
        if isinstance(optim, PyroLRScheduler):
            self.scheduler = optim.pt_scheduler_constructor(self.optimizer, **optim.kwargs)
        # Pyro 1.9.2 has one optimizer for each parameter in this dict, and steps all its values.
        optim.optim_objs = {key: self.scheduler or self.optimizer}

    def _pyro_names(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters by the names that Pyro has for them, where it has one."""
        spelled = {id(leaf): name for name, leaf in dict(self.pair.statements).items()}
        return {spelled.get(id(p), name): p for name, p in named.items()}


def make_optim(optimizer: Any, lr: float) -> Any:
    """What :class:`Trained` takes for ``optim``: Adam at ``lr`` if there is none, a class at it."""
    if optimizer is None:
        # Fused is one kernel for all weights: unfused, the update is a fifth of an eager step.
        return partial(torch.optim.Adam, lr=lr, fused=True)
    is_class = isinstance(optimizer, type) and issubclass(optimizer, Optimizer)
    return partial(optimizer, lr=lr) if is_class else optimizer


def _make_optimizer(optim: PyroOptim | Optimizer | Callable, named: dict[str, Tensor]) -> Optimizer:
    if not named:
        raise InputError("The pair has no parameters to train.")
    if isinstance(optim, Optimizer):
        return optim
    if isinstance(optim, PyroOptim):
        # Pyro 1.9.2 keeps here what optim.load() was given, by names of parameters.
        if optim._state_waiting_to_be_consumed:
            raise InputError(
                "One optimizer steps all parameters here: restore its state with "
                "svi.build() and svi.optimizer.load_state_dict(state), not with optim.load()."
            )
        make: Any = optim.pt_optim_constructor
        return make(_groups(optim, named))
    made = optim(list(named.values()))
    if not isinstance(made, Optimizer):
        raise InputTypeError(f"Expected a torch optimizer from {optim!r}.")
    return made


def _groups(optim: Any, named: dict[str, Tensor]) -> list[dict]:
    """The parameter groups of some parameters, with a Pyro optimizer's options for each."""
    options = optim.pt_optim_args if isinstance(optim, PyroOptim) else {}
    if not callable(options):
        return [{"params": list(named.values()), **options}]
    by_path = optim.pt_optim_args_argc == 1
    spelled = {n: (param_store.normalize_param_name(n),) if by_path else _split(n) for n in named}
    return [{"params": [p], **options(*spelled[n])} for n, p in named.items()]


def _split(name: str) -> tuple[str, str]:
    module = param_store.module_from_param_with_module_name(name)
    return module, param_store.user_param_name(name)


def check_precision(precision: str) -> None:
    """Refuse the name of a precision that is none of :data:`PRECISIONS`."""
    if precision not in PRECISIONS:
        raise InputError(unknown("precision", str(precision), PRECISIONS))


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Multiply float32 matrices at some precision for a while; all else stays float32.

    ``"float32"`` is exact; ``"tf32"`` rounds factors to 10 bits of mantissa where the device has
    such units, ``"bf16"`` to 7 bits; their products are added in float32 (see
    ``torch.set_float32_matmul_precision``).
    """
    check_precision(precision)
    before, convolves = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(PRECISIONS[precision])
    torch.backends.cudnn.allow_tf32 = precision != "float32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolves
