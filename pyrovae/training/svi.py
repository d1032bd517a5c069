"""Stochastic variational inference with Pyro's interface and the parameters where they belong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from pyro import infer, poutine
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer

from pyrovae._tools import InputTypeError, should_compile, warn
from pyrovae._tools.seeding import ALONE, undone
from pyrovae.objectives import Estimate, Objective, estimate, is_differentiable, summed
from pyrovae.pairs.contract import check_step
from pyrovae.pairs.pair import Pair
from pyrovae.training.optimizer import Trained

if TYPE_CHECKING:
    from pyrovae.compiling.step import CompiledSteps, Steps


@contextmanager
def with_gradients() -> Iterator[None]:
    """What a step needs, whatever it is called in: under no_grad() Pyro's moves nothing, unsaid."""
    with ALONE, torch.inference_mode(False), torch.enable_grad():
        yield


class SVI(infer.SVI):
    r"""Stochastic gradient descent on an objective of a model and its guide.

    .. math:: (\theta, \phi) \leftarrow (\theta, \phi)
              - \mathrm{optim}\bigl(\nabla_{\theta, \phi}\, \hat{\mathrm{loss}}(x)\bigr)

    A :class:`pyro.infer.SVI`, for every pair that Pyro's ELBOs accept: PyroModules, plain modules,
    bound methods, functions with ``pyro.module`` and ``pyro.param``. Module parameters are trained
    on their modules, whatever Pyro's store holds under their names.

    Args:
        model: The model program.
        guide: The guide program.
        optim: A Pyro optimizer or scheduler, which several SVIs may share; a torch optimizer; or a
            function from parameters to one. It steps what comes, thaws or is replaced later too.
        loss: A Pyro ELBO, an :class:`pyrovae.objectives.Objective`, or a function ``(model, guide,
            x, *context)`` to differentiate.
        loss_and_grads: With a function as ``loss``: does the backward pass itself.
        num_samples, num_steps: For :meth:`run`, deprecated as in Pyro.
        clip_norm: The largest norm of the whole gradient; None clips nothing.
        normalize_gradients: Divide each parameter's gradient by its norm, before any optimizer.
        average: The decay of an exponential moving average of the weights; None keeps none.
        compile: Run the step as one graph, compiled for a shape of a batch: True from the second
            step on, False never, ``"auto"`` after 2,000 steps, or at once if ``steps`` are that
            many. Another shape, or another state of what the programs read, is compiled when it has
            come 500 times. What cannot be captured runs eagerly, with one warning that says why.
        steps: How many steps are going to be taken, where that is known.

    Raises:
        TypeError: If ``optim`` or ``loss`` is none of these.
        ValueError: If an argument is out of range; at the first step, if the loss depends on module
            parameters that neither program owns, or each samples a latent that the other lacks.

    References:
        Kingma and Welling (arXiv 1312.6114), algorithm 1.

    Example:
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=pyro.infer.Trace_ELBO())
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
        num_samples: int = 0,
        num_steps: int = 0,
        *,
        clip_norm: float | None = None,
        normalize_gradients: bool = False,
        average: float | None = None,
        compile: bool | str = "auto",
        steps: int = 0,
    ) -> None:
        if not (isinstance(loss, ELBO) or callable(loss)):
            raise InputTypeError(f"Expected an ELBO or a function as the loss, got {loss!r}.")
        known = optim if isinstance(optim, PyroOptim) else PyroOptim(optim, {})
        super().__init__(model, guide, known, loss, loss_and_grads, num_samples, num_steps)
        self.optim, self.objective, self._backward = optim, loss, loss_and_grads
        self.pair = Pair(model, guide)
        self._programs = self.pair.run_model, self.pair.run_guide
        self.trained = Trained(optim, self.pair, clip_norm, normalize_gradients, average)
        self.steps_taken = 0
        self.reduce: Callable[[Estimate, list[Tensor]], Estimate] | None = None
        self.compiled: CompiledSteps | None = None
        self._differentiable = loss_and_grads is None and is_differentiable(loss)
        # The graph of the next loss is searched for parameters that a step has made.
        self._checked = -1
        if should_compile(compile, pays=True) and self._differentiable:
            from pyrovae.compiling.step import CompiledSteps

            self.compiled = CompiledSteps(loss, self.pair, self.trained, compile, steps)
        elif compile is True and not self._differentiable:
            told = "takes its gradient by code of its own, which no graph of a loss has"
            kind = f"the objective, {type(loss).__name__}," if isinstance(loss, ELBO) else "it"
            warn(f"The pair runs eagerly, not compiled: {kind} {told}.")

    @property
    def optimizer(self) -> Optimizer:
        """The one torch optimizer of all parameters; the first step makes it, or :meth:`build`."""
        return self.trained.optimizer

    def step(self, *args: Any, **kwargs: Any) -> float | tuple[float, ...]:
        """Take one gradient step on a batch ``x, *context``, the programs' arguments.

        Returns:
            The loss before the step: nats summed over the batch, lower is better; a tuple for an
            objective of several losses, as in Pyro.
        """
        result = self.update(*args, **kwargs)
        return tuple(p.item() for p in result.parts) if result.parts else result.loss.item()

    @with_gradients()
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
        self._begin()
        result, updated = self._assess(args, kwargs, load, update=self.reduce is None)
        if self.reduce is not None:
            self.trained.collect()
            result = self.reduce(result, self.trained.leaves)
        if inspect is not None:
            inspect(result)
        if not updated:
            self.apply_gradients()
        return result

    @with_gradients()
    def update_many(self, batches: Sequence[Tensor], load: Callable) -> Steps | None:
        """Take the compiled steps of the first ``batches`` in one go, if they are ready for it.

        Whatever else Python reads is looked at before them, not in between; ``load`` is as for
        :meth:`update`, which takes the same steps one by one.
        """
        compiled = self._ready() if self.reduce is None else None
        return None if compiled is None else compiled.many(batches, load, self._begin)

    @with_gradients()
    def gradients(self, *args: Any, **kwargs: Any) -> Estimate:
        """Evaluate the objective on a batch and add its gradient to every parameter's."""
        return self._assess(args, kwargs, None, update=False)[0]

    def apply_gradients(self) -> None:
        """Clip the gradients at hand, step the optimizer on them and clear them."""
        self.trained.step()

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float | tuple[float, ...]:
        """Evaluate the loss as :meth:`step` does, in nats summed over the batch, without a step."""
        with ALONE, torch.no_grad():
            if isinstance(self.objective, ELBO):
                # Pyro 1.9.2 declares loss() in each ELBO, but not in their base class.
                objective: Any = self.objective
                loss = objective.loss(*self._programs, *args, **kwargs)
                return tuple(map(float, loss)) if isinstance(loss, tuple) else float(loss)
            return estimate(self.objective, self.pair, *args, **kwargs).loss.item()

    @with_gradients()
    def build(self, *args: Any) -> None:
        """Try the objective on a batch and make the optimizer, for a state to be loaded into."""
        if self._differentiable:
            with undone(self.pair.modules, args[0].device):
                found = estimate(self.objective, self.pair, *args)
            check_step(self.pair, found.surrogate, args)
        self.trained.collect(needed=True)
        for leaf in self.trained.leaves:
            # What somebody else's loss has left there, as where a part was trained before.
            leaf.grad = None
        self._checked = self.trained.grown

    def _begin(self) -> None:
        """Set what changes from step to step."""
        if isinstance(self.objective, Objective):
            self.objective.at_step(self.steps_taken)
        if self.trained.alternates:
            self.trained.begin(self.steps_taken)
        self.steps_taken += 1

    def _ready(self) -> CompiledSteps | None:
        """The compiled steps, where the parameters are those that are known."""
        known = self._checked == self.trained.grown and self.trained.is_current()
        return self.compiled if known else None

    def _assess(self, args: tuple, kwargs: dict, load: Any, update: bool) -> tuple[Estimate, bool]:
        """A batch's estimate, its gradient at hand, or stepped on already if the second is True."""
        compiled = self._ready()
        if compiled and (step := compiled(args, kwargs, load, update, self.steps_taken)):
            return step.estimate, step.updated
        args = load(*args) if load else args
        self.pair.met.clear()
        if self._backward is not None:
            return summed(self._backward(*self._programs, *args, **kwargs)), False
        result = estimate(self.objective, self.pair, *args, **kwargs)
        if self._checked != self.trained.grown:
            check_step(self.pair, result.surrogate, (args, kwargs))
            self._checked = self.trained.grown
        if result.surrogate is not None and result.surrogate.requires_grad:
            result.surrogate.backward()
        return result, False

    def _traces(self, *args: Any, **kwargs: Any) -> Iterator[tuple[Any, float]]:
        """The draws of :meth:`run`, from the modules' own parameters."""
        for _ in range(self.num_samples):
            drawn = poutine.trace(self.pair.run_guide).get_trace(*args, **kwargs)
            replayed = poutine.replay(self.pair.run_model, trace=drawn)
            yield poutine.trace(replayed).get_trace(*args, **kwargs), 1.0
