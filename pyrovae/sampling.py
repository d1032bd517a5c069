"""Draw from a pair: samples, reconstructions, encodings, and what lies between two data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyrovae._forward import Forward
from pyrovae._tools import InputError
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.pair import Given, Pair
from pyrovae.pairs.traces import is_bookkeeping, samples

__all__ = ["decode", "encode", "interpolate", "reconstruct", "sample", "traverse"]

Sites = Tensor | dict[str, Tensor]


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
    template = like[:1].expand(n, *like.shape[1:])
    return _generate(model, {}, template, context, mean, seed, compile)


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
    template = like[:1].expand(n, *like.shape[1:])
    return _generate(model, latents, template, context, mean, seed, compile)


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

    def inspect(*rows: Tensor) -> None:
        inspect_pair(pair, *rows)

    def read(*rows: Tensor) -> dict[str, dict]:
        trace = pair.trace_posterior(*rows)
        return _data({name: trace.nodes[name] for name in pair.known.observed})

    forward = Forward(read, pair, mean, inspect)
    return _as_given(forward((x, *context), seed, compile))


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

    def read(*rows: Tensor) -> dict[str, dict]:
        sites = samples(pair.trace_guide(*rows))
        return _data({n: s for n, s in sites.items() if not s["infer"].get("is_auxiliary")})

    return Forward(read, pair, mean=True)((x, *context), seed, compile)


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
    options = {"seed": seed, "compile": compile}
    start, end = (encode(guide, data, *context, **options) for data in (x, y))
    for name, value in start.items():
        if not value.is_floating_point():
            raise InputError(f"Latent {name!r} is discrete: nothing lies between two values.")
    t = torch.linspace(0, 1, steps, device=x.device)
    path = {name: _mix(start[name], end[name], t) for name in start}
    along = (c.repeat_interleave(steps, 0) for c in context)
    found = decode(model, path, *along, like=x, **options)
    return _map(found, lambda value: value.reshape(len(x), steps, *value.shape[1:]))


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
    options = {"seed": seed, "compile": compile}
    latents = encode(guide, x, *context, **options)
    if site not in latents:
        raise InputError(f"No latent site {site!r}; the guide samples {sorted(latents)}.")
    size = latents[site].shape[-1]
    if not -size <= dim < size:
        raise InputError(f"Site {site!r} has {size} dimensions, so there is no dimension {dim}.")
    repeated = {n: z.repeat_interleave(len(values), 0) for n, z in latents.items()}
    repeated[site][..., dim] = values.to(x).repeat(len(x))
    along = (c.repeat_interleave(len(values), 0) for c in context)
    found = decode(model, repeated, *along, like=x, **options)
    return _map(found, lambda value: value.reshape(len(x), len(values), *value.shape[1:]))


def _generate(
    model: Callable,
    latents: dict[str, Tensor],
    template: Tensor,
    context: tuple,
    mean: bool,
    seed: int | None,
    compile: bool | str,
) -> Sites:
    given = (*context, *latents.values())
    if lengths := [len(tensor) for tensor in given if len(tensor) != len(template)]:
        raise InputError(
            f"Expected a context of {len(template)} rows, one for each datum to draw, got "
            f"{lengths[0]}: give n, the latents and the context the same number of rows."
        )
    pair = Pair(model, None)

    def read(*rows: Tensor) -> dict[str, dict]:
        values = dict(zip(latents, rows[1 + len(context) :], strict=True))
        program = poutine.uncondition(Given(values)(pair.run_model))
        sites = samples(poutine.trace(program).get_trace(*rows[: 1 + len(context)]))
        observed = {n: s for n, s in sites.items() if s["infer"].get("was_observed")}
        hidden = sites.keys() - observed.keys()
        if unknown := sorted(values.keys() - hidden):
            raise InputError(f"No latent sites {unknown}; the model has {sorted(hidden)}.")
        return _data(observed)

    return _as_given(Forward(read, pair, mean)((template, *given), seed, compile))


def _data(sites: dict[str, dict]) -> dict[str, dict]:
    return {name: site for name, site in sites.items() if not is_bookkeeping(site)}


def _as_given(found: dict[str, Tensor]) -> Sites:
    return next(iter(found.values())) if len(found) == 1 else found


def _mix(start: Tensor, end: Tensor, t: Tensor) -> Tensor:
    t = t.reshape(-1, *[1] * (start.dim() - 1))
    return torch.lerp(start[:, None], end[:, None], t).flatten(0, 1)


def _map(found: Sites, function: Callable[[Tensor], Any]) -> Sites:
    if isinstance(found, Tensor):
        return function(found)
    return {name: function(value) for name, value in found.items()}
