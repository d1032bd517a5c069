"""Simulation-based calibration: is the guide's posterior that of the model, on the model's data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical

from pyrovae._tools import InputError, at_least, progress_bar
from pyrovae._tools.seeding import seeded
from pyrovae._tools.shown import Shown, Told, number
from pyrovae.data.given import takes_data
from pyrovae.diagnostics.ranks import (
    PLAIN,
    RankTest,
    Reliability,
    Shape,
    band,
    distribution,
    draw_ranks,
    moments,
    p_value,
    reliability,
    shape_of,
)
from pyrovae.diagnostics.units import CHOICES, by_datum, coordinate, unmasked
from pyrovae.evidence import SIMULATION_STREAM
from pyrovae.evidence.pareto import pareto_smooth, systematic, tail_length
from pyrovae.evidence.proposals import chunked, joint_density, require_density, total
from pyrovae.evidence.result import Verdict
from pyrovae.evidence.sandwich import simulate
from pyrovae.evidence.tiles import DATA_TILE, Evaluation, require_rows
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import Layout, Site, Values, samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The chance that an exact posterior is called anything but fine, over all statistics together.
LEVEL = 0.05
# Draws that are weighed for each one that is resampled; with equal weights that is a choice of one
# in ten, which leaves ranks uniform.
POOL = 10
# Below these many data, no band is narrow enough to tell anything.
LEAST = 50
RANK_STREAM = 11
# Scores of one latent by two runs differ by rounding.
ROUNDING = 1e-5
# Log-weights of a datum that are no farther apart, in nats, are equal.
EQUAL = 1e-3
DENSITY, NORM, JOINT = "ln p(z, x)", "norm of z", "distance (TARP)"
FUNCTIONS = (DENSITY, NORM, JOINT)


@dataclass(frozen=True, repr=False)
class PosteriorCalibration(Shown):
    """The ranks of true latents among a guide's draws, over n data that a model simulated.

    Attributes:
        num_samples: The number S of draws of each datum.
        ranks: By latent site, ``[n, D]`` for its D coordinates in 0 to S; and those of ``"ln p(z,
            x)"``, of ``"norm of z"`` where a latent is continuous, and of the distance to a random
            point, ``"distance (TARP)"``, ``[n, 1]``. −1 where a latent is masked.
        corrected: The same among draws that are resampled by their Pareto-smoothed importance
            weights; None if that was not asked for.
        khat: The shape of the weights' tail for each datum, ``[n]``; above 0.7 the correction is
            not to be relied on. None without one.
        reliability: By discrete latent, its probabilities against what came true.
        seed: Which draws these are.
    """

    num_samples: int
    ranks: dict[str, Tensor]
    corrected: dict[str, Tensor] | None
    khat: Tensor | None
    reliability: dict[str, Reliability]
    seed: int

    @property
    def tests(self) -> list[RankTest]:
        """Each statistic of the guide: whether its ranks are uniform, and how they are if not."""
        found = _tests(self.ranks, self.num_samples)
        said = [(f"probabilities of {n}", r) for n, r in self.reliability.items()]
        found += [RankTest(name, r.p_value, r.shape) for name, r in said]
        return _decided(found)

    @property
    def corrected_tests(self) -> list[RankTest]:
        """The same of the corrected draws."""
        return _decided(_tests(self.corrected or {}, self.num_samples))

    @property
    def shape(self) -> Shape:
        """``"fine"``, or what the guide's posterior is above all."""
        return _shape(self.tests, self.ranks, self.num_samples)

    @property
    def corrected_shape(self) -> Shape | None:
        """The same of the corrected draws."""
        if self.corrected is None:
            return None
        return _shape(self.corrected_tests, self.corrected, self.num_samples)

    @property
    def verdict(self) -> Verdict:
        """In words: fine, too narrow, too wide or biased, before and after the correction."""
        tests, n = self.tests, len(next(iter(self.ranks.values())))
        off = [test for test in tests if test.shape != "fine"]
        start = f"On {n} simulated data points the guide's posterior is {self.shape}: "
        if not off:
            text = (
                f"{start}the ranks of all {len(tests)} statistics are uniform within bands that "
                f"hold an exact posterior with {1 - LEVEL:.0%}."
            )
            return Verdict("good", text + self._about_correction())
        off.sort(key=lambda test: test.p_value)
        named = ", ".join(f"{test.name} ({test.shape})" for test in off[:3])
        more = ", …" if len(off) > 3 else ""
        text = (
            f"{start}{len(off)} of {len(tests)} statistics lie outside bands that hold all of an "
            f"exact posterior with {1 - LEVEL:.0%}, above all {named}{more}."
        )
        return Verdict("doubtful", text + self._about_correction())

    def _told(self) -> Told:
        tests, n = self.tests, len(next(iter(self.ranks.values())))
        off = sum(test.shape != "fine" for test in tests)
        worst = min(tests, key=lambda test: test.p_value)
        rows = [
            ("posterior", self.shape),
            ("outside bands", f"{off} of {len(tests)} statistics, at {LEVEL:.0%} for all together"),
            ("least p-value", f"{number(worst.p_value)}, of {worst.name}"),
        ]
        if self.corrected is not None and self.khat is not None:
            rows.append(("resampled by weights", str(self.corrected_shape)))
            rows.append(("k-hat", f"above 0.7 for {int((self.khat > 0.7).sum())} of {n} data"))
        for name, each in self.reliability.items():
            rows.append((f"probabilities of {name}", f"off by {number(each.error)} on average"))
        title = f"PosteriorCalibration by {self.num_samples} draws for each of {n} simulated data"
        return Told(title, rows, f"{self.verdict.kind}: {self.verdict}")

    def _about_correction(self) -> str:
        if self.corrected is None or self.khat is None:
            return ""
        heavy = (self.khat > 0.7).double().mean().item()
        return (
            f" Resampled by importance weights it is {self.corrected_shape}; k-hat is above 0.7 "
            f"for {heavy:.0%} of the data."
        )

    def summary(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        tests = {"guide": self.tests, "corrected": self.corrected_tests}
        return {
            "num_data": len(next(iter(self.ranks.values()))),
            "num_samples": self.num_samples,
            "seed": self.seed,
            "shape": self.shape,
            "corrected_shape": self.corrected_shape,
            "verdict": str(self.verdict),
            "verdict_kind": self.verdict.kind,
            "tests": {key: [test._asdict() for test in each] for key, each in tests.items()},
            "reliability_error": {name: each.error for name, each in self.reliability.items()},
            "curves": self.curves,
        }

    @property
    def curves(self) -> dict[str, dict[str, list[float]]]:
        """The shares of ranks below 1 to S, by statistic, of the guide and of the corrected."""
        sets = {"guide": self.ranks, "resampled by weights": self.corrected or {}}
        return {
            title: {
                name: [round(share, 4) for share in distribution(c, self.num_samples).tolist()]
                for _, name, c in _columns(ranks)
            }
            for title, ranks in sets.items()
            if ranks
        }

    def plot(self) -> Figure:
        """The distribution functions of all ranks less the diagonal, with their bands.

        Beside them those after the correction, and the reliability of probabilities, if there are.
        """
        from matplotlib.figure import Figure

        curves, n = self.curves, len(next(iter(self.ranks.values())))
        panels = len(curves) + bool(self.reliability)
        figure = Figure(figsize=(4 * panels, 3.2), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        for (title, each), axis in zip(curves.items(), axes, strict=False):
            draw_curves(axis, each, n, self.num_samples)
            axis.set_title(title)
        if self.reliability:
            axes[-1].plot([0, 1], [0, 1], color="0.7", lw=1)
            for name, said in self.reliability.items():
                axes[-1].plot(said.predicted, said.observed, marker="o", ms=3, label=name)
            axes[-1].set(xlabel="probability", ylabel="share that came true", title="reliability")
            axes[-1].legend(frameon=False)
        return figure


@takes_data
def calibrate(
    model: Callable,
    guide: Callable,
    like: Tensor,
    *context: Tensor,
    n: int = 1000,
    num_samples: int = 99,
    corrected: bool = True,
    seed: int | None = None,
    progress: bool = False,
) -> PosteriorCalibration:
    r"""Test whether a guide is the posterior of its model, on data that the model simulates.

    .. math:: (z^*, x) \sim p(z, x), \quad z_1, \dots, z_S \sim q(z \mid x) \quad\Rightarrow\quad
              \#\{s : f(z_s) < f(z^*)\} \sim \mathrm{Uniform}\{0, \dots, S\}
              \text{ for every } f \text{ if } q(z \mid x) = p(z \mid x)

    The functions f are each coordinate of each latent, :math:`\ln p(z, x)`, the norm of z and the
    distance to a random point, whose uniformity is the expected coverage of the joint posterior.
    Ties are broken at random, and uniformity is judged by simultaneous bands, at 5% for all
    functions together. Of discrete latents, the probabilities that the guide gives are held
    against what came true as well. Latents that the model sums over are left out.

    Args:
        model: The model program.
        guide: The guide program.
        like: A batch ``[N, ...]`` of the shape that the programs take; its values are not used.
        context: Further arguments of both programs, ``[N, ...]``.
        n: How many data to simulate, 50 at least; where it is more than N, the context comes
            round.
        num_samples: The number S of draws of each datum.
        corrected: Also rank among draws that are resampled from ten times as many by their
            Pareto-smoothed importance weights: what importance sampling makes of the guide.
        seed: Seeds the draws; None draws a seed from torch's global stream.
        progress: Show a bar.

    Returns:
        Ranks by site, and a verdict: fine, too narrow, too wide or biased.

    Raises:
        ValueError: If n is below 50, no site of the model observes x, the model weighs its draws by
            a factor, or reads the x that it observes and there is no order to draw it in, or the
            guide has no density and ``corrected`` asks for weights.

    References:
        Talts et al., Validating Bayesian Inference Algorithms with Simulation-Based Calibration
        (arXiv 1804.06788); Säilynoja et al. (arXiv 2103.10522) for the bands; Lemos et al.,
        Sampling-Based Accuracy Testing of Posterior Estimators (arXiv 2302.03026), for the distance
        to a random point (TARP); Modrák et al. (arXiv 2211.02383) for the density as a function.

    Example:
        >>> found = pyrovae.calibrate(model, guide, data.test, n=200, corrected=False, seed=0)
        >>> print(found.verdict)
        On 200 simulated data points the guide's posterior is ...
    """
    at_least({"n": LEAST, "num_samples": 1}, n, num_samples)
    require_rows((like, *context))
    index = torch.arange(n) % max(len(like), 1)
    rows = tuple(tensor[index.to(tensor.device)] for tensor in (like, *context))
    with Evaluation(model, guide, rows, seed).opened() as task:
        if not task.pair.known.latents:
            raise InputError("Expected a pair with latents, got one that samples none.")
        with seeded(task.seed, task.device, 0, SIMULATION_STREAM):
            truth = simulate(task, model, guide)
        if corrected:
            require_density(task.pair.known)
        points = torch.cat(
            [*_coordinates(task.pair.known, truth, _sites(task.pair, task.first)).values()], -1
        )[0]
        # The point that distances are taken to has to be independent of the truth, given the data.
        ruler = _Ruler(points.roll(1, 0), points.std(0) + torch.finfo(points.dtype).tiny)
        parts = []
        with progress_bar((), enabled=progress, total=n, desc="calibration") as bar:
            for number, index in enumerate(torch.arange(n, device=task.device).split(DATA_TILE)):
                with seeded(task.seed, task.device, number, RANK_STREAM):
                    parts.append(_rank(task, index, truth, ruler, num_samples, corrected))
                bar.update(len(index))
    joined = {key: _joined([part[key] for part in parts], task.home) for key in parts[0]}
    return PosteriorCalibration(
        num_samples=num_samples,
        ranks=joined["ranks"],
        corrected=joined["corrected"] if corrected else None,
        khat=joined["khat"]["khat"] if corrected else None,
        reliability={n: reliability(*said.unbind(-1)) for n, said in joined["said"].items()},
        seed=task.seed,
    )


class _Ruler(NamedTuple):
    """How distances are measured: from which point ``[n, D]``, and in which units ``[D]``."""

    origin: Tensor
    unit: Tensor


def _rank(
    task: Evaluation,
    index: Tensor,
    truth: Values,
    ruler: _Ruler,
    num_samples: int,
    corrected: bool,
) -> dict[str, dict[str, Tensor]]:
    """The ranks ``[N, D]`` of some data's latents by statistic, and what is beside them."""
    pair, layout = task.pair, task.pair.known
    rows = tuple(tensor[index] for tensor in task.rows)
    sites = _sites(pair, rows, max(num_samples, 2))
    count = num_samples * (POOL if corrected else 1)
    values, scores = pair.draw(rows, count)
    true = {
        name: value.index_select(value.dim() + layout.dim - sites[name]["fn"].event_dim, index)
        for name, value in truth.items()
    }
    ruler = ruler._replace(origin=ruler.origin[index])
    density = _density(task, rows, count, values)
    used = {name: _used(layout, sites[name], len(index)) for name in layout.latents}
    drawn = _statistics(layout, values, sites, used, density, ruler)
    right = _statistics(layout, true, sites, used, _density(task, rows, 1, true), ruler)

    def ranks(drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, draws in drawn.items():
            value = right[name][0]
            slack = 0.0 if name in used else ROUNDING * (1 + value.abs())
            found[name] = draw_ranks(draws, value, slack)
            if name in used:
                found[name][~used[name]] = -1
        return found

    parts = {"ranks": ranks({name: each[:num_samples] for name, each in drawn.items()})}
    parts["said"] = {
        name: said
        for name in layout.latents
        if (said := _said(layout, sites[name], true[name], used[name])) is not None
    }
    if corrected:
        weight, khat = _smoothed(density - total(scores.values(), torch.zeros_like(density)))
        chosen = systematic(weight, num_samples)[..., None]
        again = {n: v.gather(0, chosen.expand(-1, -1, v.shape[-1])) for n, v in drawn.items()}
        parts |= {"corrected": ranks(again), "khat": {"khat": khat}}
    return parts


def _sites(pair: Pair, rows: tuple, particles: int = 1) -> dict[str, Site]:
    return samples(pair.trace_guide(*rows, particles=particles))


def _coordinates(layout: Layout, values: Values, sites: dict[str, Site]) -> dict[str, Tensor]:
    """Latents by site as ``[K, N, D]`` numbers."""
    found = {}
    for name, value in values.items():
        events = sites[name]["fn"].event_dim
        size = len(value), value.shape[layout.dim - events]
        found[name] = by_datum(value, events, layout, size).to(torch.get_default_dtype())
    return found


def _density(task: Evaluation, rows: tuple, particles: int, values: Values) -> Tensor:
    """ln p(z, x) of K latents for each of N data, ``[K, N]`` in float64."""
    found = [
        joint_density(task.pair, rows, *some) for some in chunked(values, particles, task.chunk)
    ]
    return torch.cat([each.prior + each.likelihood for each in found])


def _statistics(
    layout: Layout,
    values: Values,
    sites: dict[str, Site],
    used: dict[str, Tensor],
    density: Tensor,
    ruler: _Ruler,
) -> dict[str, Tensor]:
    """Every function of latents and data that is ranked, ``[K, N, D]`` by name."""
    found = _coordinates(layout, values, sites)
    joint, seen = torch.cat([*found.values()], -1), torch.cat([used[n] for n in found], -1)
    kept = {name: z.where(used[name], 0.0) for name, z in found.items()}
    real = [z for name, z in kept.items() if not sites[name]["fn"].support.is_discrete]
    found = found | {DENSITY: density[..., None]}
    if real:
        found[NORM] = torch.cat(real, -1).norm(dim=-1, keepdim=True)
    distance = ((joint - ruler.origin) / ruler.unit).where(seen, 0.0).norm(dim=-1, keepdim=True)
    return found | {JOINT: distance}


def _used(layout: Layout, site: Site, num_data: int) -> Tensor:
    """Where a latent is not masked, ``[N, D]``."""
    mask = unmasked(site).expand(site["value"].shape)[:1]
    return by_datum(mask, site["fn"].event_dim, layout, (1, num_data))[0]


def _said(layout: Layout, site: Site, value: Tensor, used: Tensor) -> Tensor | None:
    """The probability of each value of a discrete latent, twice, and whether it is the true one.

    Each probability is a mean over half of the draws of what it depends on. ``[N, D * C, 3]``, NaN
    where the latent is masked, or None where the guide does not say.
    """
    fn, base = site["fn"], coordinate(site["fn"])
    size, events = (len(site["value"]), value.shape[layout.dim - fn.event_dim]), fn.event_dim
    if isinstance(base, Categorical):
        value = torch.nn.functional.one_hot(value.long(), base.probs.shape[-1])
        events += 1
    elif not isinstance(base, (Bernoulli, *CHOICES)):
        return None
    probs = by_datum(base.probs, events, layout, size)
    halves = [half.mean(0) for half in probs.tensor_split(2)]
    came = by_datum(value, events, layout, (1, size[1]))[0].to(probs)
    seen = used.repeat_interleave(came.shape[1] // used.shape[1], 1)
    return torch.where(seen[..., None], torch.stack([*halves, came], -1), torch.nan)


def _smoothed(log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pareto-smoothed weights ``[K, N]`` that sum to one, and k-hat ``[N]``."""
    # Weights that differ by rounding alone have a tail of noise.
    spread = log_weight.amax(0) - log_weight.amin(0)
    ascending, order = torch.where(spread < EQUAL, 0.0, log_weight).sort(0)
    tail = tail_length(len(log_weight))
    khat, smooth = pareto_smooth(ascending[-tail - 1 :].T, len(log_weight))
    ascending = torch.cat([ascending[: len(ascending) - smooth.shape[1]], smooth.T])
    return torch.zeros_like(log_weight).scatter(0, order, ascending.softmax(0)), khat


def _joined(parts: list[dict[str, Tensor]], home: torch.device) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]).to(home) for name in parts[0]}


def _columns(ranks: dict[str, Tensor]) -> list[tuple[str, str, Tensor]]:
    """Each statistic's site or function, its name, and its ranks where they are known."""
    found = []
    for key, each in ranks.items():
        names = [key] if each.shape[1] == 1 else [f"{key}[{d}]" for d in range(each.shape[1])]
        columns = [column[column >= 0] for column in each.unbind(1)]
        found += [(key, n, c) for n, c in zip(names, columns, strict=True) if len(c)]
    return found


def _tests(ranks: dict[str, Tensor], most: int) -> list[RankTest]:
    """Each coordinate and function, with its p-value and the shape of its ranks."""
    found = []
    for key, name, column in _columns(ranks):
        shape = shape_of(column, most)
        if key in FUNCTIONS:
            # Draws of a higher density than the truth are too near the mode; what else the ranks
            # of a function say is no matter of narrow, wide or moved.
            near = key == DENSITY and moments(column, most)[0] < -PLAIN
            shape = "too narrow" if near else "misshapen"
        found.append(RankTest(name, p_value(column, most), shape))
    return found


def _decided(tests: list[RankTest]) -> list[RankTest]:
    """The same tests, fine but where one is off at the level of all together."""
    level = LEVEL / max(len(tests), 1)
    return [test if test.p_value < level else test._replace(shape="fine") for test in tests]


def _shape(tests: list[RankTest], ranks: dict[str, Tensor], most: int) -> Shape:
    """What most coordinates that are off say, the surest first.

    Where functions alone are off, it is the spread of all coordinates together.
    """
    off = sorted((test for test in tests if test.shape != "fine"), key=lambda test: test.p_value)
    if not off:
        return "fine"
    if sure := [test.shape for test in off if test.name not in FUNCTIONS]:
        return Counter(sure).most_common(1)[0][0]
    spreads = [moments(c, most)[1] for key, _, c in _columns(ranks) if key not in FUNCTIONS]
    pooled = sum(spreads) / max(len(spreads), 1) ** 0.5  # none where all latents are masked
    if abs(pooled) < PLAIN:
        return off[0].shape
    return "too narrow" if pooled > 0 else "too wide"


def draw_curves(
    axes: Axes, curves: Mapping[str, Sequence[float]], num_data: int, most: int
) -> None:
    """Draw distribution functions less the diagonal, as a summary has them, and their band."""
    z = np.arange(1, most + 1) / (most + 1)
    low, high = (each.numpy() for each in band(num_data, most, LEVEL / len(curves)))
    axes.fill_between(z, low - z, high - z, color="0.9", step="mid")
    for name, curve in curves.items():
        style: dict[str, Any] = {"lw": 0.7, "color": "0.4"}
        if name in FUNCTIONS:
            style = {"lw": 1.5, "label": name}
        axes.plot(z, np.array(curve) - z, **style)
    axes.set(xlabel="rank / (S + 1)", ylabel="ECDF less the diagonal")
    if not curves.keys().isdisjoint(FUNCTIONS):
        axes.legend(frameon=False, fontsize="small")
