"""Small tools that every folder may use: errors, progress bars, seeds, files, source lines."""

from __future__ import annotations

import contextlib
import difflib
import functools
import math
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from tqdm import tqdm

P = ParamSpec("P")
T = TypeVar("T")


class InputError(ValueError):
    """What the caller did wrong, in one sentence that says how to fix it.

    The command line prints the sentence and exits with 2. Every other exception is taken for a
    defect of this package or of a user's program, and keeps its traceback.
    """

    def __init__(self, sentence: str = "") -> None:
        # What comes out of a program, Pyro (1.9.2) raises anew with a table of shapes below.
        super().__init__(sentence.partition("Trace Shapes:")[0].rstrip())


class InputTypeError(InputError, TypeError):
    """An argument of the wrong type."""


# Files whose lines no warning is about: those of this package, and what wraps its functions.
_OURS = str(Path(__file__).parent.parent), str(Path(torch.__file__).parent), contextlib.__file__


def warn(text: str) -> None:
    """Warn at the line that called into this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def plain_numbers(function: Callable[P, T]) -> Callable[P, T]:
    """The same function, given NumPy's numbers as Python's: torch takes them for no sizes."""

    @functools.wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> T:
        return function(*map(made, args), **{name: made(v) for name, v in kwargs.items()})

    def made(value: Any) -> Any:
        return value.item() if isinstance(value, np.generic) else value

    return plain


def physical_memory() -> int:
    """The bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_memory(what: str, like: Tensor, count: int, mend: str = "ask for fewer") -> None:
    """Refuse to hold so many tensors of a shape at once, where memory cannot.

    Args:
        what: What asks for them, as the beginning of a sentence.
        like: One of them, on the device that is to hold them.
        count: How many.
        mend: How to fix it.
    """
    size = like.numel() * like.element_size() * count
    have = physical_memory()
    if like.is_cuda:
        have = torch.cuda.get_device_properties(like.device).total_memory
    if size > have:
        raise InputError(
            f"{what} would take {size / 2**30:,.0f} GiB of memory at least, and there are "
            f"{have / 2**30:,.0f}: {mend}."
        )


def require_package(module: str, what: str, extra: str) -> Any:
    """A module of a package that not every user has.

    Args:
        module: Its name.
        what: What needs it, as the beginning of a sentence.
        extra: The extra of this package that brings it.

    Raises:
        InputError: If it is missing.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = (error.name or module).partition(".")[0]
        raise InputError(f"{what} needs {package}: pip install 'pyrovae[{extra}]'.") from error


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A hint at the nearest of some names, `` (did you mean 'x'?)``, or nothing."""
    plain = {each.lower().replace("-", "_"): each for each in names}
    near = difflib.get_close_matches(name.lower().replace("-", "_"), plain, n=1)
    return f" (did you mean {plain[near[0]]!r}?)" if near else ""


def require_same(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    message: str,
    *,
    free: Collection[str] = (),
) -> None:
    """Refuse to go on with something under settings other than those it was begun with.

    Args:
        before: The settings then, nested as they come.
        now: The settings now.
        message: The error's text, with ``{key}``, ``{before}`` and ``{now}`` for the first entry
            that differs; it ends with how to fix it.
        free: Entries that may differ, by their paths ``a.b``, each with all below it.

    Raises:
        InputError: Naming the first entry that differs.
    """
    old, new = flat(before), flat(now)
    for key in sorted(old.keys() | new.keys()):
        if any(f"{key}.".startswith(f"{each}.") for each in free):
            continue
        if old.get(key) != new.get(key):
            raise InputError(message.format(key=key, before=old.get(key), now=new.get(key)))


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by their paths, ``a.b.c``; an empty mapping has none."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        path = f"{prefix}{key}"
        found |= flat(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return found


def should_compile(compile: bool | str, pays: bool) -> bool:
    """Whether something is to be compiled.

    Args:
        compile: True, False, or ``"auto"`` for where it pays.
        pays: Whether compiling takes less time than it saves.

    Raises:
        InputError: If ``compile`` is none of these.
    """
    if compile not in ("auto", True, False):
        raise InputError(f"Expected compile='auto', True or False, got {compile!r}.")
    return bool(compile is True or (compile == "auto" and pays))


def at_least(least: dict[str, int], *values: int) -> None:
    """Refuse values that are no integers, or less than the least one of that name."""
    for (name, low), value in zip(least.items(), values, strict=True):
        if not isinstance(value, int) or value < low:
            raise InputError(f"Expected an integer {name} >= {low}, got {value!r}.")


def standard_error(values: Tensor, dim: int = 0) -> Tensor:
    r"""The standard error of a mean over one dimension; NaN for fewer than two values.

    .. math:: \mathrm{se}^2 = \frac{1}{N (N - 1)} \sum_n (v_n - \bar v)^2

    Args:
        values: Independent values, ``[N, ...]``; in float64 where N is large.
        dim: The dimension that the mean is taken over.

    Returns:
        The values' shape without that dimension, in their dtype.
    """
    n = values.shape[dim]
    if n < 2:
        return values.sum(dim) * math.nan
    return values.std(dim) / math.sqrt(n)


def progress_bar(items: Iterable | None, *, enabled: bool = True, **options: Any) -> tqdm:
    """Iterate with a bar, on a terminal or in a notebook, if a bar is wanted.

    Args:
        items: What to iterate over; None for a bar that is moved with ``.update(n)``.
        enabled: Whether a bar is wanted.
        options: Passed to :class:`tqdm.tqdm`.
    """
    from tqdm.auto import tqdm

    return tqdm(items, disable=not (enabled and _watched()), leave=False, **options)


def _watched() -> bool:
    """Whether somebody watches: standard error is a terminal, or IPython runs in a kernel."""
    ipython = sys.modules.get("IPython")
    return sys.stderr.isatty() or hasattr(ipython and ipython.get_ipython(), "kernel")
