"""The scores of the sites of a model's trace and its guide's: densities, or divergences."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Distribution
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO, TraceMeanField_ELBO
from pyro.infer.trace_mean_field_elbo import _check_mean_field_requirement
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from pyrovae.distributions import divergence
from pyrovae.pairs.traces import samples

UNSCORED = ScoreParts(0.0, 0.0, 0.0)  # type: ignore[arg-type]  # Numbers do as well.


def score(model_trace: Trace, guide_trace: Trace, *, analytic: bool) -> None:
    r"""Score the sites of both traces, where ``analytic`` with ``kl`` in the place of densities.

    The guide's site gets :math:`\mathrm{KL}(q \| p)` where torch knows its closed form and it is
    exact. Half of an eager step's densities need not be evaluated then.
    """
    closed = _divergences(model_trace, guide_trace) if analytic else {}
    for name, kl in closed.items():
        site: Any = guide_trace.nodes[name]
        site["kl"] = kl
        plain = type(site["fn"]).score_parts is Distribution.score_parts
        if plain and site["fn"].has_rsample:
            site["score_parts"] = UNSCORED
    model_trace.compute_log_prob(lambda name, site: name not in closed)
    guide_trace.compute_score_parts()


def in_one_order(model_trace: Trace, guide_trace: Trace) -> bool:
    """Whether both programs sample their latents in one order, so that closed forms are exact."""
    # A closed form averages over its own latent alone, which is wrong where the model puts it
    # below a latent that the guide draws from it.
    model, guide = samples(model_trace), samples(guide_trace)
    return [name for name in model if name in guide] == [name for name in guide if name in model]


def _divergences(model_trace: Trace, guide_trace: Trace) -> dict[str, Tensor]:
    """KL(q ‖ p) of the latents that have a closed form, if it is exact."""
    model, guide = samples(model_trace), samples(guide_trace)
    found: dict[str, Tensor] = {}
    for name in model if in_one_order(model_trace, guide_trace) else ():
        if name in guide and not model[name]["is_observed"]:
            q = guide[name]
            with suppress(NotImplementedError):
                # Where a whole distribution is masked, it is Python's number 0.
                kl = torch.as_tensor(divergence(q["fn"], model[name]["fn"]))
                kl = scale_and_mask(kl.to(q["value"].device), scale=q["scale"], mask=q["mask"])
                found[name] = kl.expand(q["fn"].batch_shape)
    return found


class Analytic(TraceMeanField_ELBO):
    """Pyro's estimator B without the densities of latents whose divergence has a closed form."""

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(
            *args, **kwargs
        )
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
        traces = prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)
        score(*traces, analytic=True)
        if is_validation_enabled():
            for site in [*samples(traces[0]).values(), *samples(traces[1]).values()]:
                density = torch.empty(site["fn"].batch_shape, device="meta")
                check_site_shape({"log_prob": density} | site, self.max_plate_nesting)
            _check_mean_field_requirement(*traces)
        return traces

    @classmethod
    def like(cls, loss: ELBO) -> ELBO:
        """The same estimator, which shares what ``loss`` has and finds out."""
        made = object.__new__(cls)
        made.__dict__ = vars(loss)
        return made
