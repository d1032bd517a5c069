"""Running on some rows of every batch what one process would run on all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from math import prod
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyrovae._tools import InputError
from pyrovae.training.draws import FEW, MORE, Draw, OnDraw, Part, compare_draws, draw_part, see_draw

__all__ = ["Sharding"]


class Sharding:
    r"""The rows of one process among several, with the noise of one process alone.

    With the rows :math:`S_r` of process r, which part the batch among them,

    .. math:: \sum_{n=1}^N \ell(x_n, \epsilon_n)
              = \sum_{r=1}^R \sum_{n \in S_r} \ell(x_n, \epsilon_n)

    with the same :math:`\epsilon_n` on both sides: what a program draws for each row (latents,
    dropout, binarized pixels) is drawn for the whole batch, from a stream that all processes
    share, and cut to the rows at hand. A scale that a program computes as ``size / len(x)``, in
    :func:`pyro.poutine.scale` or by a subsampled plate, is that of the whole batch.

    Three things can differ from one process alone:

    - Draws that consume randomness by the values of their parameters (gamma, Dirichlet, Poisson,
      binomial) are right in distribution; on a CPU they, and what is drawn after them in the
      same epoch, are others than those of one process.
    - What couples the data of a batch, such as batch normalization in training mode or the
      threshold of free bits, sees the rows of its process; on CUDA,
      :class:`torch.nn.SyncBatchNorm` sees them all.
    - A loss has to be a sum over data: a mean over the batch comes out as many times too large as
      there are processes.

    Args:
        rank: The process, from 0.
        size: How many processes there are.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.part: Part | None = None
        self._particles = 1
        self._draws: list[Draw] = []
        self._next = 0
        self._seen: list[Draw] | None = None
        self._sites: list[_Sites] = []
        self._running = False

    def split(self, total: int) -> Part:
        """This process's rows of a batch: contiguous, in the order of ranks, even to one row.

        A batch of fewer than two rows a process is not split: every process runs all of it.
        """
        if total < 2 * self.size:
            return Part(0, total, total)
        rows, more = divmod(total, self.size)
        start = self.rank * rows + min(self.rank, more)
        return Part(start, start + rows + (self.rank < more), total)

    @property
    def mine(self) -> slice:
        """Which rows of the batch are this process's."""
        return slice(None) if self.part is None else slice(self.part.start, self.part.stop)

    @property
    def counts(self) -> bool:
        """Whether what this process finds on its rows goes into the sum over processes."""
        return self.rank == 0 or self.part is None or not self.part.whole

    @contextmanager
    def batch(self, total: int) -> Iterator[None]:
        """Inside, wrapped programs are given the rows :attr:`mine` of a batch.

        Args:
            total: The number of rows of the whole batch.
        """
        self.part, self._next = self.split(total), 0
        try:
            yield
        finally:
            self.part = None

    def wrap(self, program: Callable) -> Callable:
        """A program that draws, and is scaled, for the whole of a :meth:`batch`."""
        sites = _Sites(self)
        self._sites.append(sites)

        @wraps(program)
        def run(*args: Any, **kwargs: Any) -> Any:
            learning = self._seen is not None
            idle = self.part is None or self.part.whole
            if self._running or (idle and not learning):
                return program(*args, **kwargs)
            self._running = True
            try:
                with OnDraw(self._see if learning else self._draw), sites:
                    return program(*args, **kwargs)
            finally:
                self._running = False

        return run

    def learn(self, run: Callable[[int], Any]) -> None:
        """See which draws and which scales of the wrapped programs follow the number of rows.

        Args:
            run: Runs them all once, as a step does, on the given number of rows: two or three.

        Raises:
            ValueError: If a scale depends on the number of rows otherwise than as 1 / len(x).
        """
        run(FEW)
        (few_draws, few_sites), (more_draws, more_sites) = map(
            partial(self._watch, run), (FEW, MORE)
        )
        self._draws = [compare_draws(*pair) for pair in zip(few_draws, more_draws, strict=False)]
        particles = [
            sites.compare(few, more)
            for sites, few, more in zip(self._sites, few_sites, more_sites, strict=True)
        ]
        self._particles = max(particles, default=1)

    def _watch(self, run: Callable[[int], Any], rows: int) -> tuple[list[Draw], list[list[dict]]]:
        self._seen = []
        try:
            run(rows)
            return self._seen, [sites.take() for sites in self._sites]
        finally:
            self._seen = None

    def _see(self, func: Any, args: tuple, kwargs: dict) -> Any:
        found, draw = see_draw(func, args, kwargs)
        self._seen.append(draw)
        return found

    def _draw(self, func: Any, args: tuple, kwargs: dict) -> Any:
        for step in range(len(self._draws)):
            at = (self._next + step) % len(self._draws)
            draw = self._draws[at]
            if draw.fits(func, args, kwargs, self.part.rows):
                self._next = at + 1
                if draw.follows:
                    return draw_part(draw, args, kwargs, self.part, self._particles)
                break
        return func(*args, **kwargs)


class _Sites(Messenger):
    """Keeps the scales of a program's sites those of the whole batch."""

    def __init__(self, sharding: Sharding) -> None:
        super().__init__()
        self.sharding = sharding
        self.seen: list[dict] = []
        self.shares: set[str] = set()

    def take(self) -> list[dict]:
        """The sites seen since the last call."""
        seen, self.seen = self.seen, []
        return seen

    def _pyro_sample(self, msg: dict) -> None:
        part = self.sharding.part
        if part is not None and msg["name"] in self.shares and not site_is_subsample(msg):
            share = part.rows / part.total
            msg["scale"] = msg["scale"] * share
            msg["cond_indep_stack"] = tuple(
                f._replace(full_size=f.full_size * share) if _subsamples(f, part.rows) else f
                for f in msg["cond_indep_stack"]
            )

    def _pyro_post_sample(self, msg: dict) -> None:
        if self.sharding._seen is not None and not site_is_subsample(msg):
            self.seen.append(msg)

    def compare(self, few: list[dict], more: list[dict]) -> int:
        """Find the sites whose scale is one over the number of rows.

        Returns:
            How many particles there are.
        """
        pairs = [(a, b) for a, b in zip(few, more, strict=False) if a["name"] == b["name"]]
        self.shares = {a["name"] for a, b in pairs if _is_share(a["name"], a["scale"], b["scale"])}
        return max((_particles(*pair) for pair in pairs), default=1)


def _subsamples(frame: Any, rows: int) -> bool:
    return frame.size == rows and frame.full_size is not None and frame.full_size > rows


def _particles(few: dict, more: dict) -> int:
    sizes = {f.dim: f.size for f in few["cond_indep_stack"] if f.vectorized}
    frames = [f for f in more["cond_indep_stack"] if f.vectorized]
    batch = [f.dim for f in frames if (sizes.get(f.dim), f.size) == (FEW, MORE)]
    return prod(f.size for f in frames if batch and f.dim < min(batch))


def _is_share(name: str, few: Any, more: Any) -> bool:
    few, more = torch.as_tensor(few), torch.as_tensor(more)
    for dim, size in enumerate(few.shape):
        more = more.narrow(dim, 0, size)
    if torch.allclose(few, more):
        return False
    if torch.allclose(few * FEW, more * MORE):
        return True
    raise InputError(
        f"Site {name!r} has scale {few.tolist()} for {FEW} data and {more.tolist()} for {MORE}: "
        f"processes that share a batch need a scale that does not depend on len(x), or one that "
        f"is a number over len(x)."
    )
