"""The aggregate posterior: how much of the rate is information, and how much misfit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae._tools import InputError, standard_error
from pyrovae._tools.seeding import seeded, subseed
from pyrovae.evidence.proposals import guide_density, joint_density, require_scorable, total
from pyrovae.evidence.tiles import opened
from pyrovae.pairs.pair import Given, Pair
from pyrovae.pairs.traces import Values, samples

__all__ = ["Aggregate", "aggregate_posterior", "mix"]

# How many pairs of a draw and a datum are scored at once; a GPU takes more to be busy.
PAIRS, ON_DEVICE = 2**16, 2**19
# How many data score a draw at once.
DATA = 512
STREAM = 6
UNKNOWN = "its aggregate posterior is not known, and neither is the information in z"


class Aggregate(NamedTuple):
    r"""The two parts of the rate, in nats: information about the data, and the misfit to the prior.

    Attributes:
        mutual_information: I(n; z) between a latent and which of the N data it was drawn for, at
            most ln N; in expectation no more than I(x; z) of the data's source.
        standard_error: Its standard error over data and draws.
        marginal_kl: :math:`\mathrm{KL}(q(z) \| p(z))`.
        marginal_kl_error: Its standard error.
        upper: The same information with a datum's own posterior left out of the mixture; in
            expectation no less than I(x; z). NaN for a single datum.
        num_data: N.
    """

    mutual_information: float
    standard_error: float
    marginal_kl: float
    marginal_kl_error: float
    upper: float
    num_data: int

    @property
    def capped(self) -> bool:
        """Whether the information is within a nat of ln N, the most that N data can show."""
        return self.mutual_information > math.log(self.num_data) - 1


def aggregate_posterior(
    model: Callable,
    guide: Callable,
    x: Tensor,
    *context: Tensor,
    num_draws: int = 1024,
    seed: int | None = None,
) -> Aggregate:
    r"""Split the rate into information about the data and the distance to the prior.

    .. math:: \frac1N \sum_n \mathrm{KL}(q(z|x_n) \| p(z)) = I(n; z) + \mathrm{KL}(q(z) \| p(z)),
              \qquad q(z) = \frac1N \sum_n q(z \mid x_n)

    z are all latents of the guide together. Where the prior depends on the context, the second
    part is :math:`E[\ln q(z) - \ln p(z|c)]`, and the first the information about data and context.

    Args:
        model: The model program.
        guide: The guide program.
        x: Data ``[N, ...]``; ``context`` are further arguments of both programs, ``[N, ...]``.
        num_draws: How many draws are averaged; each is scored for all N data.
        seed: Seeds the draws; None draws a seed from torch's global stream.

    Raises:
        ValueError: If the guide cannot score latents that it drew for another datum, or samples a
            latent for some data and not for others.

    References:
        Hoffman and Johnson, ELBO surgery: yet another way to carve up the variational evidence
        lower bound (NIPS 2016 workshop); Poole et al., On Variational Bounds of Mutual Information
        (arXiv 1905.06922), section 2, for the two bounds.
    """
    with opened(model, guide, (x, *context), seed=seed) as task:
        return mix(task.pair, task.rows, num_draws, task.seed)


def mix(
    pair: Pair,
    rows: tuple,
    num_draws: int,
    seed: int,
    tick: Callable[[int], Any] = lambda count: None,
) -> Aggregate:
    """What :func:`aggregate_posterior` computes, for a pair that has been opened.

    Args:
        pair: The pair, inspected.
        rows: Data ``[N, ...]`` with further arguments of both programs.
        num_draws: How many draws are averaged.
        seed: Seeds the draws.
        tick: Called with the number of draws finished.
    """
    num_data, device = len(rows[0]), rows[0].device
    information, marginal, upper = [], [], []
    with seeded(subseed(seed, 0, STREAM), device):
        require_scorable(pair, tuple(tensor[:DATA] for tensor in rows), UNKNOWN)
        axes = _axes(pair, rows)
    with seeded(subseed(seed, 1, STREAM), device):
        chosen = torch.randperm(num_data)[:num_draws].to(device)
        each = max(1, num_draws // num_data)
        together = max(1, (PAIRS if device.type == "cpu" else ON_DEVICE) // DATA // each)
        for index in chosen.split(together):
            own, prior, others = _score(pair, rows, index, each, axes)
            mixture = torch.logaddexp(own, others) - math.log(num_data)
            information.append((own - mixture).mean(0))
            marginal.append((mixture - prior).mean(0))
            upper.append((own - others + math.log(max(num_data - 1, 1))).mean(0))
            tick(len(index) * each)
    (i, i_error), (m, m_error), (u, _) = map(_average, (information, marginal, upper))
    return Aggregate(i, i_error, m, m_error, u if math.isfinite(u) else math.nan, num_data)


def _score(
    pair: Pair, rows: tuple, index: Tensor, each: int, axes: dict[str, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """ln q of draws under their own datum, ln p(z), and ln Σ q over the other data, ``[K, n]``."""
    own_rows = tuple(tensor[index] for tensor in rows)
    values, scores = pair.draw(own_rows, each)
    zero = torch.zeros(each, len(index), dtype=torch.float64, device=index.device)
    own = total(scores.values(), zero)
    prior = joint_density(pair, own_rows, each, values).prior
    others = torch.full_like(own, -math.inf).flatten()
    mine = index.repeat(each)
    for start in range(0, len(rows[0]), DATA):
        tile = tuple(tensor[start : start + DATA] for tensor in rows)
        spread = _spread(values, axes, len(tile[0]))
        found = guide_density(pair, tile, len(mine), spread)
        column = torch.arange(start, start + len(tile[0]), device=index.device)
        found = found.masked_fill(column == mine[:, None], -math.inf)
        others = torch.logaddexp(others, found.logsumexp(-1))
    return own, prior, others.reshape(own.shape)


def _spread(values: Values, axes: dict[str, int], num_data: int) -> Values:
    """Draws ``[K, ..., n, ...]`` as K n particles of each of N other data."""
    found = {}
    for name, value in values.items():
        flat = value.movedim(axes[name], 1).flatten(0, 1).unsqueeze(1)
        flat = flat.expand(-1, num_data, *flat.shape[2:])
        found[name] = flat.movedim(1, axes[name])
    return found


def _axes(pair: Pair, rows: tuple) -> dict[str, int]:
    """Where the batch lies in each latent's value, counted from the right.

    Raises:
        ValueError: If a latent is masked for some data and not for others.
    """
    axes: dict[str, int] = {}
    seen: dict[str, set[bool]] = {name: set() for name in pair.known.latents}
    for start in range(0, len(rows[0]), DATA):
        tile = tuple(tensor[start : start + DATA] for tensor in rows)
        sites = samples(pair.trace_given(pair.run_guide, tile, 1, Given({})))
        for name, kinds in seen.items():
            site = sites[name]
            axes[name] = pair.known.dim - site["fn"].event_dim
            mask = True if site["mask"] is None else site["mask"]
            kinds.update(torch.as_tensor(mask).unique().tolist())
    for name, kinds in seen.items():
        if len(kinds) > 1:
            raise InputError(
                f"Latent {name!r} is masked for some data and not for others, so that {UNKNOWN}: "
                f"take data that are alike in that, such as all labelled or all unlabelled."
            )
    return axes


def _average(parts: list[Tensor]) -> tuple[float, float]:
    """The mean over data, and its standard error."""
    each = torch.cat(parts)
    return each.mean().item(), standard_error(each).item()
