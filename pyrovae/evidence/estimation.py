"""What every estimate of log p(x) starts from and ends with: a pair in eval mode, and its data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pyrovae._tools import InputError, progress_bar
from pyrovae._tools.seeding import draw_seed, seeded, subseed
from pyrovae.evidence.density import Joint, add_up
from pyrovae.evidence.proposals import uncovered_share
from pyrovae.evidence.result import Curve, LogLikelihood
from pyrovae.evidence.tiles import (
    DATA_TILE,
    Checkpoint,
    Found,
    digest,
    finished_tiles,
    read_about,
    run_tiles,
)
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import common_scale

__all__ = ["Evaluation", "particle_tile", "power_of_two", "row_limit"]

PRIOR_STREAM, PROBE_STREAM = 1, 2
DRAWN, SCORED, ON_DEVICE = 8192, 2048, 65536


class Evaluation:
    """A pair to be evaluated on data, tile by tile.

    Args:
        model: The model program.
        guide: The guide program.
        rows: Data ``[N, ...]`` with further arguments of both programs.
        options: What the estimate depends on beside these, by name, with ``seed``.
        checkpoint: The file to keep finished data in.
        processes: Share the data among the processes of :mod:`torch.distributed`.

    Raises:
        ValueError: If there are no data, or the checkpoint is of another evaluation.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        rows: tuple,
        options: dict[str, Any],
        checkpoint: str | Path | None = None,
        processes: bool = False,
    ) -> None:
        if len(rows[0]) == 0:
            raise InputError("Expected at least one datum, got an empty tensor.")
        self.options, self.part = options, _part(processes)
        self.file = None if checkpoint is None else _file(checkpoint, self.part)
        self.pair = Pair(model, guide)
        self.home = rows[0].device
        self.set_rows(tuple(tensor.to(self.pair.device) for tensor in rows))
        self.seed = self._choose_seed()

    def set_rows(self, rows: tuple) -> None:
        """Evaluate these data."""
        self.rows, self.device = rows, rows[0].device
        self.first = tuple(tensor[:DATA_TILE] for tensor in rows)
        self.tiles = len(range(self.part[0], -(-len(rows[0]) // DATA_TILE), self.part[1]))
        self.data = digest(*rows)

    @contextmanager
    def opened(self) -> Iterator[Joint]:
        """Run a block in eval mode and without validation, on a pair that has been checked."""
        with torch.no_grad(), self.pair.mode(training=False):
            with seeded(self.seed, self.device):
                layout = inspect_pair(self.pair, *self.first)
            with pyro.validation_enabled(False):
                yield Joint(self.pair, layout)

    def run(self, work: Callable[[int, tuple], Found], joint: Joint) -> Found:
        """Work on each tile of data; the programs' scales multiply what comes of it."""

        def scaled(index: int, rows: tuple) -> Found:
            found = work(index, rows)
            if not joint.layout.scaled:
                return found
            with seeded(0, self.device):
                traces = joint.pair.trace(*joint.args(rows), sums=True)
            return _scaled(found, common_scale(traces, joint.layout))

        checkpoint = None if self.file is None else Checkpoint(self.file, self._about(joint))
        return run_tiles(scaled, self.rows, checkpoint, self.part)

    def result(
        self,
        found: Found,
        joint: Joint,
        num_samples: int,
        points: list[int],
        method: str,
        *,
        covers: bool,
    ) -> LogLikelihood:
        """The estimate that the tiles' results make up.

        With ``covers``, draws are known to reach wherever the prior does.
        """
        with seeded(subseed(self.seed, 0, PRIOR_STREAM), self.device):
            uncovered = 0.0 if covers else uncovered_share(joint, self.first)
        found = {name: value.to(self.home) for name, value in found.items()}
        return LogLikelihood(
            num_samples=num_samples,
            curve=Curve(tuple(points), found.pop("curve").T),
            method=method,
            seed=self.seed,
            data=self.data,
            uncovered=uncovered,
            **found,
        )

    def bar(self, total: int, *, enabled: bool) -> Any:
        """A progress bar over the tiles left, each of so much work, and of the time left."""
        left = self.tiles - finished_tiles(self.file)
        return progress_bar(None, enabled=enabled, total=left * total, desc="log p(x)")

    def _choose_seed(self) -> int:
        begun = read_about(self.file) if self.file and self.file.exists() else {}
        asked = self.options["seed"]
        seed = [draw_seed(begun.get("seed") if asked is None else asked)]
        if self.part[1] > 1:
            torch.distributed.broadcast_object_list(seed)
        return seed[0]

    def _about(self, joint: Joint) -> dict[str, Any]:
        """What a checkpoint has to agree in."""
        state = self.pair.state_dict()
        args = joint.args(self.first)
        with seeded(subseed(self.seed, 0, PROBE_STREAM), self.device):
            values, scores = joint.draw(self.first, 1)
            prior, likelihood = joint.split(joint.model(self.first, 1, values))
        probe = (prior + likelihood - add_up(scores.values()))[0, 0].item()
        return {
            **self.options,
            "seed": self.seed,
            "data": self.data,
            "shape": [list(tensor.shape) for tensor in args],
            "weights": digest(*(state[name] for name in sorted(state))),
            "a log-weight": f"{probe:.3e}",
            "device": self.device.type,
            "process": list(self.part),
        }


def particle_tile(rows: tuple) -> int:
    """How many particles of these data are drawn at once, a power of two."""
    limit = DRAWN if rows[0].device.type == "cpu" else ON_DEVICE
    return power_of_two(limit // len(rows[0]))


def row_limit(rows: tuple, asked: int | None) -> int:
    """How many (particle, datum) pairs are scored at once, if none are asked for.

    On a CPU so few that what comes out of a decoder stays in the cache.
    """
    return asked or (SCORED if rows[0].device.type == "cpu" else ON_DEVICE)


def power_of_two(number: int) -> int:
    """The largest power of two that is no larger than a number, and 1 at least."""
    return 1 << (max(number, 1).bit_length() - 1)


def _scaled(found: Found, scale: Tensor | float) -> Found:
    scale = torch.as_tensor(scale)
    factors = dict.fromkeys(("log_prob", "smoothed", "guide_elbo", "upper"), scale)
    factors |= {"standard_error": scale.abs(), "curve": scale[..., None]}
    return {name: factors.get(name, 1.0) * value for name, value in found.items()}


def _part(processes: bool) -> tuple[int, int]:
    if not processes:
        return 0, 1
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise InputError(
            "Expected torch.distributed to be initialized for processes=True: start the script "
            "with torchrun and call torch.distributed.init_process_group() first."
        )
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _file(path: str | Path, part: tuple[int, int]) -> Path:
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"Expected a folder for the checkpoint at {path.parent}, found none.")
    return path if part[1] == 1 else path.with_name(f"{path.name}.{part[0]}")
