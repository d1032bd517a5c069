"""log p(x) of each datum, with a stated error."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

from pyrovae.capture import CaptureError, Graph, compare
from pyrovae.contract import inspect_pair
from pyrovae.params import Parameters
from pyrovae.progress import progress_bar
from pyrovae.psis import pareto_khat, tail_length
from pyrovae.seeding import draw_seed, seeded, subseed
from pyrovae.traces import (
    Layout,
    common_scale,
    replay_model,
    site_scores,
    take_particles,
    trace_guide,
    trace_pair,
)

__all__ = ["LogLikelihood", "log_likelihood"]

DATA_TILE, PARTICLE_TILE = 64, 128
PAYS_AFTER = 5_000_000


@dataclass(frozen=True)
class LogLikelihood:
    """An estimate of log p(x) for each of N data, in nats.

    Attributes:
        log_prob: The estimate, ``[N]``; a lower bound in expectation.
        standard_error: Its Monte Carlo standard error by the delta method, ``[N]``; NaN for K = 1.
        ess: The effective sample size out of K, ``[N]``.
        khat: The Pareto shape of the weights' tail, ``[N]``; above 0.7 the error is not to be
            trusted and more samples or a better guide are needed. NaN for K too small to tell.
        num_samples: K.
    """

    log_prob: Tensor
    standard_error: Tensor
    ess: Tensor
    khat: Tensor
    num_samples: int

    @property
    def mean(self) -> float:
        """The mean over data, nats per datum."""
        return self.log_prob.double().mean().item()

    @property
    def mean_standard_error(self) -> float:
        """The Monte Carlo standard error of that mean: these data, other random draws."""
        return (self.standard_error.double().square().sum().sqrt() / len(self.log_prob)).item()

    @property
    def data_standard_error(self) -> float:
        """The standard error of that mean over data: other data from the same source."""
        return (self.log_prob.double().std() / math.sqrt(len(self.log_prob))).item()


@torch.no_grad()
def log_likelihood(
    model: Callable,
    guide: Callable,
    x: Tensor,
    *context: Tensor,
    num_samples: int = 1000,
    max_rows: int = DATA_TILE * PARTICLE_TILE,
    seed: int | None = None,
    compile: bool | str = "auto",
    progress: bool = False,
) -> LogLikelihood:
    r"""Estimate log p(x) of each datum by importance sampling from its guide.

    .. math:: \ln \hat p(x) = \ln \frac1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k \mid x)},
              \qquad z_k \sim q(z \mid x)

    The weights are never kept: sums are streamed in float64 over tiles of 64 data and 128
    particles, each with a random stream of its own, so that memory depends on neither N nor K,
    and the draws do not depend on ``max_rows``.

    Args:
        model: The model program.
        guide: The guide program.
        x: Data ``[N, ...]``; ``context`` are further arguments of both programs, ``[N, ...]``.
        num_samples: The number of samples K of each datum.
        max_rows: The largest number of (particle, datum) pairs that the model scores at once;
            it bounds memory. Less than 64 counts as 64.
        seed: Seeds the draws; None draws a seed from torch's global stream.
        compile: Compile the weights of a tile: True, False, or ``"auto"`` where N K is at least
            five million, so that it pays.
        progress: Show a bar with an estimate of the time left.

    Returns:
        Nats per datum, with standard errors, effective sample sizes and Pareto shapes.

    Raises:
        ValueError: If K is not positive, x is empty, the pair breaks the contract, sites carry
            different scales, or a log-weight is NaN (the message names the site and the datum).

    References:
        Burda et al., Importance Weighted Autoencoders (arXiv 1509.00519), equation 8; Vehtari et
        al., Pareto Smoothed Importance Sampling (arXiv 1507.02646), for k-hat.

    Example:
        >>> ll = pyrovae.log_likelihood(model, guide, data.test, num_samples=1000)
        >>> print(f"{ll.mean:.2f} ± {ll.mean_standard_error:.2f} nats per datum")
    """
    if not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"Expected an integer num_samples >= 1, got {num_samples}.")
    if max_rows < 1:
        raise ValueError(f"Expected max_rows >= 1, got {max_rows}.")
    if compile not in ("auto", True, False):
        raise ValueError(f"Expected compile='auto', True or False, got {compile!r}.")
    if len(x) == 0:
        raise ValueError("Expected at least one datum, got an empty tensor.")
    seed = draw_seed(seed)
    parameters = Parameters(model, guide)
    device = x.device
    x, *context = (tensor.to(parameters.device) for tensor in (x, *context))
    tiles = list(zip(*(tensor.split(DATA_TILE) for tensor in (x, *context)), strict=True))
    results = []
    with parameters.mode(training=False):
        with seeded(seed, x.device):
            layout = inspect_pair(parameters, *tiles[0])
        weights = _Weights(parameters, layout, max_rows)
        if compile is True or (compile == "auto" and len(x) * num_samples >= PAYS_AFTER):
            weights.compile(tiles[0], min(num_samples, PARTICLE_TILE))
        bar = progress_bar(tiles, enabled=progress, desc="log p(x)", unit="tile")
        with pyro.validation_enabled(False):
            for index, rows in enumerate(bar):
                results.append(
                    _stream(weights, rows, DATA_TILE * index, num_samples, subseed(seed, index))
                )
    log_prob, error, ess, khat = (torch.cat(r).to(device) for r in zip(*results, strict=True))
    return LogLikelihood(log_prob, error, ess, khat, num_samples)


def _stream(
    weights: _Weights, rows: tuple, first_row: int, num_samples: int, seed: int
) -> tuple[Tensor, ...]:
    """Sum the weights of a few data, tile by tile of particles."""
    x = rows[0]
    top = x.new_full((len(x),), -math.inf, dtype=torch.float64)
    first, second = torch.zeros_like(top), torch.zeros_like(top)
    keep = tail_length(num_samples) + 1
    tail = top.new_empty(0, len(x))
    for index, start in enumerate(range(0, num_samples, PARTICLE_TILE)):
        particles = min(PARTICLE_TILE, num_samples - start)
        with seeded(subseed(seed, index), x.device):
            log_weight = weights(rows, particles)
        if bool(log_weight.isnan().any()):
            with seeded(subseed(seed, index), x.device):
                weights.refuse_nan(rows, particles, first_row)
        peak = torch.maximum(top, log_weight.amax(0))
        shift = torch.where(peak.isinf(), 0.0, peak)
        decay, weight = (top - shift).exp(), (log_weight - shift).exp()
        first = first * decay + weight.sum(0)
        second = second * decay.square() + weight.square().sum(0)
        top = peak
        tail = torch.cat([tail, log_weight])
        tail = tail.topk(min(keep, len(tail)), dim=0).values
    mean = torch.where(top.isinf(), top, top + (first / num_samples).log())
    ess = (first.square() / second).nan_to_num(nan=0.0)
    error = ((num_samples / ess - 1).clamp(min=0) / (num_samples - 1)).sqrt()
    if num_samples == 1:
        error = torch.full_like(error, math.nan)
    scale = weights.scale(rows)
    khat = pareto_khat(tail.flip(0).T, num_samples)
    return scale * mean, abs(scale) * error, ess, khat


class _Weights:
    """ln p(x, z) − ln q(z | x) of fresh draws, ``[K, N]`` in float64."""

    def __init__(self, parameters: Parameters, layout: Layout, max_rows: int) -> None:
        self.parameters, self.layout, self.max_rows = parameters, layout, max_rows
        self.graph: Graph | None = None
        self.shape: tuple = ()

    def __call__(self, rows: tuple, particles: int) -> Tensor:
        if self.graph is not None and self.shape == (rows[0].shape, particles):
            return self.graph(*rows)[0]
        guide, model = self._scores(rows, particles)
        return sum(s.double() for s in model.values()) - sum(s.double() for s in guide.values())

    def compile(self, rows: tuple, particles: int) -> None:
        """Compile what a full tile takes; where that fails, stay eager and say why."""

        def flat(*rows: Tensor) -> list[Tensor]:
            return [self(rows, particles)]

        try:
            graph = Graph(flat, rows, self.parameters)
            with seeded(0, rows[0].device):
                expected = flat(*rows)[0]
            with seeded(0, rows[0].device):
                compare("a log-weight", graph(*rows)[0], expected)
        except CaptureError as error:
            warnings.warn(f"log p(x) runs eagerly, not compiled: {error}.", stacklevel=3)
            return
        self.graph, self.shape = graph, (rows[0].shape, particles)

    def scale(self, rows: tuple) -> Tensor | float:
        """What the programs' scales multiply each datum's log p(x) by."""
        with seeded(0, rows[0].device):
            return common_scale(trace_pair(self.parameters, *rows), self.layout)

    def refuse_nan(self, rows: tuple, particles: int, first_row: int) -> None:
        """Say which site's log-probability is NaN, and for which datum."""
        guide, model = self._scores(rows, particles)
        for program, scores in (("guide", guide), ("model", model)):
            for name, score in scores.items():
                bad = score.isnan().any(0).nonzero()
                if len(bad):
                    raise ValueError(
                        f"The log-probability of site {name!r} in the {program} is NaN for datum "
                        f"{first_row + bad[0].item()}: look at its parameters there."
                    )
        raise ValueError(
            "A log-weight is infinity minus infinity: a guide's site has no finite log-probability "
            "at its own draw."
        )

    def _scores(self, rows: tuple, particles: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        at = {"particles": particles, "layout": self.layout}
        guide_trace = trace_guide(self.parameters, *rows, **at)
        num_data = len(rows[0])
        step = max(1, self.max_rows // num_data)
        parts = []
        for start in range(0, particles, step):
            part = slice(start, min(start + step, particles))
            at["particles"] = part.stop - part.start
            some = take_particles(guide_trace, part) if step < particles else guide_trace
            model_trace = replay_model(self.parameters, some, *rows, **at)
            parts.append(site_scores(model_trace, self.layout, at["particles"], num_data))
        model = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return site_scores(guide_trace, self.layout, particles, num_data), model
