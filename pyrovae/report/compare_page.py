"""Runs side by side on one page that loads nothing from anywhere."""

from __future__ import annotations

from html import escape

from pyrovae.report.finding_pictures import draw_findings
from pyrovae.report.html import figure, figures_of, flatten, plain, section, table
from pyrovae.report.style import page
from pyrovae.report.verdict import statements
from pyrovae.runs.compare import HEAD, RunComparison

__all__ = ["render_comparison"]

SHOWN = ("samples", "reconstructions", "interpolations", "manifold", "latent_space")
SAME = ("command", "versions")


def render_comparison(found: RunComparison) -> str:
    """Write a comparison as one self-contained HTML page: what differs, then figures and pictures.

    Args:
        found: What :func:`pyrovae.runs.compare.compare_runs` made of the runs.

    Returns:
        The page. It refers to nothing outside itself and runs no script.
    """
    names = [run.name for run in found.runs]
    title = f"{', '.join(names[:-1])} and {names[-1]}, compared on {found.split} data"
    findings = {run.name: run.finding for run in found.runs}
    figures = draw_findings(findings, joined=found.joined)
    parts = [
        f"<header><h1>{escape(title)}</h1>",
        f'<p class="soft">{found.num_data:,} data, nats per datum.</p></header>',
        _verdict(found),
        section("Numbers", _numbers(found), _doubts(found)),
        section("Curves", figures_of(figures, tuple(figures))),
        _pictures(found),
        section("What was asked for differently", _settings(found)),
        section("The commands that make these runs", *_commands(found)),
    ]
    return page(title, parts)


def _verdict(found: RunComparison) -> str:
    items = [f"<li>{escape(text)}</li>" for text in found.verdicts]
    note = (
        "Differences are paired: what makes one datum harder than another is common to both runs "
        "and cancels. ± is one standard error, over data and random draws."
    )
    return "\n".join(
        [
            '<section class="verdict"><h2>Which is better</h2><ul class="flat">',
            *items,
            f'</ul><p class="soft">{note}</p></section>',
        ]
    )


def _numbers(found: RunComparison) -> str:
    less = ["log p(x) less the first's", "ELBO less the first's"]
    rows = [[*found.runs[0].cells, "", ""]]
    for run, c, elbo in zip(found.runs[1:], found.differences, found.elbo_differences, strict=True):
        paired = [f"{d:+.3f} ± {e:.3f}" for d, e in ((c.difference, c.standard_error), elbo)]
        rows.append([*run.cells, *paired])
    (_, *names), *lines = zip([*HEAD, *less], *rows, strict=True)
    return f'<div class="scroll">{table(lines, "nats per datum", *names)}</div>'


def _doubts(found: RunComparison) -> str:
    """What gives cause for doubt in each run."""
    said = [
        f'<p class="note"><strong>{escape(run.name)}:</strong> {text}</p>'
        for run in found.runs
        for kind, text in statements(run.finding.results)
        if kind == "bad"
    ]
    return "\n".join(said)


def _pictures(found: RunComparison) -> str:
    pictures = {run.name: run.run.figures() for run in found.runs}
    parts = []
    for kind in SHOWN:
        drawn = [
            figure(name, png, run)
            for run, each in pictures.items()
            for name, png in each.items()
            if f"{name}_".startswith(f"{kind}_")
        ]
        if drawn:
            parts.append("\n".join(['<div class="figures">', *drawn, "</div>"]))
    return section("Pictures", *parts)


def _settings(found: RunComparison) -> str:
    flat = [
        {path: plain(value) for path, value in flatten(run.config) if value is not None}
        for run in found.runs
    ]
    paths = list(dict.fromkeys(path for each in flat for path in each))
    rows = [
        [path, *(each.get(path, "") for each in flat)]
        for path in paths
        if path.partition(".")[0] not in SAME and len({each.get(path) for each in flat}) > 1
    ]
    names = [run.name for run in found.runs]
    return f'<div class="scroll">{table(rows, "setting", *names)}</div>' if rows else ""


def _commands(found: RunComparison) -> list[str]:
    return [f"<pre><code>{escape(plain(run.config['command']))}</code></pre>" for run in found.runs]
