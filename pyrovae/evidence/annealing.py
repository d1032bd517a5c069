"""log p(x) of each datum by annealed importance sampling, for continuous latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae._tools import InputError, at_least, should_compile
from pyrovae._tools.seeding import Stream, seeded, subseed
from pyrovae.data.given import takes_data
from pyrovae.evidence import BACKWARD_STREAM, PILOT_STREAM, PRIOR_STREAM
from pyrovae.evidence.path import Chains, GeometricPath, Moves, Schedule, adapt, anneal
from pyrovae.evidence.proposals import (
    chunked,
    joint_density,
    refuse_nan,
    require_density,
    require_scorable,
    uncovered_share,
)
from pyrovae.evidence.result import LogLikelihood
from pyrovae.evidence.tiles import DATA_TILE, Evaluation, Found
from pyrovae.evidence.unconstrained import Coordinates
from pyrovae.evidence.weights import Sums, curve_points

# Temperatures of the run that finds step sizes and where temperatures are needed: a quarter more
# cost for 200. It has as many chains as the run itself if those are few, so that one graph serves.
PILOT_KNOTS, PILOT_CHAINS = 24, (4, 16)
# Compiling takes some 20 seconds, in which a small pair takes so many steps.
PAYS_AFTER = 2_000_000
# Wu et al.'s sigmoid, from -4 to 4: dense at both ends, where densities change fastest.
STEEPNESS = 4.0


class Settings(NamedTuple):
    """How annealing is done; see :func:`annealed_log_likelihood`."""

    num_chains: int = 16
    num_temperatures: int = 500
    num_steps: int = 2
    initial: str = "guide"

    @property
    def knots(self) -> list[float]:
        r"""Temperatures of the run that finds all others, evenly spaced in a sigmoid.

        References:
            Wu et al. (arXiv 1611.04273), section 4.
        """
        number = min(PILOT_KNOTS, self.num_temperatures) + 1
        at = [1 / (1 + math.exp(-STEEPNESS * (2 * t / number - 1))) for t in range(number + 1)]
        return [(each - at[0]) / (at[-1] - at[0]) for each in at[1:-1]]

    @property
    def method(self) -> str:
        """In words."""
        return (
            f"annealed importance sampling from the {self.initial}, {self.num_temperatures} "
            f"temperatures chosen for each datum, {self.num_steps} leapfrog steps at each"
        )

    def options(self, num_data: int, compile: bool | str) -> dict[str, Any]:
        """What an estimate depends on beside the pair and its data; refuses what makes no sense."""
        at_least({"num_chains": 1, "num_temperatures": 0, "num_steps": 1}, *self[:3])
        if self.initial not in ("guide", "prior"):
            raise InputError(f"Expected initial='guide' or 'prior', got {self.initial!r}.")
        work = num_data * self.num_chains * self.num_temperatures * self.num_steps
        compiled = should_compile(compile, work >= PAYS_AFTER)
        return self._asdict() | {"method": self.method, "compiled": compiled}


@takes_data
def annealed_log_likelihood(
    model: Callable,
    guide: Callable,
    x: Tensor,
    *context: Tensor,
    num_chains: int = 16,
    num_temperatures: int = 500,
    num_steps: int = 2,
    initial: str = "guide",
    max_rows: int | None = None,
    seed: int | None = None,
    compile: bool | str = "auto",
    checkpoint: str | Path | None = None,
    processes: bool = False,
    progress: bool = False,
) -> LogLikelihood:
    r"""Estimate log p(x) of each datum by annealed importance sampling.

    .. math:: \ln \hat p(x) = \ln \frac1C \sum_{c=1}^C
              \prod_{t=0}^{T} \frac{f_{\beta_{t+1}}(z_{c,t})}{f_{\beta_t}(z_{c,t})}, \qquad
              f_\beta(z) = q(z \mid x)^{1 - \beta}\, p(x, z)^\beta

    Each of C chains starts at a draw z_0 from the guide, or the prior, and makes one Hamiltonian
    move at each of T temperatures β_t between 0 and 1. The weights have mean p(x) however few
    temperatures there are, and vary the less the more there are: where importance sampling has
    k-hat above 0.7, this still gives a tight bound, at the price of T L gradients for each chain.
    Moves act on all latents at once, in real coordinates of their supports, and keep a part of
    their momentum (:class:`~pyrovae.evidence.path.Moves`). Temperatures and step sizes are those of
    a short run before, for each datum (:func:`~pyrovae.evidence.path.adapt`).

    Args:
        model: The model program; its latents must be continuous, or enumerated by the model.
        guide: The guide program.
        x: Data ``[N, ...]``; ``context`` are further arguments of both programs, ``[N, ...]``.
        num_chains: The number of chains C of each datum.
        num_temperatures: The number T of temperatures strictly between 0 and 1; with none, this
            is importance sampling with C samples.
        num_steps: The number L of leapfrog steps at a temperature.
        initial: Start from the ``"guide"`` or the ``"prior"``; a guide far from the posterior
            can be the worse place.
        max_rows: The largest number of (chain, datum) pairs that the programs score at once; it
            bounds memory, and less than 64 counts as 64. None is 2,048 on a CPU and 65,536
            elsewhere.
        seed: Seeds the draws; None draws a seed from torch's global stream, or goes on with that
            of the checkpoint.
        compile: Compile whole moves: True, False, or ``"auto"`` where N C T L is at
            least two million, so that it pays.
        checkpoint: A file to keep finished data in; with the same file, an evaluation that was
            stopped goes on and ends as if it had not been.
        processes: Share the data among the processes of :mod:`torch.distributed`, each of which
            calls this and gets the whole result.
        progress: Show a bar with an estimate of the time left.

    Returns:
        As :func:`pyrovae.log_likelihood`, with chains for samples, and ``acceptance``.

    Raises:
        ValueError: If an argument makes no sense, the pair breaks the contract, a latent is
            discrete, the guide cannot score latents that it did not draw (with
            ``initial="guide"``), or a log-probability is NaN at the start.

    References:
        Neal (2001), Annealed importance sampling; Wu et al., On the Quantitative Analysis of
        Decoder-Based Generative Models (arXiv 1611.04273); Sohl-Dickstein and Culpepper (2012),
        Hamiltonian annealed importance sampling (arXiv 1205.1925).

    Example:
        >>> few = {"num_chains": 4, "num_temperatures": 20}  # 16 and 500 where nothing is said
        >>> ll = pyrovae.annealed_log_likelihood(model, guide, data.test[:10], seed=0, **few)
        >>> print(f"{ll.mean:.2f} ± {ll.mean_standard_error:.2f} nats per datum. {ll.verdict}")
        -2... ± 0... nats per datum. 4 chains are too few to tell whether the errors hold: ...
    """
    settings = Settings(num_chains, num_temperatures, num_steps, initial)
    options = settings.options(len(x), compile)
    task = Evaluation(model, guide, (x, *context), seed, max_rows, checkpoint, processes)
    with task.opened():
        with seeded(task.seed, task.device):
            annealer = Annealer(task, settings, options["compiled"])

        def find(index: int, rows: tuple) -> Found:
            return annealer.run(index, rows, annealer.tune(index, rows))

        task.each(find, annealer.ready, annealer.ticks, progress, **options)
        return annealer.result()


class Annealer:
    """Anneals chains for a tile of data."""

    def __init__(self, task: Evaluation, settings: Settings, compiled: bool) -> None:
        self.task, self.settings = task, settings
        self.ready = self._compile if compiled else None
        self.coordinates = Coordinates(task.pair, task.first)
        if settings.initial == "guide":
            require_density(task.pair.known)
            require_scorable(task.pair, task.first, "use initial='prior'")
        self.path = GeometricPath(self.coordinates, settings.initial, task.max_rows)
        self.moves = Moves(self.path, settings.num_steps)
        self.tile = min(task.tile, settings.num_chains)
        self.pilots = min(max(self.tile, PILOT_CHAINS[0]), PILOT_CHAINS[1])
        tiles = -(-settings.num_chains // self.tile)
        self.ticks = len(settings.knots) + settings.num_temperatures * tiles

    def tune(self, index: int, rows: tuple) -> Schedule:
        """Find temperatures and step sizes for each datum, by chains of their own."""
        knots = rows[0].new_tensor(self.settings.knots, dtype=torch.float64)
        if not len(knots):
            return Schedule(knots[:, None].expand(0, len(rows[0])), knots, knots)
        with self._drawing(index, 0, PILOT_STREAM) as stream:
            with stream():
                chains, _ = self._start(index, rows, self.pilots)
            move = partial(self.moves, rows, stream=stream)
            return adapt(move, chains, knots, self.settings.num_temperatures, self.task.tick)

    def run(self, index: int, rows: tuple, schedule: Schedule, end: Tensor | None = None) -> Found:
        """Sum the weights of all chains: w forward, or 1/w backward from ``end`` ``[N, D]``."""
        count = self.settings.num_chains
        sums = Sums(count, curve_points(count), rows[0])
        accepted = rows[0].new_zeros(len(rows[0]), dtype=torch.float64)
        for number, first in enumerate(range(0, count, self.tile)):
            some = min(self.tile, count - first)
            path = (number,) if end is None else (number, BACKWARD_STREAM)
            with self._drawing(index, *path) as stream:
                move, how = partial(self.moves, rows, stream=stream), (schedule, self.task.tick)
                if end is None:
                    with stream():
                        chains, outside = self._start(index, rows, some)
                    log_weight, rate = anneal(move, chains, *how)
                    log_weight = log_weight.masked_fill(outside, -math.inf)
                else:
                    with stream():
                        chains = self.moves.start(rows, end.expand(some, *end.shape).contiguous())
                    log_weight, rate = anneal(move, chains, *how, backward=True)
                    log_weight = -log_weight
            sums.add(log_weight)
            accepted = accepted + rate * some / count
        return sums.result() | {"acceptance": accepted}

    def _compile(self, rows: tuple) -> bool:
        """Compile moves; whether threads may anneal side by side."""
        return self.moves.compile(rows, self.pilots, self.tile)

    @contextmanager
    def _drawing(self, index: int, *path: int) -> Iterator[Stream]:
        """A stream of a tile's; left open for the block, unless others draw meanwhile."""
        stream = Stream(subseed(self.task.seed, index), self.task.device, *path)
        with nullcontext() if self.task.crew > 1 else stream():
            yield stream

    def _start(self, index: int, rows: tuple, chains: int) -> tuple[Chains, Tensor]:
        """Where chains start: at the first draws that importance sampling would make.

        And which draws of the guide are outside of the prior's support, ``[C, N]``: their weight
        is zero, and their chain starts anywhere.
        """
        pair, chunk = self.task.pair, self.path.chunk(rows)
        if self.settings.initial == "guide":
            drawn, _ = pair.draw(rows, max(self.task.tile, chains))
            drawn = {name: value[:chains] for name, value in drawn.items()}
            parts = [joint_density(pair, rows, *part) for part in chunked(drawn, chains, chunk)]
            outside = torch.cat([part.prior == -math.inf for part in parts])
        else:
            drawn = pair.draw_prior(rows, chains)
            outside = rows[0].new_zeros(chains, len(rows[0]), dtype=torch.bool)
        u = self.coordinates.of(rows, drawn, chunk)
        state, momentum = self.moves.start(rows, torch.where(outside[..., None], 0.0, u))
        if bool(state.gain.isnan().logical_and(~outside).any()):
            model = joint_density(pair, rows, chains, drawn).sites
            start = self.settings.initial
            guide = {} if start == "prior" else pair.score_guide(rows, chains, drawn)
            refuse_nan(guide, model, index * DATA_TILE)
        return (state, momentum), outside

    def result(self, found: Found | None = None) -> LogLikelihood:
        """The estimate that all tiles' sums make up."""
        task, points = self.task, curve_points(self.settings.num_chains)
        uncovered = 0.0  # chains from the prior start everywhere where it has mass
        if self.settings.initial == "guide":
            with seeded(task.seed, task.device, 0, PRIOR_STREAM):
                uncovered = uncovered_share(task.pair, task.first)
        return task.estimate(points, self.settings.method, uncovered, found)
