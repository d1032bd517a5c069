"""A run in pictures and on a page: a single HTML file that loads nothing from anywhere."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrovae._tools import InputError, flat
from pyrovae._tools.files import plain_json
from pyrovae._tools.seeding import subseed
from pyrovae._tools.shown import number
from pyrovae.reporting import explorer
from pyrovae.reporting import figures as plots
from pyrovae.reporting.explorer import whole_events
from pyrovae.reporting.glossary import GLOSSARY
from pyrovae.reporting.posterior_figures import FINDING_PICTURES, draw_findings
from pyrovae.reporting.text import statements
from pyrovae.runs import Run
from pyrovae.runs.compare import HEAD, RunComparison
from pyrovae.runs.config import PairRecord
from pyrovae.runs.experiment import Experiment
from pyrovae.runs.results import Results, load_finding
from pyrovae.sampling import decode, encode_sites, interpolate, reconstruct, sample

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

__all__ = ["draw_found", "draw_run", "render_comparison", "render_report", "sample_picture"]

PICTURE_STREAM = 1_000_002
# Entries of a configuration that are no settings.
APART = ("command", "identity", "sha256", "signature")
REACH = 2.5  # standard deviations of the prior, within which 99% of a dimension's latents lie
CAPTIONS = {
    "learning_curves": "The ELBO and its two terms after each epoch, in nats per datum.",
    "bound_curve": "The importance-weighted bound for fewer samples, and what each tenfold adds. "
    "Where it is flat, the samples are enough.",
    "khat": "The Pareto shape of each datum's importance weights. Above 0.7 a few weights carry "
    "the sum, and log p(x) of that datum is too low by more than its error says.",
    "rate_distortion": "Rate and distortion at the end, with two standard errors over data, and "
    "after each epoch before. Along a grey line the ELBO is the same.",
    "kl_by_dimension": "KL from the prior by latent dimension: what each carries of the datum.",
    "calibration": "How many values lie in the central intervals of p(x|z), z ~ q(z|x). "
    "Below the diagonal the model is too sure of itself.",
    "guide_calibration": "Ranks of true latents among the guide's draws, on data of the model's "
    "own: their distribution less the uniform one. The band holds those of an exact posterior.",
    "latent_space": "Where the guide puts the data: posterior means.",
    "samples": "Samples: z drawn from the prior, then decoded.",
    "reconstructions": "Data, and each datum encoded and decoded again.",
    "interpolations": "From one datum to another along a line between their latents.",
    "responses": "How the columns of a table respond to each latent dimension, from two standard "
    "deviations of the posterior means below their mean to two above, the others at their mean.",
    "sequences": "Test sequences, each encoded and decoded again below it, E[x | z], and sequences "
    "that the model generates, of the same lengths.",
    "manifold": "What the model decodes across the latent plane.",
}


def draw_run(run: Run, experiment: Experiment[Any]) -> dict[str, bytes]:
    """Draw the run's test data and all that is found of it, return the PNG by name."""
    config: PairRecord = experiment.config
    seen = bool(experiment.data.split("test"))
    seed = subseed(config.seed, PICTURE_STREAM)
    drawn = _draw_pictures(experiment, seed) if seen else {}
    pair = experiment.model, experiment.guide
    explorer.save(run, explorer.explore(*pair, experiment.data, seed=seed) if seen else None)
    return draw_found(run, drawn)


def draw_found(run: Run, drawn: Mapping[str, Figure] | None = None) -> dict[str, bytes]:
    """Draw the training and the evaluation of a run from its files, and save all pictures.

    Nothing of the run is executed for it. ``drawn`` are further pictures to save.
    """
    finding, history = load_finding(run), run.history()
    figures = dict(drawn or {})
    if history:
        figures["learning_curves"] = plots.learning_curves(history)
    figures |= draw_findings({"": finding} if finding else {})
    found = {name: plots.png(figure) for name, figure in figures.items()}
    for name in FINDING_PICTURES:
        run.file(f"figures/{name}.png").unlink(missing_ok=True)
    for name, picture in found.items():
        run.write(f"figures/{name}.png", picture)
    return found


def sample_picture(
    model: Callable, like: Tensor, *context: Tensor, n: int, seed: int | None
) -> Figure:
    """Draw n data of the shape of ``like`` ``[N, ...]`` for the first rows of the context."""
    rows = [tensor[torch.arange(n) % len(tensor)] for tensor in context]
    if len(like.shape) == 3:
        drawn = _generated(model, like, rows, n, seed).split(2)
        return plots.sequences({f"{2 * i + 1}, {2 * i + 2}": x for i, x in enumerate(drawn)})
    images = whole_events(
        sample(model, *rows, like=like, n=n, mean=True, seed=seed), 1, like.shape[1:]
    )
    return plots.image_grid(images, title="Samples, E[x | z] with z from the prior")


def render_report(
    config: Mapping[str, Any],
    results: Mapping[str, Results],
    history: Sequence[Mapping[str, Any]],
    figures: Mapping[str, bytes],
    *,
    weights: str | None = None,
    explored: Mapping[str, Any] | None = None,
) -> str:
    """Write a run as one HTML page: what was found, by split, then PNG pictures, then settings.

    The page refers to nothing outside itself, and runs no script but that of the latent explorer,
    whose hash its policy names. ``weights`` is the digest of the run's weights, by which results of
    others are told, and ``explored`` what :func:`pyrovae.reporting.explorer.view` gives.
    """
    model, guide, data = (_name_of(config.get(part)) for part in ("model", "guide", "data"))
    splits: list[dict[str, Any]] = []
    for split in sorted(results, key=["test", "valid", "train", *results].index):
        found, rows = results[split], () if splits else history
        said = statements(found, history=rows, weights=weights)
        about = {"name": split, "found": plain_json(found), "statements": said}
        splits.append(about | {"headline": found.headline, "is_bound": found.is_bound})
    return _render(
        "report.html.j2",
        title=f"{model} with guide {guide}, trained on {data}",
        config=config,
        history=history,
        splits=splits,
        figures=[_picture(name, png) for name, png in figures.items()],
        explored=explored,
        glossary=GLOSSARY,
        **(explorer.script() if explored else {}),
    )


def render_comparison(found: RunComparison) -> str:
    """Write a comparison as one self-contained HTML page: what differs, then the pictures."""
    names, runs = [run.name for run in found.runs], found.runs
    curves = draw_findings({run.name: run.finding for run in runs}, joined=found.joined)
    said = [(run.name, each) for run in runs for each in statements(run.finding.results)]
    pictures = [(run.name, *each) for run in runs for each in run.run.figures().items()]
    return _render(
        "comparison.html.j2",
        title=f"{', '.join(names[:-1])} and {names[-1]}, compared on {found.split} data",
        num_data=found.num_data,
        verdicts=found.verdicts,
        names=names,
        numbers=_numbers(found),
        doubts=[(name, each) for name, each in said if each.kind == "doubtful"],
        curves=[_picture(name, plots.png(figure)) for name, figure in curves.items()],
        figures=[_picture(name, png, of=run) for run, name, png in pictures],
        settings=_differing([plain_json(run.config) for run in runs]),
        commands=[run.config.command for run in runs],
    )


def _render(template: str, **view: Any) -> str:
    """Fill a template in: what it is given is text, and is escaped."""
    from jinja2 import ChainableUndefined, Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("pyrovae.reporting"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        # What results of an earlier version or a part of an evaluation lack, the page leaves out.
        undefined=ChainableUndefined,
    )
    environment.filters |= {"cell": _cell, "leaves": _leaves, "plain": _plain}
    return environment.get_template(template).render(view)


def _cell(value: Any) -> str | Markup:
    """A float is shown rounded, with its exact value in the markup."""
    from markupsafe import Markup

    if isinstance(value, float):
        return Markup('<data value="{!r}">{}</data>').format(float(value), number(value))
    return _plain(value)


def _plain(value: Any) -> str:
    """A value as text: itself, or as JSON writes it; nothing for None."""
    from jinja2 import Undefined

    if value is None or isinstance(value, Undefined):
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _leaves(value: Any, *without: str) -> list[tuple[str, Any]]:
    """The leaves of nested mappings by their paths, ``a.b.c``, but for some keys of the first."""
    if not isinstance(value, Mapping):
        value = {"name": value} if value else {}
    kept = {key: part for key, part in value.items() if key not in without}
    return [*flat(kept).items()]


def _name_of(part: Any) -> str:
    """What a model, a guide or a data set of a configuration is called."""
    return _plain((part.get("name") if isinstance(part, Mapping) else part) or "unnamed")


def _picture(name: str, png: bytes, of: str = "") -> dict[str, Any]:
    """What a page needs of a picture: half as large as its dots, for sharp screens.

    ``latent_space_u`` is of the kind ``latent_space``, the latent space of the site u.
    """
    if png[:8] != b"\x89PNG\r\n\x1a\n":
        raise InputError(f"Expected the figure {name!r} to be a PNG, got a file of {png[:8]!r}.")
    kind = next((kind for kind in CAPTIONS if f"{name}_".startswith(f"{kind}_")), "")
    caption = " ".join(filter(None, [CAPTIONS.get(kind), name[len(kind) :].strip("_")]))
    width, height = (int.from_bytes(png[at : at + 4], "big") // 2 for at in (16, 20))
    data, size = b64encode(png).decode(), {"width": width, "height": height}
    return {"of": of, "kind": kind, "caption": caption, "data": data} | size


def _numbers(found: RunComparison) -> list[tuple[str, ...]]:
    """The table of a comparison, a run a column."""
    columns = [[*HEAD, "log p(x) less the first's", "ELBO less the first's"]]
    columns.append([*found.runs[0].cells, "", ""])
    for run, c, elbo in zip(found.runs[1:], found.differences, found.elbo_differences, strict=True):
        paired = [f"{d:+.3f} ± {e:.3f}" for d, e in ((c.difference, c.standard_error), elbo)]
        columns.append([*run.cells, *paired])
    return list(zip(*columns, strict=True))[1:]


def _differing(configs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The settings in which runs differ, a run a column."""
    runs = [dict(_leaves(config, *APART, "versions", "resumed")) for config in configs]
    paths = dict.fromkeys(path for run in runs for path in run)
    rows = [[path, *(_plain(run.get(path)) for run in runs)] for path in paths]
    return [row for row in rows if len(set(row[1:])) > 1]


def _draw_pictures(experiment: Experiment[Any], seed: int) -> dict[str, Figure]:
    """Samples, reconstructions, latent space and what lies between data."""
    model, guide, data = experiment.model, experiment.guide, experiment.data
    every, *others = data.split("test")
    if len(data.shape) == 2:
        return {"sequences": _sequences(model, guide, every[:2], [t[:2] for t in others], seed)}
    x, *context = every[:10], *(tensor[:10] for tensor in others)
    found = {"samples": sample_picture(model, every, *others, n=64, seed=seed)}
    xhat = whole_events(reconstruct(model, guide, x, *context, seed=seed), 1, data.shape)
    found["reconstructions"] = plots.reconstructions(x, xhat)
    if responding := explorer.respond(model, guide, data):
        values, curves, site = responding
        called = [column.name for column in data.columns or ()]
        found["responses"] = plots.responses(values, curves, called, site)
    means, discrete = encode_sites(guide, (every, *others))
    codes = {n: z for n, z in means.items() if n not in discrete}
    labels = data.labels.test if data.labels else None
    vectors = {name: z for name, z in codes.items() if z.dim() == 2}
    for name, z in vectors.items():
        key = "latent_space" if len(vectors) == 1 else f"latent_space_{name}"
        found[key] = plots.latent_space(z, labels, site=name)
    if len(codes) == len(means) and len(every) > 1:
        # Few data have no row of others to end at: then the last are paired with the first.
        n = min(5, len(every) // 2)
        start, half = min(10, len(every) - n), [tensor[:n] for tensor in context]
        rows = interpolate(model, guide, x[:n], every[start : start + n], *half)
        found["interpolations"] = plots.interpolations(whole_events(rows, 2, data.shape))
    if len(codes) == 1 and not others and next(iter(codes.values())).shape[1:] == (2,):
        found["manifold"] = _manifold(model, next(iter(codes)), every)
    return found


def _sequences(
    model: Callable, guide: Callable, x: Tensor, context: Sequence[Tensor], seed: int
) -> Figure:
    """Some sequences, what they are decoded to again, and as many new ones."""
    xhat = whole_events(reconstruct(model, guide, x, *context, seed=seed), 1, x.shape[1:])
    seen = _seen(x, context)
    rows = {"data": x.where(seen, torch.nan), "reconstruction": xhat.where(seen, torch.nan)}
    return plots.sequences({**rows, "generated": _generated(model, x, context, len(x), seed)})


def _generated(
    model: Callable, like: Tensor, context: Sequence[Tensor], n: int, seed: int | None
) -> Tensor:
    """New sequences ``[n, T, D]`` as long as the first ones, NaN behind their ends."""
    rows = [tensor[:n] for tensor in context]
    drawn = whole_events(sample(model, *rows, like=like, n=n, seed=seed), 1, like.shape[1:])
    return drawn.where(_seen(drawn, rows), torch.nan)


def _seen(x: Tensor, context: Sequence[Tensor]) -> Tensor:
    """Where the mask is true, which comes last if there is one."""
    masks = [each for each in context[-1:] if each.dtype == torch.bool and each.shape == x.shape]
    return masks[0] if masks else torch.ones_like(x, dtype=torch.bool)


def _manifold(model: Callable, site: str, like: Tensor, side: int = 15) -> Figure:
    axis = torch.linspace(-REACH, REACH, side)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    images = whole_events(decode(model, {site: grid.reshape(-1, 2)}, like=like), 1, like.shape[1:])
    return plots.manifold(images.reshape(side, side, *like.shape[1:]), (-REACH, REACH))
