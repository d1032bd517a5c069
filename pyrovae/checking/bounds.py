"""Whether estimators agree, bounds are bounds, samples are data, and a step can be captured."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyrovae._tools import InputError, standard_error
from pyrovae._tools.seeding import seeded, undone
from pyrovae._tools.source_lines import error_place, failed_message
from pyrovae.checking.case import Case, Row, failed, passed, skipped, warned
from pyrovae.compiling.graph import CaptureError, record
from pyrovae.distributions import divergence
from pyrovae.evidence.importance import log_likelihood
from pyrovae.objectives.elbo import terms_by_datum
from pyrovae.pairs.contract import check_scales, kind_of
from pyrovae.pairs.enumeration import enumerates
from pyrovae.pairs.generation import element_of
from pyrovae.pairs.support import DRAWN
from pyrovae.pairs.traces import samples

# Two averages over the same draws differ by five standard errors about once in two million checks.
ERRORS = 5.0
# What rounding in float32 may add to a difference of ELBOs, in nats.
ROUNDING = 1e-3
# How often a step is repeated: a branch taken by a coin of Python shows within eight with 99%.
TRIES = 8


def reparameterized(case: Case) -> Row:
    """Every latent's draw carries a gradient to the guide's parameters."""
    sites = {name: guide_site for name, (_, guide_site) in case.latents().items()}
    if not sites:
        return skipped("the guide samples nothing")
    pair = case.pair
    with undone(pair.modules, case.rows[0].device), seeded(0), pair.mode(training=True):
        trained = samples(pair.trace_guide(*case.rows))
    rounded = (*DRAWN, dist.OneHotCategoricalStraightThrough)
    if rough := [name for name in sites if isinstance(element_of(trained[name]["fn"]), rounded)]:
        kinds = ", ".join(f"{name} ({kind_of(trained[name]['fn'])})" for name in rough)
        return warned(
            f"{kinds} is drawn straight through: gradients are biased, and a relaxation is scored "
            f"by the density of what was rounded in training, whose loss is no bound then. "
            f"Evaluation scores the mass of what is drawn.",
            *case.where(*rough),
        )
    scored = [name for name, site in sites.items() if not site["fn"].has_rsample]
    kinds = ", ".join(f"{name} ({kind_of(sites[name]['fn'])})" for name in scored)
    if any(not enumerates(sites[name]) for name in scored):
        return warned(
            f"{kinds} has no rsample: trace_elbo uses the score-function gradient, of larger "
            f"variance, and trace_mean_field_elbo refuses. Use more particles, or mark it with "
            f"infer={{'enumerate': 'parallel'}} and train with TraceEnum_ELBO.",
            *case.where(*scored),
        )
    if scored:
        return passed(f"{kinds} summed over by TraceEnum_ELBO, pathwise gradients for the rest")
    return passed(f"{', '.join(sites)}: pathwise gradients")


def analytic_kl(case: Case) -> Row:
    """What TraceMeanField_ELBO needs: the same order of latents, and closed forms."""
    latents = case.latents()
    model, guide = list(latents), [name for name in case.sites["guide"] if name in latents]
    if case.enumerated():
        return skipped(f"{', '.join(case.enumerated())} is summed over, by TraceEnum_ELBO")
    if guide != model:
        return warned(
            f"The model samples {', '.join(model)} and the guide {', '.join(guide)}: in another "
            f"order the analytic KL may be biased, so train with trace_elbo, or reorder the guide.",
            *case.where(*guide),
        )
    closed = []
    for name, (model_site, guide_site) in latents.items():
        with suppress(NotImplementedError):
            divergence(guide_site["fn"], model_site["fn"])
            closed.append(name)
    sampled = ", ".join(name for name in model if name not in closed)
    if not closed:
        return skipped(f"no closed form for {sampled or 'any latent'}, so that it is sampled")
    return passed(f"closed for {', '.join(closed)}{sampled and f'; sampled for {sampled}'}")


def _estimators(case: Case) -> list[Tensor]:
    """Estimators A and B of the ELBO for the same draws, ``[K, N]`` each, in nats."""
    size, pair = (case.particles, len(case.few[0])), case.inspected
    with case.quietly():
        traces = pair.trace(*case.few, particles=case.particles)
        both = [terms_by_datum(pair, traces, size, analytic) for analytic in (False, True)]
        return [torch.stack([*terms.values()]).double().sum(0) for terms in both]


def estimators_agree(case: Case) -> Row:
    """The two estimators of the ELBO have one mean: draws, densities and divergences fit."""
    if analytic_kl(case).status != "passed":
        return skipped("no analytic KL to compare with")
    a, b = _estimators(case)
    gap, error = _mean_and_error((a - b).mean(1))
    text = f"A - B = {gap:.3g} ± {error:.2g} nats per datum"
    if abs(gap) > ERRORS * error + ROUNDING + 1e-5 * a.abs().mean().item():
        return failed(
            f"{text}: the draws of a latent, its log_prob and its kl_divergence do not belong to "
            f"one distribution. Look at the distributions that you wrote.",
            *case.where(*case.latents()),
        )
    return passed(text)


def bounds_are_ordered(case: Case) -> Row:
    """The ELBO, by either estimator, is below the importance-weighted bound."""
    if not case.latents():
        return skipped("the guide samples nothing")
    k, seed = case.particles, case.seed + 1
    programs: Any = case.pair.model, case.pair.guide
    with case.quietly():
        # Reported numbers ignore scales; what is trained, and checked here, does not.
        check_scales(case.inspected.trace(*case.few))
        found = log_likelihood(*programs, *case.few, num_samples=k, seed=seed, compile=False)
    elbos = _estimators(case)[: 1 + (analytic_kl(case).status == "passed")]
    for name, bound in zip("AB", elbos, strict=False):
        elbo, error = _mean_and_error(bound.mean(1))
        slack = ERRORS * (error**2 + found.mean_standard_error**2) ** 0.5 + ROUNDING
        if elbo > found.mean + slack:
            return failed(
                f"The ELBO by estimator {name}, {elbo:.3f} ± {error:.2g}, is above the bound of "
                f"{k} samples, {found.mean:.3f} ± {found.mean_standard_error:.2g} nats per datum."
            )
    return passed(f"ELBO {elbos[0].mean().item():.2f}, IWAE-{k} {found.mean:.2f} nats per datum")


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    return values.mean().item(), standard_error(values).item()


def samples_are_data(case: Case) -> Row:
    """Without its observations the model draws data of their shape, in the support."""
    observed = case.observed()
    if not observed:
        return skipped("the likelihood is a factor, from which nothing can be drawn")
    program = poutine.uncondition(case.pair.run_model)
    other = (case.rows[0].flip(0), *case.rows[1:])
    with case.quietly():
        drawn = samples(poutine.trace(program).get_trace(*case.rows))
    with case.quietly():
        again = samples(poutine.trace(program).get_trace(*other))
    for name in observed:
        fn, value = drawn[name]["fn"], drawn[name]["value"]
        if not bool(fn.support.check(value).all()):
            raise InputError(
                f"Site {name!r} draws values outside its own support: its sample and its support "
                f"do not belong to one distribution."
            )
        if not torch.equal(value, again[name]["value"]):
            return warned(
                f"The draws of site {name!r} depend on the data: the model reads x beside "
                f"observing it, so new data cannot be drawn without old data.",
                *case.where(name),
            )
    count = len(case.rows[0])
    sizes = {name: site["value"].numel() // count for name, site in observed.items()}
    wanted = {row[0].numel() for row in case.rows if isinstance(row, Tensor)}
    if not wanted & {*sizes.values(), sum(sizes.values())}:
        return failed(
            f"The model draws {sizes} numbers per datum and the data have "
            f"{case.rows[0][0].numel()}: observe the data as they are, obs=x.",
            *case.where(*observed),
        )
    shapes = [f"{name} {list(drawn[name]['value'].shape[1:])}" for name in observed]
    return passed(f"{', '.join(shapes)}, in the support")


def capture_is_possible(case: Case) -> Row:
    """One record of a training step holds for the next, so that it can be compiled."""
    if not all(isinstance(row, Tensor) for row in case.rows):
        return skipped("the programs take arguments that are not tensors")
    losses = set()
    for number in range(TRIES):
        with case.quietly(training=True, gradients=True, other=number):
            losses.add(_step(case, case.rows)[0].item())
    if len(losses) > 1:
        return failed(
            "A training step repeated with the same seed of torch gives another loss: random "
            "numbers of Python or NumPy, or a counter in the program, would be frozen in a "
            "compiled step. Draw with torch or pyro.sample.",
            *case.suspects(("random.", "shuffle(", "+= 1")),
        )
    try:
        with case.quietly(training=True, gradients=True):
            record(lambda *rows: _step(case, rows), case.rows, case.pair)
    except CaptureError as error:
        site = failed_message(error.__cause__) if error.__cause__ else None
        place = error_place(error)
        source = f", for {kind_of(site['fn'])} at site {site['name']!r}" if site else ""
        found = warned if site or place.startswith("<") else failed  # a library's own code
        return found(f"A step runs eagerly, not compiled{source}: {error}.", place)
    return passed("a step is one graph")


def _step(case: Case, rows: tuple) -> list[Tensor]:
    """The loss and its gradients."""
    loss, surrogate = case.estimate(*rows)
    leaves = list(case.pair.named().values())
    gradients = torch.autograd.grad(surrogate, leaves, allow_unused=True)
    return [loss, *(g for g in gradients if g is not None)]
