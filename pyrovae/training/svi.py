"""Stochastic variational inference with Pyro's interface and the parameters where they belong."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyrovae._tools import InputError, InputTypeError
from pyrovae.compiling.step import Capture, CaptureError, Step, undone
from pyrovae.compiling.update import Descent, UpdateError
from pyrovae.compiling.watch import watch_optimizer, watch_pair
from pyrovae.objectives import Estimate, Objective, estimate, is_differentiable, summed
from pyrovae.pairs.contract import check_reach
from pyrovae.pairs.pair import Pair
from pyrovae.training.optimizer import (
    clip_gradients,
    clips,
    lend_to_pyro,
    make_groups,
    make_optimizer,
)

__all__ = ["SVI"]

PAYS_AFTER, AGAIN_AFTER, REMEMBERED = 3_000, 500, 64


class SVI:
    r"""Stochastic gradient descent on an objective of a model and its guide.

    .. math:: (\theta, \phi) \leftarrow (\theta, \phi)
              - \mathrm{optim}\bigl(\nabla_{\theta, \phi}\, \hat{\mathrm{loss}}(x)\bigr)

    Constructed and called like :class:`pyro.infer.SVI`, for every pair that Pyro's ELBOs accept:
    PyroModules, plain modules, bound methods, functions with ``pyro.module`` and ``pyro.param``.
    Module parameters are trained on their modules, whatever Pyro's store holds under their names.

    Args:
        model: The model program.
        guide: The guide program.
        optim: A Pyro optimizer, a torch optimizer over the pair's parameters, or a function from
            parameters to a torch optimizer, such as ``torch.optim.Adam``. One torch optimizer
            steps all parameters, with Pyro's per-parameter options and clipping as given.
        loss: A Pyro ELBO, an :class:`pyrovae.objectives.Objective`, or a function ``(model, guide,
            x, *context)`` to differentiate.
        loss_and_grads: With a function as ``loss``: does the backward pass itself.
        clip_norm: The largest norm of the whole gradient; None clips nothing.
        compile: Run loss and gradients as one graph, captured from the handlers and compiled for
            a shape of a batch: True from the second step on, False never, ``"auto"`` where it
            pays, which is after 3,000 steps, or at once if ``steps`` are that many. Another shape,
            or the same after a change to the modules, is compiled when it has come 500 times. A
            pair that cannot be captured runs eagerly, with one warning that says why.
        steps: How many steps are going to be taken, where that is known.

    Raises:
        TypeError: If ``optim`` or ``loss`` is none of these.
        ValueError: If ``compile`` is none of these or ``clip_norm`` is not positive.

    References:
        Kingma and Welling (arXiv 1312.6114), algorithm 1.

    Example:
        >>> from pyro.infer import Trace_ELBO
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=Trace_ELBO())
        >>> svi.step(x)  # -ELBO, nats summed over the batch, as in Pyro
        3...
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: PyroOptim | Optimizer | Callable,
        loss: ELBO | Callable,
        loss_and_grads: Callable | None = None,
        *,
        clip_norm: float | None = None,
        compile: bool | str = "auto",
        steps: int = 0,
    ) -> None:
        if not (isinstance(optim, PyroOptim | Optimizer) or callable(optim)):
            raise InputTypeError(f"Expected a Pyro or torch optimizer, got {optim!r}.")
        if not (isinstance(loss, ELBO) or callable(loss)):
            raise InputTypeError(f"Expected an ELBO or a function as the loss, got {loss!r}.")
        if clip_norm is not None and not 0 < clip_norm < float("inf"):
            raise InputError(f"Expected clip_norm > 0, got {clip_norm}.")
        if compile not in ("auto", True, False):
            raise InputError(f"Expected compile='auto', True or False, got {compile!r}.")
        self.model, self.guide, self.optim = model, guide, optim
        self.objective = loss
        self.loss_and_grads = loss_and_grads
        self.clip_norm = clip_norm
        self.pair = Pair(model, guide)
        self.optimizer: Optimizer | None = None
        self.scheduler: LRScheduler | None = None
        self.compile = compile
        self.compiling: Callable[[], AbstractContextManager] = nullcontext
        self.reduce: Callable[[Estimate, list[Tensor]], Estimate] | None = None
        self.steps_taken = 0
        self._records_updates = True
        self._watch = watch_pair(loss, self.pair)
        self._wait = 0 if compile is True or steps >= PAYS_AFTER else PAYS_AFTER
        self._taken = 0
        self._captures: dict[Hashable, Capture | None] = {}
        self._seen: dict[Hashable, int] = {}
        self._trained: dict[str, Tensor] = {}
        self._found = -1
        self._reached = False

    def step(self, *args: Any, **kwargs: Any) -> float | tuple[float, ...]:
        """Take one gradient step.

        Args:
            args: The batch and the programs' further arguments.

        Returns:
            The loss before the step: nats summed over the batch, lower is better; a tuple for an
            objective of several losses, as in Pyro.

        Raises:
            ValueError: If the loss depends on parameters that neither program owns.
        """
        result = self.update(*args, **kwargs)
        return tuple(p.item() for p in result.parts) if result.parts else result.loss.item()

    def update(
        self,
        *args: Any,
        load: Callable | None = None,
        inspect: Callable[[Estimate], None] | None = None,
        **kwargs: Any,
    ) -> Estimate:
        """Take one gradient step and return its estimate, unread, on the device.

        Args:
            args: The batch and the programs' further arguments, or what ``load`` makes them from.
            load: Makes the programs' arguments from ``args``, such as :meth:`Dataset.rows` from
                the numbers of rows; it becomes a part of the compiled step.
            inspect: Called with the estimate, before the update where that is a step of its own;
                a compiled step takes no notice of the gradient of a loss that is not finite.
        """
        if isinstance(self.objective, Objective):
            self.objective.at_step(self.steps_taken)
        self.steps_taken += 1
        inside = self._updates_inside()
        begun = bool(self.optimizer and self.optimizer.state)
        if inside and begun:
            step = self._captured(args, kwargs, load, whole=True)
            if step is not None:
                self._collect()
                if inspect is not None:
                    inspect(step.estimate)
                return step.estimate
        result = self._gradients(args, kwargs, load, eagerly=inside and not begun)
        if self.reduce is not None:
            self._collect()
            result = self.reduce(result, self._leaves())
        if inspect is not None:
            inspect(result)
        self.descend()
        return result

    def gradients(self, *args: Any, load: Callable | None = None, **kwargs: Any) -> Estimate:
        """Evaluate the objective on a batch and add its gradient to every parameter's."""
        return self._gradients(args, kwargs, load)

    def _gradients(
        self, args: tuple, kwargs: dict, load: Callable | None, eagerly: bool = False
    ) -> Estimate:
        step = None if eagerly else self._captured(args, kwargs, load, whole=False)
        if step is not None:
            for leaf, gradient in zip(self._leaves(), step.gradients, strict=True):
                if gradient is not None:
                    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
            return step.estimate
        self._taken += 1
        args = load(*args) if load else args
        if self.loss_and_grads is not None:
            programs = self.pair.run_model, self.pair.run_guide
            result = summed(self.loss_and_grads(*programs, *args, **kwargs))
        else:
            result = estimate(self.objective, self.pair, *args, **kwargs)
        if not self._reached and result.surrogate is not None:
            check_reach(self.pair, result.surrogate, args)
            self._reached = True
        if result.surrogate is not None and result.surrogate.requires_grad:
            result.surrogate.backward()
        return result

    def _updates_inside(self) -> bool:
        """Whether the optimizer's update may be a part of the compiled step."""
        if self.optimizer is None or not self._records_updates or self.reduce is not None:
            return False
        untouched = not any(leaf.grad is not None for leaf in self._trained.values())
        return untouched and Descent.can_record(self.optimizer)

    def _captured(
        self, args: tuple, kwargs: dict, load: Callable | None, whole: bool
    ) -> Step | None:
        """The outcome of the compiled step, with the update if ``whole``; None to go eagerly."""
        ready = self._reached and self.optimizer is not None and self._taken >= self._wait
        if self.compile is False or not ready or self.loss_and_grads or kwargs:
            return None
        if not is_differentiable(self.objective) or not args:
            return None
        if not all(isinstance(arg, Tensor) and not arg.requires_grad for arg in args):
            return None
        shapes = tuple((arg.shape, arg.dtype, arg.device) for arg in args)
        key = shapes, self._watch(), load, self._watch_optimizer() if whole else None
        if key in self._captures and self._captures[key] is None:
            return None
        try:
            if key not in self._captures:
                if not self._pays(key):
                    return None
                self._captures[key] = self._capture(args, load, whole)
            return self._captures[key](args)
        except CaptureError as error:
            self._captures[key] = None
            if whole and isinstance(error.__cause__, UpdateError):
                self._records_updates = False
            else:
                warnings.warn(f"The pair runs eagerly, not compiled: {error}.", stacklevel=4)
            return None

    def _capture(self, args: tuple, load: Callable | None, whole: bool) -> Capture:
        leaves = self._leaves()
        clip = self._clip if clips(self.optim, self.clip_norm) else None
        descent = Descent(self.optimizer, leaves, clip) if whole else None
        with self.compiling():
            return Capture(self.objective, self.pair, leaves, args, load, descent)

    def _leaves(self) -> list[Tensor]:
        return [p for p in self._trained.values() if p.requires_grad]

    def _pays(self, key: Hashable) -> bool:
        """The first batch is worth a capture; another one if it keeps coming."""
        if len(self._seen) > REMEMBERED:
            self._seen.clear()
        self._seen[key] = self._seen.get(key, 0) + 1
        return not self._captures or self._seen[key] >= AGAIN_AFTER

    def descend(self) -> None:
        """Step the optimizer on the gradients at hand and clear them."""
        self._collect()
        if clips(self.optim, self.clip_norm):
            self._clip()
        self.optimizer.step()
        for parameter in self._trained.values():
            parameter.grad = None

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float | tuple[float, ...]:
        """Evaluate the loss without a gradient step.

        Returns:
            Nats summed over the batch, lower is better.
        """
        with torch.no_grad():
            if isinstance(self.objective, ELBO):
                programs = self.pair.run_model, self.pair.run_guide
                loss = self.objective.loss(*programs, *args, **kwargs)
                return tuple(map(float, loss)) if isinstance(loss, tuple) else float(loss)
            return estimate(self.objective, self.pair, *args, **kwargs).loss.item()

    def build(self, *args: Any) -> None:
        """Make the optimizer before the first step, for a state to be loaded into.

        Args:
            args: A batch, on which the objective is tried once.

        Raises:
            ValueError: If the loss depends on parameters that neither program owns.
        """
        if self.loss_and_grads is None and is_differentiable(self.objective):
            with undone(self.pair, args):
                surrogate = estimate(self.objective, self.pair, *args).surrogate
            check_reach(self.pair, surrogate, args)
        self._collect()
        self._reached = True

    def _collect(self) -> None:
        found = len(self.pair.statements)
        if self.optimizer is not None and found == self._found:
            return
        self._found = found
        fresh = {n: p for n, p in self.pair.named().items() if n not in self._trained}
        self._trained |= fresh
        self._reached = self._reached and not (fresh and self.optimizer)
        spelled = self._pyro_names(fresh)
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.optim, spelled)
            self._watch_optimizer = watch_optimizer(self.optimizer)
            if isinstance(self.optim, PyroOptim):
                first = next(iter(fresh.values()))
                self.scheduler = lend_to_pyro(self.optim, self.optimizer, first)
        elif fresh and not isinstance(self.optim, Optimizer):
            for group in make_groups(self.optim, spelled):
                self.optimizer.add_param_group(group)

    def _pyro_names(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters by the names that Pyro has for them, where it has one."""
        spelled = {id(leaf): name for name, leaf in dict(self.pair.statements).items()}
        return {spelled.get(id(p), name): p for name, p in named.items()}

    def _clip(self) -> None:
        named = self._pyro_names(self._trained)
        clip_gradients(self.optim, self.optimizer, named, self.clip_norm)
