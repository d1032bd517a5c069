"""A pair's draws for each datum: latents with their weights, and what the model predicts."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import infer_discrete
from torch import Tensor

from pyrovae._tools.seeding import seeded, subseed
from pyrovae.evidence.density import Joint, Place, Values, add_up, refuse_nan
from pyrovae.evidence.estimation import particle_tile
from pyrovae.evidence.tiles import DATA_TILE, Found
from pyrovae.pairs.traces import is_bookkeeping

__all__ = ["Draws", "systematic"]

SUMMED_STREAM, RESAMPLED_STREAM, POSTERIOR_STREAM, PRIOR_STREAM = 11, 12, 13, 14
BITS = (type(constraints.boolean), type(constraints.one_hot))
COUNTS = (
    constraints.integer_interval,
    constraints.multinomial,
    type(constraints.nonnegative_integer),
)


class Draws:
    """Draws K latents of each datum of a tile, weighs them, and predicts new data from them.

    Args:
        joint: The pair.
        seed: Seeds all draws; those of the guide are the ones that
            :func:`pyrovae.log_likelihood` makes of this seed.
        num_samples: K, the draws of each datum's latents.
        num_prior: The draws from the prior for each datum; 0 for none.
        resample: Replace the guide's draws by as many resampled with their weights.
        tile: How many the guide draws at once.

    Called with a tile's number and its rows, it returns ``group/site`` by name: ``[N, K, ...]``,
    and ``[N, ...]`` of what is observed. Values that count are integers, and those of a latent
    where it is masked out are NaN.
    """

    def __init__(
        self,
        joint: Joint,
        rows: tuple,
        seed: int,
        *,
        num_samples: int,
        num_prior: int,
        resample: bool,
    ) -> None:
        self.joint, self.seed, self.resample = joint, seed, resample
        self.num_samples, self.num_prior, self.tile = num_samples, num_prior, particle_tile(rows)
        self.forward = poutine.uncondition(joint.pair.run_model)

    def __call__(self, index: int, rows: tuple) -> Found:
        joint, seed = self.joint, subseed(self.seed, index)
        with seeded(seed, rows[0].device):
            given = joint.trace(joint.pair.run_model, rows, 1, Place({}, {})).nodes
        seen = [name for name in joint.layout.observed if not _is_computed(given[name])]
        data = [name for name in seen if not is_bookkeeping(given[name])]
        values, scores, log_weight = self._posterior(rows, seed, index * DATA_TILE)
        if self.resample:
            values, scores, log_weight = self._resampled(given, values, scores, log_weight, seed)
        found = {"sample_stats/log_weight": log_weight.T}
        found |= {f"log_likelihood/{name}": scores[name].double().T for name in seen}
        found |= {f"posterior/{n}": self._plain(v, given[n]) for n, v in values.items()}
        predicted = self._forward(rows, self.num_samples, values, subseed(seed, POSTERIOR_STREAM))
        found |= self._values("posterior_predictive", predicted, data, given)
        if self.num_prior:
            imagined = self._forward(rows, self.num_prior, {}, subseed(seed, PRIOR_STREAM))
            found |= self._values("prior", imagined, values, given)
            found |= self._values("prior_predictive", imagined, data, given)
        return found | self._values("observed_data", given, data, given)

    def _posterior(self, rows: tuple, seed: int, first: int) -> tuple[Values, Values, Tensor]:
        """Latents, the model's scores ``[K, N]`` by site, and the log-weights ``[K, N]``."""
        joint, parts = self.joint, []
        for number, start in enumerate(range(0, self.num_samples, self.tile)):
            with seeded(subseed(seed, number), rows[0].device):
                drawn = joint.draw(rows, self.tile)
            stop = min(self.tile, self.num_samples - start)
            parts.append([{n: v[:stop] for n, v in each.items()} for each in drawn])
        values, guide = (
            {n: torch.cat([p[n] for p in ps]) for n in ps[0]} for ps in zip(*parts, strict=True)
        )
        scored = joint.model(rows, self.num_samples, values)
        prior, likelihood = joint.split(scored)
        log_weight = prior + likelihood - add_up(guide.values())
        if bool(log_weight.isnan().any()):
            refuse_nan(guide, scored.scores, first)
        if joint.layout.enumerated:
            with seeded(subseed(seed, SUMMED_STREAM), rows[0].device):
                values = values | self._summed_out(rows, values)
        return values, scored.scores, log_weight

    def _summed_out(self, rows: tuple, values: Values) -> Values:
        """Draws of what the model sums over, from its exact posterior given the other latents."""
        joint, layout = self.joint, self.joint.layout
        model = poutine.condition(joint.pair.run_model, data=values)

        def with_particles(*args: Tensor) -> None:
            with pyro.plate("particles", self.num_samples, dim=layout.particle_dim):
                model(*args)

        program = infer_discrete(with_particles, first_available_dim=layout.particle_dim - 1)
        trace = poutine.trace(program).get_trace(*joint.args(rows))
        return {name: trace.nodes[name]["value"] for name in layout.enumerated}

    def _resampled(
        self, given: dict, values: Values, scores: Values, log_weight: Tensor, seed: int
    ) -> tuple[Values, Values, Tensor]:
        """The draws that systematic resampling keeps; each then weighs as much as the average."""
        with seeded(subseed(seed, RESAMPLED_STREAM), log_weight.device):
            index = systematic(log_weight)
        values = {n: _take(v, index, self._axis(given[n])) for n, v in values.items()}
        scores = {name: _take(score, index, -1) for name, score in scores.items()}
        average = log_weight.logsumexp(0) - torch.tensor(len(log_weight)).log()
        return values, scores, average.expand_as(log_weight)

    def _forward(self, rows: tuple, particles: int, values: Values, seed: int) -> dict:
        with seeded(seed, rows[0].device):
            return self.joint.trace(self.forward, rows, particles, Place(values, {})).nodes

    def _values(self, group: str, nodes: dict, names: list[str] | Values, given: dict) -> Found:
        masked = not group.endswith("predictive")
        return {
            f"{group}/{name}": self._plain(nodes[name]["value"], given[name], masked=masked)
            for name in names
        }

    def _plain(self, value: Tensor, site: dict, *, masked: bool = True) -> Tensor:
        """A site's value with the datum first and its particles second, without idle plates."""
        event_dim, mask = site["fn"].event_dim, site["mask"]
        value = _typed(value, site["fn"])
        if masked and isinstance(mask, Tensor) and not bool(mask.all()):
            here = mask.reshape(*mask.shape, *[1] * event_dim)
            value = torch.where(
                here, value if value.is_floating_point() else value.float(), torch.nan
            )
        used = {f.dim for f in site["cond_indep_stack"] if f.vectorized}
        idle = [d - event_dim for d in range(event_dim - value.dim(), 0) if d not in used]
        axis = self._axis(site)
        kept = [axis, *(d for d in range(-value.dim(), 0) if d != axis and d not in idle)]
        return value.permute(*kept, *idle).reshape([value.shape[d] for d in kept])

    def _axis(self, site: dict) -> int:
        """Where the batch lies in a site's value, counted from the right."""
        return self.joint.layout.dim - site["fn"].event_dim


def systematic(log_weight: Tensor) -> Tensor:
    r"""Resample by weight, with one uniform number for each datum, in random order.

    .. math:: \#\{j : i_j = k\} \in \{\lfloor K \bar w_k \rfloor, \lceil K \bar w_k \rceil\},
              \qquad E\,\#\{j : i_j = k\} = K \bar w_k

    Args:
        log_weight: Log-weights ``[K, N]`` in nats; where all are zero weights, all count alike.

    Returns:
        The indices of the draws to keep, ``[K, N]``.

    References:
        Douc, Cappé and Moulines, Comparison of Resampling Schemes for Particle Filtering
        (arXiv cs/0507025).
    """
    k, n = log_weight.shape
    impossible = (log_weight == -torch.inf).all(0)
    weight = torch.where(impossible, 0.0, log_weight.double()).softmax(0)
    ladder = weight.cumsum(0) / weight.sum(0)
    steps = torch.arange(k, device=weight.device)[:, None] + torch.rand_like(weight[:1])
    kept = torch.searchsorted(ladder.T.contiguous(), (steps / k).T.contiguous(), right=True).T
    order = torch.rand(k, n, device=weight.device).argsort(0)
    return kept.clamp(max=k - 1).gather(0, order)


def _take(value: Tensor, index: Tensor, axis: int) -> Tensor:
    shape = [1] * value.dim()
    shape[0], shape[axis] = index.shape
    return value.gather(0, index.reshape(shape).expand_as(value))


def _is_computed(site: dict) -> bool:
    return bool(site["infer"].get("_deterministic"))


def _typed(value: Tensor, fn: dist.Distribution) -> Tensor:
    """Integers where a site's values count something."""
    support = fn.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if isinstance(support, BITS):
        return value.to(torch.int8)
    if isinstance(support, COUNTS):
        return value.to(torch.int64)
    return value
