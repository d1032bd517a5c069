"""Where a site's value counts and where it may lie: masks and supports, seen through wrappers.

A distribution with a ``fold`` is one of :mod:`pyrovae.pairs.folding`, whose rows are particles.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import (
    Independent,
    MixtureSameFamily,
    Transform,
    TransformedDistribution,
    VonMises,
    biject_to,
    constraints,
)
from torch.distributions.constraints import Constraint

from pyrovae._tools import InputError

WRAPPERS = (dist.MaskedDistribution, dist.ExpandedDistribution)
# Angles. torch 2.11 and Pyro 1.9.2 declare their support to be real, though their densities are
# periodic and integrate to one over a single turn.
ANGLES: tuple[Any, ...] = (
    VonMises,
    dist.SineBivariateVonMises,
    dist.SineSkewed,
)

# What a straight-through relaxation draws: its own log_prob is a density of what was rounded.
DRAWN = {
    dist.RelaxedBernoulliStraightThrough: dist.Bernoulli,
    dist.RelaxedOneHotCategoricalStraightThrough: dist.OneHotCategorical,
}


class Turn(constraints.interval):
    """One turn of a circle, from -π to π."""


TURN = Turn(-math.pi, math.pi)


def wrapped(angle: Tensor) -> Tensor:
    """The same angle from -π to π."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


class Wrap(Transform):
    """From the line around the circle: periodic functions of a real number are those of an angle.

    No bijection, but all that moves on the line moves on the circle, which needs no more.
    """

    domain, codomain = constraints.real, TURN

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Wrap)

    def _call(self, x: Tensor) -> Tensor:
        return wrapped(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return y

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Zero: lengths stay as they are."""
        return torch.zeros_like(x)


@biject_to.register(Turn)
def _around(turn: Turn) -> Transform:
    return Wrap()


def counted(site: Any) -> Tensor | None:
    """Where a site's value counts, over its batch and its events' dimensions; None if everywhere.

    A mask may be on the site (:func:`pyro.poutine.mask`) or on its distribution, outside or inside
    of ``to_event``.
    """
    fn, device, fold = site["fn"], site["value"].device, None
    events, found = fn.event_dim, []
    if site["mask"] is not None:
        found.append((site["mask"], events))
    while isinstance(fn, (*WRAPPERS, Independent)) or hasattr(fn, "fold"):
        fold = getattr(fn, "fold", fold)
        if isinstance(fn, dist.MaskedDistribution):
            mask = torch.as_tensor(fn._mask, device=device)
            mask = fold.split(mask, events - fn.event_dim) if fold else mask
            found.append((mask, fn.event_dim))
        fn = fn.base_dist
    masks = [torch.as_tensor(mask, device=device).bool() for mask, _ in found]
    spread = [m.reshape(m.shape + (1,) * n) for m, (_, n) in zip(masks, found, strict=True)]
    return math.prod(spread[1:], start=spread[0]) if spread else None


def support_of(fn: Any) -> Constraint:
    """The support of a distribution; that of an angle is one turn, from -π to π."""
    if isinstance(fn, WRAPPERS):
        return support_of(fn.base_dist)
    if hasattr(fn, "fold"):
        return fn.fold.constraint(support_of(fn.base_dist), fn.events)
    if isinstance(fn, Independent):
        return _independent(support_of(fn.base_dist), fn.reinterpreted_batch_ndims)
    if isinstance(fn, MixtureSameFamily):
        # Its components share their support, for which torch registers no bijection itself.
        return support_of(fn.component_distribution)
    if isinstance(fn, ANGLES):
        return _independent(TURN, fn.event_dim)
    try:
        return fn.support
    except NotImplementedError:  # Of a distribution that doesn't tell.
        return constraints.dependent


def element(support: Constraint) -> Constraint:
    """A support without what declares its events."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def survey(sites: dict[str, tuple[Any, Any]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which latents, given by their sites in model and guide, are masked, and which are bounded.

    A guide is refused that leaves a support that couples the coordinates of an event: elsewhere a
    draw outside has no density, but here no density of the one program is one of the other.
    """
    for name, (model, _) in sites.items():
        if not bool(_coupled_inside(model).all()):
            raise InputError(
                f"The guide draws latent {name!r} outside the support of its prior, "
                f"{model['fn'].support}: give the guide a distribution on that support."
            )
    masked = (n for n, both in sites.items() if any(counted(site) is not None for site in both))
    bounded = (n for n, both in sites.items() if not all(_is_free(site["fn"]) for site in both))
    return tuple(masked), tuple(bounded)


def _coupled_inside(site: Any) -> Tensor:
    fn, value, mask = site["fn"], site["value"], counted(site)
    base = element(support_of(fn))
    if constraints.is_dependent(base) or base.event_dim == 0:
        return torch.ones((), dtype=torch.bool)
    inside = base.check(value)
    if isinstance(base, type(constraints.simplex)):
        # torch allows an error of 1e-6, which sums of many float32 numbers exceed.
        inside = (value >= 0).all(-1) & ((value.sum(-1) - 1).abs() < 1e-3)
    return inside if mask is None else inside | ~mask.flatten(-base.event_dim)[..., 0]


def quantized(fn: Any) -> Any:
    """A straight-through relaxation as the law of its draws, which has a mass; others as they are.

    A ratio of that density to the mass of a discrete prior is no weight.
    """
    base = fn
    while isinstance(base, (*WRAPPERS, Independent)):
        base = base.base_dist
    if type(base) not in DRAWN:
        return fn
    if base is fn:
        return DRAWN[type(fn)](logits=fn.logits)
    inner = quantized(fn.base_dist)
    if isinstance(fn, Independent):
        return inner.to_event(fn.reinterpreted_batch_ndims)
    masked = isinstance(fn, dist.MaskedDistribution)
    return inner.mask(fn._mask) if masked else inner.expand(fn.batch_shape)


def within_bounds(
    scores: dict[str, Tensor], sites: dict[str, Any], bounded: tuple[str, ...]
) -> dict[str, Tensor]:
    """Log-probabilities of sites, masked, with -inf where a latent is impossible."""
    found = dict(scores)
    for name in bounded:
        inside = possible(sites[name]["fn"], sites[name]["value"])
        # With more dimensions, a support depends on latents that have been summed over.
        if inside is None or inside.dim() > scores[name].dim():
            continue
        mask = sites[name]["mask"]
        inside = inside if mask is None else inside | ~torch.as_tensor(mask)
        found[name] = torch.where(inside, scores[name], -math.inf)
    return found


def possible(fn: Any, value: Tensor) -> Tensor | None:
    """Where a value lies in a distribution's support, over the batch; None where any value does.

    Outside, many densities go on with the formula of the inside when validation is off. Supports
    whose coordinates depend on each other, such as a simplex, are not looked at, and NaN is inside.
    """
    if hasattr(fn, "fold"):
        inside = possible(fn.base_dist, fn._raw(value))
        return None if inside is None else fn.fold.split(inside, fn.inside)
    if isinstance(fn, WRAPPERS):
        inside = possible(fn.base_dist, value)
        if inside is None or not isinstance(fn, dist.MaskedDistribution):
            return inside
        return inside | ~torch.as_tensor(fn._mask)
    if isinstance(fn, MixtureSameFamily):
        found = possible(fn.component_distribution, value.unsqueeze(-1 - len(fn.event_shape)))
        return None if found is None else found.any(-1)
    if isinstance(fn, Independent):
        return _together(possible(fn.base_dist, value), fn.reinterpreted_batch_ndims)
    inside = _together(_within(fn, value), fn.event_dim)
    if _is_transformed(fn) and not _is_free(fn.base_dist):
        # What a transform makes of a bounded base has bounds that torch does not derive.
        latent, base = value, fn.base_dist
        for transform in reversed(fn.transforms):
            latent = transform.inv(latent)
        events = (latent.dim() - base.event_dim) - (value.dim() - fn.event_dim)
        below = _together(possible(base, latent), events)
        inside = below if inside is None else inside if below is None else inside & below
    return inside


def _within(fn: Any, value: Tensor) -> Tensor | None:
    base = element(support_of(fn))
    if constraints.is_dependent(base) or isinstance(base, type(constraints.real)):
        return None
    return base.check(value) | value.isnan() if base.event_dim == 0 else None


def _together(inside: Tensor | None, events: int) -> Tensor | None:
    """Whether all of an event is inside."""
    return inside if inside is None or events == 0 else inside.flatten(-events).all(-1)


def _is_transformed(fn: Any) -> bool:
    """Whether torch derives a distribution's support from its transforms alone."""
    return type(fn).support is TransformedDistribution.support


def _is_free(fn: Any) -> bool:
    """Whether any value is possible."""
    while isinstance(fn, (*WRAPPERS, Independent)) or hasattr(fn, "fold"):
        fn = fn.base_dist
    if isinstance(fn, MixtureSameFamily):
        return _is_free(fn.component_distribution)
    base = element(support_of(fn))
    free = constraints.is_dependent(base) or isinstance(base, type(constraints.real))
    return free and (not _is_transformed(fn) or _is_free(fn.base_dist))


def _independent(support: Constraint, events: int) -> Constraint:
    return constraints.independent(support, events) if events else support
