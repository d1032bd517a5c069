"""Small tools that every folder may use: errors, hints, seeds, files, progress, source lines."""

from __future__ import annotations

__all__ = ["InputError", "InputTypeError"]


class InputError(ValueError):
    """What the caller did wrong, in one sentence that says how to fix it.

    The command line prints the sentence and exits with 2. Every other exception is taken for a
    defect of this package or of a user's program, and keeps its traceback.
    """


class InputTypeError(InputError, TypeError):
    """An argument of the wrong type."""
