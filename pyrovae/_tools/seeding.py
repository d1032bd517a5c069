"""Random streams: a seed for a block of code, and one for each part of a computation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import index
from threading import RLock, local

import numpy as np
import torch
from torch import Tensor, nn

from pyrovae._tools import InputTypeError

# Torch's stream, Pyro's stack of handlers (1.9.2) and a module's mode are one for all threads, so
# that threads which run programs take turns.
ALONE = RLock()
# What stands for it in threads that work for one which holds it.
_LENT = local()


def turn() -> RLock:
    """The lock with which this thread takes turns: :data:`ALONE`, or what was lent instead."""
    return getattr(_LENT, "lock", ALONE)


def lend() -> Callable[[], None]:
    """What threads call first that work for this one; they take turns among themselves then."""
    lock = RLock()
    return lambda: setattr(_LENT, "lock", lock)


@contextmanager
def seeded(seed: int | None, device: torch.device | str = "cpu", *path: int) -> Iterator[None]:
    """Run a block under a seed, one thread at a time; torch's streams are then as they were.

    Args:
        seed: The seed; None leaves the global stream to run on.
        device: Where the block draws; its stream is kept beside the CPU's.
        path: The part of a computation, as :func:`subseed` has it, if it is one.
    """
    if seed is None:
        with turn():
            yield
        return
    seed = subseed(seed, *path) if path else draw_seed(seed)
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    with turn(), torch.random.fork_rng(devices=devices, device_type="cuda"):
        torch.default_generator.manual_seed(seed)
        for each in devices:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield


class Stream:
    """A stream of random numbers that blocks of a thread draw from, one after the other.

    Between two of them other threads may draw from theirs. Arguments as for :func:`seeded`.
    """

    def __init__(self, seed: int, device: torch.device, *path: int) -> None:
        self.seed, self.device = subseed(seed, *path), device
        self._states: list[Tensor] = []
        self._opened = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Run a block that goes on with the stream, which may be within another one."""
        if self._opened:
            yield
            return
        with seeded(self.seed, self.device):
            if self._states:
                torch.set_rng_state(self._states[0])
            for state in self._states[1:]:
                torch.cuda.set_rng_state(state, self.device)
            self._opened = True
            try:
                yield
            finally:
                self._opened, self._states = False, [torch.get_rng_state()]
                if self.device.type == "cuda":
                    self._states.append(torch.cuda.get_rng_state(self.device))


def subseed(seed: int, *path: int) -> int:
    """A seed for one part of a computation, independent of the order in which parts run.

    Args:
        seed: The seed of the whole.
        path: Integers >= 0 that name the part.

    References:
        numpy.random.SeedSequence.
    """
    state = np.random.SeedSequence([draw_seed(seed) % 2**64, *path]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def draw_seed(seed: int | None) -> int:
    """The seed itself, or one drawn from torch's global stream if it is None."""
    if seed is None:
        return int(torch.randint(2**31 - 1, ()))
    try:
        return index(seed)
    except TypeError:
        raise InputTypeError(f"Expected an integer seed or None, got {seed!r}.") from None


@contextmanager
def undone(
    modules: Iterable[nn.Module], device: torch.device, changed: Iterable[Tensor] = ()
) -> Iterator[None]:
    """Run a block, and give buffers, random streams and some tensors back as they were.

    Args:
        modules: Whose buffers, those of submodules apart.
        device: Whose random stream, beside the CPU's.
        changed: What else the block writes to, in place.
    """
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in modules
        for name, buffer in module.named_buffers(recurse=False)
    ]
    kept = [(tensor, tensor.detach().clone()) for tensor in changed]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices, device_type="cuda"):
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                setattr(module, name, buffer)
                restore(buffer, value)
            for tensor, value in kept:
                restore(tensor, value)


def restore(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor the value that it had."""
    # A write in place would spoil graphs that hold the tensor for a backward pass. Its version does
    # not tell whether it changed: what Inductor's kernels write does not count there.
    if not torch.equal(tensor, value):
        tensor.copy_(value)
