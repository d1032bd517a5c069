r"""The ELBO with weights on its divergences, for training alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyrovae._tools import InputError, at_least
from pyrovae.objectives.base import Estimate, Objective
from pyrovae.objectives.elbo import site_terms, surrogate_elbo, total
from pyrovae.objectives.scores import score
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.support import counted
from pyrovae.pairs.traces import Site, reduce_to, samples, unscaled

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: done,
    "cosine": lambda done: (1 - math.cos(math.pi * done)) / 2,
}


class BetaELBO(Objective):
    r"""The ELBO with β on its divergences, β rising over a warm-up, and nats that are free.

    .. math:: \mathcal{L} = E_q[\ln p(x | z)] - \beta_t \sum_s \max(\lambda_s, \mathrm{KL}_s),
              \qquad \beta_t = \beta \, h\Bigl(\min\bigl(1, \tfrac{t + 1}{W}\bigr)\Bigr)

    KL of site s is the mean over the batch, in closed form where there is one and the guide samples
    its latents in the model's order. While it is below
    its λ, the site's divergence has no gradient. What an :class:`Estimate` calls ``terms`` stays
    the ELBO at β = 1.

    Args:
        particles: The number of samples of each datum.
        beta: β, at least 0.
        warm_up: The number W of steps in which β rises from zero; step W is the first with all
            of β. 0 starts with it.
        schedule: h, from 0 and 1 to 0 and 1: ``"linear"``, ``"cosine"``, or a function.
        free_bits: λ in nats per datum, one number for each latent site, or by site.
        analytic: Use divergences in closed form.

    Raises:
        ValueError: If an argument is out of range, or ``free_bits`` names no latent site.

    References:
        Higgins et al., β-VAE (ICLR 2017), equation 4; Bowman et al., Generating Sentences from a
        Continuous Space (arXiv 1511.06349), section 3.1, for the warm-up; Kingma et al., Improving
        Variational Inference with Inverse Autoregressive Flow (1606.04934), for free bits.
    """

    def __init__(
        self,
        particles: int = 1,
        beta: float = 1.0,
        warm_up: int = 0,
        schedule: str | Callable[[float], float] = "linear",
        free_bits: float | Mapping[str, float] = 0.0,
        analytic: bool = True,
    ) -> None:
        super().__init__(particles)
        if not 0 <= beta < math.inf:
            raise InputError(f"Expected beta >= 0, got {beta}.")
        at_least({"warm_up": 0}, warm_up)
        if not callable(schedule) and schedule not in SCHEDULES:
            raise InputError(f"Expected schedule {' or '.join(SCHEDULES)}, got {schedule!r}.")
        given = free_bits.values() if isinstance(free_bits, Mapping) else [free_bits]
        if not all(0 <= nats < math.inf for nats in given):
            raise InputError(f"Expected free_bits >= 0, in nats per datum, got {free_bits}.")
        self.full, self.warm_up, self.analytic = float(beta), warm_up, analytic
        self.schedule = schedule if callable(schedule) else SCHEDULES[schedule]
        self.free_bits, self.settings = free_bits, {"beta": self.full, "schedule": schedule}
        self.beta, self._filled = torch.tensor(self.full, dtype=torch.float64), [self.full]
        self.at_step(0)

    def at_step(self, step: int) -> None:
        """Set β for a step, counted from 0, in place."""
        done = 1.0 if step + 1 >= self.warm_up else (step + 1) / self.warm_up
        beta = self.full * (1.0 if done == 1 else self.schedule(done))
        if beta != self._filled[-1]:
            self.beta.fill_(beta)
            self._filled[-1] = beta

    def prepare(self, pair: Pair, args: tuple, steps: int | None = None) -> None:
        """Look at a pair once; refuse a warm-up that is longer than the training."""
        if steps is not None and self.warm_up > steps:
            raise InputError(
                f"The warm-up of {self.warm_up} steps is longer than the training of {steps}, so "
                f"that beta={self.full:g} is never reached: train longer, or shorten warm_up."
            )
        super().prepare(pair, args, steps)

    def examine(self, pair: Pair, args: tuple) -> dict[str, float]:
        """The free nats by site; β moves to the pair's device."""
        if self.beta.device != args[0].device:
            self.beta = self.beta.to(args[0].device)
        if not isinstance(self.free_bits, Mapping):
            return dict.fromkeys(pair.known.latents if self.free_bits else (), self.free_bits)
        unknown = sorted(self.free_bits.keys() - set(pair.known.latents))
        if unknown:
            raise InputError(
                f"free_bits names {unknown}, and the pair's latent sites are "
                f"{sorted(pair.known.latents)}: name one of those."
            )
        return dict(self.free_bits)

    def estimate(self, pair: Pair, *args: Any) -> Estimate:
        """The loss of a batch and its surrogate, with nothing read back from the device."""
        traces, terms, betas, allowed = self._split(pair, args)
        sums = {name: term.detach().sum() for name, term in terms.items()}
        above = {name: sums[name] < -nats for name, nats in allowed.items()}
        coefficients = {n: b * above[n] if n in above else b for n, b in betas.items()}
        surrogate = surrogate_elbo(*traces, terms, coefficients)
        held = {n: torch.where(above[n], sums[n], -nats) for n, nats in allowed.items()}
        value = total(betas[n] * v if n in betas else v for n, v in (sums | held).items())
        means = {name: term / self.particles for name, term in sums.items()}
        return Estimate(-value / self.particles, -surrogate / self.particles, means)

    def bounds(self, pair: Pair, *args: Any) -> Tensor:
        """The weighted bound of each datum before any scale, ``[N]``, in nats."""
        free = self.known(pair, args)
        traces, scaled, betas, allowed = self._split(pair, args)
        unscaled(pair.known, *traces)
        score(*traces, analytic=self.analytic)
        parts = []
        for name, term in site_terms(*traces).items():
            each = reduce_to(term, pair.known, self.particles, len(args[0])).mean(0)
            if name in allowed:
                each = torch.where(scaled[name].sum() < -allowed[name], each, -free[name])
            parts.append(betas[name] * each if name in betas else each)
        return total(parts)

    def _split(
        self, pair: Pair, args: tuple
    ) -> tuple[tuple[Trace, Trace], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Scored traces, the ELBO by site, and by latent β and the nats that the batch has free."""
        free = self.known(pair, args)
        traces = pair.trace(*args, particles=self.draws, sums=True)
        score(*traces, analytic=self.analytic)
        terms = site_terms(*traces)
        model, guide = (samples(trace) for trace in traces)
        beta = self.beta.to(next(iter(terms.values())).dtype)
        betas = {name: beta for name in terms if not (guide | model)[name]["is_observed"]}
        plate = pair.known.plate
        allowed = {n: _allowed(nats, terms[n], guide[n], plate) for n, nats in free.items()}
        return traces, terms, betas, allowed


def _allowed(nats: float, term: Tensor, site: Site, plate: str) -> Tensor:
    """Nats for each datum times how often a batch counts, over particles, scaled and masked."""
    fn, seen = site["fn"], counted(site)
    ones = term.new_ones(fn.batch_shape + fn.event_shape) * (1 if seen is None else seen)
    if fn.event_dim:  # a datum counts where one of its coordinates does
        ones = ones.flatten(len(fn.batch_shape)).amax(-1)
    inside = math.prod(
        f.full_size or f.size
        for f in site["cond_indep_stack"]
        if f.vectorized and f.name not in (plate, "particles")
    )
    return nats * (ones * site["scale"]).sum() / inside
