"""A run on one page: a single HTML file that loads nothing from anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from pyrovae._tools.seeding import subseed
from pyrovae.report.finding_pictures import FINDING_PICTURES, draw_findings
from pyrovae.report.html import figures_of, flatten, name_of, plain, section, table
from pyrovae.report.numbers import behind_table, number_tables
from pyrovae.report.pictures import draw_pictures
from pyrovae.report.style import page
from pyrovae.report.verdict import Statement, verdict
from pyrovae.runs import Run
from pyrovae.runs.experiment import Experiment
from pyrovae.runs.results import load_finding

__all__ = ["draw_run", "render_report"]

PICTURE_STREAM = 1_000_002

GROUPS = {"model": "Model", "guide": "Guide", "data": "Data", "versions": "Versions"}
PICTURES = {
    "Training": ("learning_curves",),
    "How far log p(x) can be trusted": ("bound_curve", "khat"),
    "What the posterior does": (
        "rate_distortion",
        "kl_by_dimension",
        "calibration",
        "latent_space",
    ),
    "Pictures": ("samples", "reconstructions", "interpolations", "manifold"),
}
SPLITS = {"train": "training", "valid": "validation"}


def draw_run(run: Run, experiment: Experiment) -> dict[str, bytes]:
    """Draw the run's pictures, and those of its evaluation, and save them.

    Args:
        run: The run, where the pictures are saved.
        experiment: Its trained pair and its data.

    Returns:
        PNG by name.
    """
    seed = subseed(experiment.config["seed"], PICTURE_STREAM)
    pair = experiment.model, experiment.guide
    found = draw_pictures(*pair, experiment.data, run.history(), seed=seed)
    if (finding := load_finding(run)) is not None:
        found |= draw_findings({"": finding})
    for name in FINDING_PICTURES:
        run.remove_figure(name)
    for name, picture in found.items():
        run.save_figure(name, picture)
    return found


def render_report(
    config: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]],
    figures: Mapping[str, bytes],
    *,
    weights: str | None = None,
) -> str:
    """Write a run as one self-contained HTML page: what was found, then pictures, then settings.

    Args:
        config: The run's configuration, nested as it comes.
        results: By split, ``num_data``, ``elbo`` by estimator and ``log_likelihood``, in nats per
            datum. What is missing is left out; what is unknown is listed.
        history: The rows of the training, one an epoch.
        figures: PNG pictures by name.
        weights: The digest of the run's weights, by which results of others are told.

    Returns:
        The page. It refers to nothing outside itself and runs no script.

    Raises:
        ValueError: If a figure is not a PNG.
    """
    model, guide, data = (name_of(config.get(part)) for part in ("model", "guide", "data"))
    title = f"{model} with guide {guide}, trained on {data}"
    order = ["test", "valid", "train", *results]
    shown = {split: results[split] for split in sorted(results, key=order.index)}
    parts = [
        f"<header><h1>{escape(title)}</h1>{_about(config)}{_training(config, history)}</header>",
        "" if results else "<p>Not evaluated yet: pyrovae evaluate.</p>",
    ]
    for number, (split, found) in enumerate(shown.items()):
        notes = [*_stale(found, weights), *([] if number else _unfinished(history))]
        parts.append(verdict(_split(split, found), found, notes))
        parts.append(section("Numbers", number_tables(found)))
    for name, kinds in PICTURES.items():
        layout = "figures tall" if "samples" in kinds else "figures"
        parts.append(section(name, figures_of(figures, kinds, layout)))
    parts.append(section("Further pictures", figures_of(figures)))
    behind = [
        section(f"Behind the numbers: {SPLITS.get(split, split)} data", behind_table(found))
        for split, found in shown.items()
    ]
    parts += ['<div class="columns">', *behind, *_settings(config), "</div>", _command(config)]
    return page(title, parts)


def _about(config: Mapping[str, Any]) -> str:
    """What was trained on what, in a line."""
    data = config.get("data")
    if not isinstance(data, Mapping):
        return ""
    said = []
    if config.get("objective"):
        said.append(f"objective {plain(config['objective'])}")
    if data.get("shape"):
        said.append(f"data of shape {plain(data['shape'])}")
    if data.get("binarize"):
        said.append(f"binarization {plain(data['binarize'])}")
    if isinstance(data.get("sizes"), Mapping):
        sizes = [f"{plain(n)} {SPLITS.get(s, s)}" for s, n in data["sizes"].items()]
        said.append(" + ".join(sizes) + " data")
    text = "; ".join(said)
    return f'<p class="soft">{escape(text[:1].upper() + text[1:])}.</p>' if said else ""


def _training(config: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> str:
    if not history:
        return ""
    seconds = sum(row.get("seconds") or 0.0 for row in history)
    text = f"{len(history)} epoch{'s' * (len(history) > 1)}"
    text += f" in {seconds:.1f} s" if seconds else ""
    text += f" on {config['device']}" if "device" in config else ""
    best = _best(history)
    text += f"; best validation ELBO {best[1]:.3f} nats per datum" if best else ""
    return f'<p class="soft">{escape(text)}.</p>'


def _best(history: Sequence[Mapping[str, Any]]) -> tuple[int, float] | None:
    rows = [(i, row.get("valid_elbo")) for i, row in enumerate(history)]
    rows = [row for row in rows if row[1] is not None]
    return max(rows, key=lambda row: row[1]) if rows else None


def _split(split: str, found: Mapping[str, Any]) -> str:
    name = SPLITS.get(split, split).capitalize()
    n, of = found.get("num_data"), found.get("num_data_of_split")
    size = "" if n is None else f", N = {n:,}"
    return f"{name} data{size}{f' of {of:,}' if of and of != n else ''}"


def _stale(found: Mapping[str, Any], weights: str | None) -> Iterator[Statement]:
    if weights is not None and found.get("weights") not in (None, weights):
        yield Statement(
            "bad",
            "These numbers are of earlier weights: the run was trained further since. Evaluate "
            "it again.",
        )


def _unfinished(history: Sequence[Mapping[str, Any]]) -> Iterator[Statement]:
    best = _best(history)
    if best and len(history) > 1 and best[0] == len(history) - 1:
        yield Statement(
            "",
            "The validation ELBO was best in the last epoch: longer training (pyrovae train "
            "--resume --epochs) may raise it.",
        )


def _settings(config: Mapping[str, Any]) -> Iterator[str]:
    training = {key: config[key] for key in config if key not in (*GROUPS, "command")}
    groups = {GROUPS[key]: config[key] for key in GROUPS if key in config}
    for title, group in {"Settings": training, **groups}.items():
        rows = [[path, plain(value)] for path, value in flatten(group) if value is not None]
        yield section(title, table(rows))


def _command(config: Mapping[str, Any]) -> str:
    command = escape(plain(config.get("command")))
    if not command:
        return ""
    return section("The command that makes this run", f"<pre><code>{command}</code></pre>")
