"""The rate and the gap to log p(x), each in its two parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae._tools import InputError, at_least, standard_error
from pyrovae._tools.seeding import seeded
from pyrovae.diagnostics.units import by_datum, unmasked
from pyrovae.evidence.importance import log_likelihood
from pyrovae.evidence.proposals import Proposal, guide_density, joint_density, require_scorable
from pyrovae.evidence.result import LogLikelihood
from pyrovae.evidence.tiles import Evaluation
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import Values, samples

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
    with Evaluation(model, guide, (x, *context), seed).opened() as task:
        return mix(task, num_draws)


def mix(
    task: Evaluation, num_draws: int, tick: Callable[[int], Any] = lambda count: None
) -> Aggregate:
    """What :func:`aggregate_posterior` computes; ``tick`` hears how many draws are finished."""
    pair, rows, device = task.pair, task.rows, task.device
    num_data, parts = len(rows[0]), []
    with seeded(task.seed, device, 0, STREAM):
        require_scorable(pair, tuple(tensor[:DATA] for tensor in rows), UNKNOWN)
        axes = _axes(pair, rows)
    with seeded(task.seed, device, 1, STREAM):
        chosen = torch.randperm(num_data)[:num_draws].to(device)
        each = max(1, num_draws // num_data)
        together = max(1, (PAIRS if device.type == "cpu" else ON_DEVICE) // DATA // each)
        for index in chosen.split(together):
            own, prior, others = _score(pair, rows, index, each, axes)
            mixture = torch.logaddexp(own, others) - math.log(num_data)
            least = own - others + math.log(max(num_data - 1, 1))
            parts.append([f.mean(0) for f in (own - mixture, mixture - prior, least)])
            tick(len(index) * each)
    found = [torch.cat(part) for part in zip(*parts, strict=True)]
    information, marginal, upper = (part.mean().item() for part in found)
    errors = [standard_error(part).item() for part in found]
    upper = upper if math.isfinite(upper) else math.nan
    return Aggregate(information, errors[0], marginal, errors[1], upper, num_data)


def _score(
    pair: Pair, rows: tuple, index: Tensor, each: int, axes: dict[str, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """ln q of draws under their own datum, ln p(z), and ln Σ q over the other data, ``[K, n]``."""
    own_rows = tuple(tensor[index] for tensor in rows)
    values, own = Proposal(pair).draw(own_rows, each)
    prior = joint_density(pair, own_rows, each, values).prior
    others = torch.full_like(own, -math.inf).flatten()
    mine, number = index.repeat(each)[:, None], torch.arange(len(rows[0]), device=index.device)
    for column, *tile in _tiles((number, *rows)):
        spread = _spread(values, axes, len(column))
        found = guide_density(pair, tuple(tile), len(mine), spread)
        found = found.masked_fill(column == mine, -math.inf)
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
    """Where the batch lies in each latent's value, counted from the right."""
    axes: dict[str, int] = {}
    first: dict[str, Tensor] = {}
    for tile in _tiles(rows):
        sites = samples(pair.trace_guide(*tile, particles=1))
        for name in pair.known.latents:
            events = sites[name]["fn"].event_dim
            axes[name] = pair.known.dim - events
            seen = by_datum(unmasked(sites[name]), events, pair.known, (1, len(tile[0])))[0]
            if bool((seen != first.setdefault(name, seen[:1])).any()):
                raise InputError(
                    f"Latent {name!r} is masked for some data and not for others, so that "
                    f"{UNKNOWN}: take data that are alike in that, such as all labelled or all "
                    f"unlabelled."
                )
    return axes


def _tiles(rows: tuple) -> Iterator[tuple]:
    return zip(*(tensor.split(DATA) for tensor in rows), strict=True)


@dataclass(frozen=True)
class Gaps:
    r"""The gap between log p(x) and the ELBO in two parts, ``[N]`` each, in nats.

    .. math:: \ln p(x) - \mathcal{L}(q) = \underbrace{\ln p(x) - \mathcal{L}(q^*_x)}
              _{\text{approximation}} + \underbrace{\mathcal{L}(q^*_x) - \mathcal{L}(q)}
              _{\text{amortization}}

    Attributes:
        amortization: The gain of a normal of independent coordinates fitted to each datum over
            the guide; negative where the guide is richer than such a normal.
        approximation: What such a normal still lacks; too small by as much as log p(x) is.
        log_prob: The estimate of log p(x) used.
    """

    amortization: Tensor
    approximation: Tensor
    log_prob: LogLikelihood

    @property
    def total(self) -> Tensor:
        """Both together: log p(x) − ELBO, ``[N]``."""
        return self.amortization + self.approximation

    @property
    def amortization_mean(self) -> float:
        """The mean over data, in nats."""
        return self.amortization.double().mean().item()

    @property
    def amortization_standard_error(self) -> float:
        """The standard error of that mean over data."""
        return standard_error(self.amortization.double()).item()

    @property
    def approximation_mean(self) -> float:
        """The mean over data, in nats."""
        return self.approximation.double().mean().item()

    @property
    def approximation_standard_error(self) -> float:
        """The standard error of that mean over data."""
        return standard_error(self.approximation.double()).item()

    @property
    def verdict(self) -> str:
        """In words: how large both gaps are, and how far log p(x) can be trusted."""
        mean, error = self.amortization_mean, self.amortization_standard_error
        part = f"{mean:.3g} ± {error:.2g} because the guide is amortized"
        if mean < -2 * error:
            part = f"{mean:.3g} ± {error:.2g} as the guide is richer than that normal"
        return (
            f"The ELBO is {self.total.double().mean():.3g} nats below log p(x): {part}, "
            f"{self.approximation_mean:.3g} ± "
            f"{self.approximation_standard_error:.2g} because a normal of independent coordinates "
            f"is not the posterior. {self.log_prob.verdict}"
        )


def inference_gaps(
    model: Callable,
    guide: Callable,
    x: Tensor,
    *context: Tensor,
    refine_steps: int = 200,
    num_samples: int = 1000,
    log_prob: LogLikelihood | None = None,
    seed: int | None = None,
) -> Gaps:
    r"""How far the ELBO lies below log p(x), and why.

    .. math:: q^*_x = \arg\max_{q \in \mathcal{Q}} \mathcal{L}(q; x), \qquad
              \mathcal{Q} = \{\mathcal{N}(m, \mathrm{diag}\, s^2)\}

    Args:
        model: The model program.
        guide: The guide program, of continuous latents.
        x: Data ``[N, ...]``; ``context`` are further arguments of both programs, ``[N, ...]``.
        refine_steps: The number of optimizer steps for each datum, from the guide's moments.
        num_samples: The number of samples K of the refined normal, for its ELBO and for log p(x).
        log_prob: A better estimate of log p(x) of the same data, such as one of
            :func:`pyrovae.annealed_log_likelihood`; by default importance sampling from the
            refined normal.
        seed: Seeds the draws; None draws a seed from torch's global stream.

    Raises:
        ValueError: If a latent is discrete, ``refine_steps`` is not positive, or ``log_prob`` is
            of other data.

    References:
        Cremer et al., Inference Suboptimality in Variational Autoencoders (arXiv 1801.03558).
    """
    at_least({"refine_steps": 1}, refine_steps)
    refined = log_likelihood(
        model, guide, x, *context, num_samples=num_samples, refine_steps=refine_steps, seed=seed
    )
    best = refined if log_prob is None else log_prob
    if len(best.log_prob) != len(x) or (best.data and best.data != refined.data):
        raise InputError(
            f"Expected log p(x) of the same {len(x)} data, got one of {len(best.log_prob)}"
            f"{' that differ' if len(best.log_prob) == len(x) else ''}: estimate it on the x and "
            f"context given here, binarized once."
        )
    amortization: Any = refined.amortization_gap  # Known, as the guide was refined.
    bound = amortization + refined.guide_elbo
    return Gaps(amortization, best.log_prob.to(bound) - bound, best)
