"""A pair: a model and its guide as one object that runs, draws, scores, and owns parameters.

Everything else in the package takes a :class:`Pair` and looks at the traces that it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import pyro
from pyro import poutine
from pyro.infer import infer_discrete
from pyro.nn import PyroModule
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor, nn

from pyrovae._tools import InputError
from pyrovae.pairs.enumeration import sum_out
from pyrovae.pairs.folding import Fold
from pyrovae.pairs.parameters import Parameters, Program
from pyrovae.pairs.support import quantized
from pyrovae.pairs.traces import Layout, Site, Values, site_scores, without_factors


class Pair(Parameters):
    """A model and its guide: two programs, their parameters, and the layout of their sites.

    Args:
        model: The model program, or None for a guide alone.
        guide: The guide program, or None for a model alone.
        store: Let parameter statements reach Pyro's global store, as :class:`pyro.infer.SVI` does.

    ``layout`` is what :func:`pyrovae.pairs.contract.inspect_pair` found, and ``folds`` whether the
    programs take particles as further rows alone (:class:`Fold`). ``rows`` is everywhere a
    batch with the programs' further arguments, ``[N, ...]`` each; values of latents are
    ``[K, ..., N, ...]`` by site.
    """

    layout: Layout

    def __init__(self, model: Program, guide: Program, *, store: bool = False) -> None:
        self.model, self.guide = model, guide
        super().__init__(model, guide)
        self._serve = [nullcontext() if store else OwnParameters(self, i) for i in (0, 1)]

    def run_model(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with its modules' own parameters."""
        with self._serve[0]:
            return self.model(*args, **kwargs)  # type: ignore[misc]  # None only for a lone guide

    def run_guide(self, *args: Any, **kwargs: Any) -> Any:
        """Run the guide with its modules' own parameters."""
        with self._serve[1]:
            return self.guide(*args, **kwargs)  # type: ignore[misc]  # None only for a lone model

    def trace(
        self, *rows: Any, particles: int | None = None, sums: bool | None = None
    ) -> tuple[Trace, Trace]:
        """Trace the model replayed against its guide: the model's trace, and the guide's.

        ``particles`` is the size K of a plate to the left of all others. ``sums`` says to sum over
        the latents that the model enumerates, which are drawn from the model otherwise; by
        default they are where there are particles. Sites of subsampling plates are left out.
        """
        guide_trace = self.trace_guide(*rows, particles=particles)
        model_trace = self.replay_model(guide_trace, *rows, particles=particles, sums=sums)
        return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)

    def trace_guide(self, *rows: Any, particles: int | None = None) -> Trace:
        """Trace the guide alone; arguments as in :meth:`trace`."""
        return self.trace_given(self.run_guide, rows, particles)

    def replay_model(
        self, guide_trace: Trace, *rows: Any, particles: int | None = None, sums: bool | None = None
    ) -> Trace:
        """Trace the model with the latents of a guide's trace; arguments as in :meth:`trace`."""
        summed = self.known.enumerated if (particles is not None if sums is None else sums) else ()
        program = poutine.replay(self._summing(summed), trace=guide_trace)
        trace = self.trace_given(program, rows, particles)
        return sum_out(trace, summed) if summed else trace

    def trace_posterior(self, *rows: Any) -> Trace:
        """Trace the model at one draw of every latent given the batch.

        The guide draws what it samples; what the model sums over is drawn from its exact
        posterior given the guide's draw.
        """
        guide_trace = self.trace_guide(*rows)
        if not self.known.enumerated:
            return self.replay_model(guide_trace, *rows, sums=False)
        return self.trace_summed(self._latents(guide_trace), *rows)

    def trace_summed(self, values: Values, *rows: Any, particles: int | None = None) -> Trace:
        """Trace the model at given latents, with those that it sums over drawn given them."""
        left, fold = self.known.particle_dim - (particles is not None), self._fold(rows, particles)
        program = infer_discrete(
            lambda *args: self.trace_given(self.run_model, args, particles, Given(values)),
            first_available_dim=left,
        )
        found = poutine.trace(program).get_trace(*rows)
        return fold.read(found) if fold else found

    def trace_given(
        self,
        program: Callable,
        rows: tuple,
        particles: int | None = None,
        given: Given | None = None,
    ) -> Trace:
        """Trace one of the programs with K particles, its sites set as ``given`` says."""
        fold, plate = self._fold(rows, particles), cast(Any, nullcontext())
        if particles is not None:
            plate = fold or pyro.plate("particles", particles, dim=self.known.particle_dim)
        with given or nullcontext(), plate:
            trace = poutine.trace(program).get_trace(*(fold.rows(rows) if fold else rows))
        return fold.read(trace) if fold else trace

    def _fold(self, rows: tuple, particles: int | None) -> Fold | None:
        return Fold(self.known, particles, len(rows[0])) if self.folds and particles else None

    def _summing(self, summed: tuple[str, ...]) -> Callable:
        if not summed:
            return self.run_model
        return poutine.enum(self.run_model, first_available_dim=self.known.particle_dim - 1)

    @property
    def known(self) -> Layout:
        """The layout, which :func:`pyrovae.pairs.contract.inspect_pair` has to have found."""
        if "layout" not in vars(self):
            raise RuntimeError("The pair has not been inspected: call inspect_pair first.")
        return self.layout

    def draw(self, rows: tuple, particles: int) -> tuple[Values, Values]:
        """Draw K latents of each datum from the guide: values and scores ``[K, N]`` by site."""
        trace = without_factors(self.trace_guide(*rows, particles=particles))
        return self._latents(trace), site_scores(trace, self.known, particles, len(rows[0]))

    def draw_prior(self, rows: tuple, particles: int) -> Values:
        """Draw K latents of each datum from the model's prior."""
        return self._latents(self.trace_given(self.run_model, rows, particles))

    def score_guide(self, rows: tuple, particles: int | None, values: Values) -> Values:
        """The guide's scores ``[K, N]`` by site, at given latents."""
        trace = without_factors(self.trace_given(self.run_guide, rows, particles, Given(values)))
        return site_scores(trace, self.known, particles, len(rows[0]))

    def score_model(
        self, rows: tuple, particles: int | None, given: Given | Values, *, fused: bool = False
    ) -> tuple[Values, Values]:
        """The model's scores ``[K, N]`` by site at given latents, and those latents."""
        layout = self.known
        given = given if isinstance(given, Given) else Given(given)
        trace = self.trace_given(self._summing(layout.enumerated), rows, particles, given)
        if layout.enumerated:
            trace = sum_out(trace, layout.enumerated)
        found = site_scores(trace, layout, particles, len(rows[0]), fused=fused)
        return found, self._latents(trace)

    def _latents(self, trace: Trace) -> Values:
        nodes: dict[str, Site] = trace.nodes
        if absent := [name for name in self.known.latents if name not in nodes]:
            raise InputError(
                f"The programs have no latents {absent} on this batch, and had them on the first: "
                f"sample the same sites for every batch, and mask what a datum lacks."
            )
        return {name: nodes[name]["value"] for name in self.known.latents}


class Given(Messenger):
    """Sets latent sites to given values, by name, and observed ones to other data."""

    def __init__(self, values: Values, observed: Values | None = None) -> None:
        super().__init__()
        self.values, self.observed = values, observed or {}

    def _pyro_sample(self, msg: Any) -> None:
        known = self.observed if msg["is_observed"] else self.values
        if (value := known.get(msg["name"])) is not None:
            value = msg["fold"].join(value, msg["fn"].event_dim) if "fold" in msg else value
            msg["value"] = value if msg["is_observed"] else self.latent(msg, value)

    def latent(self, msg: Any, value: Tensor) -> Tensor:
        """What a latent site is set to."""
        return value


class OwnParameters(Messenger):
    """Runs a program with its modules' parameters served by the modules, not by Pyro's store.

    Pyro files every parameter under its name in one global store, where a second module with the
    same attribute names meets the first one's values, and a PyroModule then trains those instead
    of its own (seen in Pyro 1.9.2, ``PyroModule.__getattr__``). So entries that a module of the
    program would meet are set aside while it runs; the store keeps what a program asks of it by
    name with ``pyro.param("name", initial_value)``. Pyro has no public way to move an entry with
    its constraint, hence ``_params`` and ``_constraints``.

    What is stated and drawn is noted at the pair; what only the store saw stated is ``blocked``.
    """

    def __init__(self, pair: Parameters, program: int) -> None:
        super().__init__()
        self.pair, self.modules = pair, pair.owned[program]
        self.found, self.sites = pair.found[program], pair.sites[program]
        self._owned = [p for module in self.modules for p in module.parameters()]

    def __enter__(self) -> OwnParameters:
        store = pyro.get_param_store()
        self._aside = {n: _take(store, n) for n in self._met_by_modules(store)}
        # With module-local parameters a PyroModule swaps in a store of its own while it runs.
        self._local = pyro.settings.get("module_local_params")
        if self._local:
            pyro.settings.set(module_local_params=False)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._local:
            pyro.settings.set(module_local_params=True)
        store = pyro.get_param_store()
        for name in self._met_by_modules(store):
            value, _ = _take(store, name)
            if value not in self.pair.met:
                self.pair.blocked.add(value)
        for name, (value, constraint) in self._aside.items():
            store.set_state({"params": {name: value}, "constraints": {name: constraint}})

    def _met_by_modules(self, store: Any) -> list[str]:
        """The names of entries that a module of the program would meet."""
        kinds = {n: isinstance(value, nn.Parameter) for n, value in store._params.items()}
        # Modules are walked through only where something in the store asks for it.
        own = () if all(kinds.values()) else _pyro_param_names(self.modules)
        return [n for n, foreign in kinds.items() if foreign or n in own]

    def _pyro_param(self, msg: Any) -> None:
        store = pyro.get_param_store()
        if msg["fn"] != store.get_param or len(msg["args"]) < 2:
            return
        name, initial = msg["args"][0], msg["args"][1]
        if isinstance(initial, nn.Parameter):
            msg["value"] = initial
        elif isinstance(initial, Tensor) and name in store and initial.shape != store[name].shape:
            raise InputError(
                f"pyro.param({name!r}) asks for shape {list(initial.shape)}, but Pyro's store "
                f"holds {list(store[name].shape)} under that name, from another program: call "
                f"pyro.clear_param_store() first, or give the parameter another name."
            )

    def _pyro_post_param(self, msg: Any) -> None:
        value = msg["value"]
        leaf = value if isinstance(value, nn.Parameter) else value.unconstrained()
        if leaf is None:
            return
        if msg["name"] not in self.found and not any(leaf is p for p in self._owned):
            # pyro.module may be the only one to know of the module.
            self.pair.adopt(self.modules)
        self.found[msg["name"]] = leaf
        self.pair.met.add(leaf)

    def _pyro_sample(self, msg: Any) -> None:
        if self.pair.rounds and self.pair.evaluates:
            msg["fn"] = quantized(msg["fn"])

    def _pyro_post_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            self.sites[msg["name"]] = {key: msg[key] for key in ("is_observed", "infer")}


def _pyro_param_names(modules: list[nn.Module]) -> list[str]:
    return [
        f"{child._pyro_name}.{name}" if child._pyro_name else name
        for module in modules
        for child in module.modules()
        if isinstance(child, PyroModule)
        for name in child._pyro_params
    ]


def _take(store: Any, name: str) -> tuple[Tensor, Any]:
    taken = store._params[name], store._constraints[name]
    del store[name]
    return taken
