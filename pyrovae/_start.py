"""What ``pyrovae`` and ``python -m pyrovae`` do before they import anything that takes long.

Ctrl-C ends the command with one sentence while it is still importing: libraries take an interrupt
for an import that failed, or swallow it. Where Python runs anything else, nothing is done.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def interrupt_as_usual() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again: everything is imported."""
    if signal.getsignal(signal.SIGINT) is _quit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _quit(number: int, frame: FrameType | None) -> None:
    os.write(2, b"pyrovae: stopped.\n")
    os._exit(130)


def _is_command() -> bool:
    # sys.argv has the name of a console script, but not yet that of a module after -m.
    script = os.path.basename(next(iter(getattr(sys, "argv", [])), ""))
    return script == "pyrovae" or ["-m", "pyrovae"] in [sys.orig_argv[i : i + 2] for i in (1, 2, 3)]


if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _quit)
