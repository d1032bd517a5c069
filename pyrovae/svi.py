"""Stochastic variational inference with Pyro's interface and the parameters where they belong."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from pyro.params.param_store import (
    module_from_param_with_module_name,
    normalize_param_name,
    user_param_name,
)
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyrovae.capture import Capture, CaptureError, signature, undone
from pyrovae.objectives import Estimate, estimate, is_differentiable, summed
from pyrovae.params import Parameters

__all__ = ["SVI"]

PAYS_AFTER, AGAIN_AFTER, REMEMBERED = 5_000, 500, 64


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
        loss: A Pyro ELBO, or a function ``(model, guide, x, *context)`` to differentiate.
        loss_and_grads: With a function as ``loss``: does the backward pass itself.
        clip_norm: The largest norm of the whole gradient; None clips nothing.
        compile: Run loss and gradients as one graph, captured from the handlers and compiled for
            a shape of a batch: True from the second step on, False never, ``"auto"`` where it
            pays, which is after 5,000 steps, or at once if ``steps`` are that many. Another shape,
            or the same after a change to the modules, is compiled when it has come 500 times. A
            pair that cannot be captured runs eagerly, with one warning that says why.
        steps: How many steps are going to be taken, where that is known.

    Raises:
        TypeError: If ``optim`` or ``loss`` is none of these.
        ValueError: If ``compile`` is none of these or ``clip_norm`` is not positive.

    References:
        Kingma and Welling (arXiv 1312.6114), algorithm 1.

    Example:
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=Trace_ELBO())
        >>> svi.step(x)  # -ELBO, nats summed over the batch, as in Pyro
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
            raise TypeError(f"Expected a Pyro or torch optimizer, got {optim!r}.")
        if not (isinstance(loss, ELBO) or callable(loss)):
            raise TypeError(f"Expected an ELBO or a function as the loss, got {loss!r}.")
        if clip_norm is not None and not 0 < clip_norm < float("inf"):
            raise ValueError(f"Expected clip_norm > 0, got {clip_norm}.")
        if compile not in ("auto", True, False):
            raise ValueError(f"Expected compile='auto', True or False, got {compile!r}.")
        self.model, self.guide, self.optim = model, guide, optim
        self.objective = loss
        self.loss_and_grads = loss_and_grads
        self.clip_norm = clip_norm
        self.parameters = Parameters(model, guide)
        self.optimizer: Optimizer | None = None
        self.scheduler: LRScheduler | None = None
        self.compile = compile
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

    def update(self, *args: Any, **kwargs: Any) -> Estimate:
        """Take one gradient step and return its estimate, unread, on the device."""
        result = self.gradients(*args, **kwargs)
        self.descend()
        return result

    def gradients(self, *args: Any, **kwargs: Any) -> Estimate:
        """Evaluate the objective on a batch and add its gradient to every parameter's."""
        captured = self._captured(args, kwargs)
        if captured is not None:
            return captured
        if self.loss_and_grads is not None:
            programs = self.parameters.run_model, self.parameters.run_guide
            result = summed(self.loss_and_grads(*programs, *args, **kwargs))
        else:
            result = estimate(self.objective, self.parameters, *args, **kwargs)
        if not self._reached and result.surrogate is not None:
            self.parameters.check_reach(result.surrogate, args)
            self._reached = True
        if result.surrogate is not None and result.surrogate.requires_grad:
            result.surrogate.backward()
        return result

    def _captured(self, args: tuple, kwargs: dict) -> Estimate | None:
        self._taken += 1
        ready = self._reached and self.optimizer is not None and self._taken > self._wait
        if self.compile is False or not ready or self.loss_and_grads or kwargs:
            return None
        if not is_differentiable(self.objective):
            return None
        key = signature(self.objective, self.parameters, args)
        if key is None or (key in self._captures and self._captures[key] is None):
            return None
        try:
            if key not in self._captures:
                if not self._pays(key):
                    return None
                leaves = [p for p in self._trained.values() if p.requires_grad]
                self._captures[key] = Capture(self.objective, self.parameters, leaves, args)
            capture = self._captures[key]
            step = capture(args)
        except CaptureError as error:
            self._captures[key] = None
            warnings.warn(f"The pair runs eagerly, not compiled: {error}.", stacklevel=4)
            return None
        for leaf, gradient in zip(capture.leaves, step.gradients, strict=True):
            if gradient is not None:
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        return step.estimate

    def _pays(self, key: Hashable) -> bool:
        """The first batch is worth a capture; another one if it keeps coming."""
        if len(self._seen) > REMEMBERED:
            self._seen.clear()
        self._seen[key] = self._seen.get(key, 0) + 1
        return not self._captures or self._seen[key] >= AGAIN_AFTER

    def descend(self) -> None:
        """Step the optimizer on the gradients at hand and clear them."""
        self._collect()
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
                programs = self.parameters.run_model, self.parameters.run_guide
                loss = self.objective.loss(*programs, *args, **kwargs)
                return tuple(map(float, loss)) if isinstance(loss, tuple) else float(loss)
            return estimate(self.objective, self.parameters, *args, **kwargs).loss.item()

    def build(self, *args: Any) -> None:
        """Make the optimizer before the first step, for a state to be loaded into.

        Args:
            args: A batch, on which the objective is tried once.

        Raises:
            ValueError: If the loss depends on parameters that neither program owns.
        """
        if self.loss_and_grads is None and is_differentiable(self.objective):
            with undone(self.parameters, args):
                surrogate = estimate(self.objective, self.parameters, *args).surrogate
            self.parameters.check_reach(surrogate, args)
        self._collect()
        self._reached = True

    def _collect(self) -> None:
        found = len(self.parameters.model.found) + len(self.parameters.guide.found)
        if self.optimizer is not None and found == self._found:
            return
        self._found = found
        fresh = {n: p for n, p in self.parameters.named().items() if n not in self._trained}
        self._trained |= fresh
        self._reached = self._reached and not (fresh and self.optimizer)
        if self.optimizer is None:
            self._make_optimizer(fresh)
        elif fresh and not isinstance(self.optim, Optimizer):
            for group in self._groups(fresh):
                self.optimizer.add_param_group(group)

    def _make_optimizer(self, named: dict[str, Tensor]) -> None:
        if not named:
            raise ValueError("The pair has no parameters to train.")
        if isinstance(self.optim, Optimizer):
            self.optimizer = self.optim
        elif isinstance(self.optim, PyroOptim):
            if self.optim._state_waiting_to_be_consumed:
                raise ValueError(
                    "One optimizer steps all parameters here: restore its state with "
                    "svi.build() and svi.optimizer.load_state_dict(state), not with optim.load()."
                )
            self.optimizer = self.optim.pt_optim_constructor(self._groups(named))
            self._lend_to_pyro(next(iter(named.values())))
        else:
            self.optimizer = self.optim(list(named.values()))
            if not isinstance(self.optimizer, Optimizer):
                raise TypeError(f"Expected a torch optimizer from {self.optim!r}.")

    def _groups(self, named: dict[str, Tensor]) -> list[dict]:
        options = self.optim.pt_optim_args if isinstance(self.optim, PyroOptim) else {}
        if not callable(options):
            return [{"params": list(named.values()), **options}]
        by_path = self.optim.pt_optim_args_argc == 1
        return [
            {
                "params": [p],
                **(options(normalize_param_name(n)) if by_path else options(*_split(n))),
            }
            for n, p in self._pyro_names(named).items()
        ]

    def _pyro_names(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters by the names that Pyro has for them, where it has one."""
        found = self.parameters.model.found | self.parameters.guide.found
        spelled = {id(leaf): name for name, leaf in found.items()}
        return {spelled.get(id(p), name): p for name, p in named.items()}

    def _lend_to_pyro(self, key: Tensor) -> None:
        """Let ``optim.step()`` of Pyro's schedulers reach the one optimizer."""
        make_scheduler = getattr(self.optim, "pt_scheduler_constructor", None)
        if make_scheduler is not None:
            self.scheduler = make_scheduler(self.optimizer, **self.optim.kwargs)
        self.optim.optim_objs = {key: self.scheduler or self.optimizer}

    def _clip(self) -> None:
        clip = self.optim.pt_clip_args if isinstance(self.optim, PyroOptim) else {}
        if clip:
            for name, parameter in self._pyro_names(self._trained).items():
                if parameter.grad is not None:
                    options = clip(*_split(name)) if callable(clip) else clip
                    PyroOptim._clip_grad(parameter, **options)
        if self.clip_norm is not None:
            stepped = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(stepped, self.clip_norm)


def _split(name: str) -> tuple[str, str]:
    return module_from_param_with_module_name(name), user_param_name(name)
