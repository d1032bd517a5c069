r"""``TraceEnum_ELBO`` with nothing read back from the device, so that its step can be compiled.

Where no latent needs a score the ELBO is summed site by site. Elsewhere the sums are Pyro's own,
over the same factors in the same order; only its last line, which looks whether a probability is
zero and then leaves it out, is written so that no one has to look.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from opt_einsum import shared_intermediates  # type: ignore[import-untyped]  # no stubs exist
from pyro.infer import TraceEnum_ELBO
from pyro.infer.traceenum_elbo import _compute_model_factors
from pyro.infer.util import Dice
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.einsum.adjoint import require_backward
from pyro.ops.rings import MarginalRing, SampleRing
from pyro.poutine import Trace
from torch import Tensor

from pyrovae.objectives.base import Estimate
from pyrovae.objectives.elbo import total
from pyrovae.pairs.enumeration import exact_terms

__all__ = ["enum_estimate"]


def enum_estimate(
    loss: TraceEnum_ELBO, model: Callable, guide: Callable, args: tuple, kwargs: dict
) -> Estimate:
    """The value and gradient of ``TraceEnum_ELBO``."""
    found: dict[str, Tensor] = {}
    surrogates: list[Tensor] = []
    split = True
    for model_trace, guide_trace in loss._get_traces(model, guide, args, kwargs):
        terms = exact_terms(model_trace, guide_trace)
        if terms is None:
            terms, split = {"": _expected_elbo(model_trace, guide_trace)}, False
        for name, term in terms.items():
            surrogates.append(-term / loss.num_particles)
            found[name] = found.get(name, 0.0) + term.detach() / loss.num_particles
    surrogate = total(surrogates)
    return Estimate(surrogate.detach(), surrogate, found if split else {})


def _expected_elbo(model_trace: Trace, guide_trace: Trace) -> Tensor:
    costs, log_factors, ordering, dims, scale = _compute_model_factors(model_trace, guide_trace)
    for ordinal, terms in _summed_out(log_factors, dims).items():
        costs.setdefault(ordinal, []).extend(packed.scale_and_mask(t, scale=scale) for t in terms)
    for name, site in guide_trace.nodes.items():
        if site["type"] == "sample":
            costs.setdefault(ordering[name], []).append(packed.neg(site["packed"]["log_prob"]))
    return _Expectation(guide_trace, ordering).compute_expectation(costs)


def _summed_out(log_factors: OrderedDict, dims: set[str]) -> OrderedDict:
    """The factors of the model with its enumerated sites summed out."""
    if not log_factors:
        return log_factors
    every = [term for terms in log_factors.values() for term in terms]
    sizes = {d: n for term in every for d, n in zip(term._pyro_dims, term.shape, strict=True)}
    with shared_intermediates() as cache:
        ring = SampleRing(cache=cache, dim_to_size=sizes)
        return contract_tensor_tree(log_factors, dims, ring=ring)


class _Expectation(Dice):
    """Expected costs under the enumerated sites of a guide."""

    def compute_expectation(self, costs: dict) -> Tensor:
        """The sum of the costs, each weighted by the probability of what it depends on."""
        with shared_intermediates() as cache:
            ring = MarginalRing(cache=cache)
            return total(self._at(ordinal, terms, ring) for ordinal, terms in costs.items())

    def _at(self, ordinal: frozenset, costs: list[Any], ring: MarginalRing) -> Tensor:
        factors = self._get_log_factors(ordinal)
        scale = math.exp(sum(f for f in factors if not isinstance(f, Tensor)))
        factors = [f for f in factors if isinstance(f, Tensor)]
        queries = {frozenset(f._pyro_dims): f for f in reversed(factors)}
        for cost in costs:
            if frozenset(cost._pyro_dims) not in queries:
                query: Any = torch.zeros_like(cost)
                query._pyro_dims = cost._pyro_dims
                factors.append(query)
                queries[frozenset(cost._pyro_dims)] = query
        asked = {frozenset(cost._pyro_dims) for cost in costs}
        queries = {key: query for key, query in queries.items() if key in asked}
        for query in queries.values():
            require_backward(query)
        dims = set().union(*(f._pyro_dims for f in factors)) - ordinal
        ring.sumproduct(factors, dims)._pyro_backward()
        return scale * total(_weighted(cost, queries[frozenset(cost._pyro_dims)]) for cost in costs)


def _weighted(cost: Any, query: Any) -> Tensor:
    """The sum of a cost times its probability, where that is not zero."""
    probability = query._pyro_backward_result.exp()
    probability._pyro_dims = query._pyro_dims
    cost, probability = packed.broadcast_all(cost, probability)
    return (probability * cost.masked_fill(probability == 0, 0.0)).sum()
