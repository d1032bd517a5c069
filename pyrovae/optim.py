"""Several torch optimizers as one, such as Muon for matrices beside Adam for the rest.

Gradients are normalized per tensor before any of them by ``normalize_gradients=True``, of
:func:`pyrovae.fit` and of :class:`pyrovae.SVI`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Muon, Optimizer

from pyrovae._tools import InputError

__all__ = ["Combined", "muon", "parts_of", "place_counts"]


class Combined(Optimizer):
    """Optimizers of some parameters each, stepped one after another as a single one.

    Its groups and its state are theirs, so that schedules, checkpoints and compiled steps see all
    of them. Parameters that come later join the last group.

    Args:
        parts: The optimizers, none of whose parameters another has.

    Raises:
        ValueError: If there is none, or two of them step one parameter.

    Example:
        >>> a, b = (torch.zeros(2, requires_grad=True) for _ in range(2))
        >>> parts = torch.optim.SGD([a], lr=0.1), torch.optim.Adam([b], lr=1e-3)
        >>> len(pyrovae.optim.Combined(*parts).param_groups)
        2
    """

    def __init__(self, *parts: Optimizer) -> None:
        if not parts:
            raise InputError("Expected optimizers to combine, got none.")
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:
            self.state.update(part.state)
        self._share()

    def _share(self) -> None:
        rest = iter(self.param_groups)
        for part in self.parts:
            part.state = self.state
            part.param_groups = [next(rest) for _ in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every part, after a closure that evaluates the loss if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a ``state_dict()``, in every part."""
        super().load_state_dict(state_dict)
        self._share()


def parts_of(optimizer: Optimizer) -> Sequence[Optimizer]:
    """The optimizers that one is made of: those of a :class:`Combined`, or itself."""
    return optimizer.parts if isinstance(optimizer, Combined) else (optimizer,)


def place_counts(optimizer: Optimizer) -> None:
    """Bring an optimizer's counts of steps to its weights: a CUDA graph replays nothing on a CPU.

    torch keeps them on the CPU unless an option says otherwise (2.11 to 2.14).
    """
    for leaf, state in optimizer.state.items():
        for name, value in state.items() if leaf.device.type == "cuda" else ():
            if isinstance(value, Tensor) and value.dim() == 0:
                state[name] = value.to(leaf.device)


def muon(
    parameters: Iterable[Tensor],
    lr: float = 1e-3,
    *,
    others: Iterable[Tensor] = (),
    weight_decay: float = 0.0,
    momentum: float = 0.95,
) -> Combined:
    r"""torch's Muon for matrices, and Adam for all else, at one learning rate.

    .. math:: M \leftarrow \mu M + (1 - \mu) G, \qquad
              W \leftarrow W - 0.2 \, \eta \sqrt{\max(m, n)} \,
              \mathrm{orth}\bigl((1 - \mu) G + \mu M\bigr)

    orth(·) has the singular vectors of its argument and singular values near one, so that entries
    move by a fifth of η, about as far as Adam moves them in the course of a training.

    Args:
        parameters: All parameters, as :func:`pyrovae.fit` gives them to ``optimizer``.
        lr: The learning rate η of both.
        others: Matrices for Adam: those that read or write the data, as Muon is for what lies
            between.
        weight_decay: Muon's, times η, decoupled from the gradient.
        momentum: Muon's μ.

    Raises:
        ValueError: If there is no matrix for Muon.

    References:
        Jordan et al., Muon: an optimizer for hidden layers in neural networks (2024); Liu et al.,
        Muon is scalable for LLM training (arXiv 2502.16982), equation 4, for the factor.

    Example:
        >>> outer = [guide.encoder.layers[0].weight, model.decoder.last.weight]
        >>> from functools import partial
        >>> optimizer = partial(pyrovae.optim.muon, lr=1e-3, others=outer)
        >>> result = pyrovae.fit(model, guide, data, epochs=2, optimizer=optimizer, seed=0)
        >>> len(result.history)
        2
    """
    every, outer = list(parameters), set(map(id, others))
    hidden = [p for p in every if p.dim() == 2 and id(p) not in outer]
    rest = [p for p in every if not any(p is each for each in hidden)]
    if not hidden:
        raise InputError("Expected a matrix for Muon among the parameters, got none: take Adam.")
    made: list[Optimizer] = [
        Muon(
            hidden,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            adjust_lr_fn="match_rms_adamw",
        )
    ]
    return Combined(*made, *([Adam(rest, lr=lr)] if rest else []))
