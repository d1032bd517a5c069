r"""Bounds on log p(x) from several samples, each with three estimators of its gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions.util import is_identically_zero
from pyro.poutine import Trace
from torch import Tensor

from pyrovae._tools import InputError, at_least
from pyrovae.objectives.base import Estimate, Objective
from pyrovae.objectives.elbo import total
from pyrovae.objectives.log_weights import (
    Few,
    Scores,
    Through,
    check_cells,
    check_density,
    check_few,
    held_still,
    is_hierarchical,
    weigh,
)
from pyrovae.pairs.contract import kind_of
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import Site, drawn, samples


class ImportanceWeighted(Objective):
    r"""The importance-weighted bound and its relatives, with K samples in each of M groups.

    .. math:: \mathcal{L} = \frac1M \sum_{m=1}^M \Bigl[ \frac{1 - \beta}{1 - \alpha}
              \ln \frac1K \sum_{k=1}^K w_{mk}^{1 - \alpha}
              + \frac{\beta}{K} \sum_{k=1}^K \ln w_{mk} \Bigr],
              \qquad w_{mk} = \frac{p(x, z_{mk})}{q(z_{mk} | x)}

    IWAE is α = β = 0 and M = 1; Rényi's bound has another α, and α = 1 is the ELBO; MIWAE has
    several groups; CIWAE has β between 0 and 1.

    The gradient is ``"plain"``, autograd's; ``"stl"``, which leaves out the score of q and is
    unbiased for the ELBO alone; or ``"dreg"``, which replaces that score by a second path and is
    unbiased for all. Latents that are not reparameterized have a score-function term under
    ``"plain"``, against the bound with their own weight replaced by the geometric mean of the
    others'; the other two refuse them.

    With ``backward=R`` a gradient goes back through R of the samples alone, the r-th of them drawn
    where the weights add up to between (r − 1)/R and r/R. The gradient stays unbiased, for

    .. math:: \sum_k v_k \nabla \ln p(x, z_k) = E\Bigl[\frac1R \sum_{r=1}^R
              \nabla \ln p(x, z_{k_r})\Bigr], \qquad P(k_r = k) = v_k
              \quad\text{on average over } r,

    and the model, which costs most, runs forward alone on M K samples and forward and backward on
    R. The loss is that of all samples.

    Args:
        particles: K.
        groups: M; M K samples are drawn in all.
        alpha: The order α, a finite number; the bound holds for α >= 0.
        beta: The weight of the ELBO, from 0 to 1.
        gradient: ``"plain"``, ``"stl"`` or ``"dreg"``.
        backward: R, fewer than M K; None is all of them.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Burda et al., Importance Weighted Autoencoders (arXiv 1509.00519), where section 3 has R = 1
        for plain gradients; Li and Turner, Rényi
        Divergence Variational Inference (1602.02311); Rainforth et al., Tighter Variational Bounds
        Are Not Necessarily Better (1802.04537); for the gradients, Mnih and Rezende, Variational
        Inference for Monte Carlo Objectives (1602.06725); Roeder et al., Sticking the Landing
        (1703.09194); Tucker et al., Doubly Reparameterized Gradient Estimators (1810.04152).
    """

    def __init__(
        self,
        particles: int = 10,
        groups: int = 1,
        alpha: float = 0.0,
        beta: float = 0.0,
        gradient: str = "plain",
        backward: int | None = None,
    ) -> None:
        super().__init__(particles)
        at_least({"groups": 1}, groups)
        if not math.isfinite(alpha):
            raise InputError(f"Expected a finite alpha, got {alpha}.")
        if not 0 <= beta <= 1:
            raise InputError(f"Expected beta from 0 (IWAE) to 1 (ELBO), got {beta}.")
        if gradient not in ("plain", "stl", "dreg"):
            raise InputError(f"Expected gradient='plain', 'stl' or 'dreg', got {gradient!r}.")
        whole = isinstance(backward, int) and not isinstance(backward, bool)
        if backward is not None and not (whole and 1 <= backward < groups * particles):
            raise InputError(
                f"Expected an integer backward from 1 to {groups * particles - 1}, fewer than the "
                f"samples that are drawn, or None for all, got {backward!r}."
            )
        self.groups, self.alpha, self.beta, self.gradient = groups, alpha, beta, gradient
        self.draws = groups * particles if groups * particles > 1 else None
        self.backward = backward

    def examine(self, pair: Pair, args: tuple) -> tuple[tuple[str, ...], bool]:
        """Check the pair; the latents with a score, and whether the guide is to be run twice."""
        traces = pair.trace(*args)
        check_cells(traces, pair.known)
        latents = drawn(traces[1])
        scored = tuple(n for n, s in latents.items() if not is_identically_zero(_score(s)))
        if self.gradient == "plain":
            if self.backward:
                check_few(pair, args, self.draws, self.backward, twice=False)
            return scored, False
        for name in scored:
            raise InputError(
                f"gradient={self.gradient!r} takes reparameterized latents alone, and the guide "
                f"draws {name!r} from a {kind_of(latents[name]['fn'])}: train with iwae, "
                f"which has a score-function term for it, or with reweighted_wake_sleep, or "
                f"enumerate it with trace_enum_elbo."
            )
        hierarchical = is_hierarchical(pair, args)
        check_density(pair, args)
        if self.backward or hierarchical:
            check_few(pair, args, self.draws, self.backward, hierarchical)
        return (), hierarchical

    def bounds(self, pair: Pair, *args: Any) -> Tensor:
        """The bound of each datum before any scale, ``[N]``, in nats."""
        self.known(pair, args)
        guide_trace = pair.trace_guide(*args, particles=self.draws)
        found = weigh(pair, guide_trace, args, self.draws)
        return found.where.by_datum(self.bound(found.log_weights))

    def estimate(self, pair: Pair, *args: Any) -> Estimate:
        """The loss of a batch and its surrogate, with nothing read back from the device."""
        names, hierarchical = self.known(pair, args)
        guide_trace = pair.trace_guide(*args, particles=self.draws)
        if self.backward:
            found, gain = self._of_few(pair, guide_trace, args, hierarchical)
        else:
            found, gain = self._of_all(pair, guide_trace, args, hierarchical)
        gain = gain + self._scored(guide_trace, found, names)
        bound = self.bound(found.log_weights.detach())
        return Estimate(found.where.loss(bound), found.where.loss(gain), found.terms)

    def _of_all(
        self, pair: Pair, guide_trace: Trace, args: tuple, twice: bool
    ) -> tuple[Scores, Tensor]:
        """The scores of all samples, and a cell's surrogate, ``[*cells]``."""
        through = Through(guide_trace) if self.gradient == "dreg" else None
        found = weigh(pair, guide_trace, args, self.draws, through.trace if through else None)
        if self.gradient == "plain":
            return found, self.bound(found.log_weights)
        weights, paths, factor = self.weights(found.log_weights.detach())
        if through is not None:
            through.factor = factor
        still = held_still(pair, guide_trace, args, self.draws, twice)
        path, others = found.paths(still)
        return found, (weights * (found.log_p - others) - paths * path).sum(0)

    def _of_few(
        self, pair: Pair, guide_trace: Trace, args: tuple, twice: bool
    ) -> tuple[Scores, Tensor]:
        """The same from R samples of each cell, on which the model runs again."""
        assert self.backward is not None
        found = weigh(pair, guide_trace, args, self.draws, forward=True)
        weights, _, factor = self.weights(found.log_weights.detach())
        few = Few.in_proportion(weights, self.backward)
        seen, factor = few.trace(pair, guide_trace), few.of(factor)
        through = Through(seen) if self.gradient == "dreg" else None
        if through is not None:
            through.factor = factor
        log_p = found.where.log_p(pair, through.trace if through else seen, args, self.backward)
        if self.gradient == "plain":
            return found, (log_p - few.of(total(found.guide.values()))).mean(0)
        if twice:
            still = held_still(pair, seen, args, self.backward, twice)
            path, others = few.guide(found).paths(still)
        else:
            still = held_still(pair, guide_trace, args, self.draws, twice)
            path, others = map(few.of, found.paths(still))
        return found, (log_p - others - factor * path).mean(0)

    def bound(self, log_weights: Tensor) -> Tensor:
        """The bound of each cell, ``[*cells]``, from its log-weights ``[M K, *cells]``."""
        return self._of_group(log_weights.unflatten(0, (self.groups, -1))).mean(0)

    def weights(self, log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""The gradient of the bound in its log-weights, and what paths are weighted by.

        .. math:: v = \frac1M \Bigl[(1 - \beta) \tilde w + \frac{\beta}{K}\Bigr], \qquad
                  u = \frac1M \Bigl[(1 - \beta) \bigl(\alpha \tilde w + (1 - \alpha) \tilde w^2
                  \bigr) + \frac{\beta}{K}\Bigr]

        with the group's normalized :math:`\tilde w \propto w^{1 - \alpha}`; sticking the landing
        takes u = v. They come as v, u and u / v, ``[M K, *cells]`` each.
        """
        normal = log_weights.unflatten(0, (self.groups, -1)).mul(1 - self.alpha).softmax(1)
        share, rest = (1 - self.beta) / self.groups, self.beta / self.groups / self.particles
        v = share * normal + rest
        u, factor = v, torch.ones_like(v)
        if self.gradient == "dreg":
            factor = self.alpha + (1 - self.alpha) * normal
            u = share * normal * factor + rest
            factor = u / v if rest else factor
        return v.flatten(0, 1), u.flatten(0, 1), factor.flatten(0, 1)

    def _of_group(self, log_weights: Tensor) -> Tensor:
        """The bound of each group over the second dimension, ``[M, K, ...]`` to ``[M, ...]``."""
        order = 1 - self.alpha
        if order == 0 or self.beta == 1:
            return log_weights.mean(1)
        bound = ((order * log_weights).logsumexp(1) - math.log(self.particles)) / order
        if self.beta == 0:
            return bound
        return (1 - self.beta) * bound + self.beta * log_weights.mean(1)

    def _scored(self, guide_trace: Trace, found: Scores, names: tuple[str, ...]) -> Tensor | float:
        """The score-function term of latents that are not reparameterized, ``[*cells]``."""
        if not names:
            return 0.0
        sites = samples(guide_trace)
        scores = sum(found.where.fold(_score(sites[name])) for name in names)
        return (self._gains(found.log_weights.detach()) * scores).sum(0)

    def _gains(self, log_weights: Tensor) -> Tensor:
        """What each particle adds to the bound, over what the others would make of it."""
        grouped = log_weights.unflatten(0, (self.groups, -1))
        bound = self._of_group(grouped).unsqueeze(1)
        without: Tensor | float = 0.0
        size, groups = self.particles, self.groups
        if size > 1:
            own = torch.eye(size, dtype=torch.bool, device=log_weights.device)
            own = own.reshape(1, size, size, *(1,) * (grouped.dim() - 2))
            each = grouped.unsqueeze(2).expand(-1, -1, size, *grouped.shape[2:])
            others = each.masked_fill(own, 0.0).sum(1, keepdim=True) / (size - 1)
            without = self._of_group(torch.where(own, others, each))
        elif groups > 1:
            without = (bound.sum(0) - bound) / (groups - 1)
        return (bound - without).flatten(0, 1) / groups


def _score(site: Site) -> Tensor:
    """ln q of a latent that is not reparameterized, whose gradient is its score; zero of others."""
    return site["fn"].score_parts(site["value"]).score_function
