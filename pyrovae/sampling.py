"""Draw from a model, encode and decode data, and classify them by a discrete latent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyrovae._tools import (
    InputError,
    InputTypeError,
    at_least,
    require_memory,
    should_compile,
    warn,
)
from pyrovae._tools.seeding import draw_seed, seeded, subseed
from pyrovae.compiling.graph import CaptureError, audited
from pyrovae.data.given import data_tensors, takes_data
from pyrovae.pairs.contract import (
    blames_data,
    check_order,
    fitting_plates,
    inspect_pair,
    plates,
    warn_of_factors,
)
from pyrovae.pairs.generation import Simulator
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import Site, is_bookkeeping, is_factor, samples

# Rows from which compiling pays: 5 to 20 s of it are won back after a few times as many rows.
PAYS_AFTER = 500_000
# The share of draws that may differ by more than rounding, as where a uniform number falls next to
# a probability.
FLIPPED = 1e-4

Sites = Tensor | dict[str, Tensor]
Rows = tuple[Tensor, ...]
Read = Callable[..., dict[str, Site]]


def sample(
    model: Callable,
    *context: Any,
    like: Tensor,
    n: int | None = None,
    mean: bool = False,
    seed: int | None = None,
    compile: bool | str = "auto",
) -> Sites:
    r"""Draw new data from a model, by leaving out its observations.

    .. math:: z \sim p(z), \qquad x \sim p(x \mid z)

    A site that observes a further argument, such as a label, keeps what it is given. A model whose
    likelihood reads the values of x that come before, :math:`p(x_t \mid x_{<t}, z)`, is run once
    for each of them, with what was drawn fed back.

    Args:
        model: The model program.
        context: Its further arguments, ``[n, ...]``; what is no such tensor is handed on as it is.
        like: A batch ``[N, ...]`` of the shape that the model takes. Its values are not used, but
            for those in the first row that the model reads and no site observes.
        n: How many data to draw; by default one for each row of the context, 64 without one.
        mean: Return E[x | z] in place of x, where the likelihood knows it and does not read x.
        seed: Seeds the draws; None continues torch's global stream.
        compile: Compile the model's run: True, False, or ``"auto"`` where n is at least 500,000,
            so that it pays. A model that cannot be captured runs eagerly, with one warning that
            says why; the draws of a seed are the same either way, up to rounding.

    Returns:
        ``[n, ...]``, or a dictionary of them if the model observes several sites.

    Raises:
        ValueError: If ``n`` is not positive, ``like`` is empty, the context has not n rows, an
            argument that is given is observed by a site that depends on latents, or the model
            reads the x that it observes and there is no order to draw it in.
    """
    like, *rest = data_tensors(like, *context)
    context = tuple(rest)
    if n is None:
        n = next((len(each) for each in context if _has_rows(each)), 64)
    if n < 1 or len(like) < 1:
        raise InputError(f"Expected n >= 1 and a template of one datum, got {n} and {len(like)}.")
    require_memory(f"{n} samples", like[0], n)
    options = {"mean": mean, "seed": seed, "compile": compile}
    return _one_or_all(_generate(model, {}, like, n, context, options))


def decode(
    model: Callable,
    latents: dict[str, Tensor],
    *context: Any,
    like: Tensor,
    mean: bool = True,
    seed: int | None = None,
    compile: bool | str = "auto",
) -> Sites:
    """Run a model forward from given latents; the rest it draws.

    Args:
        model: The model program.
        latents: Values ``[n, ...]`` by site.
        context: Its further arguments, as for :func:`sample`.
        like: A batch ``[N, ...]``, as there.
        mean: Return E[x | z] in place of a draw, where the likelihood knows it.
        seed: Seeds the draws; None continues torch's global stream.
        compile: As for :func:`sample`.

    Returns:
        ``[n, ...]``, or a dictionary of them if the model observes several sites.

    Raises:
        ValueError: If a name is no latent site of the model, or as for :func:`sample`.
    """
    if not isinstance(latents, Mapping):
        raise InputTypeError(
            f"Expected latents by name, such as {{'z': z}}, got {type(latents).__name__}."
        )
    if not latents:
        raise InputError("Expected the values of a latent site at least, got none.")
    n = len(next(iter(latents.values())))
    like, *rest = data_tensors(like, *latents.values(), *context)
    latents, context = dict(zip(latents, rest, strict=False)), tuple(rest[len(latents) :])
    options = {"mean": mean, "seed": seed, "compile": compile}
    return _one_or_all(_generate(model, latents, like, n, context, options))


@takes_data
def reconstruct(
    model: Callable,
    guide: Callable,
    x: Tensor,
    *context: Any,
    mean: bool = True,
    seed: int | None = None,
    compile: bool | str = "auto",
) -> Sites:
    r"""Encode data and decode them again, read off the model replayed against its guide.

    .. math:: z \sim q(z \mid x), \qquad \hat x = E[x \mid z]

    Args:
        model: The model program.
        guide: The guide program.
        x: Data ``[N, ...]``; ``context`` are further arguments of both programs, ``[N, ...]``.
        mean: Return E[x | z], where the likelihood knows it, or else a draw.
        seed: Seeds the draws; None continues torch's global stream.
        compile: As for :func:`sample`.

    Returns:
        ``[N, ...]``, or a dictionary of them if the model observes several sites.

    Raises:
        ValueError: If the pair breaks the contract, or the model reads the x that it observes and
            there is no order to draw it in.
    """
    pair = Pair(model, guide)
    rows, size = _bound(pair, (x, *context))
    simulator = Simulator(pair)

    def read(*rows: Tensor) -> dict[str, Site]:
        sites, layout = dict(samples(pair.trace_posterior(*rows))), pair.known
        latents = {n: sites[n]["value"] for n in (*layout.latents, *layout.enumerated)}
        if simulator.reads is None:
            simulator.look(rows, latents)
        if simulator.reads:
            sites, _ = simulator.draw(rows, latents)
        seen = [n for n in layout.observed if n in sites and n not in simulator.kept]
        how = {"reads": simulator.reads, "redrawn": True}
        return {n: sites[n] | how | {"axis": layout.dim - sites[n]["fn"].event_dim} for n in seen}

    return _one_or_all(_forward(pair, read, rows, mean, seed, compile, size))


@takes_data
def encode(
    guide: Callable,
    x: Any,
    *context: Any,
    seed: int | None = None,
    compile: bool | str = "auto",
) -> dict[str, Tensor]:
    """The posterior mean of each latent of each datum, as the guide has it.

    ``encode(model, guide, x, ...)``, in the order of the other functions, is the same.

    Args:
        guide: The guide program.
        x: Data ``[N, ...]``; ``context`` are further arguments of the guide, ``[N, ...]``.
        seed: Seeds the draws; None continues torch's global stream.
        compile: As for :func:`sample`.

    Returns:
        ``[N, ...]`` by site; one draw where a site's distribution knows no mean. A latent
        below another one is conditioned on a draw of it.
    """
    return encode_sites(guide, (x, *context), seed, compile)[0]


@takes_data
def interpolate(
    model: Callable,
    guide: Callable,
    x: Tensor,
    y: Tensor,
    *context: Any,
    steps: int = 9,
    seed: int | None = None,
    compile: bool | str = "auto",
) -> Sites:
    r"""Decode what lies between the encodings of two data.

    .. math:: z_t = (1 - t)\, E[z \mid x] + t\, E[z \mid y], \qquad t = 0, \dots, 1

    Args:
        model: The model program.
        guide: The guide program, with real-valued latents.
        x: Where to start, ``[N, ...]``.
        y: Where to go, ``[N, ...]``.
        context: Further arguments of both programs, the same all the way, ``[N, ...]``.
        steps: The number of values of t.
        seed: Seeds what is drawn on the way; None continues torch's global stream.
        compile: As for :func:`sample`.

    Returns:
        E[x | z_t], ``[N, steps, ...]``.

    Raises:
        ValueError: If a latent is discrete.
    """
    at_least({"steps": 1}, steps)
    if len(x) != len(y) and 1 not in (len(x), len(y)):
        raise InputError(
            f"Expected as many data to go to as to start at, got {len(y)} and {len(x)}."
        )
    start, discrete = encode_sites(guide, (x, *context), seed, compile)
    end, _ = encode_sites(guide, (y.to(x), *context), seed, compile)
    for name in discrete:
        raise InputError(f"Latent {name!r} is discrete: nothing lies between two values.")
    t = torch.linspace(0, 1, steps, device=x.device)
    path = {
        name: torch.lerp(z[:, None], end[name][:, None], t.reshape(-1, *[1] * (z.dim() - 1)))
        for name, z in start.items()
    }
    return _decode_paths(model, path, context, x, seed=seed, compile=compile)


@takes_data
def traverse(
    model: Callable,
    guide: Callable,
    x: Tensor,
    site: str,
    dim: int,
    values: Tensor | Sequence[float],
    *context: Any,
    seed: int | None = None,
    compile: bool | str = "auto",
) -> Sites:
    """Decode data with one latent dimension set to each of some values.

    The others are at the mean of the guide; a discrete latent, whose mean may be no value of it, is
    drawn.

    Args:
        model: The model program.
        guide: The guide program.
        x: Data ``[N, ...]``.
        site: The latent site.
        dim: The dimension of its last axis to set.
        values: What to set it to, ``[V]``.
        context: Further arguments of both programs, ``[N, ...]``.
        seed: Seeds what is drawn on the way; None continues torch's global stream.
        compile: As for :func:`sample`.

    Returns:
        E[x | z], ``[N, V, ...]``.

    Raises:
        ValueError: If the guide has no such site, or the site no such dimension or none at all.
    """
    latents, _ = encode_sites(guide, (x, *context), seed, compile, drawn=True)
    if site not in latents:
        raise InputError(f"No latent site {site!r}; the guide samples {sorted(latents)}.")
    if latents[site].dim() < 2:
        raise InputError(
            f"Site {site!r} is a single value for each datum and has no dimension to set: give its "
            f"values to pyrovae.decode."
        )
    size = latents[site].shape[-1]
    if not (isinstance(dim, int) and -size <= dim < size):
        raise InputError(f"Site {site!r} has {size} dimensions, so there is no dimension {dim}.")
    values = torch.as_tensor(values)
    if values.dim() != 1 or not len(values):
        raise InputError(f"Expected values [V] to set it to, got the shape {list(values.shape)}.")
    path = {n: torch.stack([z] * len(values), 1) for n, z in latents.items()}
    path[site][..., dim] = values.to(x).reshape(-1, *[1] * (latents[site].dim() - 2))
    return _decode_paths(model, path, context, x, seed=seed, compile=compile)


@takes_data
@torch.no_grad()
def classify(
    guide: Callable, x: Any, *context: Any, site: str | None = None, seed: int | None = None
) -> Tensor:
    """The posterior probabilities q(y|x) of a discrete latent, as the guide has them.

    ``classify(model, guide, x, ...)`` is the same.

    Args:
        guide: The guide program.
        x: Data ``[N, ...]``; ``context`` are further arguments of the guide, ``[N, ...]``.
        site: The latent; it may be left out where the guide has one that is discrete.
        seed: Seeds the draws of latents that it depends on; None continues torch's global stream.

    Returns:
        ``[N, C]``, in the order of the distribution's ``enumerate_support()``.

    Raises:
        ValueError: If the guide has no such latent, or several and none is named.

    Example:
        >>> from pyrovae.guides.semi_supervised import SemiSupervised
        >>> data = pyrovae.load_data("digits", binarize="dynamic", context="labels")
        >>> q = pyrovae.classify(SemiSupervised(data.shape), *data.split("test"))
        >>> q.shape
        torch.Size([359, 10])
        >>> accuracy = (q.argmax(-1) == data.labels.test).float().mean()
    """
    pair = Pair(None, guide)
    rows = [tensor.to(pair.device) for tensor in _bound(pair, (x, *context))[0]]
    run = partial(_latents, pair)
    with pair.mode(training=False), seeded(seed, rows[0].device):
        sites = run(*rows)
        axes = _axes(sites, run, tuple(rows))
    found = {name: s["fn"] for name, s in sites.items() if s["fn"].has_enumerate_support}
    if site is None and len(found) == 1:
        (site,) = found
    if site not in found:
        raise InputError(
            f"Expected the name of one discrete latent of the guide, got {site!r}; it has "
            f"{sorted(found) or 'none'}."
        )
    fn = found[site]
    log_prob = fn.log_prob(fn.enumerate_support()).movedim(0, -1)
    axis = axes[site] + fn.event_dim - 1 if site in axes else None
    return _moved(log_prob.exp(), axis, 0).to(x.device)


def encode_sites(
    guide: Callable,
    args: tuple,
    seed: int | None = None,
    compile: bool | str = "auto",
    drawn: bool = False,
) -> tuple[dict[str, Tensor], list[str]]:
    """What :func:`encode` returns, and which latents are discrete; of those a draw if ``drawn``.

    A discrete latent may have real numbers for its values, as a Bernoulli has: its mean is none.
    """
    pair, discrete, axes = Pair(None, guide), dict[str, bool](), dict[str, int]()
    rows, size = _bound(pair, args)

    def read(*rows: Tensor) -> dict[str, Site]:
        with blames_data(rows[0]):
            sites = _latents(pair, *rows)
        if not discrete:
            axes.update(_axes(sites, partial(_latents, pair), rows))
            discrete.update((n, s["fn"].support.is_discrete) for n, s in sites.items())
        how = {n: {"drawn": drawn and discrete[n], "axis": axes.get(n)} for n in sites}
        return {n: s | how[n] for n, s in sites.items()}

    found = _forward(pair, read, rows, True, seed, compile, size)
    return found, [name for name, is_discrete in discrete.items() if is_discrete]


def _latents(pair: Pair, *rows: Tensor) -> dict[str, Site]:
    """What a guide samples, but for what it alone has."""
    sites = samples(pair.trace_guide(*rows))
    found = {n: s for n, s in sites.items() if not s["infer"].get("is_auxiliary")}
    check_order(found, {})
    return found


def _axes(sites: dict[str, Site], run: Read, rows: Rows) -> dict[str, int]:
    """Where in the sites' values the batch lies, from the right, for those in a plate over it.

    Where that may be another plate of its size, a run of one datum fewer tells.
    """
    size, names = len(rows[0]), fitting_plates([*sites.items()], len(rows[0]))
    found = _in_plate(sites, names)
    moved = any(sites[name]["value"].dim() != -axis for name, axis in found.items())
    if size > 1 and (moved or len(names) > 1):
        with seeded(0, rows[0].device):
            fewer = run(*(row[1:] for row in rows))
        found = _in_plate(sites, fitting_plates([*fewer.items()], size - 1))
    return found


def _in_plate(sites: dict[str, Site], names: list[str]) -> dict[str, int]:
    frames = {name: plates(site).get(next(iter(names), "")) for name, site in sites.items()}
    return {n: frame.dim - sites[n]["fn"].event_dim for n, frame in frames.items() if frame}


def _generate(
    model: Callable,
    latents: dict[str, Tensor],
    like: Tensor,
    n: int,
    context: tuple,
    options: dict[str, Any],
) -> dict[str, Tensor]:
    """Values ``[n, ...]`` of observed sites; ``options`` are those of :func:`sample`."""
    given = (*filter(_has_rows, context), *latents.values())
    if lengths := [len(tensor) for tensor in given if len(tensor) != n]:
        raise InputError(
            f"Expected a context of {n} rows, one for each datum to draw, got {lengths[0]}: give "
            f"n, the latents and the context the same number of rows."
        )
    pair = Pair(model, None)
    simulator = Simulator(pair)
    template = like[:1].expand(n, *like.shape[1:])
    rows, size = _bound(pair, (template, *context))
    split, axes = len(rows), dict[str, int]()

    def run(*rows: Tensor) -> dict[str, Site]:
        return samples(pair.trace_given(pair.run_model, rows))

    def read(*rows: Tensor) -> dict[str, Site]:
        rows, values = rows[:split], dict(zip(latents, rows[split:], strict=True))
        with blames_data(rows[0]) if simulator.reads is None else nullcontext():
            if simulator.reads is None:
                with seeded(0, rows[0].device):
                    axes.update(_axes(sites := run(*rows), run, rows))
                if not latents and any(map(is_factor, sites.values())):
                    warn_of_factors(pair, rows)
            values = {name: _moved(z, 0, axes.get(name)) for name, z in values.items()}
            sites, _ = simulator.draw(rows, values)
        free = {n: s for n, s in sites.items() if not s["is_observed"]}
        drawn = {n: s for n, s in free.items() if s["infer"].get("was_observed")}
        hidden = free.keys() - drawn.keys()
        if unknown := sorted(values.keys() - hidden):
            raise InputError(f"No latent sites {unknown}; the model has {sorted(hidden)}.")
        if not drawn:
            raise InputError(
                f"Expected a model that observes data, got a program that samples {sorted(hidden)} "
                f"alone: give the model, and in it the site of the data obs=x."
            )
        return {n: s | {"reads": simulator.reads, "axis": axes.get(n)} for n, s in drawn.items()}

    return _forward(pair, read, (*rows, *latents.values()), size=size, **options)


def _has_rows(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.dim() > 0


def _bound(pair: Pair, args: tuple) -> tuple[Rows, int | None]:
    """The arguments that have rows; the programs are handed the others as they are.

    And how many rows to run at once, where an argument may hold all of them in another form.
    """
    fixed = {i: arg for i, arg in enumerate(args) if not _has_rows(arg)}
    if fixed:
        for name in ("model", "guide"):
            if program := getattr(pair, name):
                setattr(pair, name, partial(_run_with, program, fixed, len(args)))
    plain = all(
        arg is None or isinstance(arg, int | float | str | Tensor) for arg in fixed.values()
    )
    return tuple(filter(_has_rows, args)), None if plain else len(args[0])


def _run_with(program: Callable, fixed: dict[int, Any], count: int, *rows: Tensor) -> Any:
    left = iter(rows)
    return program(*(fixed[i] if i in fixed else next(left) for i in range(count)))


def _decode_paths(
    model: Callable, path: dict[str, Tensor], context: tuple, like: Tensor, **options: Any
) -> Sites:
    """E[x | z] at S latents of each datum, ``[N, S, ...]`` by site."""
    n, steps = next(iter(path.values())).shape[:2]
    latents = {name: z.flatten(0, 1) for name, z in path.items()}
    along = tuple(c.repeat_interleave(steps, 0) if _has_rows(c) else c for c in context)
    found = _generate(model, latents, like, n * steps, along, {"mean": True, **options})
    return _one_or_all({name: value.unflatten(0, (n, steps)) for name, value in found.items()})


def _one_or_all(found: dict[str, Tensor]) -> Sites:
    return next(iter(found.values())) if len(found) == 1 else found


def tile_size(device: torch.device) -> int:
    """How many rows run at once.

    On a CPU as many as its second-level cache holds the activations of, some hundred floats a row
    and layer; on an accelerator enough to keep it busy in a few MB of memory a layer.
    """
    return 512 if device.type == "cpu" else 16_384


def _forward(
    pair: Pair,
    read: Read,
    rows: Rows,
    mean: bool,
    seed: int | None,
    compile: bool | str,
    size: int | None = None,
) -> dict[str, Tensor]:
    """Values ``[N, ...]`` of sites of a program, which runs on one tile of rows after another.

    ``read`` runs the program on a tile's rows and returns the sites, to take the mean or the draw
    of. The first tile draws under the seed itself, every other under a seed of its own. All but
    the first and a smaller last one may run as one compiled graph, which is checked against an
    eager run with the same noise; a tile in which a NaN or data outside their support come up
    runs eagerly again. A program that cannot be run on a part of the rows is run on all at once.
    """
    size, home = size or tile_size(pair.device), rows[0].device
    pays = should_compile(compile, len(rows[0]) >= PAYS_AFTER)
    tiles = list(zip(*(tensor.split(size) for tensor in rows), strict=True))
    with torch.no_grad(), pair.mode(training=False):
        if len(tiles) > 1:
            try:
                return _tiled(pair, read, tiles, mean, seed, pays)
            except torch.OutOfMemoryError:
                raise
            except (ValueError, RuntimeError):
                pass  # All rows at once may run, or else name what is wrong.
        found = _eager(pair, read, rows, mean, seed)[0]
    return {name: value.to(home) for name, value in found.items()}


def _eager(
    pair: Pair, read: Read, rows: Rows, mean: bool, seed: int | None
) -> tuple[dict[str, Tensor], set[str]]:
    """The sites' values, and the names of those whose mean that is."""
    rows = tuple(tensor.to(pair.device) for tensor in rows)
    with seeded(seed, rows[0].device):
        if None not in (pair.model, pair.guide):
            inspect_pair(pair, *rows)
        sites = _sites(read, rows)
        means = {name for name, site in sites.items() if mean and _has_mean(site)}
        return _values(sites, means), means


def _tiled(
    pair: Pair, read: Read, tiles: list[Rows], mean: bool, seed: int | None, pays: bool
) -> dict[str, Tensor]:
    """All rows' values, ``[N, ...]`` where the rows are."""
    first, means = _eager(pair, read, tiles[0], mean, seed)
    size, total, home = len(tiles[0][0]), sum(len(tile[0]) for tile in tiles), tiles[0][0].device
    if any(value.shape[:1] != (size,) for value in first.values()):
        raise InputError(f"Expected a value for each of {size} rows.")

    def run(*rows: Tensor) -> list[Tensor]:
        """A tile's values, and whether they and the data are sound."""
        sites = _sites(read, rows)
        values = [*_values(sites, means).values()]
        sound = [~value.isnan().any() for value in values]
        observed = [site for site in sites.values() if site["is_observed"]]
        sound += [site["fn"].support.check(site["value"]).all() for site in observed]
        return [*values, torch.stack(sound).all()]

    seed, graph = draw_seed(seed), run
    if pays:
        named = [(f"site {name!r}", 0.0 if name in means else FLIPPED) for name in first]
        try:
            graph = audited(run, tuple(t.to(pair.device) for t in tiles[0]), pair, named)
        except CaptureError as error:
            warn(f"The program runs eagerly, not compiled: {error}.")
    shapes = {name: (total, *value.shape[1:]) for name, value in first.items()}
    found = {name: first[name].new_empty(shape, device=home) for name, shape in shapes.items()}
    for index, tile in enumerate(tiles):
        part = first
        if index:
            rows = tuple(tensor.to(pair.device) for tensor in tile)
            with seeded(seed, rows[0].device, index):
                *values, sound = (graph if len(rows[0]) == size else run)(*rows)
            part = dict(zip(first, values, strict=True))
            if not bool(sound):
                part, _ = _eager(pair, read, tile, mean, subseed(seed, index))
        for name, value in part.items():
            found[name][index * size : (index + 1) * size] = value
    return found


def _sites(read: Read, rows: Rows) -> dict[str, Site]:
    return {name: site for name, site in read(*rows).items() if not is_bookkeeping(site)}


def _values(sites: dict[str, Site], means: Iterable[str]) -> dict[str, Tensor]:
    """The mean of a site, a draw where its value is an observation, or its value, ``[N, ...]``."""
    found = {
        name: site["fn"].mean
        if name in means
        else site["fn"]()
        if site["is_observed"] and site.get("redrawn")
        else site["value"]
        for name, site in sites.items()
    }
    return {name: _moved(value, sites[name].get("axis"), 0) for name, value in found.items()}


def _moved(value: Tensor, start: int | None, end: int | None) -> Tensor:
    """A value with the batch at another axis, where that is known and the value has it."""
    if start is None or end is None or value.dim() < -min(start, end):
        return value
    return value.movedim(start, end)


def _has_mean(site: Site) -> bool:
    """Whether the mean is known and wanted; that given values of x drawn before is not E[x | z]."""
    if site.get("reads") or site.get("drawn"):
        return False
    try:
        return not bool(site["fn"].mean.isnan().any())
    except NotImplementedError:
        return False
