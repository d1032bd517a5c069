"""Bidirectional Monte Carlo: log p(x) between two bounds, for data that the model draws itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrovae._tools import InputError, at_least, standard_error
from pyrovae._tools.seeding import seeded
from pyrovae._tools.shown import Shown, Told, figures, mean
from pyrovae.data.given import data_tensors
from pyrovae.evidence import SIMULATION_STREAM
from pyrovae.evidence.annealing import Annealer, Settings
from pyrovae.evidence.result import LogLikelihood
from pyrovae.evidence.tiles import Evaluation, Found, require_rows, tile_rows
from pyrovae.pairs.contract import refuse_factors
from pyrovae.pairs.generation import Simulator
from pyrovae.pairs.pair import Given
from pyrovae.pairs.traces import Values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# An upper bound below the lower one by so many standard errors, and by more nats than float32
# loses in a sum over an image, is no chance.
CHANCE, ROUNDING = 4.0, 1e-2


@dataclass(frozen=True, repr=False)
class Bidirectional(Shown):
    """What annealing says of log p(x) of n simulated data, from below and from above, in nats.

    Attributes:
        lower: Forward annealing, a lower bound in expectation.
        upper: Backward annealing from an exact draw of the posterior, an upper bound in
            expectation, ``[n]``. There is one such draw for each datum, which all its chains
            share, so that no error is stated but that of the mean over data.
        x: The simulated data.
    """

    lower: LogLikelihood
    upper: Tensor
    x: Tensor

    @property
    def gap(self) -> Tensor:
        """Upper less lower bound of each datum, ``[n]``; negative by chance only."""
        return self.upper - self.lower.log_prob

    @property
    def mean_gap(self) -> float:
        """How far the mean of the lower bound can be below log p(x), nats per datum."""
        return self.gap.mean().item()

    @property
    def mean_gap_standard_error(self) -> float:
        """The standard error of that, over data and draws."""
        return standard_error(self.gap).item()

    def plot(self) -> Figure:
        """Draw both bounds of each datum, and the gaps between them."""
        return figures().bounds(self)

    def _told(self) -> Told:
        each = {"lower bound": self.lower.log_prob, "upper bound": self.upper, "gap": self.gap}
        rows = [(name, f"{mean(values)} nats per datum") for name, values in each.items()]
        title = f"Bidirectional: bounds of log p(x) of {len(self.gap)} simulated data (± over data)"
        return Told(title, rows, self.verdict)

    @property
    def verdict(self) -> str:
        """In words: how tight the two bounds are."""
        low, high, error = self.lower.mean, self.upper.mean().item(), self.mean_gap_standard_error
        if len(self.gap) == 1:
            return (
                f"On one datum of the model's own, log p(x) is {low:.3f} from below and {high:.3f} "
                f"from above, which are bounds in expectation alone: take more data, such as n=64."
            )
        found = (
            f"On {len(self.gap)} data of the model's own, mean log p(x) lies between {low:.3f} and "
            f"{high:.3f}, bounds that are {self.mean_gap:.3f} ± {error:.3f} nats per datum apart: "
        )
        if self.mean_gap < 2 * error:
            return f"{found}forward annealing with these settings cannot be told from log p(x)."
        return f"{found}forward annealing with these settings is too low by that at most."


def bidirectional(
    model: Callable,
    guide: Callable,
    *context: Tensor,
    like: Tensor,
    n: int = 64,
    num_chains: int = 16,
    num_temperatures: int = 500,
    num_steps: int = 2,
    initial: str = "guide",
    max_rows: int | None = None,
    seed: int | None = None,
    compile: bool | str = "auto",
    progress: bool = False,
) -> Bidirectional:
    r"""Bound log p(x) from both sides, on data simulated from the model.

    .. math:: (z^*, x) \sim p(z, x), \qquad
              E\Bigl[\ln \frac1C \sum_c w_c\Bigr] \le \ln p(x) \le
              E\Bigl[-\ln \frac1C \sum_c \frac{1}{w'_c}\Bigr]

    w are the weights of annealing as :func:`pyrovae.annealed_log_likelihood` does it, w' those of
    the same chains run backward from z*, which is an exact draw of the posterior because x was
    made from it. The gap between the two says how much that estimate may be too low, on data
    that look as the model's do; on other data it says so as far as the model fits them.

    Args:
        model: The model program.
        guide: The guide program.
        context: Further arguments of both programs, ``[N, ...]``.
        like: A batch ``[N, ...]`` of the shape that the programs take; its values are not used.
        n: The number of data to simulate; where it is more than N, the context comes round.
        num_chains: As in :func:`pyrovae.annealed_log_likelihood`, as are all other arguments.

    Raises:
        ValueError: As there; if no site of the model observes x, the model weighs its draws by a
            factor, or reads the x that it observes and there is no order to draw it in; and if
            the upper bound is below the lower one by more than chance.

    References:
        Grosse, Ghahramani and Adams, Sandwiching the marginal likelihood using bidirectional
        Monte Carlo (arXiv 1511.02543); Wu et al. (arXiv 1611.04273), section 4.2.

    Example:
        >>> few = {"num_chains": 4, "num_temperatures": 20}  # 16 and 500 where nothing is said
        >>> both = pyrovae.bidirectional(model, guide, like=data.test, n=5, seed=0, **few)
        >>> print(both.verdict)
        On 5 data of the model's own, mean log p(x) lies between -2... and -2..., ...
    """
    settings = Settings(num_chains, num_temperatures, num_steps, initial)
    at_least({"n": 1}, n)
    options = settings.options(2 * n, compile)
    given = data_tensors(like, *context)
    require_rows(given)
    index = torch.arange(n) % max(len(given[0]), 1)
    rows = tuple(tensor[index.to(tensor.device)] for tensor in given)
    task = Evaluation(model, guide, rows, seed, max_rows)
    with task.opened():
        with seeded(task.seed, task.device, 0, SIMULATION_STREAM):
            latents = simulate(task, model, guide)
            annealer = Annealer(task, settings, options["compiled"])
            ends = tile_rows((annealer.coordinates.of(task.rows, latents)[0],))

        def find(number: int, rows: tuple) -> Found:
            tuned = annealer.tune(number, rows)
            lower = annealer.run(number, rows, tuned)
            above = annealer.run(number, rows, tuned, ends[number][0])
            return lower | {"upper": -above["log_prob"]}

        task.each(find, annealer.ready, 2 * annealer.ticks, progress)
        found = task.found()
        upper = found.pop("upper")
        return _ordered(Bidirectional(annealer.result(found), upper, task.rows[0].to(task.home)))


def _ordered(found: Bidirectional) -> Bidirectional:
    """Refuse an upper bound that is below the lower one by more than chance."""
    gap, error = found.mean_gap, found.mean_gap_standard_error
    if gap < -max(CHANCE * error, ROUNDING):
        raise InputError(
            f"The upper bound is {-gap:.3f} ± {error:.3f} nats per datum below the lower one, so "
            f"that the data are no draws from the density that was annealed: look for something "
            f"that changes between two calls of a program."
        )
    return found


def simulate(task: Evaluation, model: Callable, guide: Callable) -> Values:
    """Draw latents and data, evaluate on the data from now on, and return the latents.

    The data of sites that observe no argument follow the programs' arguments in the rows, so that
    tiles take them along.
    """
    pair, rows, layout = task.pair, task.rows, task.pair.known
    refuse_factors(pair, rows)
    sites, args = Simulator(pair, keep=False).draw(rows)
    axes = {
        name: layout.dim - sites[name]["fn"].event_dim for name in layout.observed if name in sites
    }
    if args[0] is rows[0]:
        raise InputError(
            f"Expected a site of the model that observes x itself, got {sorted(axes)}, so that "
            f"data drawn from the model cannot be shown to the guide."
        )
    data = [sites[name]["value"].movedim(axis, 0) for name, axis in axes.items()]
    pair.model = partial(_observing, model, len(rows), axes)
    pair.guide = lambda *given: guide(*given[: len(rows)])
    task.set_rows((*args, *data))
    found = {}
    for name in layout.latents:  # as those of one particle, [1, ..., N, ...]
        value, rank = sites[name]["value"], sites[name]["fn"].event_dim - layout.particle_dim
        found[name] = value[(None,) * (rank - value.dim())]
    return found


def _observing(model: Callable, count: int, axes: dict[str, int], *rows: Tensor) -> None:
    """Run a model whose sites observe what follows its arguments, the batch at ``axes``."""
    places = zip(axes.items(), rows[count:], strict=True)
    with Given({}, {name: value.movedim(0, axis) for (name, axis), value in places}):
        model(*rows[:count])
