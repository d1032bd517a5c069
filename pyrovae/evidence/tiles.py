"""A pair opened for evaluation, its data a tile at a time, and a file to go on from."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor

from pyrovae._tools import InputError, InputTypeError, progress_bar, require_same
from pyrovae._tools.files import pack_tensors, reading, unpack_tensors, write_atomic
from pyrovae._tools.precision import matmul_precision, require_effect
from pyrovae._tools.seeding import draw_seed, lend, seeded
from pyrovae.evidence import PROBE_STREAM
from pyrovae.evidence.result import Curve, LogLikelihood
from pyrovae.pairs.contract import check_support, inspect_evidence
from pyrovae.pairs.pair import Pair

if TYPE_CHECKING:
    from tqdm import tqdm

# Data in a tile. Each tile has a random stream of its own, so this number is part of what a seed
# means: with another one, the same seed gives other draws.
DATA_TILE = 64
# (Particle, datum) pairs that are drawn at once on a CPU, part of what a seed means as well.
DRAWN = 8192
# Pairs that are scored at once on a CPU, so that what a decoder makes of them stays in the cache
# (2,048 images of 784 pixels are 6 MB), and on a device, where memory is the limit.
SCORED, ON_DEVICE = 2048, 65536
# Draws a second of a small network on a CPU and on a GPU. Tiles bound the memory of an evaluation,
# and not its time: one of more than a day is taken for a slip.
RATES = 10**6, 10**8
# Seconds between two savings of what is finished, each of which costs milliseconds.
SAVE_AFTER = 2.0

Found = dict[str, Tensor]


class Evaluation:
    """A pair and the data to evaluate it on; arguments as for :func:`pyrovae.log_likelihood`.

    ``rows`` are the data with further arguments of both programs on the pair's ``device``,
    ``first`` the first tile of them, ``data`` their digest and ``home`` the device that they came
    from. All draws derive from ``seed``; matrices are multiplied at a ``precision``, whatever
    torch is set to. At once ``tile`` particles of each datum are drawn and
    ``chunk`` scored, powers of two, and ``max_rows`` (particle, datum) pairs at most. ``bar``
    shows the time left, from :meth:`tiles` on, and ``tick`` moves it on.
    """

    bar: tqdm
    tick: Callable[..., Any]

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        rows: tuple,
        seed: int | None = None,
        max_rows: int | None = None,
        checkpoint: str | Path | None = None,
        processes: bool = False,
        precision: str = "float32",
    ) -> None:
        if max_rows is not None and max_rows < 1:
            raise InputError(f"Expected max_rows >= 1, got {max_rows}.")
        require_rows(rows)
        self.part = _part(processes)
        self.file = None if checkpoint is None else _file(checkpoint, self.part)
        self.pair, self.home = Pair(model, guide), rows[0].device
        device, self.precision = self.pair.device, precision
        if precision != "float32":
            require_effect(precision, device, self.pair.leaves())
        self.max_rows = max_rows or (SCORED if device.type == "cpu" else ON_DEVICE)
        self.set_rows(tuple(tensor.to(device) for tensor in rows))
        self.seed = self._agreed_seed(seed)
        self.about: dict[str, Any] = {"max_rows": max_rows}
        if precision != "float32":
            self.about["precision"] = precision
        self._tiles: list[tuple] = []
        self._found: list[Found] = []
        self._saved, self._saved_at = 0, time.monotonic()
        self.crew, self._stopped, self._moving = 1, False, Lock()

    @contextmanager
    def opened(self) -> Iterator[Evaluation]:
        """Run a block in eval mode, without gradients and validation, with the sites inspected."""
        multiplied = matmul_precision(self.precision)
        with torch.no_grad(), self.pair.mode(training=False), multiplied:
            with seeded(self.seed, self.device):
                inspect_evidence(self.pair, *self.first)
                if len(self.rows[0]) > DATA_TILE:
                    size = max(DATA_TILE, self.max_rows)
                    check_support(self.pair, *self.rows, batch_size=size, first=DATA_TILE)
            try:
                with pyro.validation_enabled(False):
                    yield self
            finally:
                self.close()

    def set_rows(self, rows: tuple) -> None:
        """Evaluate these data."""
        # A graph that is compiled for the first tile takes the others if they lie alike.
        self.rows, self.device = tuple(tensor.contiguous() for tensor in rows), rows[0].device
        self.first = tuple(tensor[:DATA_TILE] for tensor in self.rows)
        self.data, n = digest(*rows), len(self.first[0])
        self.tile = _power_of_two((DRAWN if self.device.type == "cpu" else ON_DEVICE) // n)
        self.chunk = min(_power_of_two(self.max_rows // n), self.tile)

    def tiles(
        self, work: int = 1, progress: bool = False, **options: Any
    ) -> list[tuple[int, tuple]]:
        """This process's tiles of data that are not finished, each with its number.

        ``work`` is how much the bar is moved on for each tile; ``options`` are what the estimate
        depends on beside pair, data and seed.
        """
        if partial := list(self.pair.layout.partial):
            raise InputError(
                f"Plates {partial} subsample within a datum, and log p(x) of a part says nothing "
                f"of the whole: evaluate without subsampling."
            )
        draws, rate = work * len(self.rows[0]), RATES[self.device.type == "cuda"]
        if (days := draws / rate / 86_400) > 1:
            raise InputError(
                f"An evaluation of {draws:.1e} draws takes {days:,.0f} days at {rate:,} a second; "
                f"its memory is bounded, its time is not: ask for fewer samples, or fewer data."
            )
        if self.file is not None:
            self.about |= options | self._fingerprint()
            if self.file.exists():
                self._resume(self.file)
        self._tiles = tile_rows(self.rows)
        left = list(enumerate(self._tiles))[self.part[0] :: self.part[1]][len(self._found) :]
        self.bar = progress_bar(None, enabled=progress, total=len(left) * work, desc="log p(x)")
        self.tick = self.bar.update
        return left

    def each(
        self,
        find: Callable[[int, tuple], Found],
        prepare: Callable[[tuple], bool] | None = None,
        *work: Any,
        **options: Any,
    ) -> None:
        """Keep what is found for each of the :meth:`tiles`.

        ``prepare`` compiles for the first tile, and says whether threads may find side by side, so
        that all that runs a program or draws waits for its :func:`~pyrovae._tools.seeding.turn`.
        Then each of a crew takes a tile for itself, for as many as torch has threads: a kernel of
        few rows leaves several threads waiting for each other. What is found is the same for crews
        of all sizes, to the last bit.
        """
        tiles, threads, able = self.tiles(*work, **options), torch.get_num_threads(), False
        many = self.device.type == "cpu" and len(tiles) >= threads > 1
        if prepare is not None and tiles:
            try:
                torch.set_num_threads(1 if many else threads)
                able = prepare(tiles[0][1]) and many
                if able:
                    self._by_crew(threads, find, tiles)
            finally:
                torch.set_num_threads(threads)
        for index, rows in [] if able else tiles:
            self.keep(index, find(index, rows))

    def _by_crew(
        self, crew: int, find: Callable[[int, tuple], Found], tiles: list[tuple[int, tuple]]
    ) -> None:
        self.crew, self.tick = crew, self._tick
        with ThreadPoolExecutor(crew, initializer=lend()) as threads:
            found = [threads.submit(torch.no_grad()(find), *tile) for tile in tiles]
            try:
                for (index, _), each in zip(tiles, found, strict=True):
                    self.keep(index, each.result())
            finally:
                self._stopped = True
                threads.shutdown(wait=False, cancel_futures=True)

    def _tick(self, work: int = 1) -> None:
        """Move the bar on; where another thread has failed, or Ctrl-C was pressed, end here."""
        if self._stopped:
            raise CancelledError
        with self._moving:
            self.bar.update(work)

    def keep(self, index: int, found: Found) -> None:
        """Keep what was found for a tile, ``[64, ...]`` by name."""
        left = len(self.rows[0]) - index * DATA_TILE
        found = {name: value[:left] for name, value in found.items()}
        if self._found and _layout(found) != _layout(self._found[0]):
            raise InputError(f"{self.file} holds other numbers than this evaluation: remove it.")
        self._found.append(found)
        if time.monotonic() - self._saved_at > SAVE_AFTER:
            self._save()

    def found(self) -> Found:
        """What was found for all data, ``[N, ...]`` by name, where the data came from."""
        self.close()
        found = self._found if self.part[1] == 1 else _exchange(self._found, self.part[1])
        return {name: value.to(self.home) for name, value in _join(found).items()}

    def estimate(
        self, points: list[int], method: str, uncovered: float, found: Found | None = None
    ) -> LogLikelihood:
        """What the sums for all data say, with the bound for these numbers of samples."""
        found = found or self.found()
        return LogLikelihood(
            num_samples=points[-1],
            curve=Curve(tuple(points), found.pop("curve").T),
            method=method,
            seed=self.seed,
            data=self.data,
            uncovered=uncovered,
            **found,
        )

    def close(self) -> None:
        """Write what is finished to the checkpoint, and take the bar away."""
        if "bar" in vars(self):
            self.bar.close()
        self._save()

    def _save(self) -> None:
        """Replace the checkpoint, if there is one: all of it, or nothing."""
        if self.file is None or self._saved == len(self._found):
            return
        about = {"about": json.dumps(self.about)}
        write_atomic(self.file, pack_tensors(_join(self._found), about, self.file.name))
        self._saved, self._saved_at = len(self._found), time.monotonic()

    def _resume(self, file: Path) -> None:
        """Take up the finished tiles of a checkpoint, which has to be of this evaluation."""
        different = (
            f"The checkpoint {file} was made with {{key}} = {{before}}, and this evaluation has "
            f"{{now}}: choose another file, or remove it."
        )
        about, done = read_checkpoint(file)
        require_same(about, self.about, different)
        rows = torch.arange(len(self.rows[0])).split(DATA_TILE)[self.part[0] :: self.part[1]]
        with reading(file):
            tiles = _tiled(value.to(self.device) for value in done.values())
            self._found = [dict(zip(done, tile, strict=True)) for tile in tiles]
            for tile, index in zip(self._found, rows, strict=False):
                if tile["log_prob"].shape != index.shape or tile["log_prob"].isnan().any():
                    raise ValueError("it has NaN, or other numbers of data than its tiles have")
            if len(tiles) > len(rows):
                raise ValueError(f"it has {len(tiles)} tiles of {len(rows)}")
        self._saved = len(self._found)

    def _agreed_seed(self, asked: int | None) -> int:
        begun = read_checkpoint(self.file)[0] if self.file and self.file.exists() else {}
        asked = begun.get("seed") if asked is None else asked
        seed = [draw_seed(None) if asked is None else asked]
        if self.part[1] > 1:
            torch.distributed.broadcast_object_list(seed)
        return seed[0]

    def _fingerprint(self) -> dict[str, Any]:
        """What another evaluation that goes on with this one's checkpoint has to agree in.

        A log-weight is among it, as programs may change where no weight or setting does.
        """
        state = self.pair.state_dict()
        with seeded(self.seed, self.device, 0, PROBE_STREAM):
            values, guide = self.pair.draw(self.first, 1)
            model, _ = self.pair.score_model(self.first, 1, values)
        terms = [*model.values(), *(-score for score in guide.values())]
        probe = sum(term[0, 0].item() for term in terms)
        return {
            "seed": self.seed,
            "data": self.data,
            "shape": [list(tensor.shape) for tensor in self.first],
            "weights": digest(*(state[name] for name in sorted(state))),
            "a log-weight": f"{probe:.3e}",
            "device": self.device.type,
            "process": list(self.part),
        }


def tile_rows(rows: tuple) -> list[tuple]:
    """Data ``[N, ...]`` in tiles of 64, the last of several filled up with rows of its own.

    So all tiles have one shape, and what is drawn for a datum depends on its place and not on N.
    """
    tiles = _tiled(rows)
    missing = DATA_TILE - len(tiles[-1][0])
    if len(tiles) > 1 and missing:
        tiles[-1] = tuple(torch.cat([t, t[:1].expand(missing, *t.shape[1:])]) for t in tiles[-1])
    return tiles


def read_checkpoint(path: Path) -> tuple[dict[str, Any], Found]:
    """What the evaluation of a checkpoint is, and its finished data; a damaged one is refused."""
    try:
        found, told = unpack_tensors(path)
        about = json.loads(told["about"])
        if not isinstance(about, dict):
            raise ValueError("it does not say what it is of")
        return about, found
    except (ValueError, KeyError, OSError) as error:
        raise InputError(
            f"{path} is no checkpoint of an evaluation, or a damaged one ({error}): choose "
            f"another file, or remove it."
        ) from error


def require_rows(args: tuple) -> None:
    """Refuse arguments that are no tensors with rows, as the data are taken a tile at a time."""
    for place, arg in enumerate(args):
        if not isinstance(arg, Tensor) or arg.dim() == 0:
            raise InputTypeError(
                f"Expected tensors [N, ...] for x and the further arguments of both programs, got "
                f"{type(arg).__name__} as argument {place}: give a value for each row, or bind it "
                f"to the programs before, as functools.partial does."
            )
    if len(args[0]) == 0:
        raise InputError("Expected at least one datum, got an empty tensor.")


def digest(*tensors: Tensor) -> str:
    """A short name for tensors: equal for equal numbers, types and shapes."""
    name = hashlib.blake2b(digest_size=12)
    for tensor in tensors:
        name.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        # NumPy knows no bfloat16, hence the view as bytes.
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        name.update(flat.numpy().data)
    return name.hexdigest()


def _power_of_two(number: int) -> int:
    """The largest power of two that is no larger than a number, and 1 at least."""
    return 1 << (max(number, 1).bit_length() - 1)


def _part(processes: bool) -> tuple[int, int]:
    """This process's number, and that of all of them; each takes every so manieth tile."""
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


def _exchange(found: list[Found], size: int) -> list[Found]:
    """All processes' tiles in their order, on the CPU: each may have a GPU of its own."""
    parts: list = [None] * size
    found = [{name: value.cpu() for name, value in tile.items()} for tile in found]
    try:
        torch.distributed.all_gather_object(parts, found)
    except RuntimeError as error:
        raise ConnectionError(f"another process is gone or does not answer ({error})") from error
    return [tile for tiles in zip_longest(*parts) for tile in tiles if tile is not None]


def _tiled(tensors: Iterable[Tensor]) -> list[tuple]:
    return list(zip(*(tensor.split(DATA_TILE) for tensor in tensors), strict=True))


def _layout(found: Found) -> dict[str, tuple]:
    return {name: (value.shape[1:], value.dtype) for name, value in found.items()}


def _join(found: list[Found]) -> Found:
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}
