"""Draw from a model, encode and decode data, and classify them by a discrete latent."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyrovae._tools import InputError, should_compile
from pyrovae._tools.seeding import draw_seed, seeded, subseed
from pyrovae.compiling.graph import CaptureError, audited
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.pair import Given, Pair
from pyrovae.pairs.traces import Site, is_bookkeeping, samples

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
    *context: Tensor,
    like: Tensor,
    n: int | None = None,
    mean: bool = False,
    seed: int | None = None,
    compile: bool | str = "auto",
) -> Sites:
    r"""Draw new data from a model, by leaving out its observations.

    .. math:: z \sim p(z), \qquad x \sim p(x \mid z)

    Args:
        model: The model program.
        context: Its further arguments, ``[n, ...]``.
        like: A batch ``[N, ...]`` of the shape that the model takes; its values are not used.
        n: How many data to draw; by default one for each row of the context, 64 without one.
        mean: Return E[x | z] in place of x, where the likelihood knows it.
        seed: Seeds the draws; None continues torch's global stream.
        compile: Compile the model's run: True, False, or ``"auto"`` where n is at least 500,000,
            so that it pays. A model that cannot be captured runs eagerly, with one warning that
            says why; the draws of a seed are the same either way, up to rounding.

    Returns:
        ``[n, ...]``, or a dictionary of them if the model observes several sites.

    Raises:
        ValueError: If ``n`` is not positive, ``like`` is empty, or the context has not n rows.
    """
    if n is None:
        n = len(context[0]) if context else 64
    if n < 1 or len(like) < 1:
        raise InputError(f"Expected n >= 1 and a template of one datum, got {n} and {len(like)}.")
    options = {"mean": mean, "seed": seed, "compile": compile}
    return _one_or_all(_generate(model, {}, like, n, context, options))


def decode(
    model: Callable,
    latents: dict[str, Tensor],
    *context: Tensor,
    like: Tensor,
    mean: bool = True,
    seed: int | None = None,
    compile: bool | str = "auto",
) -> Sites:
    """Run a model forward from given latents; the rest it draws.

    Args:
        model: The model program.
        latents: Values ``[n, ...]`` by site.
        context: Its further arguments, ``[n, ...]``.
        like: A batch ``[N, ...]`` of the shape that the model takes; its values are not used.
        mean: Return E[x | z] in place of a draw, where the likelihood knows it.
        seed: Seeds the draws; None continues torch's global stream.
        compile: As for :func:`sample`.

    Returns:
        ``[n, ...]``, or a dictionary of them if the model observes several sites.

    Raises:
        ValueError: If a name is no latent site of the model.
    """
    if not latents:
        raise InputError("Expected the values of a latent site at least, got none.")
    n = len(next(iter(latents.values())))
    options = {"mean": mean, "seed": seed, "compile": compile}
    return _one_or_all(_generate(model, latents, like, n, context, options))


def reconstruct(
    model: Callable,
    guide: Callable,
    x: Tensor,
    *context: Tensor,
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
        ValueError: If the pair breaks the contract.
    """
    pair = Pair(model, guide)

    def read(*rows: Tensor) -> dict[str, Site]:
        trace = pair.trace_posterior(*rows)
        return {name: trace.nodes[name] for name in pair.known.observed}

    return _one_or_all(_forward(pair, read, (x, *context), mean, seed, compile))


def encode(
    guide: Callable,
    x: Tensor,
    *context: Tensor,
    seed: int | None = None,
    compile: bool | str = "auto",
) -> dict[str, Tensor]:
    """The posterior mean of each latent of each datum, as the guide has it.

    Args:
        guide: The guide program.
        x: Data ``[N, ...]``; ``context`` are further arguments of the guide, ``[N, ...]``.
        seed: Seeds the draws; None continues torch's global stream.
        compile: As for :func:`sample`.

    Returns:
        ``[N, ...]`` by site; one draw where a site's distribution knows no mean. A latent
        below another one is conditioned on a draw of it.
    """
    pair = Pair(None, guide)

    def read(*rows: Tensor) -> dict[str, Site]:
        sites = samples(pair.trace_guide(*rows))
        return {n: s for n, s in sites.items() if not s["infer"].get("is_auxiliary")}

    return _forward(pair, read, (x, *context), True, seed, compile)


def interpolate(
    model: Callable,
    guide: Callable,
    x: Tensor,
    y: Tensor,
    *context: Tensor,
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
    start, end = (encode(guide, xs, *context, seed=seed, compile=compile) for xs in (x, y))
    for name, value in start.items():
        if not value.is_floating_point():
            raise InputError(f"Latent {name!r} is discrete: nothing lies between two values.")
    t = torch.linspace(0, 1, steps, device=x.device)
    path = {
        name: torch.lerp(z[:, None], end[name][:, None], t.reshape(-1, *[1] * (z.dim() - 1)))
        for name, z in start.items()
    }
    return _decode_paths(model, path, context, x, seed=seed, compile=compile)


def traverse(
    model: Callable,
    guide: Callable,
    x: Tensor,
    site: str,
    dim: int,
    values: Tensor,
    *context: Tensor,
    seed: int | None = None,
    compile: bool | str = "auto",
) -> Sites:
    """Decode data with one latent dimension set to each of some values.

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
        ValueError: If the guide has no such site, or the site no such dimension.
    """
    latents = encode(guide, x, *context, seed=seed, compile=compile)
    if site not in latents:
        raise InputError(f"No latent site {site!r}; the guide samples {sorted(latents)}.")
    size = latents[site].shape[-1]
    if not -size <= dim < size:
        raise InputError(f"Site {site!r} has {size} dimensions, so there is no dimension {dim}.")
    path = {n: torch.stack([z] * len(values), 1) for n, z in latents.items()}
    path[site][..., dim] = values.to(x).reshape(-1, *[1] * (latents[site].dim() - 2))
    return _decode_paths(model, path, context, x, seed=seed, compile=compile)


@torch.no_grad()
def classify(
    guide: Callable, x: Tensor, *context: Tensor, site: str | None = None, seed: int | None = None
) -> Tensor:
    """The posterior probabilities q(y|x) of a discrete latent, as the guide has them.

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
    rows = [tensor.to(pair.device) for tensor in (x, *context)]
    with pair.mode(training=False), seeded(seed, rows[0].device):
        trace = pair.trace_guide(*rows)
    found = {
        name: node["fn"]
        for name, node in samples(trace).items()
        if not node["is_observed"] and node["fn"].has_enumerate_support
    }
    if site is None and len(found) == 1:
        (site,) = found
    if site not in found:
        raise InputError(
            f"Expected the name of one discrete latent of the guide, got {site!r}; it has "
            f"{sorted(found) or 'none'}."
        )
    log_prob = found[site].log_prob(found[site].enumerate_support())
    return log_prob.exp().movedim(0, -1).to(x.device)


def _generate(
    model: Callable,
    latents: dict[str, Tensor],
    like: Tensor,
    n: int,
    context: tuple,
    options: dict[str, Any],
) -> dict[str, Tensor]:
    """Values ``[n, ...]`` of observed sites; ``options`` are those of :func:`sample`."""
    given = (*context, *latents.values())
    if lengths := [len(tensor) for tensor in given if len(tensor) != n]:
        raise InputError(
            f"Expected a context of {n} rows, one for each datum to draw, got {lengths[0]}: give "
            f"n, the latents and the context the same number of rows."
        )
    pair, split = Pair(model, None), 1 + len(context)

    def read(*rows: Tensor) -> dict[str, Site]:
        values = dict(zip(latents, rows[split:], strict=True))
        program = poutine.uncondition(Given(values)(pair.run_model))
        sites = samples(poutine.trace(program).get_trace(*rows[:split]))
        observed = {n: s for n, s in sites.items() if s["infer"].get("was_observed")}
        hidden = sites.keys() - observed.keys()
        if unknown := sorted(values.keys() - hidden):
            raise InputError(f"No latent sites {unknown}; the model has {sorted(hidden)}.")
        return observed

    template = like[:1].expand(n, *like.shape[1:])
    return _forward(pair, read, (template, *given), **options)


def _decode_paths(
    model: Callable, path: dict[str, Tensor], context: tuple, like: Tensor, **options: Any
) -> Sites:
    """E[x | z] at S latents of each datum, ``[N, S, ...]`` by site."""
    n, steps = next(iter(path.values())).shape[:2]
    latents = {name: z.flatten(0, 1) for name, z in path.items()}
    along = tuple(c.repeat_interleave(steps, 0) for c in context)
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


@torch.no_grad()
def _forward(
    pair: Pair, read: Read, rows: Rows, mean: bool, seed: int | None, compile: bool | str
) -> dict[str, Tensor]:
    """Values ``[N, ...]`` of sites of a program, which runs on one tile of rows after another.

    ``read`` runs the program on a tile's rows and returns the sites, to take the mean or the draw
    of. The first tile draws under the seed itself, every other under a seed of its own. All but
    the first and a smaller last one may run as one compiled graph, which is checked against an
    eager run with the same noise; a tile in which a NaN or data outside their support come up
    runs eagerly again. A program that cannot be run on a part of the rows is run on all at once.
    """
    size, home = tile_size(pair.device), rows[0].device
    pays = should_compile(compile, len(rows[0]) >= PAYS_AFTER)
    tiles = list(zip(*(tensor.split(size) for tensor in rows), strict=True))
    with pair.mode(training=False):
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
            text = f"The program runs eagerly, not compiled: {error}."
            warnings.warn(text, stacklevel=5)  # The line that called a function of this module.
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


def _values(sites: dict[str, Site], means: set[str]) -> dict[str, Tensor]:
    return {n: s["fn"].mean if n in means else s["value"] for n, s in sites.items()}


def _has_mean(site: Site) -> bool:
    try:
        return not bool(site["fn"].mean.isnan().any())
    except NotImplementedError:
        return False
