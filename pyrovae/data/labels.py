"""Hand labels to both programs as their second argument: all labels, or a chosen few."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyrovae._tools import InputError

__all__ = ["HIDDEN", "LABEL_SEED", "choose_labelled", "label_context"]

# No class number, so that a program can tell a hidden label by its sign.
HIDDEN = -1
# Fixed, so that runs with different seeds are shown the same labels and can be compared.
LABEL_SEED = 0


def label_context(
    labels: Sequence[Tensor] | None, name: str, labelled: int | None = None
) -> list[Tensor]:
    """The labels that a pair ``model(x, y)``, ``guide(x, y)`` is shown, for each split.

    Args:
        labels: The classes of the training, validation and test data, int64 ``[N]`` each.
        name: What the data are called.
        labelled: How many training labels are shown, chosen by :func:`choose_labelled`; the
            others, and those of the other splits, are :data:`HIDDEN`. None shows every label of
            every split.

    Returns:
        int64 ``[N]`` for each split.

    Raises:
        ValueError: If there are no labels, they are not the classes 0 to C − 1, or fewer than
            ``labelled``.
    """
    if labels is None:
        raise InputError(
            f"Expected labels in {name} for context='labels', got none; save them as y beside x "
            f"in a .npz file, or in a column 'label' of a .csv file."
        )
    if any(y.is_floating_point() for y in labels):
        raise InputError(
            f"Expected labels that are classes in {name} for context='labels', got real numbers; "
            f"save them as integers from 0."
        )
    found = torch.cat(list(labels)).unique()
    if not torch.equal(found, torch.arange(len(found))):
        raise InputError(
            f"Expected the classes 0 to {len(found) - 1} as labels in {name}, got "
            f"{found[0].item()} to {found[-1].item()}; number them from 0 without gaps."
        )
    if labelled is None:
        return list(labels)
    train, *others = labels
    shown = torch.full_like(train, HIDDEN)
    chosen = choose_labelled(train, labelled)
    shown[chosen] = train[chosen]
    return [shown, *(torch.full_like(y, HIDDEN) for y in others)]


def choose_labelled(y: Tensor, count: int) -> Tensor:
    """Rows whose labels are shown: as many of every class, to within one, as the classes allow.

    Args:
        y: Classes, int64 ``[N]``.
        count: How many rows.

    Returns:
        Row numbers ``[count]``, picked with the fixed seed :data:`LABEL_SEED`; more of them
        contain fewer of them.

    Raises:
        ValueError: If ``count`` is not between 0 and N.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= len(y):
        raise InputError(
            f"Expected labelled between 0 and the {len(y)} training labels, got {count!r}."
        )
    generator = torch.Generator().manual_seed(LABEL_SEED)
    order = torch.randperm(len(y), generator=generator)
    seen = torch.nn.functional.one_hot(y[order]).cumsum(0)
    turn = seen.gather(1, y[order][:, None])[:, 0]
    return order[turn.argsort(stable=True)[:count]]
