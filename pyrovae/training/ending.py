"""How a job of several processes ends: one sentence, and the same exit code for all."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from typing import NoReturn

import torch

from pyrovae.training.distributed import ProcessLost, World

__all__ = ["Ending"]

ANSWER = 1.5


class Ending:
    """Whichever process has to give up first says why; the others leave quietly after it.

    Args:
        world: The processes; for one alone, a sentence is printed and nothing else is done.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._once = threading.Lock()

    def end(self, sentence: str, code: int) -> int:
        """Say a sentence on standard error, if no other process has ended the job before.

        Returns:
            The exit code; where there are several processes, this one exits with it at once.
        """
        if self.world.size == 1:
            print(sentence, file=sys.stderr)
            return code
        self._once.acquire()
        return self._leave(sentence, code)

    def parse(self, parser: ArgumentParser, arguments: list[str]) -> Namespace:
        """Parse a command line; what is wrong with it is said once."""
        if self.world.size == 1:
            return parser.parse_args(arguments)
        words = io.StringIO()
        try:
            with redirect_stderr(words):
                return parser.parse_args(arguments)
        except SystemExit as error:
            if error.code:
                self.end(words.getvalue().rstrip(), error.code)
            raise

    @contextmanager
    def hushed(self) -> Iterator[None]:
        """Inside, rank 0 alone writes to standard output and standard error."""
        if self.world.first:
            yield
            return
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield

    @contextmanager
    def parting(self, kept: Callable[[], str]) -> Iterator[None]:
        """Inside, the loss of another process ends this one with a sentence that says whose.

        ``torchrun`` sends SIGTERM to the others when a process of the same machine dies. It is
        answered by a thread, since the process itself may be waiting for the one that is gone.

        Args:
            kept: Says what is kept, and how to go on.
        """
        if self.world.size == 1:
            yield
            return
        here, there = os.pipe()
        os.set_blocking(there, False)
        handler = signal.signal(signal.SIGTERM, lambda *_: None)
        wakeup = signal.set_wakeup_fd(there, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(here, kept), daemon=True).start()
        try:
            yield
        except ProcessLost:
            self._mourn(kept)
        finally:
            signal.set_wakeup_fd(wakeup)
            signal.signal(signal.SIGTERM, handler)
            os.close(there)

    def _listen(self, pipe: int, kept: Callable[[], str]) -> None:
        while number := os.read(pipe, 1):
            if number[0] == signal.SIGTERM:
                self._mourn(kept)
        os.close(pipe)

    def _mourn(self, kept: Callable[[], str]) -> NoReturn:
        self._once.acquire()
        gone = self._gone()
        if not gone:
            self._leave(f"pyrovae: {kept()}", 128 + signal.SIGTERM)
        who = f"rank {' and rank '.join(map(str, gone))} of {self.world.size} processes"
        self._leave(f"pyrovae: {who} is gone or does not answer; {kept()}", 1)

    def _gone(self) -> list[int]:
        """The processes that do not say within a moment that they are here."""
        missing = [rank for rank in range(self.world.size) if rank != self.world.rank]
        with suppress(RuntimeError):
            store, until = _store(), time.monotonic() + ANSWER
            store.set(f"pyrovae/here/{self.world.rank}", "")
            while missing and time.monotonic() < until and not store.check(["pyrovae/said"]):
                missing = [r for r in missing if not store.check([f"pyrovae/here/{r}"])]
                time.sleep(0.02)
        return missing

    def _leave(self, sentence: str, code: int) -> NoReturn:
        said = self._said(code)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            if said is None:
                print(sentence, file=sys.__stderr__, flush=True)
        os._exit(code if said is None else said)

    def _said(self, code: int) -> int | None:
        """The code with which another process has ended the job; None if this one is the first."""
        try:
            store = _store()
            if store.add("pyrovae/said", 1) == 1:
                store.set("pyrovae/code", str(code))
                return None
            store.wait(["pyrovae/code"], timedelta(seconds=ANSWER))
            return int(store.get("pyrovae/code"))
        except RuntimeError:
            return None


def _store() -> torch.distributed.Store:
    """What processes can tell each other without a collective; it outlives any of them."""
    return torch.distributed.distributed_c10d._get_default_store()
