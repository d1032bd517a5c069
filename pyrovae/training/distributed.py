"""Data-parallel training by the processes that ``torchrun`` starts.

Every process has the whole data, the whole pair and the whole optimizer, and runs its share of the
rows of each batch with a random stream of its own. Gradients are summed in one all-reduce a step,
before they are clipped. Rank 0 validates, writes and speaks. A process that is lost ends the job:
torchrun stops the others, and training goes on from the last checkpoint.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from functools import reduce
from typing import Any, NoReturn

import torch
from torch import Tensor

from pyrovae._tools import InputError
from pyrovae._tools.seeding import seeded, subseed
from pyrovae.compiling.graph import undone
from pyrovae.objectives import Estimate
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import samples
from pyrovae.training.svi import SVI

__all__ = ["Diverged", "ProcessLost", "World", "join"]

# Rank 0 validates and writes while the others wait: longer than that takes for large data.
PATIENCE = timedelta(minutes=30)
# Relative to a tensor's norm. Ranks on equal devices agree to the last bit; the optimizer's
# arithmetic on unequal ones may differ by rounding.
CLOSE = 1e-4


class ProcessLost(RuntimeError):
    """Another process is gone, or does not answer."""


class Diverged(RuntimeError):
    """The processes no longer train the same weights."""


class World:
    r"""The processes of a job; one process alone has nothing to share.

    With the rows :math:`S_r` of rank r, which part a batch of N among R ranks,

    .. math:: \sum_{n=1}^N \ell(x_n, \epsilon_n)
              = \sum_{r=1}^R \sum_{n \in S_r} \ell(x_n, \epsilon_n),

    so losses and gradients are summed. Where a pair's scores carry a number over ``len(x)``, as a
    subsampled plate's do, a rank's sum is :math:`N / |S_r|` times too large, and is weighted by
    :math:`|S_r| / N`.

    What couples the data of a batch, such as batch normalization in training mode or the
    threshold of free bits, sees the rows of its own rank. A loss of one's own has to be a sum over
    data: a mean comes out as many times too large as there are ranks.

    Args:
        rank: This process, from 0.
        size: How many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._share = 1.0
        self._averages = False

    @property
    def first(self) -> bool:
        """Whether this process is the one that validates, writes and speaks."""
        return self.rank == 0

    def place(self, device: torch.device | str) -> torch.device:
        """Where this process computes: on CUDA, each has the GPU of its rank on its machine.

        That GPU becomes the current one.

        Raises:
            ValueError: If there are fewer GPUs than processes on this machine.
        """
        device = torch.device(device)
        if self.size == 1 or device.type != "cuda":
            return device
        local, gpus = int(os.environ.get("LOCAL_RANK", self.rank)), torch.cuda.device_count()
        if local >= gpus:
            processes = os.environ.get("LOCAL_WORLD_SIZE", self.size)
            raise InputError(
                f"Expected a GPU for each of the {processes} processes on this machine, found "
                f"{gpus}: use --nproc-per-node {gpus}, or --device cpu."
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        return device

    @property
    def command(self) -> list[str]:
        """How to start as many processes of the command line."""
        if self.size == 1:
            return ["pyrovae"]
        local = os.environ.get("LOCAL_WORLD_SIZE", str(self.size))
        machines = os.environ.get("GROUP_WORLD_SIZE", "1")
        more = [] if machines == "1" else ["--nnodes", machines]
        return ["torchrun", *more, "--nproc-per-node", local, "-m", "pyrovae"]

    def share(self, value: Any) -> Any:
        """What rank 0 has, on every process: numbers, texts, lists and dicts of them."""
        values = [value]
        if self.size > 1:
            with _together():
                torch.distributed.broadcast_object_list(values, 0)
        return values[0]

    def wait(self) -> None:
        """Wait until every process is here."""
        self._gather(None)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Rank 0 of each machine runs a block before its others do: what it downloads is there."""
        leads = int(os.environ.get("LOCAL_RANK", 0)) == 0
        if not leads:
            self.wait()
        try:
            yield
        finally:
            if leads:
                self.wait()

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """Run a command: rank 0 alone writes to standard output and error, and SIGTERM, with which
        torchrun ends the others when one process is lost, is answered as Ctrl-C is."""
        if self.size == 1:
            yield
            return
        signal.signal(signal.SIGTERM, _terminate)
        if self.first:
            yield
            return
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield

    def say(self, sentence: str) -> None:
        """Print a sentence on standard error, once for all processes that say the same."""
        try:
            # A private name (torch 2.11 to 2.15) for the store of torchrun's agent, which outlives
            # every rank; add() counts those that came before.
            store = torch.distributed.distributed_c10d._get_default_store
            said = self.size > 1 and store().add(f"pyrovae/{sentence}", 1) > 1
        except RuntimeError:
            said = False
        if not said:
            print(sentence, file=sys.stderr, flush=True)

    def agree(self, **facts: Any) -> None:
        """Check that every process was asked for the same.

        Raises:
            ValueError: On every process, if something is other than on rank 0.
        """
        first, *others = self._gather(facts)
        for rank, other in enumerate(others, start=1):
            for name, value in first.items():
                if other[name] != value:
                    raise InputError(
                        f"Rank {rank} has {name} = {other[name]}, rank 0 has {value}: every "
                        f"machine needs the same files, and a run directory that all of them see."
                    )

    def prepare(self, svi: SVI, args: tuple) -> None:
        """Give all processes the weights of rank 0, and let ``svi`` sum their gradients.

        Args:
            svi: What is going to be trained, built.
            args: A batch with the programs' further arguments.

        Raises:
            ValueError: If the batch is too small to be shared, or the pair's scales depend on its
                size in a way that cannot be.
        """
        if self.size == 1:
            return
        if len(args[0]) < 2 * self.size:
            raise InputError(
                f"Expected a batch of at least two rows for each of the {self.size} processes, "
                f"got {len(args[0])}: enlarge the batch, or start fewer processes."
            )
        self._averages = _averages(svi.pair, args)
        for tensor in (*svi.pair.leaves(), *_buffers(svi.pair)):
            self._broadcast(tensor)
        self.check(svi.pair)
        svi.reduce = self.reduce

    def stream(
        self, seed: int, epoch: int, device: torch.device | str
    ) -> AbstractContextManager[None]:
        """Inside, this process draws what no other draws; rank 0 goes on with its stream.

        Args:
            seed: The seed of the training.
            epoch: The number of the epoch.
            device: Where the noise is drawn.
        """
        # Rank 0 needs no seed of its own, and must not have this one: numpy's SeedSequence pads
        # with zeros, so that (seed, epoch, 0) is (seed, epoch), the stream that shuffled the data.
        return seeded(subseed(seed, epoch, self.rank) if self.rank else None, device)

    def rows(self, index: Tensor) -> Tensor:
        """This process's rows of a batch: contiguous, in the order of ranks, even to one row.

        A batch of fewer than two rows a process is not split: every process runs all of it, and
        rank 0's result counts.

        Args:
            index: The numbers of the batch's rows.
        """
        total = len(index)
        if total < 2 * self.size:
            self._share = float(self.first)
            return index
        part = index.tensor_split(self.size)[self.rank]
        self._share = len(part) / total if self._averages else 1.0
        return part

    def reduce(self, found: Estimate, leaves: list[Tensor]) -> Estimate:
        """Sum the estimates of the :meth:`rows`, and in place their gradients, over processes.

        A parameter has a gradient afterwards if it had one on any process.
        """
        numbers = [found.loss, *found.terms.values(), *found.parts]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in leaves]
        values = [*numbers, *gradients]
        dtype = reduce(torch.promote_types, (value.dtype for value in values), torch.float32)
        flat = torch.cat([value.detach().reshape(-1).to(dtype) for value in values])
        # Not 0 * flat, which is NaN where a value is.
        flat = flat * self._share if self._share else torch.zeros_like(flat)
        had = flat.new_tensor([p.grad is not None for p in leaves])
        flat = torch.cat([flat, had])
        with _together():
            torch.distributed.all_reduce(flat)
        *sums, had = flat.split([*(value.numel() for value in values), len(leaves)])
        sums = [t.view(v.shape).to(v.dtype) for t, v in zip(sums, values, strict=True)]
        for at, leaf in enumerate(leaves):
            # Asking `had` reads it back from the device: only where it can say anything new.
            if leaf.grad is not None or had[at] > 0:
                leaf.grad = sums[len(numbers) + at]
        loss, *rest = sums[: len(numbers)]
        terms = dict(zip(found.terms, rest, strict=False))
        return Estimate(loss, None, terms, tuple(rest[len(terms) :]))

    def settle(self, pair: Pair) -> None:
        """End an epoch: buffers become those of rank 0, as in PyTorch's own data parallelism.

        Raises:
            Diverged: If the weights are not those of rank 0.
        """
        if self.size > 1:
            for buffer in _buffers(pair):
                self._broadcast(buffer)
            self.check(pair)

    def check(self, pair: Pair) -> None:
        """Compare the sum and the norm of every weight with those of rank 0.

        Raises:
            Diverged: On every process, if they differ by more than rounding on any.
        """
        named = {name: leaf.detach().double() for name, leaf in pair.named().items()}
        mine = {name: torch.stack([w.sum(), w.norm()]).tolist() for name, w in named.items()}
        first, *others = self._gather(mine)
        for rank, other in enumerate(others, start=1):
            for name, numbers in first.items():
                far = zip(numbers, other[name], strict=True) if name in other else [(0, torch.inf)]
                if any(abs(a - b) > CLOSE * numbers[1] for a, b in far):
                    raise Diverged(
                        f"Rank {rank} strayed from rank 0, seen in {name}: programs must not "
                        f"change weights themselves, nor choose them by the process or by draws."
                    )

    def _gather(self, value: Any) -> list[Any]:
        values = [value] * self.size
        if self.size > 1:
            with _together():
                torch.distributed.all_gather_object(values, value)
        return values

    def _broadcast(self, tensor: Tensor) -> None:
        whole = tensor.detach().contiguous()
        with _together():
            # As bytes: gloo and NCCL know fewer types than torch.
            torch.distributed.broadcast(whole.view(-1).view(torch.uint8), 0)
        if not tensor.is_contiguous():
            tensor.detach().copy_(whole)


def join() -> World:
    """The processes of the job that ``torchrun`` has started; this one alone without ``torchrun``.

    Raises:
        ValueError: If the environment asks for several processes and does not say where they meet.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    group = torch.distributed
    if not group.is_initialized():
        missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
        if missing:
            raise InputError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} asks for several processes, but "
                f"{', '.join(missing)} is not set: start them with torchrun."
            )
        nccl = torch.cuda.is_available() and group.is_nccl_available()
        group.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=PATIENCE)
        atexit.register(_leave)
    return World(group.get_rank(), group.get_world_size())


def _averages(pair: Pair, args: tuple) -> bool:
    """Whether a pair's scores carry a number over ``len(x)``, and not one that x leaves alone.

    Raises:
        ValueError: If its sites are scaled by the number of rows in any other way.
    """
    total = len(args[0])
    part = tuple(arg[: total // 2] for arg in args)
    with undone(pair, args), torch.no_grad(), pair.mode(training=True):
        few, more = _scales(pair, part), _scales(pair, args)
    fixed, over = [
        {name: torch.allclose(few[name] * a, _like(more[name], few[name]) * b) for name in few}
        for a, b in ((1, 1), (total // 2, total))
    ]
    if all(fixed.values()) or all(over.values()):
        return not all(fixed.values())
    name = next(name for name, constant in fixed.items() if not constant)
    raise InputError(
        f"The {name} has scale {few[name].max():.4g} for {total // 2} rows and "
        f"{more[name].max():.4g} for {total}: processes that share a batch need scales that do not "
        f"depend on len(x), or that are a number over len(x) at every site of both programs."
    )


def _scales(pair: Pair, args: tuple) -> dict[str, Tensor]:
    traces = zip(("model", "guide"), pair.trace(*args), strict=True)
    return {
        f"{program}'s {name}": torch.as_tensor(site["scale"]).double()
        for program, trace in traces
        for name, site in samples(trace).items()
    }


def _like(more: Tensor, few: Tensor) -> Tensor:
    """The scales of the first rows, where each datum has its own."""
    return more[tuple(slice(size) for size in few.shape)]


def _buffers(pair: Pair) -> list[Tensor]:
    return [buffer for root in pair.roots.values() for buffer in root.buffers()]


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if signal.getsignal(signal.SIGTERM) is _terminate:
            # torchrun's SIGTERM is on its way: it must not cut short what is being said.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise ProcessLost(f"Another process is gone or does not answer ({error}).") from error


def _terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
