"""log p(x) of each datum by importance sampling, with a stated error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from pyrovae._tools import InputError, at_least, should_compile
from pyrovae._tools.seeding import seeded, subseed
from pyrovae.data.given import takes_data
from pyrovae.evidence import PRIOR_STREAM
from pyrovae.evidence.proposals import (
    Proposal,
    Sampler,
    require_density,
    require_scorable,
    uncovered_share,
)
from pyrovae.evidence.result import LogLikelihood
from pyrovae.evidence.tiles import DATA_TILE, Evaluation, Found
from pyrovae.evidence.unconstrained import Refined
from pyrovae.evidence.weights import Sums, curve_points

# Compiling takes some 20 seconds, in which a small pair is done with so many weights.
PAYS_AFTER = 5_000_000


@takes_data
def log_likelihood(
    model: Callable,
    guide: Callable,
    x: Tensor,
    *context: Tensor,
    num_samples: int = 1000,
    curve: Sequence[int] = (),
    defensive: float = 0.0,
    refine_steps: int = 0,
    max_rows: int | None = None,
    seed: int | None = None,
    compile: bool | str = "auto",
    precision: str = "float32",
    checkpoint: str | Path | None = None,
    processes: bool = False,
    progress: bool = False,
) -> LogLikelihood:
    r"""Estimate log p(x) of each datum by importance sampling from its guide.

    .. math:: \ln \hat p(x) = \ln \frac1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k \mid x)},
              \qquad z_k \sim q(z \mid x)

    Sums are streamed in float64 over tiles of 64 data and some thousand draws, each with a random
    stream of its own, so that the memory of a tile depends on neither N nor K. Of all weights the
    3√K largest of each datum are kept, for k-hat. Draws do not depend on ``max_rows``, those for
    fewer samples are the first of those for more, and with more than 64 data a datum's draws depend
    on its place and not on N. Scales (:func:`pyro.poutine.scale`) are ignored.

    Args:
        model: The model program.
        guide: The guide program.
        x: Data ``[N, ...]``; ``context`` are further arguments of both programs, ``[N, ...]``.
        num_samples: The number of samples K of each datum.
        curve: The numbers of samples, up to K, to report the bound for in ``.curve``; by default
            1, 10, 100, ….
        defensive: The share α of the prior in the proposal (1 − α) q(z|x) + α p(z), which bounds
            the weights by p(x|z) / α; 0 takes the guide alone.
        refine_steps: Before sampling, fit a normal of independent coordinates to each datum's
            posterior by so many steps from the guide's moments, and take that as the proposal;
            the result then has an ``amortization_gap``. For continuous latents.
        max_rows: The largest number of (particle, datum) pairs that the model scores at once;
            it bounds memory, and less than 64 counts as 64. None is 2,048 on a CPU, for each
            thread, and 65,536 elsewhere.
        seed: Seeds the draws; None draws a seed from torch's global stream, or goes on with that
            of the checkpoint.
        compile: Compile draws and weights: True, False, or ``"auto"``, from five million N K on.
        precision: Of matrix products, as for :func:`pyrovae.fit`. ``"bf16"`` moves log p(x) of an
            image by some hundredths of a nat; what the device does not round is refused.
        checkpoint: A file to keep finished data in; with the same file, an evaluation that was
            stopped goes on and ends as if it had not been.
        processes: Share the data among the processes of :mod:`torch.distributed`, each of which
            calls this and gets the whole result.
        progress: Show a bar with an estimate of the time left.

    Returns:
        Nats per datum, with standard errors, effective sample sizes, Pareto shapes and a verdict.

    Raises:
        ValueError: If K is not positive, x is empty or impossible, the pair breaks the contract, no
            datum has a log p(x) of its own, a log-weight is NaN (the message names the site and
            the datum), the device has no such precision, or the checkpoint is of another one.

    References:
        Burda et al., Importance Weighted Autoencoders (arXiv 1509.00519), equation 8; Vehtari et
        al., Pareto Smoothed Importance Sampling (arXiv 1507.02646), for k-hat.

    Example:
        >>> ll = pyrovae.log_likelihood(model, guide, data.test, num_samples=1000, seed=0)
        >>> print(f"{ll.mean:.1f} ± {ll.mean_standard_error:.3f} nats per datum. {ll.verdict}")
        -2... ± 0.00... nats per datum. k-hat is at most 0.7 for all 359 data...: ...
    """
    at_least({"num_samples": 1, "refine_steps": 0}, num_samples, refine_steps)
    if not 0 <= defensive < 1:
        raise InputError(f"Expected 0 <= defensive < 1, got {defensive}.")
    points = curve_points(num_samples, curve)
    compiled = should_compile(compile, len(x) * num_samples >= PAYS_AFTER)
    options = {"method": "importance sampling", "num_samples": num_samples, "curve": points}
    options |= {"defensive": defensive, "refine_steps": refine_steps, "compiled": compiled}
    task = Evaluation(model, guide, (x, *context), seed, max_rows, checkpoint, processes, precision)
    with task.opened():
        with seeded(task.seed, task.device, 0, PRIOR_STREAM):
            proposal, uncovered = _proposal(task, defensive, refine_steps)
        sampler = Sampler(task.pair, task.tile, task.chunk, proposal, defensive, compiled)

        def find(index: int, rows: tuple) -> Found:
            # A stream for each tile, drawn in full, whatever max_rows and the numbers of both are.
            stream = subseed(task.seed, index)
            about, sums = sampler.prepare(rows, stream), Sums(num_samples, points, rows[0])
            for number, start in enumerate(range(0, num_samples, task.tile)):
                drawn = seeded(stream, task.device, number)
                particles = min(task.tile, num_samples - start)
                prior, likelihood, proposed = sampler.weigh(rows, particles, drawn)
                log_weight = prior + likelihood - proposed
                if bool(log_weight.isnan().any()):
                    sampler.refuse_nan(rows, subseed(stream, number), index * DATA_TILE)
                sums.add(log_weight)
                task.tick(particles)
            return sums.result() | about

        task.each(find, sampler.ready if compiled else None, num_samples, progress, **options)
        return task.estimate(points, _method(defensive, refine_steps, precision), uncovered)


def _proposal(
    task: Evaluation, defensive: float, refine_steps: int
) -> tuple[Proposal | None, float]:
    """What to draw from in place of the guide, and which share of the prior the guide misses.

    A guide without a density is refused, and one that cannot score what the prior draws.
    """
    pair, rows = task.pair, task.first
    if not (defensive or refine_steps):
        return None, uncovered_share(pair, rows)
    require_density(pair.known)
    if refine_steps:
        return Refined(pair, rows, refine_steps, task.chunk), 0.0
    require_scorable(pair, rows, "leave out defensive")
    return None, 0.0


def _method(defensive: float, refine_steps: int, precision: str) -> str:
    base = "the guide refined for each datum" if refine_steps else "the guide"
    mixed = f" and, for {defensive:.0%} of the draws, the prior" if defensive else ""
    rounded = "" if precision == "float32" else f", with {precision} products"
    return f"importance sampling from {base}{mixed}{rounded}"
