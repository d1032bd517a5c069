"""The contract of a pair, checked: its sites, its plates, its shapes, and the data's support."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from inspect import signature
from traceback import walk_tb
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions import Distribution as PyroDistribution
from pyro.infer import ELBO, TraceEnum_ELBO
from pyro.poutine import Trace
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Independent, Normal, constraints
from torch.utils._pytree import tree_leaves

from pyrovae._tools import InputError, InputTypeError, did_you_mean, require_memory, warn
from pyrovae._tools.seeding import seeded
from pyrovae._tools.source_lines import error_place, failed_message
from pyrovae.pairs.enumeration import enumerates
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.support import counted, element, quantized, survey
from pyrovae.pairs.traces import (
    Layout,
    Site,
    Values,
    drawn,
    is_bookkeeping,
    is_factor,
    samples,
    scored,
)
from pyrovae.pairs.trial import takes_a_plate

# What Pyro (1.9.2) marks a factor and a deterministic with, which observe no data.
BESIDE = {"is_auxiliary", "_deterministic"}


def inspect_pair(pair: Pair, x: Tensor, *context: Any) -> Layout:
    """Run a pair once and check that its programs belong together.

    Args:
        pair: The pair.
        x: A batch ``[N, ...]``, with further arguments of the programs in ``context``.

    Returns:
        The pair's layout, which the pair remembers.

    Raises:
        ValueError: If a latent is in one program only, no plate holds the batch, a site lies
            outside that plate, event dimensions disagree, or x is outside a site's support.
    """
    check_arguments(pair, x, *context)
    with torch.no_grad(), blames_data(x):
        guide_trace = pair.trace_guide(x, *context)
        model_trace = _try_replay(pair, guide_trace, x, *context)
    sites, guide_sites = samples(model_trace), samples(guide_trace)
    check_kinds(guide_sites)
    check_kinds(sites)
    hidden = {name: site for name, site in sites.items() if not site["is_observed"]}
    enumerated = tuple(n for n, s in hidden.items() if n not in guide_sites and enumerates(s))
    latents = tuple(name for name in hidden if name not in enumerated)
    check_order(guide_sites, sites)
    check_sites(latents, guide_sites)
    for name in latents:
        check_event(name, hidden[name], guide_sites[name])
    dense = scored(model_trace, guide_trace)
    fitting = batch_plates(dense, len(x))
    if len(fitting) > 1 and len(x) > 1:
        fitting = [inspect_pair(pair, x[1:], *(c[1:] for c in context)).plate]
    frame = batch_frame(dense, fitting[0])
    _check_observed(dense)
    dims = [f.dim for s in (*sites.values(), *guide_sites.values()) for f in plates(s).values()]
    observed = tuple(name for name in sites if name not in hidden)
    for name in observed:
        if sites[name]["value"] is x and sites[name]["fn"].event_dim >= x.dim():
            raise InputError(
                f"Site {name!r} observes all of x, {list(x.shape)}, as one datum: give a batch "
                f"[N, ...], such as x[None] for N = 1."
            )
    layout = Layout(frame.name, frame.dim, min(dims) - 1, latents, observed)
    every = [item for found in (sites, guide_sites) for item in found.items()]
    own = [item for item in dense if item[1] is guide_sites.get(item[0])]  # the guide's
    # Looped over or not: both make a part stand for the whole.
    inner = [f for _, s in dense for f in s["cond_indep_stack"] if f.name != frame.name]
    pair.layout = layout._replace(
        plate_scale=subsampling(frame),
        scaled=any(
            bool((torch.as_tensor(s["scale"]) != subsampling(frame)).any()) for _, s in dense
        ),
        enumerated=enumerated,
        adrift=tuple(sorted(n for n, s in every if not _has_data(s, frame.dim) and is_factor(s))),
        partial=tuple(sorted({f.name for f in inner if subsampling(f) != 1})),
        auxiliary=tuple(n for n, _ in own if n not in latents),
        points=tuple(n for n, s in own if _is_delta(s["fn"])),
    )
    unusual = {n: (sites[n], guide_sites[n]) for n in latents}
    unusual = {n: both for n, both in unusual.items() if not all(map(_is_normal, both))}
    if unusual:
        masked, bounded = survey(unusual)
        pair.layout = pair.layout._replace(masked=masked, bounded=bounded)
        found = [site["fn"] for both in unusual.values() for site in both]
        pair.rounds = pair.rounds or any(quantized(fn) is not fn for fn in found)
    pair.folds = not takes_a_plate(pair, (x, *context))
    return pair.layout


def check_arguments(pair: Pair, *rows: Any, called: Sequence[str] = ()) -> None:
    """Check that both programs take as many arguments as there are, context of these names."""
    for kind, program in (("model", pair.model), ("guide", pair.guide)):
        entry = program.forward if isinstance(program, nn.Module) else program
        try:
            taken = signature(entry)  # type: ignore[arg-type]  # a pair under inspection has both
        except (TypeError, ValueError):  # Python knows none of some callables written in C.
            continue
        try:
            taken.bind(*rows)
        except TypeError as error:
            names = list(taken.parameters)
            mend = "the arguments that it needs, or give the context after x"
            masked = getattr(rows[-1], "dtype", None) == torch.bool
            if masked or called:
                known = [name for name in names if name != "mask"]
                named = known + [f"y{i}" for i in range(1, len(rows) - len(known))]
                named = [*known[:1], *called] if called else named
                mend = f"forward(self, {', '.join(named)}{', mask=True' * masked})"
            given = f"{len(rows)} arguments, x and its context" if len(rows) > 1 else "x alone"
            raise InputError(
                f"The {kind} takes ({', '.join(names)}), and it is given {given}: write {mend}."
            ) from error


def argument_names(program: Any, rows: Sequence[Tensor]) -> list[str]:
    """What a program calls its arguments; a mask that is given after ``*context`` is one."""
    parameters = signature(getattr(program, "forward", program)).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = named[: len(rows)] + [f"context_{i - 1}" for i in range(len(named), len(rows))]
    if len(names) > len(named) and rows[-1].dtype == torch.bool:
        names[-1] = "mask"
    return names


def inspect_evidence(pair: Pair, *rows: Any) -> None:
    """Inspect a pair in eval mode, and refuse it where no datum has a log p(x) of its own.

    Such are a factor outside of the batch's plate, a latent that one of the programs masks and the
    other doesn't, and one on which something depends where it is masked.
    """
    layout = inspect_pair(pair, *rows)
    check_factors(layout)
    if not layout.masked:
        return
    with seeded(0, pair.device):
        traces = pair.trace(*rows, sums=False)
    masks: dict[str, Tensor] = {}
    for name in layout.masked:
        model, guide = (counted(samples(trace)[name]) for trace in traces)
        masks[name], other = (m if m is not None else torch.tensor(True) for m in (model, guide))
        if bool((masks[name] != other).any()):
            raise InputError(
                f"Latent {name!r} is masked otherwise in the model than in the guide, so that "
                f"neither log p(x) nor a bound on it is defined: mask it alike in both."
            )
    values = {name: samples(traces[0])[name]["value"] for name in layout.latents}
    _check_unused(pair, rows, values, masks)


def _check_unused(pair: Pair, rows: tuple, values: Values, masks: Values) -> None:
    """Refuse sites whose log-probability changes with latents where they are masked."""
    with seeded(1, pair.device):
        others = samples(pair.trace_guide(*rows))
    changed = values | {
        name: torch.where(mask, values[name], others[name]["value"]) for name, mask in masks.items()
    }
    for what, score in (("model", lambda *a: pair.score_model(*a)[0]), ("guide", pair.score_guide)):
        found = []
        for given in (values, changed):
            # A guide may be unable to score what it did not draw.
            with seeded(0, pair.device), suppress(NotImplementedError, KeyError):
                found.append(score(rows, None, given))
        for name, before in found[0].items() if len(found) == 2 else ():
            if not torch.allclose(before, found[1][name], rtol=1e-3, atol=1e-3, equal_nan=True):
                raise InputError(
                    f"Site {name!r} of the {what} depends on values of {sorted(masks)} that are "
                    f"masked, so that log p(x) is not defined: replace them by a constant there, "
                    f"with torch.where or a product with the mask."
                )


def check_factors(layout: Layout) -> None:
    """Refuse factors that no datum has, for whatever is known of each datum."""
    if layout.adrift:
        raise InputError(
            f"The factor {layout.adrift[0]!r} lies outside the plate {layout.plate!r}, so it "
            f"belongs to no datum: move it inside, or train with an ELBO."
        )


def refuse_factors(pair: Pair, rows: tuple) -> None:
    """Refuse factors that weigh what a model draws: no draw follows them."""
    for name in moving_factors(pair, rows):
        raise InputError(
            f"The factor {name!r} of the model changes with what is drawn, and no draw follows "
            f"a pyro.factor, so that latents and data drawn from the model are not those of "
            f"p(z, x): write it as a distribution that is sampled or observed."
        )


def warn_of_factors(pair: Pair, rows: tuple) -> None:
    """Warn where draws from the model are wanted and it has such factors."""
    for name in moving_factors(pair, rows):
        warn(
            f"The factor {name!r} of the model changes with what is drawn, and no draw follows a "
            f"pyro.factor: what is drawn forward is that of the program without it."
        )


def moving_factors(pair: Pair, rows: tuple) -> list[str]:
    """The model's factors that change with what it draws."""
    with seeded(0, rows[0].device):
        one, two = (samples(poutine.trace(pair.run_model).get_trace(*rows)) for _ in range(2))
    factors = {n: s["fn"].log_factor for n, s in one.items() if is_factor(s)}
    return [n for n, value in factors.items() if not torch.equal(value, two[n]["fn"].log_factor)]


def check_support(
    pair: Pair, x: Tensor, *context: Any, batch_size: int = 512, first: int = 0
) -> None:
    """Check data from the row ``first`` on against the supports of the sites that observe them."""
    args = [each[first:] for each in (x, *context)]
    with torch.no_grad(), blames_data(args[0], first), pyro.validation_enabled(False):
        if bool(args[0].isinf().any()):
            raise ValueError("no data are infinite, though torch's real support holds infinity")
        for rows in zip(*(each.split(batch_size) for each in args), strict=True):
            _check_observed(scored(pair.trace(*rows)[0]))


def check_objective(
    layout: Layout, objective: Any, validated: bool = False, rows: tuple[Tensor, ...] = ()
) -> None:
    """Refuse one of Pyro's objectives that draws latents which the model is to sum over.

    And a pair that is to be ``validated`` by bounds of each datum, and has none; and particles of
    a batch ``rows`` that memory cannot hold at once.
    """
    looped = isinstance(objective, ELBO) and not objective.vectorize_particles
    particles = getattr(objective, "particles", getattr(objective, "num_particles", 1))
    if rows and not looped:
        count = particles * getattr(objective, "groups", 1)
        require_memory(f"{count} particles of each of {len(rows[0])} data", rows[0], count)
    if validated:
        check_factors(layout)
    sums = isinstance(objective, TraceEnum_ELBO) or not isinstance(objective, ELBO)
    if layout.enumerated and not sums:
        raise InputError(
            f"{type(objective).__name__} is no bound for latents that the model alone has, "
            f"{sorted(layout.enumerated)}: train with TraceEnum_ELBO, which sums over them, or "
            f"sample them in the guide."
        )


def check_step(pair: Pair, surrogate: Tensor | None, args: Any) -> None:
    """Refuse to train programs by a step whose loss or latents show that they do not fit."""
    _check_strangers(pair)
    if surrogate is not None:
        check_reach(pair, surrogate, args)


def _check_strangers(pair: Pair) -> None:
    """Refuse programs that are exchanged, or have each drawn a latent the other does not know."""
    model, guide = pair.sites
    check_order(guide, model)
    model, guide = (
        {name: site["infer"] for name, site in sites.items() if not site["is_observed"]}
        for sites in pair.sites
    )
    extra = [name for name, infer in guide.items() if not infer.get("is_auxiliary")]
    extra = sorted(name for name in extra if name not in model)
    missing = sorted(n for n, infer in model.items() if n not in guide and "enumerate" not in infer)
    if extra and missing:
        raise InputError(
            f"The guide samples {extra}, which the model does not, and the model's latents "
            f"{missing} are missing in the guide: give a latent one name in both"
            f"{did_you_mean(extra[0], missing)}, or mark what the guide alone has with "
            f"infer={{'is_auxiliary': True}}."
        )


def check_reach(pair: Pair, surrogate: Tensor, args: Any = ()) -> None:
    """Refuse a loss that depends on a module's parameters which neither program owns.

    What ``args``, nested as they come, depend on is their maker's to train, and what
    :func:`pyro.poutine.block` hides is frozen.
    """
    given = [each for each in tree_leaves(args) if isinstance(each, Tensor)]
    known = {id(leaf) for leaf in (*pair.named().values(), *pair.blocked, *given)}
    leaves = leaves_behind(surrogate, {tensor.grad_fn for tensor in given})
    lost = [
        list(leaf.shape)
        for leaf in leaves
        if isinstance(leaf, nn.Parameter) and id(leaf) not in known
    ]
    if lost:
        raise InputError(
            f"The loss depends on parameters of shapes {lost} that neither the model nor the "
            f"guide owns, so they would not be trained: make their module an attribute, call "
            f"pyro.module('name', module) in the program, or freeze it with requires_grad_(False)."
        )


def leaves_behind(tensor: Tensor, seen: set[Any]) -> list[Tensor]:
    """The leaves of a graph, but for what lies behind the nodes in ``seen``."""
    found, stack = [], [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        stack.extend(parent for parent, _ in node.next_functions)
    return found


def _try_replay(pair: Pair, guide_trace: Trace, x: Tensor, *context: Any) -> Trace:
    try:
        return pair.replay_model(guide_trace, x, *context)
    except (ValueError, RuntimeError):
        guide_sites = samples(guide_trace)
        for name, site in drawn(pair.trace_given(pair.run_model, (x, *context))).items():
            if name in guide_sites:
                check_event(name, site, guide_sites[name])
        raise


def check_tensor(x: Any) -> None:
    """Check that data are a tensor, and no data set."""
    if not isinstance(x, Tensor):
        raise InputTypeError(
            f"Expected a tensor [N, ...], got {type(x).__name__}: a data set's are .train, .valid "
            f"and .test."
        )
    if not len(x):
        raise InputError("Expected at least one datum, got an empty tensor.")


@contextmanager
def blames_data(x: Tensor, first: int = 0) -> Iterator[None]:
    """Where a program fails at first sight, say of the data or of the program what is wrong.

    ``first`` is the number of the first row of x among all data.
    """
    check_tensor(x)
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # a RuntimeError of the device, which is nobody's program or data
    except (ValueError, RuntimeError) as error:
        bad = (~x.isfinite()).reshape(len(x), -1).any(-1).nonzero()
        if len(bad):
            raise InputError(
                f"{len(bad)} of {len(x) + first} data hold NaN or infinity, first in row "
                f"{bad[0].item() + first}: clean them, or mask NaN: give x.nan_to_num() and, after "
                f"it, ~x.isnan(), or fit what pyrovae.load_data(x, missing='mask') returns, which "
                f"has both."
            ) from error
        raise InputError(mended(error, x)) from error
    except IndexError as error:
        raise InputError(
            f"A program looks up what it does not have ({error}): give it as many classes as there "
            f"are labels, and labels that are not hidden (-1) where it needs them."
        ) from error


def mended(error: Exception, x: Tensor) -> str:
    """An error's text with what to change, where that is known."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    inner, text = dict(frame.f_locals), sentence(error)
    if (site := misfit(error)) is not None:
        fixed = {f.size for f in plates(site).values()}.isdisjoint({len(x), -1})
        plate = f"give the plate the size of the batch, len(x), here {len(x)}, or " if fixed else ""
        return f"{text}: {plate}declare the dimensions of one event with .to_event(n)."
    if (refused := _refused(frame.f_code, inner, x)) is not None:
        return refused
    owner, given_to = inner.get("self"), inner.get("input")
    if isinstance(owner, nn.Linear) and isinstance(given_to, Tensor):
        expected, found = owner.in_features, [*given_to.shape]
        if found[-1:] != [expected]:
            return (
                f"{owner} is given {found}, and takes the last dimension alone: flatten a datum "
                f"before it, as x.flatten(1) does, or give the layer that size."
            )
    known = {p.dtype for p in owner.parameters()} if isinstance(owner, nn.Module) else set()
    given = {value.dtype for value in inner.values() if isinstance(value, Tensor)}
    if isinstance(error, RuntimeError) and known and x.dtype in given - known:
        more = ", or look them up in an nn.Embedding if they are categories"
        if x.is_floating_point():
            more = " (tensors keep their dtype, and all else is read as float32)"
        return f"{text}. The data are {x.dtype}: convert them or the modules{more}."
    if isinstance(error, RuntimeError) and any(w in error_place(error) for w in (".numpy(", "np.")):
        return (
            f"{text} NumPy sees no gradient, so that what it computes would train nothing: use "
            f"torch's function instead, without detach()."
        )
    return text


def _refused(code: Any, inner: dict[str, Any], x: Tensor) -> str | None:
    """What a library's own check refused, in words that help; None for any other error.

    Which check it was is told by its code, as the errors say so in words alone; the names of the
    variables are those of torch 2.11 to 2.15 and of Pyro 1.9.
    """
    if code is Distribution.__init__.__code__ and {"param", "value", "constraint"} <= inner.keys():
        fix = into(inner["constraint"])
        if fix is None and x.min() <= -1 and inner["value"].isnan().any():
            fix = (
                f"the data go down to {x.min():.4g}: are they counts, give those from 0, whose "
                f"log1p is a number, or else a network that takes no logarithm"
            )
        elif fix is None:
            fix = (
                f"The data run from {x.min():.4g} to {x.max():.4g}: scale them to about [0, 1], or "
                f"look at the network that makes the parameter"
            )
        return (
            f"Expected parameter {inner['param']} of {type(inner['self']).__name__}, of shape "
            f"{list(inner['value'].shape)}, to satisfy the constraint {inner['constraint']!r}, and "
            f"it does not. {fix[0].upper()}{fix[1:]}."
        )
    if code is Independent.__init__.__code__ and "base_distribution" in inner:
        base, events = inner["base_distribution"], inner["reinterpreted_batch_ndims"]
        return (
            f"{type(base).__name__} has shape {list(base.batch_shape)}, fewer dimensions than "
            f".to_event({events}) takes: let the network's output have the shape of what is "
            f"sampled (a datum has {list(x.shape[1:])}), or correct the number."
        )
    if code is Trace.add_node.__code__:
        return f"Two sites are named {inner['site_name']!r}: give each a name of its own."
    return None


def into(constraint: Any) -> str | None:
    """How to bring a parameter into its range; None for one that may be any number."""
    constraint = element(constraint)
    if isinstance(constraint, type(constraints.real)):
        return None
    if isinstance(constraint, type(constraints.unit_interval)):
        return "take torch.sigmoid of it, or give the distribution logits="
    if isinstance(constraint, type(constraints.simplex)):
        return "take torch.softmax of it, or give the distribution logits="
    if isinstance(constraint, type(constraints.positive) | type(constraints.nonnegative)):
        return "bound it, as softplus(s) + 1e-3 does"
    return "bring it there by torch.distributions.transform_to(constraint)"


def sentence(error: BaseException) -> str:
    """What an error says, without the table of shapes that Pyro (1.9.2) puts below in its text."""
    return str(error).partition("Trace Shapes:")[0].strip()


def misfit(error: Exception) -> Site | None:
    """The sample statement that does not fit into its plates, if the error came out of one.

    Pyro's BroadcastMessenger (1.9.2) raises a plain ValueError there; as its text is not to be
    relied on, the statement's shapes are held against its plates once more.
    """
    site = failed_message(error)
    if site is None or not isinstance(error, ValueError):
        return None
    batch = getattr(site["fn"], "batch_shape", Size())
    return None if sizes_fit(batch, plates(site).values()) else site


def sizes_fit(batch: Size, frames: Iterable[Any]) -> bool:
    """Whether a batch shape has the sizes of plates, or ones."""
    return all(len(batch) < -f.dim or f.size == -1 or batch[f.dim] in (1, f.size) for f in frames)


def check_kinds(sites: dict[str, Site]) -> None:
    """Refuse distributions of torch itself, which know neither plates nor events as Pyro's do."""
    for name, site in sites.items():
        if not isinstance(site["fn"], PyroDistribution):
            raise InputError(
                f"Site {name!r} has {type(site['fn']).__name__} of "
                f"{type(site['fn']).__module__.partition('.')[0]}, which knows no events: take it "
                f"from pyro.distributions, with .to_event(n)."
            )


def check_programs(*programs: Any) -> None:
    """Refuse a class in the place of a program, and what cannot be called."""
    for kind, program in zip(("model", "guide"), programs, strict=True):
        if isinstance(program, type):
            name = program.__name__
            raise InputTypeError(f"Expected a {kind}, got the class {name}: make one, {name}(...).")
        if not callable(program):
            raise InputTypeError(f"Expected a program as the {kind}, got {program!r}.")


def check_order(guide: dict[str, Site], model: dict[str, Site]) -> None:
    """Refuse a model in the place of the guide: that one observes data, and the other none."""
    seen, data = (
        [n for n, s in sites.items() if s["is_observed"] and not BESIDE & s["infer"].keys()]
        for sites in (guide, model)
    )
    if seen and not data:
        raise InputError(
            f"Expected the model before the guide, got a guide that observes {seen[0]!r}, as a "
            f"model does: exchange the two."
        )


def check_sites(latents: Iterable[str], guide_sites: dict[str, Site]) -> None:
    """Check that the guide samples the model's latents, and no others."""
    for name in latents:
        if name not in guide_sites:
            raise InputError(
                f"The model's latent site {name!r} is missing in the guide, which samples "
                f"{sorted(guide_sites)}: sample every latent there"
                f"{did_you_mean(name, guide_sites)}, give it obs=x if it is data, or mark one that "
                f"is discrete with infer={{'enumerate': 'parallel'}} in the model and train with "
                f"TraceEnum_ELBO."
            )
    for name in sorted(guide_sites.keys() - set(latents)):
        site = guide_sites[name]
        if site["infer"].get("is_auxiliary") or is_bookkeeping(site):
            continue
        raise InputError(
            f"The guide samples {name!r}, which is no latent site of the model (its latents are "
            f"{sorted(latents)}): remove it, or mark it with infer={{'is_auxiliary': True}}"
            f"{did_you_mean(name, latents)}."
        )


def check_event(name: str, model_site: Site, guide_site: Site) -> None:
    """Check that a latent has the same event dimensions and sizes in both programs."""
    ours, theirs = model_site["fn"], guide_site["fn"]
    if ours.event_dim != theirs.event_dim:
        raise InputError(
            f"Site {name!r} has {ours.event_dim} event dimensions in the model and "
            f"{theirs.event_dim} in the guide: end both distributions in the same .to_event(n)."
        )
    if ours.event_shape != theirs.event_shape:
        raise InputError(
            f"Site {name!r} has event shape {list(ours.event_shape)} in the model and "
            f"{list(theirs.event_shape)} in the guide: give both the same latent size."
        )


def batch_plates(sites: list[tuple[str, Site]], num_data: int) -> list[str]:
    """The plates that may hold the batch, one at least."""
    fitting = fitting_plates(sites, num_data)
    if not fitting:
        stacks = [plates(site) for _, site in sites]
        raise InputError(
            f"Expected a plate over the batch of {num_data} around site "
            f"{sites[0][0] if sites else 'x'!r}, got plates "
            f"{sorted({(f.name, f.size) for stack in stacks for f in stack.values()})}: open "
            f"`with pyro.plate('data', len(x))` in the model and in the guide. A guide that has "
            f"parameters for each row, as Pyro's AutoNormal, is of its first batch alone."
        )
    return fitting


def fitting_plates(sites: list[tuple[str, Site]], num_data: int) -> list[str]:
    """The plates of the batch's size, around every site if there is one."""
    stacks = [plates(site) for _, site in sites]
    # A plate without a size, pyro.plate("data"), has that of what is in it; Pyro calls it -1.
    sizes = (num_data, -1)
    fitting = sorted({f.name for stack in stacks for f in stack.values() if f.size in sizes})
    common = [name for name in fitting if all(name in stack for stack in stacks)]
    return ["data"] if "data" in (common or fitting) else (common or fitting)


def batch_frame(sites: list[tuple[str, Site]], plate: str) -> Any:
    """The frame of the plate that holds the batch, and every site."""
    frames = [frame for _, site in sites for frame in plates(site).values()]
    sizes = {frame.size for frame in frames if frame.name == plate}
    for name, site in sites:
        other = [frame.name for frame in plates(site).values() if frame.size in sizes]
        if other and plate not in plates(site):
            raise InputError(
                f"Site {name!r} lies in the plate {other[0]!r}, and others in the plate {plate!r}, "
                f"of the same size: give the plate over the batch one name in model and guide, "
                f"pyro.plate({plate!r}, len(x))."
            )
        if plate not in plates(site):
            raise InputError(
                f"Site {name!r} lies outside the plate {plate!r} that holds the batch, so its "
                f"log-probability belongs to no datum: sample it inside that plate."
            )
    return plates(sites[0][1])[plate]


def plates(site: Site) -> dict[str, Any]:
    """The frames of the plates around a site, by name; plates that are looped over are none."""
    return {frame.name: frame for frame in site["cond_indep_stack"] if frame.vectorized}


def subsampling(frame: Any) -> float:
    """How often an index of a plate counts: the plate's full size over that of its subsample."""
    return (frame.full_size or frame.size) / frame.size


@torch.no_grad()
def plate_scale(pair: Pair, x: Tensor, *context: Any) -> float:
    """How often the plate over the batch counts each datum of one, which the guide is run on."""
    sites = samples(pair.trace_guide(x, *context)).values()
    frames = [
        frames[pair.known.plate] for frames in map(plates, sites) if pair.known.plate in frames
    ]
    return subsampling(frames[0]) if frames else pair.known.plate_scale


def _check_observed(sites: list[tuple[str, Site]]) -> None:
    """Check that what is observed has the shape of its distribution's events, and is possible."""
    for name, site in sites:
        if not site["is_observed"]:
            continue
        fn, value, mask = site["fn"], site["value"], site["mask"]
        split = value.dim() - fn.event_dim
        if value.shape[split:] != fn.event_shape:
            raise InputError(
                f"Site {name!r} observes events of shape {list(value.shape[1:])}, but its "
                f"distribution has events {list(fn.event_shape)} and batch "
                f"{list(fn.batch_shape)}: check the model's data shape, and declare event "
                f"dimensions with .to_event(n)."
            )
        inside = fn.support.check(value)
        if isinstance(mask, Tensor):
            inside = inside | ~mask.expand(value.shape[:split])
        if mask is not False and not bool(inside.all()):
            row = tuple((~inside).nonzero()[0].tolist())
            raise InputError(_outside(name, fn, value, row))


def _is_normal(site: Site) -> bool:
    """Whether a latent is of the usual kind: normal, of any value, and not masked."""
    fn = site["fn"]
    base = fn.base_dist if isinstance(fn, Independent) else fn
    return site["mask"] is None and isinstance(base, Normal)


def _is_delta(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def _has_data(site: Site, dim: int) -> bool:
    """Whether a site has a value for each datum: its plate may have another name."""
    return any(frame.dim == dim for frame in plates(site).values())


def _outside(name: str, fn: Any, value: Tensor, row: tuple[int, ...]) -> str:
    base = base_of(fn)
    kind = kind_of(fn)
    inside = base.support.check(value)
    bad = value[row][~inside[row]] if inside.shape == value.shape else value[row]
    first = bad.reshape(-1)[0].item()
    shown = f"{first:.6g}"
    mend = "choose a likelihood whose support holds the data"
    if base.support.is_discrete and 0 < first < 1 and abs(255 * first - round(255 * first)) < 1e-4:
        mend += " (uint8 is read as levels over 255: counts need another dtype)"
    if kind == "Multinomial":
        shown = f"counts that sum to {bad.sum().item():.6g}"
        mend = f"give it a total_count of the largest sum, not {base.total_count}"
    if kind in ("Bernoulli", "RelaxedBernoulli"):
        mend = (
            "a Bernoulli scores only 0 and 1, so binarize the data (binarize='threshold', "
            "'static' or 'dynamic'), or choose a likelihood for grey values (continuous "
            "Bernoulli, Gaussian)"
        )
    return f"Site {name!r} observes {shown}, outside the support of {kind}: {mend}."


def kind_of(fn: Any) -> str:
    """What a distribution is called, whatever declares its events or masks it."""
    return type(base_of(fn)).__name__


def base_of(fn: Any) -> Any:
    """A distribution without what declares its events or masks it."""
    while hasattr(fn, "base_dist") and not hasattr(fn, "transforms"):
        fn = fn.base_dist
    return fn


def check_scales(traces: Iterable[Trace]) -> Site:
    """Refuse sites that do not share one scale, comparing values; the first of them."""
    (first, site), *rest = scored(*traces)
    for name, other in rest:
        if not bool((torch.as_tensor(site["scale"]) == torch.as_tensor(other["scale"])).all()):
            raise InputError(
                f"Sites {first!r} and {name!r} carry different scales, so log p(x) is not "
                f"defined, and no importance-weighted bound is: drop poutine.scale and "
                f"subsampling within a datum, or use an ELBO."
            )
    return site


def cell_scale(scale: Tensor | float, layout: Layout, kept: Collection[int]) -> Tensor | float:
    """A scale as a number, or with every plate's dimension; only along ``kept`` it may vary."""
    if not isinstance(scale, Tensor) or scale.dim() == 0:
        return scale
    rank = max(scale.dim(), -layout.particle_dim - 1)
    scale = scale[(None,) * (rank - scale.dim())]
    if any(n != 1 and d - rank not in kept for d, n in enumerate(scale.shape)):
        raise InputError(
            "Expected one scale per datum, got a scale that varies within it: neither log p(x) "
            "nor an importance-weighted bound is defined; drop poutine.scale, or use an ELBO."
        )
    return scale
