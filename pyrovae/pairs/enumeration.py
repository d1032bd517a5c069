r"""Exact sums over discrete latents: those of the guide, and those that the model alone has.

For latents y that the guide enumerates, and latents u that the model enumerates,

.. math:: \mathcal{L}(x) = E_{q(z|x)} \sum_y q(y|x, z)
          \Bigl[\ln \sum_u p(x, u, y, z) - \ln q(y, z|x)\Bigr].

The sums are Pyro's tensor variable elimination over plates (:mod:`pyro.ops.contract`), with the
factors of one sum added before the exponential, so that factors that disagree by hundreds of nats
do not underflow, and with nothing read back from the device.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.distributions.util import is_identically_zero
from pyro.infer.util import compute_site_dice_factor
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions.constraints import Constraint
from torch.utils._python_dispatch import _get_current_dispatch_mode

from pyrovae._tools import InputError
from pyrovae.pairs.traces import samples

Packed = Any  # a tensor that names its dimensions in an attribute of its own, as Pyro packs them


def enumerates(site: Any) -> bool:
    """Whether a latent is marked to be summed over, ``infer={"enumerate": "parallel"}``."""
    marked = site["infer"].get("enumerate") == "parallel"
    return marked and not site["is_observed"] and site["infer"].get("num_samples") is None


def sum_out(trace: Trace, latents: Iterable[str]) -> Trace:
    """Sum a model's trace over latents that it enumerates.

    In the trace they take all their values, as :func:`pyro.poutine.enum` has it. Of the sites that
    depend on one of them, the first latent then scores ln p of all remaining latents, the first
    observed site ln p of the data given these, and the others 0.
    """
    summed = prune_subsample_sites(trace)
    summed.compute_log_prob()
    summed.pack_tensors()
    for name, score in _marginal_scores(summed, list(latents)).items():
        site: Any = summed.nodes[name]
        log_prob = packed.unpack(score, summed.symbol_to_dim)
        site = {key: site[key] for key in site if key not in ("log_prob", "unscaled_log_prob")}
        summed.nodes[name] = site | {"fn": _Scored(site["fn"], log_prob), "mask": None}
    return summed


def exact_terms(model_trace: Trace, guide_trace: Trace) -> dict[str, Tensor]:
    """The ELBO by site, summed over enumerated latents, plates and particles.

    A latent that the guide draws without a path has a factor of one whose gradient is its score
    (DiCE, arXiv 1802.05098), as in :class:`pyro.infer.TraceEnum_ELBO`, whose traces these are.
    Nats by site, scaled and differentiable.
    """
    model, guide = samples(model_trace), samples(guide_trace)
    weights, repeated = [], []
    for site in guide.values():
        ordinal, packs = _ordinal(guide_trace, site), site["packed"]
        # Pyro's factor is masked, so that the values of a masked site would count once each.
        factor, repeats = (
            (packs["unscaled_log_prob"], 0.0)
            if _is_summed(site)
            else compute_site_dice_factor(site)
        )
        if not is_identically_zero(factor):
            weights.append((ordinal, factor))
        if repeats:
            repeated.append((ordinal, repeats))
    latents = [name for name, site in model.items() if _is_summed(site) and name not in guide]
    scores = {name: site["packed"]["log_prob"] for name, site in model.items()}
    summed = _marginal_scores(model_trace, latents)
    _check_one_scale({name: model[name]["scale"] for name in summed})
    for name, score in summed.items():
        scores[name] = packed.scale_and_mask(score, scale=model[name]["scale"])
    terms: dict[str, Tensor] = {}
    costs = [(n, model_trace, model[n], score) for n, score in scores.items()]
    costs += [(n, guide_trace, s, packed.neg(s["packed"]["log_prob"])) for n, s in guide.items()]
    for name, trace, site, cost in costs:
        ordinal = _ordinal(trace, site)
        # A site outside the plates of one that is enumerated in turn comes back every time.
        times = sum(log_times for where, log_times in repeated if not where <= ordinal)
        term = _expected(cost, ordinal, weights)
        terms[name] = terms.get(name, 0.0) + (term * math.exp(-times) if times else term)
    return terms


def _check_one_scale(scales: dict[str, Any]) -> None:
    """Refuse different scales in one sum over latents, whose logarithm has but one."""
    for first, name in pairwise(scales):
        one, other = scales[first], scales[name]
        if any(isinstance(scale, Tensor) and scale.dim() for scale in (one, other)):
            raise InputError(
                f"Sites {first!r} and {name!r} depend on latents that the model sums over, where "
                f"poutine.scale has to be a number: scale the loss of each datum outside the model."
            )
        # While a step is recorded nothing is read back; it has been taken once before.
        recorded = isinstance(one, Tensor) or isinstance(other, Tensor)
        recorded = recorded and _get_current_dispatch_mode() is not None
        if not recorded and bool(one != other):
            raise InputError(
                f"Sites {first!r} and {name!r} depend on latents that the model sums over, and "
                f"carry different scales, {float(one):g} and {float(other):g}, so that no ELBO is "
                f"defined: put poutine.scale around all of these sites, or around none."
            )


def _is_summed(site: Any) -> bool:
    return enumerates(site) and "_enumerate_dim" in site["infer"]


def _marginal_scores(trace: Trace, latents: list[str]) -> dict[str, Tensor]:
    """Packed scores, masked and not scaled, of the sites that depend on ``latents``."""
    if not latents:
        return {}
    sites = samples(trace)
    symbols = {sites[name]["infer"]["_enumerate_symbol"] for name in latents}
    factors: dict[str, Packed] = {}
    for name, site in sites.items():
        score, mask = site["packed"]["unscaled_log_prob"], site["packed"]["mask"]
        if name in latents:
            factors[name] = score
        elif symbols & set(score._pyro_dims):
            factors[name] = packed.scale_and_mask(score, mask=mask)
    seen = [name for name in factors if sites[name]["is_observed"]]
    hidden = {name: factor for name, factor in factors.items() if name not in seen}
    prior: Packed = _contract(trace, hidden, symbols)
    scores = {name: _named(torch.zeros_like(prior), prior._pyro_dims) for name in factors}
    scores[next((name for name in hidden if name not in latents), latents[0])] = prior
    if seen:
        joint = _contract(trace, factors, symbols)
        scores[seen[0]] = _add([joint, packed.neg(prior)])
    return scores


def _contract(trace: Trace, factors: dict[str, Tensor], symbols: set[str]) -> Tensor:
    """Sum a product of factors over symbols, and over the plates that not all sites are in."""
    sites = samples(trace)
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for name, factor in factors.items():
        tree.setdefault(_ordinal(trace, sites[name]), []).append(factor)
    sizes = {
        trace.plate_to_symbol[f.name]: f.size
        for site in sites.values()
        for f in site["cond_indep_stack"]
        if f.vectorized
    }
    common = frozenset.intersection(*(_ordinal(trace, site) for site in sites.values()))
    return contract_to_tensor(tree, symbols, common, ring=_AddingRing(dim_to_size=sizes))


class _AddingRing(LogRing):
    """Sums of exponentials one dimension at a time, over the sum of the terms that have it."""

    def sumproduct(self, terms: list[Packed], dims: Iterable[str]) -> Packed:
        terms, left = list(terms), set(dims)
        while left:
            dim = min(sorted(left), key=lambda d: len(_joint_dims(terms, d)))
            having = [term for term in terms if dim in term._pyro_dims]
            terms = [term for term in terms if dim not in term._pyro_dims]
            if having:
                terms.append(_log_sum_exp(_add(having), dim))
            left.remove(dim)
        return _add(terms)


def _joint_dims(terms: list[Packed], dim: str) -> set[str]:
    return set().union(*(term._pyro_dims for term in terms if dim in term._pyro_dims))


def _log_sum_exp(term: Packed, dim: str) -> Packed:
    return _named(term.logsumexp(term._pyro_dims.index(dim)), term._pyro_dims.replace(dim, ""))


def _add(terms: list[Packed]) -> Packed:
    first, *rest = packed.broadcast_all(*terms)
    return _named(sum(rest, first[...]), first._pyro_dims)


def _named(term: Packed, dims: str) -> Packed:
    term._pyro_dims = dims
    return term


def _expected(
    cost: Packed, ordinal: frozenset[str], weights: list[tuple[frozenset[str], Packed]]
) -> Packed:
    """A cost summed over its dimensions, those of enumerated latents weighted by the guide."""
    upstream = [weight for where, weight in weights if where <= ordinal]
    if not upstream:
        return cost.sum()
    others = set().union(*(w._pyro_dims for w in upstream)) - set(cost._pyro_dims) - ordinal
    weight = packed.exp(_AddingRing().sumproduct(upstream, others))
    weight, cost = packed.broadcast_all(weight, cost)
    return (weight * torch.where(weight > 0, cost, 0.0)).sum()


def _ordinal(trace: Trace, site: Any) -> frozenset[str]:
    frames = site["cond_indep_stack"]
    return frozenset(trace.plate_to_symbol[f.name] for f in frames if f.vectorized)


class _Scored(TorchDistribution):
    """A distribution that has been scored already."""

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, base: TorchDistribution, log_prob: Tensor) -> None:
        super().__init__(log_prob.shape, base.event_shape, validate_args=False)
        self._base, self._log_prob = base, log_prob

    @property
    def support(self) -> Constraint | None:
        return self._base.support

    def log_prob(self, value: Tensor) -> Tensor:
        return self._log_prob
