"""A progress bar on a terminal, silence in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["progress_bar"]


def progress_bar(items: Iterable, *, enabled: bool = True, **options: Any) -> tqdm:
    """Iterate with a bar on standard error, if that is a terminal and a bar is wanted.

    Args:
        items: What to iterate over.
        enabled: Whether a bar is wanted.
        options: Passed to :class:`tqdm.tqdm`.
    """
    from tqdm import tqdm

    return tqdm(items, disable=not (enabled and sys.stderr.isatty()), leave=False, **options)
