"""Data-parallel training by the processes that ``torchrun`` starts."""

from __future__ import annotations

import atexit
import math
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pyrovae._tools import InputError
from pyrovae._tools.seeding import seeded, subseed, undone
from pyrovae.objectives import Estimate
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import samples
from pyrovae.training.optimizer import Trained
from pyrovae.training.svi import SVI

# How far the norm of a weight may be from rank 0's, relative: what unequal devices round apart.
CLOSE = 1e-5


class ProcessLost(RuntimeError):
    """Another process is gone, or does not answer."""


class Diverged(RuntimeError):
    """The processes no longer train the same weights."""


class World:
    """The ``size`` processes of a job, of which this is ``rank``; one alone has nothing to share.

    Every process has the whole data, the whole pair and the whole optimizer, and runs its rows of
    each batch with noise of its own. Losses and gradients are summed over ranks once a step. Scores
    that carry a number over ``len(x)``, as a subsampled plate's do, are N / n times too large on a
    rank that has n of a batch's N rows, and are weighted by n / N. The first process alone
    validates, writes and speaks.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size, self.first = rank, size, rank == 0
        self._share, self._averages = 1.0, False
        self._sites: list[str] | None = None  # until the first batch

    def place(self, device: torch.device | str) -> torch.device:
        """Where this process computes: on CUDA, on the GPU of its rank, made the current one."""
        device = torch.device(device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise InputError("There is no CUDA device here: use device='cpu'.")
        if self.size > 1 and device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.rank)))
            if (gpus := torch.cuda.device_count()) <= device.index:
                raise InputError(
                    f"Expected {device.index + 1} GPUs or more on this machine, one a process, "
                    f"found {gpus}: use --nproc-per-node {gpus}, or --device cpu."
                )
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
        """What rank 0 has, on every process."""
        if self.size == 1:
            return value
        with _together():
            torch.distributed.broadcast_object_list(values := [value], 0)
        return values[0]

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Rank 0 of each machine runs a block before its others do: what it downloads is there."""
        leads = int(os.environ.get("LOCAL_RANK", 0)) == 0
        if not leads:
            self._gather(None)
        try:
            yield
        finally:
            if leads:
                self._gather(None)

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """Run a command: rank 0 alone writes to the terminal; torchrun's SIGTERM is as Ctrl-C."""
        if self.size > 1:
            signal.signal(signal.SIGTERM, _terminate)
        try:
            if self.first:
                yield
                return
            with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
                yield
        finally:
            if self.size > 1:
                # torchrun's SIGTERM may be on its way: it must not cut short what is said last.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def say(self, sentence: str) -> None:
        """Print a sentence on standard error, once for all processes that say the same."""
        times = 1
        if self.size > 1:
            with suppress(RuntimeError):
                # The store of torchrun's agent, which outlives every rank; the name is private
                # (seen in torch 2.11 and 2.15). add() counts those that came before.
                store = torch.distributed.distributed_c10d._get_default_store()
                times = store.add(f"pyrovae/{sentence}", 1)
        if times == 1:
            print(sentence, file=sys.stderr, flush=True)

    def prepare(self, svi: SVI, args: tuple, **facts: float) -> None:
        """Give all processes rank 0's weights, and let ``svi``, inspected, sum their gradients.

        The ``facts`` have to be those of rank 0, and a batch such as ``args`` fit to be shared.
        """
        if self.size == 1:
            return
        if stray := self._stray(facts, 0.0):
            raise InputError(
                "Rank {} has {} = {}, rank 0 has {}: every machine needs the same files, and a "
                "run directory that all of them see.".format(*stray)
            )
        if len(args[0]) < 2 * self.size:
            raise InputError(
                f"Expected a batch of at least two rows for each of the {self.size} processes, "
                f"got {len(args[0])}: enlarge the batch, or start fewer processes."
            )
        if adrift := svi.pair.known.adrift:
            raise InputError(
                f"The factor {adrift[0]!r} lies outside the data's plate, so that each of the "
                f"{self.size} processes would count it: move it inside, over the number of data, "
                f"or start one process."
            )
        self._averages, self._sites = _averages(svi.pair, args), None
        averages = svi.trained.average.of.values() if svi.trained.average else ()
        self._copy_first([*svi.pair.leaves(), *averages])
        self.settle(svi.pair)
        svi.reduce = self.reduce

    @contextmanager
    def stream(self, seed: int, epoch: int, device: torch.device) -> Iterator[None]:
        """Inside, each process draws noise of its own for an epoch; rank 0 goes on as it was."""
        # Not (seed, epoch, 0) on rank 0: numpy's SeedSequence pads with zeros, so that this is
        # (seed, epoch), the stream that has just shuffled the data.
        with seeded(subseed(seed, epoch, self.rank) if self.rank else None, device):
            yield

    def rows(self, index: Tensor) -> Tensor:
        """This process's rows of a batch: contiguous, in the order of ranks, even to one row.

        A batch of fewer than two rows a process, which batch normalization may need, is not split:
        every process runs all of it, and rank 0's result counts.
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

        A parameter has a gradient afterwards if it had one on any process; a site that a process's
        rows lack has a term of 0 there.

        Raises:
            ValueError: If a site is on these rows that no process's rows of the first batch had.
        """
        # In one order: what the processes send is summed by its place.
        if self._sites is None:
            self._sites = [*dict.fromkeys(chain(*self._gather([*found.terms])))]
        if late := sorted(found.terms.keys() - {*self._sites}):
            raise InputError(
                f"The programs have the sites {late} on this batch, and not on the first, so that "
                f"the {self.size} processes cannot sum them: sample the same sites for every "
                f"batch, and mask what a datum lacks."
            )
        zero = torch.zeros_like(found.loss)
        terms = {name: found.terms.get(name, zero) for name in self._sites}
        numbers = [found.loss, *terms.values(), *found.parts]
        values = numbers + [torch.zeros_like(p) if p.grad is None else p.grad for p in leaves]
        flat = torch.cat([value.detach().flatten() for value in values])
        # Not 0 * flat, which is NaN where a value is.
        flat = flat * self._share if self._share else torch.zeros_like(flat)
        flat = torch.cat([flat, flat.new_tensor([p.grad is not None for p in leaves])])
        with _together():
            torch.distributed.all_reduce(flat)
        *parts, had = flat.split([*(value.numel() for value in values), len(leaves)])
        sums = [t.view(v.shape).to(v.dtype) for t, v in zip(parts, values, strict=True)]
        for leaf, gradient, count in zip(leaves, sums[len(numbers) :], had, strict=True):
            # Asking the count waits for the device: only where it is not known already.
            if leaf.grad is not None or count > 0:
                leaf.grad = gradient
        loss, *rest = sums[: len(numbers)]
        terms = dict(zip(terms, rest, strict=False))
        return Estimate(loss, None, terms, tuple(rest[len(terms) :]))

    def settle(self, pair: Pair) -> None:
        """End an epoch: buffers become those of rank 0, as in PyTorch's own data parallelism.

        Every process raises Diverged if the norm of a weight is not that of rank 0's.
        """
        if self.size == 1:
            return
        self._copy_first(buffer for root in pair.roots.values() for buffer in root.buffers())
        norms = {name: leaf.detach().double().norm().item() for name, leaf in pair.named().items()}
        if stray := self._stray(norms, CLOSE):
            raise Diverged(
                "Rank {} strayed from rank 0, seen in {}: programs must not change weights "
                "themselves, nor choose them by the process or by draws.".format(*stray)
            )

    def follow(self, trained: Trained) -> None:
        """Take over the optimizer's options and what is frozen, as rank 0's callbacks left them."""
        if self.size == 1:
            return
        groups = trained.optimizer.param_groups
        options = [{n: v for n, v in group.items() if n != "params"} for group in groups]
        frozen = [name for name, leaf in trained.named.items() if not leaf.requires_grad]
        options, frozen = self.share((options, frozen))
        for group, first in zip(groups, options, strict=True):
            for name, value in first.items():
                mine = group[name]
                group[name] = value.to(mine.device) if isinstance(mine, Tensor) else value
        for name, leaf in trained.named.items():
            leaf.requires_grad_(name not in frozen)

    def _stray(self, mine: dict[str, float], close: float) -> tuple[int, str, float, float] | None:
        """A rank whose numbers are not rank 0's, the name of the first that is not, and both."""
        first, *others = self._gather(mine)
        for rank, other in enumerate(others, start=1):
            for name, value in first.items():
                theirs = other.get(name, math.inf)
                if abs(theirs - value) > close * abs(value):
                    return rank, name, theirs, value
        return None

    def _gather(self, value: Any) -> list[Any]:
        values = [value] * self.size
        if self.size > 1:
            with _together():
                torch.distributed.all_gather_object(values, value)
        return values

    def _copy_first(self, tensors: Iterable[Tensor]) -> None:
        mine = [tensor.detach() for tensor in tensors]
        first = self.share([tensor.cpu() for tensor in mine])
        for tensor, value in zip(mine, first, strict=True):
            tensor.copy_(value)


def join() -> World:
    """The processes of the job that ``torchrun`` has started, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    group = torch.distributed
    if not group.is_initialized():
        needed = ("RANK", "MASTER_ADDR", "MASTER_PORT")
        if missing := ", ".join(name for name in needed if name not in os.environ):
            raise InputError(f"WORLD_SIZE is set, {missing} is not set: start them with torchrun.")
        nccl = torch.cuda.is_available() and group.is_nccl_available()
        group.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
        atexit.register(_leave)
    return World(group.get_rank(), group.get_world_size())


def _averages(pair: Pair, args: tuple) -> bool:
    """Whether the scale of every site is a number over ``len(x)``, and not a number alone."""
    total, half = len(args[0]), len(args[0]) // 2
    with undone(pair.modules, args[0].device), torch.no_grad(), pair.mode(training=True):
        few, more = (_scales(pair, tuple(arg[:n] for arg in args)) for n in (half, total))
    # The power of 1 / len(x) in each scale; three digits are more than float32 spoils.
    powers = {n: round(math.log(few[n] / more[n], total / half), 3) for n in few if more[n]}
    if set(powers.values()) <= {0.0} or set(powers.values()) == {1.0}:
        return 1.0 in powers.values()
    name = max(powers, key=lambda name: abs(powers[name]))
    raise InputError(
        f"The {name} has scale {few[name]:.4g} for {half} rows and {more[name]:.4g} for {total}: "
        f"processes that share a batch need scales that do not depend on len(x), or that are a "
        f"number over len(x) at every site of both programs."
    )


def _scales(pair: Pair, args: tuple) -> dict[str, float]:
    """The first datum's scale at every site."""
    return {
        f"{program}'s {name}": float(torch.as_tensor(site["scale"]).flatten()[0])
        for program, trace in zip(("model", "guide"), pair.trace(*args), strict=True)
        for name, site in samples(trace).items()
    }


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(f"Another process is gone or does not answer ({error}).") from error


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # That another process is gone is told already, with how to go on.
    if not isinstance(sys.exc_info()[1], RuntimeError | ConnectionError):
        raise KeyboardInterrupt


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
