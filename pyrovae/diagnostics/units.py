"""The divergence from the prior and the posterior mean of each latent, by coordinate."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor
from torch.distributions import Categorical, Independent, OneHotCategorical

from pyrovae._tools import InputError
from pyrovae.distributions import divergence
from pyrovae.objectives.elbo import terms_by_datum
from pyrovae.objectives.scores import in_one_order
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.support import counted
from pyrovae.pairs.traces import Layout, Site, samples

CHOICES = (Categorical, OneHotCategorical)


class SitePosterior(NamedTuple):
    """One latent site, for each of N data.

    ``kl`` ``[N, D]`` is the divergence by coordinate, in nats, where the posterior and the prior
    are both products over their coordinates, as ``factorized`` says, and ``[N, 1]`` otherwise.
    ``mean`` ``[N, D * width]`` is E_q[z | x], and ``noise`` the variance that it has from being an
    average of draws. A categorical variable is one coordinate, its mean the ``width`` probabilities
    of its values. ``used``, of its shape, is False where the site is masked.
    """

    kl: Tensor
    mean: Tensor
    noise: Tensor
    used: Tensor
    factorized: bool
    width: int


def examine(
    pair: Pair, rows: tuple, particles: int
) -> tuple[Tensor, Tensor, dict[str, SitePosterior]]:
    """The rate and the distortion of each datum, ``[N]`` in nats, and the rate's parts by site.

    Divergences are in closed form where there is one and both programs sample their latents in
    one order, and means over draws elsewhere.
    """
    layout, size = pair.known, (particles, len(rows[0]))
    traces = pair.trace(*rows, particles=particles)
    analytic = in_one_order(*traces)
    found = terms_by_datum(pair, traces, size, analytic)
    terms = {name: term.mean(0) for name, term in found.items()}
    if bad := [name for name, term in terms.items() if bool(term.isnan().any())]:
        raise InputError(
            f"The log-probability of site {bad[0]!r} is NaN at draws from the guide: look at its "
            f"parameters there."
        )
    model, guide = map(samples, traces)
    sites = {
        name: _site(model[name], guide[name], -terms[name], analytic, layout, size)
        for name in layout.latents
    }
    zero = torch.zeros_like(next(iter(terms.values())))
    distortion = sum((-terms.pop(name) for name in layout.observed if name in terms), zero)
    return sum((-term for term in terms.values()), zero), distortion, sites


def _site(
    model: Site, guide: Site, total: Tensor, analytic: bool, layout: Layout, size: tuple[int, int]
) -> SitePosterior:
    kl = _kl_by_coordinate(model, guide, analytic, layout, size)
    values, width = _mean(guide, layout, size)
    noise = values.var(0) / size[0] if size[0] > 1 else torch.zeros_like(values[0])
    seen = unmasked(guide).expand(guide["value"].shape)
    used = by_datum(seen, guide["fn"].event_dim, layout, size).any(0)
    used = used.repeat_interleave(values.shape[-1] // used.shape[-1], 1)
    found = total.unsqueeze(-1) if kl is None else kl.mean(0)
    return SitePosterior(found, values.mean(0), noise, used, kl is not None, width)


def _kl_by_coordinate(
    model: Site, guide: Site, analytic: bool, layout: Layout, size: tuple[int, int]
) -> Tensor | None:
    """``[K, N, D]``, or None where a distribution is no product over coordinates."""
    p, q, value = coordinate(model["fn"]), coordinate(guide["fn"]), guide["value"]
    if p is None or q is None or p.event_dim != q.event_dim:
        return None
    kl = q.log_prob(value) - p.log_prob(value)
    if analytic:
        with suppress(NotImplementedError):
            kl = divergence(q, p)
    events, seen = guide["fn"].event_dim - q.event_dim, unmasked(guide)
    seen = seen.flatten(-q.event_dim).any(-1) if q.event_dim else seen
    return by_datum(torch.where(seen, kl, 0.0), events, layout, size)


def coordinate(fn: Any) -> Any:
    """The distribution of one coordinate, its mask apart; None if they are dependent."""
    while isinstance(fn, Independent | MaskedDistribution):
        fn = fn.base_dist
    return fn if fn.event_dim == 0 or isinstance(fn, CHOICES) else None


def _mean(site: Site, layout: Layout, size: tuple[int, int]) -> tuple[Tensor, int]:
    """E[z | x] given the latents above, or else z, ``[K, N, D * width]``; and the width."""
    fn, base = site["fn"], coordinate(site["fn"])
    if isinstance(base, CHOICES):
        events = fn.event_dim - len(base.event_shape) + 1
        return by_datum(base.probs, events, layout, size), base.probs.shape[-1]
    try:
        mean = fn.mean
    except NotImplementedError:
        mean = site["value"]
    if bool(mean.isnan().any()):
        mean = site["value"]
    return by_datum(mean.to(torch.get_default_dtype()), fn.event_dim, layout, size), 1


def unmasked(site: Site) -> Tensor:
    """Where a site's value counts, over its batch and its event's dimensions, each of 1 or all."""
    if (found := counted(site)) is None:
        found = torch.ones((), dtype=torch.bool, device=site["value"].device)
    return found[(None,) * (site["fn"].event_dim - found.dim())]


def by_datum(value: Tensor, events: int, layout: Layout, size: tuple[int, int]) -> Tensor:
    """A tensor of a program's batch shape and some event dimensions as ``[K, N, D]``."""
    rank = events - layout.particle_dim
    value = value[(None,) * (rank - value.dim())].movedim(layout.dim - events, 1)
    return value.expand(*size, *value.shape[2:]).reshape(*size, -1)
