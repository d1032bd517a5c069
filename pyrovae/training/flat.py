"""The numbers and the gradients of a step in one flat tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

__all__ = ["FlatSum"]


class FlatSum:
    """Sums the numbers and the gradients of a step over processes, all of them at once.

    A parameter has a gradient afterwards if it had one on any process. On a CPU that is read at
    every step; on an accelerator, where reading costs a synchronization, only until every
    parameter has had one.

    Args:
        all_reduce: Sums a contiguous tensor over processes, in place.
    """

    def __init__(self, all_reduce: Callable[[Tensor], None]) -> None:
        self.all_reduce = all_reduce
        self._leaves: list[Tensor] = []
        self._numbers = -1
        self._flags: dict[tuple[bool, ...], Tensor] = {}
        self._full = False

    def __call__(self, leaves: list[Tensor], numbers: list[Tensor], counts: bool) -> list[Tensor]:
        """Sum a step's numbers, and in place its gradients.

        Args:
            leaves: The parameters, in the same order on every process.
            numbers: Scalars.
            counts: Whether this process's share goes into the sum.

        Returns:
            The sums of the numbers. Gradients become views of a tensor that the next call
            overwrites.
        """
        if len(numbers) != self._numbers or not _same(leaves, self._leaves):
            self._lay_out(leaves, len(numbers))
        had = tuple(counts and leaf.grad is not None for leaf in leaves)
        self._fill(leaves, numbers, had, counts)
        self.all_reduce(self._flat)
        for leaf, view, present in zip(leaves, self._views, self._present(), strict=True):
            leaf.grad = view.to(leaf.dtype) if present else None
        sums = self._head.clone().unbind()
        return [total.to(number.dtype) for total, number in zip(sums, numbers, strict=True)]

    def _lay_out(self, leaves: list[Tensor], numbers: int) -> None:
        sizes = [numbers, len(leaves), *(leaf.numel() for leaf in leaves)]
        dtype = reduce(torch.promote_types, (leaf.dtype for leaf in leaves), torch.float32)
        self._flat = torch.zeros(sum(sizes), dtype=dtype, device=leaves[0].device)
        self._head, self._found, *views = self._flat.split(sizes)
        self._views = [view.view(leaf.shape) for view, leaf in zip(views, leaves, strict=True)]
        self._leaves, self._numbers, self._full = list(leaves), numbers, False
        self._flags.clear()

    def _fill(
        self, leaves: list[Tensor], numbers: list[Tensor], had: tuple[bool, ...], counts: bool
    ) -> None:
        if not all(had):
            self._flat.zero_()
        if not counts:
            return
        if had not in self._flags:
            self._flags[had] = torch.tensor(had).to(self._flat)
        self._found.copy_(self._flags[had])
        self._head.copy_(torch.stack([number.to(self._flat.dtype) for number in numbers]))
        pairs = [(view, leaf.grad) for view, leaf in zip(self._views, leaves, strict=True)]
        given = [(view, grad) for view, grad in pairs if grad is not None]
        if given:
            torch._foreach_copy_(*map(list, zip(*given, strict=True)))

    def _present(self) -> list[bool]:
        if self._full:
            return [True] * len(self._leaves)
        present = [count > 0 for count in self._found.tolist()]
        self._full = all(present) and self._flat.device.type != "cpu"
        return present


def _same(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))
