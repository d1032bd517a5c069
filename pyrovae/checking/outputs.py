"""Whether gradients go back from what distributions are given to all that it depends on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae.checking.case import Case
from pyrovae.pairs.contract import leaves_behind
from pyrovae.pairs.pair import Given
from pyrovae.pairs.traces import Values, drawn, samples

# By how much parameters are moved.
MOVED = 1e-2
# What moves an output by less is rounding.
ROUNDING = 1e-6

Output = tuple[str, str, str]  # the program, the site, and the argument


class Cut(NamedTuple):
    """An argument of a distribution that changes with sources to which no gradient goes back.

    ``sources`` are names of parameters, or of latents as ``latent z``; ``dead`` says that it has
    no gradient to any source at all.
    """

    program: str
    site: str
    argument: str
    sources: tuple[str, ...]
    dead: bool


def cuts(case: Case) -> tuple[list[Cut], list[str]]:
    """The arguments that depend on a parameter or a latent without a gradient to it.

    And the parameters to which no gradient goes back from anything.

    The sources that an argument's graph does not reach are moved, all other values held: where
    that moves the argument, something between them stops the gradient. What no source moves, such
    as a constant, needs none, and what is frozen is no source.
    """
    programs = {"guide": case.inspected.run_guide, "model": case.inspected.run_model}
    values = _values(case)
    sources: Values = case.pair.named()
    sources |= {f"latent {name}": v for name, v in values.items() if v.requires_grad}
    with case.quietly(gradients=True):
        outputs = _outputs(case, programs, values)
    known = {id(leaf): name for name, leaf in sources.items()}
    reached = {key: {known.get(id(t)) for t in _leaves(out)} for key, out in outputs.items()}
    still = _run(case, programs, values)
    again = _run(case, programs, values)
    steady = {key for key in still if key in again and not _moves(still[key], again[key])}
    found: dict[Output, list[str]] = {}
    missing = {k: frozenset(sources.keys() - reached[k]) for k in outputs if k in steady}
    for names in dict.fromkeys(missing.values()):
        keys = [key for key, each in missing.items() if each == names]
        for name in _movers(case, programs, values, sources, still, keys, sorted(names)):
            for key in _moved(case, programs, values, {name: sources[name]}, still, keys):
                found.setdefault(key, []).append(name)
    # Where an argument was found, the density that follows from it says nothing more.
    named = {key[:2] for key in found if key[2] != "log_prob"}
    stopped = [
        Cut(*key, tuple(found[key]), dead=not reached[key] & sources.keys())
        for key in outputs
        if key in found
        if key[2] != "log_prob" or key[:2] not in named
    ]
    used = set().union(*reached.values())
    return stopped, [name for name in case.pair.named() if name not in used]


def _values(case: Case) -> Values:
    """A value of every latent of either program; those with a gradient are leaves."""
    pair = case.inspected
    with case.quietly():
        guide = drawn(pair.trace_guide(*case.few))
        given = Given({name: site["value"] for name, site in guide.items()})
        model = drawn(pair.trace_given(pair.run_model, case.few, None, given))
    found = {}
    for name, site in (model | guide).items():
        value = site["value"].detach().clone()
        pathwise = getattr(site["fn"], "has_rsample", False) and value.is_floating_point()
        found[name] = value.requires_grad_() if pathwise and name in model else value
    return found


def _outputs(case: Case, programs: dict, values: Values) -> dict[Output, Tensor]:
    """Every argument of every site's distribution, and the densities, at given latents."""
    found: dict[Output, Tensor] = {}
    for kind, program in programs.items():
        trace = case.inspected.trace_given(program, case.few, None, Given(values))
        for name, site in samples(trace).items():
            if site["infer"].get("_deterministic"):
                continue
            for argument, value in _arguments(site["fn"]):
                found[kind, name, argument] = value
            # A guide may be unable to score what it did not draw.
            with suppress(NotImplementedError, KeyError, ValueError):
                found[kind, name, "log_prob"] = site["fn"].log_prob(site["value"])
    return found


def _arguments(fn: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a distribution was made from, by the names of its parameters."""
    while fn is not None:
        for argument in getattr(fn, "arg_constraints", {}):
            value = vars(fn).get(argument)
            if isinstance(value, Tensor) and value.is_floating_point():
                yield argument, value
        fn = getattr(fn, "_component_distribution", None) or getattr(fn, "base_dist", None)


def _run(case: Case, programs: dict, values: Values) -> dict[Output, Tensor]:
    with case.quietly():
        # An argument may be a view of a parameter, which is going to be moved.
        return {key: out.clone() for key, out in _outputs(case, programs, values).items()}


def _leaves(output: Tensor) -> list[Tensor]:
    return [output] if output.is_leaf else leaves_behind(output, set())


def _movers(
    case: Case,
    programs: dict,
    values: Values,
    sources: Values,
    still: dict,
    keys: list,
    names: list,
) -> list[str]:
    """Those of some sources that move an output, found by halves: most often there is none."""
    some = {name: sources[name] for name in names}
    if not names or not _moved(case, programs, values, some, still, keys):
        return []
    if len(names) == 1:
        return names
    half = len(names) // 2
    parts = names[:half], names[half:]
    return [n for p in parts for n in _movers(case, programs, values, sources, still, keys, p)]


def _moved(
    case: Case, programs: dict, values: Values, sources: Values, still: dict, keys: list
) -> list[Output]:
    """The outputs that change when some sources do."""
    needed = {kind: programs[kind] for kind in {key[0] for key in keys}}
    latents = {n: v.detach().roll(1, 0) for n, v in values.items() if f"latent {n}" in sources}
    leaves = [leaf for name, leaf in sources.items() if not name.startswith("latent ")]
    with _shifted(leaves, case.seed):
        try:
            now = _run(case, needed, values | latents)
        except (ValueError, RuntimeError, ArithmeticError):
            return []  # nothing is known where a program does not run
    return [key for key in keys if key in now and _moves(still[key], now[key])]


@contextmanager
def _shifted(leaves: list[Tensor], seed: int) -> Iterator[None]:
    """Run a block with other values of some leaves."""
    before = [leaf.detach().clone() for leaf in leaves]
    stream = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for leaf in leaves:
                # A product of two vectors moves a matrix in a general direction at little cost.
                rows = torch.randn(leaf.shape[:1], generator=stream).to(leaf)
                columns = torch.randn(leaf.shape[1:][-1:], generator=stream).to(leaf)
                rows = rows.reshape([-1, *[1] * (leaf.dim() - 1)] if leaf.dim() else [])
                leaf.add_(rows * columns, alpha=MOVED)
        yield
    finally:
        with torch.no_grad():
            for leaf, value in zip(leaves, before, strict=True):
                leaf.copy_(value)


def _moves(before: Tensor, after: Tensor) -> bool:
    if before.shape != after.shape:
        return True
    both = before.isfinite() & after.isfinite()
    return bool(((before - after).abs() > ROUNDING * (1 + before.abs()))[both].any())
