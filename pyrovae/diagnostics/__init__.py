"""What the posterior does: rate and distortion, active units, information, calibration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions.constraints import MixtureSameFamilyConstraint, independent

from pyrovae._tools import InputError, at_least, progress_bar, standard_error
from pyrovae._tools.seeding import seeded, subseed
from pyrovae.data.given import takes_data
from pyrovae.diagnostics.aggregate import Aggregate, Gaps, aggregate_posterior, inference_gaps, mix
from pyrovae.diagnostics.calibration import (
    Calibration,
    Probe,
    fit_probe,
    interval_coverage,
    is_probable,
)
from pyrovae.diagnostics.result import ACTIVE, Diagnosis, SiteDiagnosis
from pyrovae.diagnostics.simulation import PosteriorCalibration, calibrate
from pyrovae.diagnostics.units import SitePosterior, examine, unmasked
from pyrovae.evidence.tiles import Evaluation
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import is_bookkeeping, samples

__all__ = [
    "Aggregate",
    "Calibration",
    "Diagnosis",
    "Gaps",
    "PosteriorCalibration",
    "Probe",
    "SiteDiagnosis",
    "aggregate_posterior",
    "calibrate",
    "diagnose",
    "inference_gaps",
]

# How many draws are examined at once, over data and particles.
ROWS = 2048
# The coverage over a thousand data points is known to 0.016 or better, less than what is called
# a miss.
CALIBRATED = 1000
# Each draw of the aggregate posterior is scored for all N data: PAIRS bounds that work, and at
# least 256 draws keep the error of the information near a tenth of a nat.
MOST_DRAWS, LEAST_DRAWS, PAIRS = 1024, 256, 2**22
# Each stage has a random stream of its own, so that leaving one out does not change the others.
DRAW_STREAM, CHOICE_STREAM, INTERVAL_STREAM, PROBE_STREAM = 7, 8, 9, 10


@takes_data
def diagnose(
    model: Callable,
    guide: Callable,
    x: Tensor,
    *context: Tensor,
    labels: Any = None,
    num_samples: int = 16,
    intervals: bool = True,
    seed: int | None = None,
    progress: bool = False,
) -> Diagnosis:
    r"""Measure what the posterior of a pair does with its latents.

    .. math:: -\mathcal{L} = \underbrace{E_q[\ln q(z|x) - \ln p(z)]}_{\text{rate}}
              + \underbrace{-E_q[\ln p(x|z)]}_{\text{distortion}}, \qquad
              \overline{\text{rate}} = I(n; z) + \mathrm{KL}(q(z) \| p(z))

    Rate, distortion and ELBO come from the same draws. A unit is active if the variance over data
    of its posterior mean is above 0.01. Latents that the model alone has are summed out, and
    belong to no site here.

    Args:
        model: The model program.
        guide: The guide program.
        x: Data ``[N, ...]``, two at least; ``context`` are further arguments of both programs.
        labels: Classes ``[N]``, to fit classifiers to the posterior means of each site.
        num_samples: The number of draws for each datum behind rate and distortion, at least two.
        intervals: Measure the coverage of the likelihood's intervals, on 1,000 of the data.
        seed: Seeds the draws; None draws a seed from torch's global stream.
        progress: Show a bar.

    Returns:
        Everything in nats, with a verdict in words.

    Raises:
        ValueError: If there are fewer than two data points, labels of another number,
            ``num_samples`` is below two, or the pair breaks the contract.

    References:
        Alemi et al., Fixing a Broken ELBO (arXiv 1711.00464), for rate and distortion; Burda et
        al. (arXiv 1509.00519), section 5.2, for active units; Hoffman and Johnson, ELBO surgery
        (NIPS 2016 workshop).

    Example:
        >>> found = pyrovae.diagnose(model, guide, data.test, labels=data.labels.test, seed=0)
        >>> print(found.verdict)
        4 of 4 units are active: ... Of the rate of ... nats, ...
    """
    if len(x) < 2:
        raise InputError(
            f"Expected at least two data points, got {len(x)}: diagnose more of them together."
        )
    at_least({"num_samples": 2}, num_samples)
    labels = None if labels is None else torch.as_tensor(labels)
    if labels is not None and len(labels) != len(x):
        raise InputError(f"Expected a label for each of {len(x)} data points, got {len(labels)}.")
    total = len(x) + _draws(len(x))
    with (
        Evaluation(model, guide, (x, *context), seed).opened() as task,
        progress_bar((), enabled=progress, total=total, desc="diagnosis") as bar,
    ):
        rate, distortion, sites = _examine(task, num_samples, bar.update)
        aggregate, remarks = _aggregate(task, bar.update)
        with seeded(task.seed, task.device, 0, INTERVAL_STREAM):
            calibration = None
            if intervals:
                chosen = torch.randperm(len(x))[:CALIBRATED].to(task.device)
                calibration = interval_coverage(
                    task.pair, tuple(rows[chosen] for rows in task.rows)
                )
            dimensions = _eight_bit_dimensions(task.pair, task.first)
    probe = None
    if labels is not None and not is_probable(labels):
        remarks += (
            "Probing needs at least ten integer labels of two or more classes: nothing was probed.",
        )
    elif labels is not None:
        seed = subseed(task.seed, 0, PROBE_STREAM)
        probe = {name: fit_probe(site.mean, labels, seed) for name, site in sites.items()}
    bits = (rate + distortion).double().mean().item() / (dimensions * math.log(2))
    return Diagnosis(
        num_data=len(x),
        rate=rate.to(task.home),
        distortion=distortion.to(task.home),
        sites={name: _site(site, task.home) for name, site in sites.items()},
        aggregate=aggregate,
        calibration=calibration,
        probe=probe,
        bits_per_dimension=bits if math.isfinite(bits) else None,
        remarks=remarks,
    )


def _examine(
    task: Evaluation, particles: int, tick: Callable[[int], Any]
) -> tuple[Tensor, Tensor, dict[str, SitePosterior]]:
    """:func:`pyrovae.diagnostics.units.examine` of all data, a tile at a time."""
    parts, size = [], max(1, ROWS // particles)
    with seeded(task.seed, task.device, 0, DRAW_STREAM):
        for rows in zip(*(tensor.split(size) for tensor in task.rows), strict=True):
            parts.append(examine(task.pair, rows, particles))
            tick(len(rows[0]))
    rate, distortion, sites = zip(*parts, strict=True)
    joined = {}
    for name in task.pair.known.latents:
        *tensors, factorized, width = zip(*(site[name] for site in sites), strict=True)
        joined[name] = SitePosterior._make([*map(torch.cat, tensors), factorized[0], width[0]])
    return torch.cat(rate), torch.cat(distortion), joined


def _site(site: SitePosterior, home: torch.device) -> SiteDiagnosis:
    """The variance of noisy means, less what the noise adds to it."""
    kl, mean, noise = (each.double().to(home) for each in (site.kl, site.mean, site.noise))
    used = site.used.to(home)
    count, rest = used.sum(0), torch.where(used, mean, 0.0)
    rest = torch.where(used, mean - rest.sum(0) / count, 0.0)
    variance = rest.square().sum(0) / (count - 1) - torch.where(used, noise, 0.0).sum(0) / count
    variance = torch.where(count > 1, variance, 0.0).clamp(min=0)
    variance = variance.reshape(-1, site.width).sum(-1)
    error = standard_error(kl)
    return SiteDiagnosis(kl.mean(0), error, variance, variance > ACTIVE, site.factorized)


def _aggregate(
    task: Evaluation, tick: Callable[[int], Any]
) -> tuple[Aggregate | None, tuple[str, ...]]:
    if not task.pair.known.latents:
        return None, ()
    try:
        return mix(task, _draws(len(task.rows[0])), tick), ()
    except InputError as error:
        return None, (str(error),)


def _draws(num_data: int) -> int:
    """How many draws to score for all data, as many for each where there are few data."""
    draws = min(max(PAIRS // num_data, LEAST_DRAWS), MOST_DRAWS)
    return draws // min(num_data, draws) * min(num_data, draws)


def _eight_bit_dimensions(pair: Pair, rows: tuple) -> float:
    """How many values the one observed site has, if each is one of 256 levels; NaN if not."""
    sites = samples(pair.trace_posterior(*rows)).values()
    seen = [site for site in sites if site["is_observed"]]
    if len(seen) != 1 or is_bookkeeping(seen[0]) or not bool(unmasked(seen[0]).all()):
        return math.nan
    support = seen[0]["fn"].support
    while isinstance(support, independent | MixtureSameFamilyConstraint):
        support = support.base_constraint
    levels = getattr(support, "levels", 0)
    # A multinomial's support has a bound of its sum alone.
    if support.is_discrete and hasattr(support, "upper_bound") and hasattr(support, "lower_bound"):
        levels = support.upper_bound - support.lower_bound + 1
    if not bool((torch.as_tensor(levels) == 256).all()):
        return math.nan
    return seen[0]["scale"] * seen[0]["value"].numel() / len(rows[0])
