"""The divergence from the prior and the posterior mean of each latent, by coordinate."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, OneHotCategorical
from torch.distributions import kl_divergence as divergence

from pyrovae._tools import InputError
from pyrovae.objectives.elbo import in_one_order, terms_by_datum
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import Layout, samples

CHOICES = (Categorical, OneHotCategorical)


class SitePosterior(NamedTuple):
    """One latent site, for each of N data.

    ``kl`` ``[N, D]`` is the divergence by coordinate, in nats, where the posterior and the prior
    are both products over their coordinates, as ``factorized`` says, and ``[N, 1]`` otherwise.
    ``mean`` ``[N, D * width]`` is E_q[z | x], and ``noise`` the variance that it has from being an
    average of draws. A categorical variable is one coordinate, its mean the ``width`` probabilities
    of its values. ``used`` ``[N]`` is False where the site is masked.
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

    Raises:
        ValueError: If a site's log-probability is NaN.
    """
    layout = pair.known
    model, guide = pair.trace(*rows, particles=particles)
    analytic, size = in_one_order(model, guide), (particles, len(rows[0]))
    found = terms_by_datum(pair, (model, guide), size, analytic)
    terms = {name: term.mean(0) for name, term in found.items()}
    if bad := [name for name, term in terms.items() if bool(term.isnan().any())]:
        raise InputError(
            f"The log-probability of site {bad[0]!r} is NaN at draws from the guide: look at its "
            f"parameters there."
        )
    model_sites, guide_sites = samples(model), samples(guide)
    seen = {n for n in terms if n in model_sites and model_sites[n]["is_observed"]}
    zero = torch.zeros_like(next(iter(terms.values())))
    rate = sum((-term for name, term in terms.items() if name not in seen), zero)
    distortion = sum((-terms[name] for name in seen), zero)
    sites = {
        name: _site(model_sites[name], guide_sites[name], -terms[name], analytic, layout, size)
        for name in layout.latents
    }
    return rate, distortion, sites


def _site(
    model: dict,
    guide: dict,
    total: Tensor,
    analytic: bool,
    layout: Layout,
    size: tuple[int, int],
) -> SitePosterior:
    kl = _kl_by_coordinate(model, guide, analytic, layout, size)
    values, width = _mean(guide, layout, size)
    mean, noise = values.mean(0), torch.zeros_like(values[0])
    if size[0] > 1:
        noise = values.var(0) / size[0]
    used = torch.ones(size[1], dtype=torch.bool, device=total.device)
    if guide["mask"] is not None:
        mask = torch.as_tensor(guide["mask"], device=total.device)
        used = _by_datum(mask, 0, layout, size).any(-1).any(0)
    found = total.unsqueeze(-1) if kl is None else kl.mean(0)
    return SitePosterior(found, mean, noise, used, kl is not None, width)


def _kl_by_coordinate(
    model: dict, guide: dict, analytic: bool, layout: Layout, size: tuple[int, int]
) -> Tensor | None:
    """``[K, N, D]``, or None where a distribution is no product over coordinates."""
    p, q, value = _coordinate(model["fn"]), _coordinate(guide["fn"]), guide["value"]
    if p is None or q is None or p.event_dim != q.event_dim:
        return None
    kl = _closed_form(q, p) if analytic else None
    if kl is None:
        kl = q.log_prob(value) - p.log_prob(value)
    events = guide["fn"].event_dim - q.event_dim
    if guide["mask"] is not None:
        mask = torch.as_tensor(guide["mask"], device=kl.device)
        kl = torch.where(mask.reshape(*mask.shape, *[1] * events), kl, 0.0)
    return _by_datum(kl, events, layout, size)


def _closed_form(q: Distribution, p: Distribution) -> Tensor | None:
    try:
        return divergence(q, p)
    except NotImplementedError:
        return None


def _coordinate(fn: Any) -> Any:
    """The distribution of one coordinate, over a batch of them; None if they are dependent."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn if fn.event_dim == 0 or isinstance(fn, CHOICES) else None


def _mean(site: dict, layout: Layout, size: tuple[int, int]) -> tuple[Tensor, int]:
    """E[z | x] given the latents above, or else z, ``[K, N, D * width]``; and the width."""
    fn, base = site["fn"], _coordinate(site["fn"])
    if isinstance(base, CHOICES):
        events = fn.event_dim - len(base.event_shape) + 1
        return _by_datum(base.probs, events, layout, size), base.probs.shape[-1]
    try:
        mean = fn.mean
    except NotImplementedError:
        mean = site["value"]
    if bool(mean.isnan().any()):
        mean = site["value"]
    return _by_datum(mean.to(torch.get_default_dtype()), fn.event_dim, layout, size), 1


def _by_datum(value: Tensor, events: int, layout: Layout, size: tuple[int, int]) -> Tensor:
    """A tensor of a program's batch shape and some event dimensions as ``[K, N, D]``."""
    rank = events - layout.particle_dim
    value = value.reshape((1,) * (rank - value.dim()) + value.shape)
    value = value.movedim(layout.dim - events, 1)
    return value.expand(*size, *value.shape[2:]).reshape(*size, -1)
