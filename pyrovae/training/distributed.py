"""Training by several processes that ``torchrun`` starts, as if by one.

Every process has the whole data, the whole pair and the whole optimizer, and runs its rows of each
batch; gradients are summed once a step, before they are clipped. Rank 0 validates and writes.
"""

from __future__ import annotations

import atexit
import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from pyrovae._tools import InputError
from pyrovae.compiling.graph import undone
from pyrovae.objectives import Estimate, estimate
from pyrovae.training.flat import FlatSum
from pyrovae.training.sharding import Sharding
from pyrovae.training.svi import SVI

__all__ = ["Diverged", "ProcessLost", "World", "join"]

PATIENCE = timedelta(minutes=30)
CLOSE = 1e-4


class ProcessLost(RuntimeError):
    """Another process is gone, or does not answer."""


class Diverged(RuntimeError):
    """The processes no longer train the same weights."""


class World:
    """The processes of a job; one process alone has nothing to share.

    Args:
        rank: This process, from 0.
        size: How many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.sharding = Sharding(rank, size)
        self._sum = FlatSum(self._all_reduce)
        self._load: Callable[[Tensor], tuple] | None = None

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
        """What rank 0 has, on every process: numbers, texts, tensors, lists and dicts of them."""
        if self.size == 1:
            return value
        buffer = io.BytesIO()
        torch.save(value if self.first else None, buffer)
        length = torch.tensor([buffer.getbuffer().nbytes])
        self._broadcast(length)
        content = torch.zeros(int(length), dtype=torch.uint8)
        if self.first:
            content = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
        self._broadcast(content)
        return torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True)

    def agree(self, **facts: int) -> None:
        """Check that every process was asked for the same.

        Raises:
            ValueError: If something is other than on rank 0.
        """
        for name, value in self.share(facts).items():
            if value != facts[name]:
                raise InputError(
                    f"Rank {self.rank} has {name} = {facts[name]}, rank 0 has {value}: every "
                    f"machine needs the same files, and a run directory that all of them see."
                )

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Rank 0 of each machine runs a block before its others do: what it downloads is there."""
        leads = int(os.environ.get("LOCAL_RANK", 0)) == 0
        if not leads:
            self.wait()
        yield
        if leads:
            self.wait()

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            self._all_reduce(torch.zeros(1))

    def prepare(self, svi: SVI, load: Callable[[Tensor], tuple], index: Tensor) -> None:
        """Give all processes the weights of rank 0, and the same draws for the same rows.

        Args:
            svi: What is going to be trained, built.
            load: Makes the programs' arguments from the numbers of rows, such as
                :meth:`pyrovae.Dataset.rows`.
            index: The numbers of a batch's rows, three or more.

        Raises:
            ValueError: If the batch is too small to be shared, or a site's scale depends on the
                size of the batch in a way that cannot be.
        """
        self._load = load
        if self.size == 1:
            return
        if len(index) < 2 * self.size:
            raise InputError(
                f"Expected a batch of at least two rows for each of the {self.size} processes, "
                f"got {len(index)}: enlarge the batch, or start fewer processes."
            )
        self.sharding = Sharding(self.rank, self.size)
        pair, self._load = svi.pair, self.sharding.wrap(load)
        pair.run_model = self.sharding.wrap(pair.run_model)
        pair.run_guide = self.sharding.wrap(pair.run_guide)
        with undone(pair, (index,)), pair.mode(training=True):
            self.sharding.learn(lambda rows: _try(svi, self.load(index[:rows])))
        for tensor in (*pair.leaves(), *_buffers(svi)):
            self._broadcast(tensor)
        svi.reduce = self.reduce
        self.check(svi)

    def load(self, index: Tensor) -> tuple:
        """The programs' arguments for this process's rows of a batch."""
        return self._load(index[self.sharding.mine])

    def batch(self, total: int) -> AbstractContextManager:
        """Inside, :meth:`load` and the programs of :meth:`prepare` run on rows of one batch.

        Args:
            total: The number of rows of the whole batch.
        """
        return nullcontext() if self.size == 1 else self.sharding.batch(total)

    def reduce(self, found: Estimate, leaves: list[Tensor]) -> Estimate:
        """Sum an estimate, and in place its gradients, over the processes."""
        numbers = [found.loss, *found.terms.values(), *found.parts]
        loss, *rest = self._sum(leaves, numbers, self.sharding.counts)
        terms = dict(zip(found.terms, rest, strict=False))
        return Estimate(loss, None, terms, tuple(rest[len(terms) :]))

    def settle(self, svi: SVI) -> None:
        """End an epoch: buffers become those of rank 0, as in PyTorch's own data parallelism.

        Raises:
            Diverged: If weights or the optimizer's state are not those of rank 0.
        """
        if self.size > 1:
            for buffer in _buffers(svi):
                self._broadcast(buffer)
            self.check(svi)

    def check(self, svi: SVI) -> None:
        """Compare sum and norm of every weight, and of the optimizer's state, with rank 0's.

        Raises:
            Diverged: On every process, if they differ by more than rounding on any.
        """
        state = _state(svi)
        names, mine = list(state), _digest(state.values())
        those, first = self.share([names, mine])
        votes = torch.zeros(self.size, dtype=torch.long)
        if names != those:
            votes[self.rank] = -1
        elif len(names):
            far = (mine - first).abs().gt(CLOSE * first[:, 1:]).any(1).nonzero()
            votes[self.rank] = far[0, 0] + 1 if len(far) else 0
        self._all_reduce(votes)
        for rank, vote in enumerate(votes.tolist()):
            if vote:
                raise Diverged(_strayed(rank, those[vote - 1] if vote > 0 else "the optimizer"))

    def _all_reduce(self, tensor: Tensor) -> None:
        with _together():
            torch.distributed.all_reduce(tensor)

    def _broadcast(self, tensor: Tensor) -> None:
        whole = tensor.detach().contiguous()
        with _together():
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


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(f"another process is gone or does not answer ({error})") from error


def _try(svi: SVI, args: tuple) -> None:
    """Run what a step draws, and leave no gradient."""
    if svi.loss_and_grads is not None:
        svi.loss_and_grads(svi.pair.run_model, svi.pair.run_guide, *args)
    else:
        estimate(svi.objective, svi.pair, *args)
    for leaf in svi.pair.leaves():
        leaf.grad = None


def _buffers(svi: SVI) -> list[Tensor]:
    return [buffer for root in svi.pair.roots.values() for buffer in root.buffers()]


def _state(svi: SVI) -> dict[str, Tensor]:
    """Everything that processes must agree on, by name."""
    state = {name: leaf.detach() for name, leaf in svi.pair.named().items()}
    for number, entry in enumerate(svi.optimizer.state.values()):
        for name, value in entry.items():
            if isinstance(value, Tensor):
                state[f"the optimizer's {name} of parameter {number}"] = value
    return state


def _digest(tensors: Iterable[Tensor]) -> Tensor:
    found = [torch.stack([t.double().sum(), t.double().norm()]).cpu() for t in tensors]
    return torch.stack(found) if found else torch.zeros(0, 2)


def _strayed(rank: int, name: str) -> str:
    return (
        f"Rank {rank} strayed from rank 0, seen in {name}: programs must not change weights "
        f"themselves, nor depend on the process or on random numbers that are not torch's."
    )
