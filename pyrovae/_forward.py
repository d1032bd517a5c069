"""Sites of a program's trace for any number of rows: in bounded memory, eagerly or compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyrovae._tools import InputError
from pyrovae._tools.seeding import draw_seed, seeded, subseed
from pyrovae.compiling.graph import CaptureError, Graph
from pyrovae.pairs.pair import Pair

__all__ = ["Forward", "Values", "tile_size"]

PAYS_AFTER = 500_000
ROUNDING = 1e-3
FLIPPED = 1e-4

Rows = tuple[Tensor, ...]


def tile_size(device: torch.device) -> int:
    """How many rows run at once: on a CPU, as many as its cache holds the activations of."""
    return 512 if device.type == "cpu" else 16_384


class Values(NamedTuple):
    """What was read off a tile's trace, and the names of the sites whose mean that is."""

    found: dict[str, Tensor]
    means: frozenset[str]


class Forward:
    """Values of sites ``[N, ...]``, read off the traces of one tile of rows after another.

    The first tile draws under the seed itself, every other under a seed of its own. All but the
    first and a last that is smaller may run as one compiled graph, which is held against the eager
    run for the same noise; a tile in which a NaN or data outside their support come up runs
    eagerly again. A program that cannot be run on a part of the rows is run on all at once.

    Args:
        read: Runs the program on a tile's rows and returns the sites to take values of.
        pair: The pair, or one of its programs twice.
        mean: Take a site's mean where its distribution knows it, or else its draw.
        inspect: Looks at the first tile before it runs, and at those with unsupported data.
    """

    def __init__(
        self,
        read: Callable[..., dict[str, dict]],
        pair: Pair,
        mean: bool,
        inspect: Callable[..., object] | None = None,
    ) -> None:
        self.read, self.pair, self.mean = read, pair, mean
        self.inspect = inspect or (lambda *rows: None)

    @torch.no_grad()
    def __call__(self, rows: Rows, seed: int | None, compile: bool | str) -> dict[str, Tensor]:
        """The sites' values ``[N, ...]``, on the device of the first of the rows.

        Args:
            rows: What the program is run on, ``[N, ...]`` each.
            seed: Seeds the draws; None continues torch's global stream.
            compile: Whether to compile the run of a tile; ``"auto"`` does for 500,000 rows.

        Raises:
            ValueError: If ``compile`` is none of these.
        """
        if compile not in ("auto", True, False):
            raise InputError(f"Expected compile='auto', True or False, got {compile!r}.")
        pays = compile is True or (compile == "auto" and len(rows[0]) >= PAYS_AFTER)
        size = tile_size(self.pair.device)
        tiles = list(zip(*(tensor.split(size) for tensor in rows), strict=True))
        with self.pair.mode(training=False):
            found = self._tiled(tiles, seed, pays) if len(tiles) > 1 else None
            found = self._eager(rows, seed).found if found is None else found
        return {name: value.to(rows[0].device) for name, value in found.items()}

    def _eager(self, tile: Rows, seed: int | None) -> Values:
        rows = self._placed(tile)
        with seeded(seed, rows[0].device):
            self.inspect(*rows)
            sites = self.read(*rows)
        means = frozenset(name for name, site in sites.items() if self.mean and _has_mean(site))
        return Values({name: _value(site, name in means) for name, site in sites.items()}, means)

    def _tiled(self, tiles: list[Rows], seed: int | None, pays: bool) -> dict[str, Tensor] | None:
        """All rows' values; None where the program fails on a part of them."""
        size, last = len(tiles[0][0]), tiles[-1][0]
        num_rows, found = (len(tiles) - 1) * size + len(last), {}
        try:
            first = self._eager(tiles[0], seed)
            if any(value.shape[:1] != (size,) for value in first.found.values()):
                return None
            seed = draw_seed(seed)
            graph = self._compiled(self._placed(tiles[0]), first) if pays else None
            for name, value in first.found.items():
                found[name] = value.new_empty((num_rows, *value.shape[1:]), device=last.device)
                found[name][:size] = value
            for index, tile in enumerate(tiles[1:], 1):
                run = graph if len(tile[0]) == size else None
                values = self._tile(tile, first, subseed(seed, index), run)
                for name, value in values.items():
                    found[name][index * size : index * size + len(tile[0])] = value
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError):
            return None
        return found

    def _tile(self, tile: Rows, first: Values, seed: int, graph: Graph | None) -> dict[str, Tensor]:
        rows = self._placed(tile)
        with seeded(seed, rows[0].device):
            *values, sound = graph(*rows) if graph else self._flat(first, *rows)
        if not bool(sound):
            return self._eager(tile, seed).found
        return dict(zip(first.found, values, strict=True))

    def _flat(self, first: Values, *rows: Tensor) -> list[Tensor]:
        """A tile's values, and whether they and the data are sound."""
        sites = self.read(*rows)
        values = [_value(site, name in first.means) for name, site in sites.items()]
        sound = [~value.isnan().any() for value in values]
        observed = [site for site in sites.values() if site["is_observed"]]
        sound += [site["fn"].support.check(site["value"]).all() for site in observed]
        return [*values, torch.stack(sound).all()]

    def _compiled(self, rows: Rows, first: Values) -> Graph | None:
        """The run of a tile as one graph; None, and a warning, where that fails."""

        def run(*rows: Tensor) -> list[Tensor]:
            return self._flat(first, *rows)

        try:
            graph = Graph(run, rows, self.pair)
            values = []
            for each in (graph, run):
                with seeded(0, rows[0].device):
                    values.append(each(*rows)[:-1])
            for name, one, other in zip(first.found, *values, strict=True):
                _require_same(name, one, other, 0.0 if name in first.means else FLIPPED)
        except CaptureError as error:
            warnings.warn(f"The program runs eagerly, not compiled: {error}.", stacklevel=6)
            return None
        return graph

    def _placed(self, tile: Rows) -> Rows:
        return tuple(tensor.to(self.pair.device) for tensor in tile)


def _has_mean(site: dict) -> bool:
    try:
        return not bool(site["fn"].mean.isnan().any())
    except NotImplementedError:
        return False


def _value(site: dict, mean: bool) -> Tensor:
    return site["fn"].mean if mean else site["value"]


def _require_same(name: str, found: Tensor, expected: Tensor, share: float) -> None:
    """Hold values against the eager ones; a small share of draws may fall otherwise by rounding.

    Raises:
        CaptureError: If more do.
    """
    found, expected = found.double(), expected.double()
    slack = ROUNDING * expected.abs().nan_to_num().max() + 1e-6
    other = ((found - expected).abs() > slack) | (found.isnan() != expected.isnan())
    if bool(other.double().mean() > share):
        raise CaptureError(
            f"site {name!r} came out otherwise than through the handlers: the program may depend "
            f"on something that changes between calls and is no tensor"
        )
