"""ln p(x, z) and ln q(z | x) of drawn or given latents: what every estimate of log p(x) needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from pyro.distributions import Delta
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Transform, biject_to
from torch.distributions.constraints import MixtureSameFamilyConstraint

from pyrovae._tools import InputError
from pyrovae.pairs.pair import Given, Pair
from pyrovae.pairs.traces import Layout, Values, is_bookkeeping, reduce_to, samples

__all__ = ["Joint", "Place", "Scored", "Values", "add_up", "refuse_nan", "to_support"]


class Place(Given):
    r"""Sets latent sites to given values, and observed ones to other data.

    Args:
        values: Values of latents by site.
        observed: Values of observed sites.
        line: Take a latent's value as a point u of real coordinates, and set the site to T(u) of
            its support, :func:`torch.distributions.biject_to`; ``log_det`` collects
            :math:`\ln |\partial T / \partial u|` by site.
    """

    def __init__(self, values: Values, observed: Values, line: bool = False) -> None:
        super().__init__(values, observed)
        self.line = line
        self.log_det: Values = {}

    def latent(self, msg: Any, value: Tensor) -> Tensor:
        """The value, or the image of a point of the real line."""
        if not self.line:
            return value
        transform = to_support(msg["name"], msg["fn"])
        image = transform(value)
        self.log_det[msg["name"]] = transform.log_abs_det_jacobian(value, image)
        return image


class Scored(NamedTuple):
    """What a model gave latents: scores ``[K, N]`` by site, the latents, and ln|∂T/∂u| ``[K, N]``.

    The last is zero where the latents were given as they are.
    """

    scores: Values
    latents: Values
    log_det: Tensor | float


class Joint:
    """A pair's densities at ``[K, N]`` points, K particles of each of N data.

    Args:
        pair: The pair.
        layout: What :func:`pyrovae.pairs.contract.inspect_pair` said of it.
        replaced: Observed sites whose values follow the programs' arguments in ``rows``, each with
            the place of the batch in its value, counted from the right.

    ``rows`` is everywhere a tuple of tensors ``[N, ...]``, ``values`` are latents ``[K, ..., N,
    ...]`` by site. With ``fused``, scores are written for a compiler.
    """

    def __init__(self, pair: Pair, layout: Layout, replaced: dict[str, int] | None = None) -> None:
        self.pair, self.layout, self.replaced = pair, layout, replaced or {}
        self.fused = False

    def draw(self, rows: tuple, particles: int) -> tuple[Values, Values]:
        """Draw K latents of each datum from the guide: values and scores ``[K, N]`` by site."""
        return self.pair.draw(self.args(rows), particles)

    def draw_prior(self, rows: tuple, particles: int) -> Values:
        """Draw K latents of each datum from the model's prior."""
        return self.pair.draw_prior(self.args(rows), particles, self._observed(rows))

    def guide(self, rows: tuple, particles: int, values: Values) -> Values:
        """The guide's scores ``[K, N]`` by site, at given latents."""
        return self.pair.score_guide(self.args(rows), particles, values)

    def model(self, rows: tuple, particles: int, values: Values, line: bool = False) -> Scored:
        """The model's scores at given latents, or with ``line`` at points on the real line."""
        place = Place(values, self._observed(rows), line)
        found, latents = self.pair.score_model(self.args(rows), particles, place, fused=self.fused)
        log_det = add_up(
            reduce_to(each, self.layout, particles, len(rows[0])) for each in place.log_det.values()
        )
        return Scored(found, latents, log_det)

    def split(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """ln p(z), as a density where the values were given, and ln p(x | z), ``[K, N]``."""
        latents, scores = self.layout.latents + self.layout.enumerated, scored.scores
        prior = add_up(score for name, score in scores.items() if name in latents)
        likelihood = add_up(score for name, score in scores.items() if name not in latents)
        return torch.zeros_like(likelihood) + prior + scored.log_det, likelihood

    def on_the_line(self, rows: tuple, particles: int, values: Values) -> Values:
        """The points of the real line whose images latents are."""
        place = Place(values, self._observed(rows))
        trace = self.trace(self.pair.run_model, rows, particles, place)
        return {n: to_support(n, trace.nodes[n]["fn"]).inv(v) for n, v in values.items()}

    def args(self, rows: tuple) -> tuple:
        """The arguments of the programs in ``rows``."""
        return rows[: len(rows) - len(self.replaced)]

    def axes(self, rows: tuple) -> dict[str, int]:
        """Where the batch lies in each latent's value on the line, counted from the right."""
        trace = self.trace(self.pair.run_model, rows, 1, Place({}, self._observed(rows)))
        fns = {name: trace.nodes[name]["fn"] for name in self.layout.latents}
        return {n: self.layout.dim - to_support(n, fn).domain.event_dim for n, fn in fns.items()}

    def odd_sites(self, rows: tuple) -> tuple[list[str], list[str]]:
        """The guide's auxiliary sites, and its latents that are points without a density."""
        trace = self.trace(self.pair.run_guide, rows, 1, Place({}, {}))
        sites = {n: s for n, s in samples(trace).items() if not is_bookkeeping(s)}
        points = [name for name, site in sites.items() if _is_delta(site["fn"])]
        return [name for name in sites if name not in self.layout.latents], points

    def trace(self, program: Callable, rows: tuple, particles: int, place: Given) -> Trace:
        """Trace a program with K particles, its sites set as ``place`` says."""
        return self.pair.trace_given(program, self.args(rows), particles, place)

    def _observed(self, rows: tuple) -> Values:
        values = rows[len(rows) - len(self.replaced) :]
        places = zip(self.replaced.items(), values, strict=True)
        return {name: value.movedim(0, axis) for (name, axis), value in places}


def refuse_nan(guide: Values, model: Values, first_row: int) -> None:
    """Say which site's score ``[K, N]`` is NaN, and for which datum.

    Raises:
        ValueError: In any case.
    """
    for program, scores in (("guide", guide), ("model", model)):
        for name, score in scores.items():
            bad = score.isnan().any(0).nonzero()
            if len(bad):
                raise InputError(
                    f"The log-probability of site {name!r} in the {program} is NaN for datum "
                    f"{first_row + bad[0].item()}: look at its parameters there."
                )
    raise InputError(
        "A log-weight is infinity minus infinity: a guide's site has no finite log-probability "
        "at its own draw."
    )


def to_support(name: str, fn: Any) -> Transform:
    """The bijection from the real line to a latent's support.

    Raises:
        ValueError: If the latent is discrete, or no bijection is known.
    """
    if fn.support.is_discrete:
        raise InputError(
            f"Latent {name!r} is discrete, where annealing and refining need gradients: use "
            f"pyrovae.log_likelihood without refine_steps, or sum it out: mark it with "
            f"infer={{'enumerate': 'parallel'}} in the model and leave it out of the guide."
        )
    support = fn.support
    while isinstance(support, MixtureSameFamilyConstraint):
        support = support.base_constraint
    try:
        return biject_to(support)
    except NotImplementedError as error:
        raise InputError(
            f"Latent {name!r} lives on {fn.support}, to which no bijection from the real line is "
            f"known: use pyrovae.log_likelihood, or register one with torch's biject_to."
        ) from error


def _is_delta(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def add_up(scores: Iterable[Tensor]) -> Tensor | float:
    """The sum of scores, in float64; zero of none."""
    return sum(score.double() for score in scores)
