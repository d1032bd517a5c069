"""Missing entries given the observed ones, by self-normalized importance sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyrovae._tools import InputError, at_least
from pyrovae._tools.seeding import seeded, subseed
from pyrovae._tools.shown import Shown, Told, figures
from pyrovae.data.given import takes_data
from pyrovae.evidence import PRIOR_STREAM
from pyrovae.evidence.proposals import Sampler, chunked, refuse_nan, total, uncovered_share
from pyrovae.evidence.result import LogLikelihood
from pyrovae.evidence.tiles import DATA_TILE, Evaluation, Found, require_rows
from pyrovae.evidence.weights import Sums, curve_points
from pyrovae.pairs.contract import base_of
from pyrovae.pairs.pair import Given, Pair
from pyrovae.pairs.traces import Site, Values, scored, site_scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Draws of missing entries that are sorted at once: 16 MB, and as much again for their weights.
SORTED_AT_ONCE = 2**22
# What names of results begin with: fields of Imputation, and the probabilities of a site.
FIELD, SHARES = "field.", "probabilities."


@dataclass(frozen=True, eq=False, repr=False)
class Imputation(Shown):
    """The missing entries of N data given the observed ones, which all fields repeat.

    Attributes:
        filled: The data with one best guess for each missing entry, ``[N, *shape]``: the mean, or
            the most probable value of a site that has none, such as a categorical one.
        mean: E[x | x_observed], ``[N, *shape]``; NaN where the likelihood has no mean.
        standard_error: The Monte Carlo standard error of that mean, ``[N, *shape]``, 0 where x is
            observed, and NaN for one sample.
        quantiles: The quantiles of p(x | x_observed) for ``levels``, ``[Q, N, *shape]``.
        levels: Which quantiles, from 0 to 1.
        draws: M draws from p(x | x_observed), ``[M, N, *shape]``, joint over a datum's entries: M
            completed data sets, for multiple imputation.
        probabilities: For each site of categories their probabilities, ``[N, ..., C]``.
        mask: True where x is observed, ``[N, *shape]``.
        log_likelihood: log p(x_observed), with its error, ESS and k-hat.
        columns: What the D entries of a datum are called, if that is known.
    """

    filled: Tensor
    mean: Tensor
    standard_error: Tensor
    quantiles: Tensor
    levels: tuple[float, ...]
    draws: Tensor
    probabilities: Values
    mask: Tensor
    log_likelihood: LogLikelihood
    columns: tuple[str, ...] | None = None

    @property
    def ess(self) -> Tensor:
        """The effective sample size out of K, ``[N]``."""
        return self.log_likelihood.ess

    @property
    def khat(self) -> Tensor:
        """The Pareto shape of the weights' tail, ``[N]``; above 0.7 nothing here is reliable."""
        return self.log_likelihood.khat

    def plot(self) -> Figure:
        """Draw the mean, the quantiles and the draws of missing entries; images are filled in."""
        return figures().imputed(self)

    def _told(self) -> Told:
        hidden, ll = int((~self.mask).sum()), self.log_likelihood
        title = f"Imputation of {hidden} of {self.mask.numel()} values of {len(self.mask)} data"
        rows = ll._told().rows
        rows[0] = "log p(x observed)", rows[0][1]
        rows[1] = "effective samples", f"{self.ess.min():.1f} of {ll.num_samples} at least"
        return Told(f"{title}, K = {ll.num_samples}", rows, f"{ll.verdict.kind}: {ll.verdict}")


@takes_data
def impute(
    model: Callable,
    guide: Callable,
    x: Tensor,
    *context: Tensor,
    num_samples: int = 1000,
    num_draws: int = 10,
    quantiles: Sequence[float] | float = (0.05, 0.5, 0.95),
    site: str | None = None,
    columns: Sequence[Any] | None = None,
    max_rows: int | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> Imputation:
    r"""Estimate what is missing of each datum from what is observed of it.

    .. math:: E[h(x_m) \mid x_o] \approx \sum_{k=1}^K \tilde w_k \, E[h(x_m) \mid z_k], \qquad
              w_k = \frac{p(x_o, z_k)}{q(z_k \mid x_o)}, \quad \tilde w_k = \frac{w_k}{\sum_j w_j},
              \quad z_k \sim q(z \mid x_o)

    The draws are x_m ~ p(x_m | z_k) with k ~ Categorical(w̃), the same k for all entries of a
    datum. Both programs get ``(x, *context, mask)``, with possible values where x is missing and
    the mask true where it is observed, and the model has to score the observed entries alone, as
    ``dist.Normal(loc, scale).mask(mask).to_event(1)`` does. Where being missing depends on x, and
    the model observes that, x_m is a latent of both programs, ``site``, and the draws are its own.
    Random numbers are those of :func:`pyrovae.log_likelihood` for the same seed, and with more than
    64 data they depend on a datum's place and not on N.

    Args:
        model: The model program; it observes all of x, at one site or at one site after another,
            unless ``site`` is given.
        guide: The guide program.
        x: Data ``[N, *shape]`` with NaN where they are missing. Or data without NaN, and as the
            last argument of ``context`` a mask of their shape, as ``data.split("test")`` has it.
        context: Further arguments of both programs, ``[N, ...]``.
        num_samples: The number of samples K of each datum.
        num_draws: The number M of completed data sets to return.
        quantiles: Which quantiles to return, from 0 to 1.
        site: A latent of the shape of x that stands for it where it is missing.
        columns: ``data.columns`` or what they are called, for the plot; by default the names of a
            frame's, or of sites that observe a number each.
        max_rows: The largest number of (particle, datum) pairs that the model scores at once.
        seed: Seeds the draws; None draws a seed from torch's global stream.
        progress: Show a bar with an estimate of the time left.

    Returns:
        The missing entries' draws, mean with its error, and quantiles, and log p(x_observed) with
        the effective sample size and k-hat of each datum.

    Raises:
        ValueError: If the pair breaks the contract, NaN stands where the mask says that x is
            observed, the model's score depends on what stands at missing entries, its sites do not
            observe x entry by entry, ``site`` is no such latent, or a log-weight is NaN.

    References:
        Mattei and Frellsen, MIWAE: Deep Generative Modelling and Imputation of Incomplete Data
        (arXiv 1812.02633), equations 11 to 13.

    Example:
        >>> x = data.test.clone()
        >>> x[:, 0, 2:5] = torch.nan
        >>> found = pyrovae.impute(model, guide, x, num_samples=500, seed=0)
        >>> found.draws.shape
        torch.Size([10, 359, 1, 8, 8])
    """
    at_least({"num_samples": 1, "num_draws": 0}, num_samples, num_draws)
    levels = tuple(map(float, [quantiles] if isinstance(quantiles, float | int) else quantiles))
    if not all(0 <= level <= 1 for level in levels):
        raise InputError(f"Expected quantiles between 0 and 1, got {list(levels)}.")
    require_rows((x, *context))
    rows, points = _masked(x, context), curve_points(num_samples)
    task = Evaluation(model, guide, rows, seed, max_rows)
    with task.opened():
        with seeded(task.seed, task.device, 0, PRIOR_STREAM):
            uncovered = uncovered_share(task.pair, task.first)
            sites = _check(task.pair, task.first, site)
        names = _names(x, sites, columns)
        sampler = Sampler(task.pair, task.tile, task.chunk)
        for index, tile in task.tiles(num_samples, progress):
            stream, sums = subseed(task.seed, index), Sums(num_samples, points, tile[0])
            entries = _Entries(task.pair, tile, site)
            for number, start in enumerate(range(0, num_samples, task.tile)):
                particles = min(task.tile, num_samples - start)
                with seeded(stream, task.device, number):
                    values, proposed = sampler.draw(tile)
                    scores = [entries.add(*some) for some in chunked(values, particles, task.chunk)]
                log_weight = torch.cat(scores) - proposed[:particles]
                if bool(log_weight.isnan().any()):
                    refuse_nan({}, entries.scores, index * DATA_TILE)
                sums.add(log_weight)
                entries.log_weight.append(log_weight)
                task.tick(particles)
            with seeded(stream, task.device, num_samples):
                task.keep(index, sums.result() | entries.result(num_draws, levels))
        found = task.found()
        told = {name: found.pop(name) for name in [*found] if name.startswith((FIELD, SHARES))}
        ll = task.estimate(points, "importance sampling from the guide", uncovered, found)
    return _result(told, x.shape, rows[-1], levels, ll, names)


def _masked(x: Tensor, context: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The programs' arguments: x without NaN, and as the last a mask of what is observed."""
    missing = x.isnan()
    given = context[-1] if context else None
    if given is None or given.dtype != torch.bool or given.shape != x.shape:
        context = (*context, ~missing)
    elif bool((missing & given).any()):
        raise InputError(
            f"Expected NaN only where the mask is false, got {int((missing & given).sum())} where "
            f"it is true: the mask is true where x is observed."
        )
    # What stands there is not scored, but has to be possible: what another datum has, or 1.
    first = (~missing).int().argmax(0, keepdim=True)
    filler = x.gather(0, first).nan_to_num(nan=1.0)
    return torch.where(missing, filler, x), *context


def _names(
    x: Tensor, sites: dict[str, Site], columns: Sequence[Any] | None
) -> tuple[str, ...] | None:
    """What the entries of a datum are called."""
    if columns is None:
        return tuple(sites) if len(sites) == x[0].numel() > 1 else None
    if len(columns) != x[0].numel():
        raise InputError(
            f"Expected columns=data.columns, of each of the {x[0].numel()} entries of a datum, got "
            f"{len(columns)}."
        )
    return tuple(str(getattr(column, "name", column)) for column in columns)


def _check(pair: Pair, rows: tuple, latent: str | None) -> dict[str, Site]:
    """Refuse a model that scores missing entries, or whose sites are not x entry by entry."""
    x, *rest, mask = rows
    values, _ = pair.draw(rows, 1)
    scores, _ = pair.score_model(rows, 1, values)
    # What other rows have there lies within the support, whatever that is.
    for other in (x.roll(1, 0), x.flip(0)):
        mixed, _ = pair.score_model((torch.where(mask, x, other), *rest, mask), 1, values)
        if changed := [name for name in scores if not torch.equal(scores[name], mixed[name])]:
            raise InputError(
                f"Site {changed[0]!r} depends on what stands where x is missing: score the "
                f"observed entries alone, as in dist.Normal(loc, scale).mask(mask).to_event(1)."
            )
    sites = _holding(_trace(pair, rows, 1, values), latent)
    if latent is not None:
        sizes = [site["value"].numel() for site in sites.values() if not site["is_observed"]]
        if sizes != [x.numel()]:
            raise InputError(
                f"Expected site={latent!r} to name a latent of the shape {list(x.shape)} of x, "
                f"which the model draws where x is missing: it does not."
            )
        return sites
    seen = torch.cat([site["value"].reshape(len(x), -1) for site in sites.values()], -1)
    flat, known = x.flatten(1), mask.flatten(1)
    if seen.shape != flat.shape or not torch.equal(seen[known].to(flat.dtype), flat[known]):
        raise InputError(
            f"Expected the sites {list(sites)} to observe the entries of x one after another, as "
            f"x or as x[:, 0], x[:, 1], …, so that it is known which entry is which: they do not."
        )
    return sites


def _trace(pair: Pair, rows: tuple, particles: int, values: Values) -> Trace:
    """The model at K latents of each datum, what it sums over being drawn given the data."""
    if pair.layout.enumerated:
        return pair.trace_summed(values, *rows, particles=particles)
    return pair.trace_given(pair.run_model, rows, particles, Given(values))


def _holding(trace: Trace, latent: str | None) -> dict[str, Site]:
    """The sites whose values are the entries of x: a latent, or all that are observed."""
    if latent is not None:
        return {name: site for name, site in scored(trace) if name == latent}
    return {name: site for name, site in scored(trace) if site["is_observed"]}


class _Entries:
    """What K latents of each datum of a tile say of its missing entries: m of them, ``[K, m]``.

    ``rows`` end with the mask; ``log_weight`` holds the log-weights ``[k, n]`` of the draws that
    were added.
    """

    def __init__(self, pair: Pair, rows: tuple, latent: str | None = None) -> None:
        self.pair, self.rows, self.latent = pair, rows, latent
        self.row, self.entry = (~rows[-1].flatten(1)).nonzero().unbind(1)
        self.scores: Values = {}
        self.log_weight: list[Tensor] = []
        self._draws: list[Tensor] = []
        self._means: list[Tensor] = []
        self._shares: dict[str, list[Tensor]] = {}
        self._supports: dict[str, tuple[int, Tensor]] = {}

    def add(self, particles: int, values: Values) -> Tensor:
        """Draw what is missing at K latents of each datum; ln p(x_observed, z), ``[K, N]``."""
        trace = _trace(self.pair, self.rows, particles, values)
        n, draws, means, width = len(self.rows[0]), [], [], 0
        for name, site in _holding(trace, self.latent).items():
            fn, drawn = site["fn"], site["value"]
            if site["is_observed"]:
                drawn, mean = fn.sample(), _mean(fn)
            else:
                mean = drawn  # the weights are of this draw, and not of all that z may bring
            draws.append(drawn.reshape(particles, n, -1).to(self.rows[0].dtype))
            if mean is None:
                self._add_shares(name, base_of(fn), width)
            else:
                mean = mean.reshape(particles, n, -1)
            means.append(torch.full_like(draws[-1], torch.nan) if mean is None else mean)
            width += draws[-1].shape[-1]
        self._draws.append(torch.cat(draws, -1)[:, self.row, self.entry])
        self._means.append(torch.cat(means, -1)[:, self.row, self.entry])
        if self.pair.layout.enumerated:
            self.scores, _ = self.pair.score_model(self.rows, particles, values)
        else:
            self.scores = site_scores(trace, self.pair.layout, particles, n)
        zero = self.rows[0].new_zeros(particles, n, dtype=torch.float64)
        return total(self.scores.values(), zero)

    def result(self, num_draws: int, levels: tuple[float, ...]) -> Found:
        """Fields of :class:`Imputation`, the data first, their entries ``[D]`` last."""
        weight = torch.cat(self.log_weight).softmax(0)
        # Where all weights are zero nothing is known, and ESS and k-hat say so.
        weight = weight.nan_to_num(nan=1 / len(weight)).to(self.rows[0].dtype)
        draws, means = torch.cat(self._draws), torch.cat(self._means)
        size = max(1, SORTED_AT_ONCE // len(weight))
        parts = [
            self._summarize(x, mean, weight[:, row], levels)
            for x, mean, row in zip(
                *(t.split(size, -1) for t in (draws, means, self.row)), strict=True
            )
        ]
        mean, error, quantiles = (torch.cat(each, -1) for each in zip(*parts, strict=True))
        shares = {
            name: torch.einsum("kn,kn...->n...", weight, torch.cat(parts))
            for name, parts in self._shares.items()
        }
        filled = self._dense(torch.where(mean.isnan(), quantiles[-1], mean)[None])[:, 0]
        for name, (start, support) in self._supports.items():
            best = support[shares[name].argmax(-1)].to(filled.dtype)
            part = slice(start, start + best.shape[1])
            known = self.rows[-1].flatten(1)[:, part]
            filled[:, part] = torch.where(known, filled[:, part], best)
        chosen = weight.mT.multinomial(max(num_draws, 1), replacement=True)[:, :num_draws]
        fields = {
            "filled": filled,
            "mean": self._dense(mean[None])[:, 0],
            "standard_error": self._dense(error[None], observed=0.0)[:, 0],
            "quantiles": self._dense(quantiles[:-1]),
            "draws": self._dense(draws.gather(0, chosen[self.row].mT)),
        }
        named = {f"{FIELD}{name}": value for name, value in fields.items()}
        return named | {f"{SHARES}{name}": share for name, share in shares.items()}

    def _add_shares(self, name: str, base: Any, start: int) -> None:
        """The probabilities ``[k, n, ..., C]`` of the values of a site that has no mean."""
        if not base.has_enumerate_support or base.event_shape:
            return
        support = base.enumerate_support(expand=False)
        shares = base.log_prob(support).exp().movedim(0, -1)
        shape = (*shares.shape[:2], -1, len(support))
        self._shares.setdefault(name, []).append(shares.reshape(shape))
        self._supports[name] = start, support.reshape(-1)

    def _summarize(
        self, x: Tensor, mean: Tensor, weight: Tensor, levels: tuple[float, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Means ``[m]``, their errors, and quantiles ``[Q + 1, m]``, the last of them the median.

        The error is the delta method's of a ratio of means, sum of w̃² (E[x | z] - mean)².
        """
        middle = (weight * mean).sum(0)
        error = (weight * (mean - middle)).square().sum(0).sqrt()
        error = error if len(x) > 1 else error.fill_(torch.nan)
        x, order = x.sort(0)
        below = weight.gather(0, order).cumsum(0)
        asked = torch.tensor([*levels, 0.5]).to(below) * below[-1:].mT
        at = torch.searchsorted(below.mT.contiguous(), asked).clamp(max=len(x) - 1)
        return middle, error, x.mT.gather(1, at).mT

    def _dense(self, values: Tensor, observed: float | None = None) -> Tensor:
        """Values ``[M, m]`` of missing entries among those of all, ``[n, M, D]``."""
        flat = self.rows[0].flatten(1)
        full = flat if observed is None else torch.full_like(flat, observed)
        full = full[:, None].repeat(1, len(values), 1)
        full[self.row, :, self.entry] = values.mT
        return full


def _mean(fn: Any) -> Tensor | None:
    """The mean of a distribution; None if it has none, as a categorical one."""
    try:
        mean = fn.mean
    except NotImplementedError:
        return None
    return None if bool(mean.isnan().any()) else mean


def _result(
    found: Found,
    shape: torch.Size,
    mask: Tensor,
    levels: tuple[float, ...],
    ll: LogLikelihood,
    columns: tuple[str, ...] | None,
) -> Imputation:
    fields: dict[str, Any] = {
        n.removeprefix(FIELD): v for n, v in found.items() if n.startswith(FIELD)
    }
    for name in ("quantiles", "draws"):
        fields[name] = fields[name].movedim(1, 0)
    shares = {n.removeprefix(SHARES): v for n, v in found.items() if n.startswith(SHARES)}
    return Imputation(
        **{n: v.reshape(*v.shape[:-2], *shape) for n, v in fields.items()},
        levels=levels,
        probabilities={name: value.squeeze(1) for name, value in shares.items()},
        mask=mask.to(ll.log_prob.device),
        log_likelihood=ll,
        columns=columns,
    )
