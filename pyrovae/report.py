"""A run on one page: a single HTML file that loads nothing from anywhere."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["render_report"]

BOUNDS = {
    "trace_elbo": "ELBO, estimator A (Trace_ELBO)",
    "trace_mean_field_elbo": "ELBO, estimator B (TraceMeanField_ELBO)",
}
BEHIND = {
    "num_samples": "samples per datum for log p(x), K",
    "ess_median": "effective sample size of those K, median",
    "khat_median": "Pareto k-hat, median",
    "khat_over_0.7": "data with Pareto k-hat above 0.7",
    "reconstruction": "E_q[ln p(x|z)], nats per datum",
    "kl": "KL(q(z|x) ‖ p(z)), nats per datum",
}
CAPTIONS = {
    "learning_curves": "The ELBO and its two terms after each epoch, in nats per datum.",
    "samples": "Samples: z drawn from the prior, then decoded.",
    "reconstructions": "Data, and each datum encoded and decoded again.",
    "latent_space": "Where the guide puts the data: posterior means.",
    "manifold": "What the model decodes across the latent plane.",
    "interpolations": "From one datum to another along a line between their latents.",
}
GROUPS = {"model": "Model", "guide": "Guide", "data": "Data", "versions": "Versions"}
KHAT_SHARE = 0.05
STYLE = """
:root { color-scheme: light dark;
        --ink: #222; --soft: #666; --line: #ddd; --paper: #fff; --note: #fff1d6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --soft: #a5a5a5; --line: #444; --paper: #1a1a1a; --note: #4a3918; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 72rem; color: var(--ink);
       background: var(--paper); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
header, p, .numbers, .behind { max-width: 48rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p { margin: .5rem 0; }
.soft, figcaption, thead th { color: var(--soft); font-size: .9rem; }
.verdict { font-size: 1.1rem; }
.note { background: var(--note); padding: .6rem .8rem; border-radius: .3rem; }
table { border-collapse: collapse; width: 100%; margin: .8rem 0 1.4rem; }
th, td { text-align: left; vertical-align: baseline; padding: .3rem 1rem .3rem 0;
         border-bottom: 1px solid var(--line); }
th { font-weight: 500; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.columns th { width: 40%; }
.numbers td, .numbers th + th { text-align: right; padding: .3rem 0 .3rem .6rem; }
.numbers td { white-space: nowrap; }
.columns { columns: 2 24rem; column-gap: 3rem; }
.columns > * { display: inline-block; width: 100%; margin: 0 0 1.4rem; break-inside: avoid; }
.columns h2 { margin-top: .6rem; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: .3rem; }
figcaption { margin-top: .3rem; }
pre { white-space: pre-wrap; padding: .8rem; border: 1px solid var(--line); }
@media (max-width: 30rem) { .numbers { font-size: .85rem; } }
@page { margin: 15mm; }
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --note: #fff; }
  body { padding: 0; max-width: none; font-size: 9.5pt; }
  .columns { columns: 2; column-gap: 1.5rem; }
  h2 { break-after: avoid; }
  tr, pre { break-inside: avoid; }
  .note { border: 1px solid #000; }
}
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def render_report(
    config: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]],
    figures: Mapping[str, bytes],
) -> str:
    """Write a run as one self-contained HTML page: numbers first, then pictures, then settings.

    Args:
        config: The run's configuration, nested as it comes.
        results: By split, ``num_data``, ``elbo`` by estimator and ``log_likelihood``, in nats per
            datum. What is missing is left out; what is unknown is listed.
        history: The rows of the training, one an epoch.
        figures: PNG pictures by name.

    Returns:
        The page. It refers to nothing outside itself and runs no script.

    Raises:
        ValueError: If a figure is not a PNG.
    """
    model, guide, data = (_name(config.get(part)) for part in ("model", "guide", "data"))
    title = escape(f"{model} with guide {guide}, trained on {data}")
    order = ["test", "valid", "train", *results]
    body = [
        f"<header><h1>{title}</h1>{_training(config, history)}</header>",
        *(_split(split, results[split]) for split in sorted(results, key=order.index)),
        "" if results else "<p>Not evaluated yet.</p>",
        _pictures(figures),
        '<div class="columns">',
        *_settings(config),
        "</div>",
        _command(config),
    ]
    return PAGE.format(title=title, style=STYLE, body="\n".join(filter(None, body)))


def _name(part: Any) -> str:
    return _plain((part.get("name") if isinstance(part, Mapping) else part) or "unnamed")


def _training(config: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> str:
    if not history:
        return ""
    seconds = sum(row.get("seconds") or 0.0 for row in history)
    text = f"{len(history)} epoch{'s' * (len(history) > 1)}"
    text += f" in {seconds:.1f} s" if seconds else ""
    text += f" on {config['device']}" if "device" in config else ""
    best = [row["valid_elbo"] for row in history if row.get("valid_elbo") is not None]
    text += f"; best validation ELBO {max(best):.3f} nats per datum" if best else ""
    return f'<p class="soft">{escape(text)}.</p>'


def _split(split: str, found: Mapping[str, Any]) -> str:
    """A split's numbers: in words, in a table with their errors, and what lies behind them."""
    bounds, ll = dict(found.get("elbo") or {}), dict(found.get("log_likelihood") or {})
    rows = [
        [BOUNDS.get(name, f"ELBO, {name}"), bound.get("mean"), None, bound.get("standard_error")]
        for name, bound in bounds.items()
    ]
    errors = [ll.pop(key, None) for key in ("mean", "standard_error", "data_standard_error")]
    if errors[0] is not None:
        rows.append(["log p(x)", *errors])
    others = {key: found[key] for key in found if key not in ("elbo", "log_likelihood", "num_data")}
    behind = [[BEHIND.get(key, key), _share(key, value)] for key, value in _flatten(ll | others)]
    name = {"train": "training", "valid": "validation"}.get(split, split).capitalize()
    size = f", N = {found['num_data']:,}" if "num_data" in found else ""
    return "\n".join(
        [
            f"<section><h2>{escape(name)} data{size}</h2>",
            _verdict(bounds, *errors[:2]),
            _warning(ll.get("khat_over_0.7")),
            _table(
                rows, "nats per datum, higher is better", "mean", "± Monte Carlo", "± over data"
            ),
            _table(behind),
            "</section>",
        ]
    )


def _verdict(bounds: Mapping[str, Any], mean: float | None, error: float | None) -> str:
    """The comparison of log p(x) with the ELBO of the smaller variance, in words."""
    if mean is None:
        return ""
    text = f"log p(x) = {_cell(mean)}" + ("" if error is None else f" ± {_cell(error)}")
    text += " nats per datum."
    bound = bounds.get("trace_mean_field_elbo") or bounds.get("trace_elbo") or {}
    if bound.get("mean") is not None:
        gap = mean - bound["mean"]
        which = "B" if "trace_mean_field_elbo" in bounds else "A"
        text += f" The gap log p(x) − ELBO ({which}) is {_cell(gap)} nats: the looseness of the "
        text += "bound, an estimate of the mean KL(q(z|x) ‖ p(z|x)), at least this where k-hat is "
        text += "above 0.7"
        text += "." if gap > 0 else ", never negative: here sampling error outweighs it."
    return f'<p class="verdict">{text}</p>'


def _warning(share: float | None) -> str:
    if share is None or share <= KHAT_SHARE:
        return ""
    return (
        f'<p class="note">For {share:.1%} of the data the Pareto k-hat of the importance weights '
        "is above 0.7: log p(x) of these data is a lower bound in expectation; raise --samples.</p>"
    )


def _pictures(figures: Mapping[str, bytes]) -> str:
    kinds = [*CAPTIONS, ""]
    drawn = [
        _figure(name, figures[name]) for kind in kinds for name in figures if _kind(name) == kind
    ]
    heading = '<section><h2>Pictures</h2>\n<div class="columns">'
    return "\n".join([heading, *drawn, "</div></section>"]) if drawn else ""


def _kind(name: str) -> str:
    """The caption that fits: ``latent_space_u`` is the latent space of the site u."""
    return next((kind for kind in CAPTIONS if f"{name}_".startswith(f"{kind}_")), "")


def _figure(name: str, png: bytes) -> str:
    if png[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError(f"Expected the figure {name!r} to be a PNG, got a file of {png[:8]!r}.")
    width, height = (int.from_bytes(png[at : at + 4], "big") // 2 for at in (16, 20))
    kind = _kind(name)
    text = escape(" ".join(filter(None, [CAPTIONS.get(kind), name[len(kind) :].strip("_")])))
    return (
        f'<figure><img src="data:image/png;base64,{b64encode(png).decode()}" alt="{text}" '
        f'width="{width}" height="{height}"><figcaption>{text}</figcaption></figure>'
    )


def _settings(config: Mapping[str, Any]) -> Iterator[str]:
    training = {key: config[key] for key in config if key not in (*GROUPS, "command")}
    groups = {GROUPS[key]: config[key] for key in GROUPS if key in config}
    for title, group in {"Training": training, **groups}.items():
        if rows := [[path, _plain(value)] for path, value in _flatten(group) if value is not None]:
            yield f"<section><h2>{title}</h2>{_table(rows)}</section>"


def _command(config: Mapping[str, Any]) -> str:
    command = escape(_plain(config.get("command")))
    heading = "<section><h2>The command that makes this run</h2>"
    return f"{heading}<pre><code>{command}</code></pre></section>" if command else ""


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flatten(part, f"{path}.{key}" if path else str(key))
    else:
        yield path or "name", value


def _table(rows: Sequence[Sequence[Any]], *head: str) -> str:
    """Rows of a name and its values; values that are numbers keep all their digits."""
    if not rows:
        return ""
    kind = "numbers" if head else "behind"
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = [f'<table class="{kind}">', f"<thead><tr>{top}</tr></thead>" if head else ""]
    for name, *values in rows:
        cells = "".join(f"<td>{_cell(value)}</td>" for value in values)
        lines.append(f'<tr><th scope="row">{escape(str(name))}</th>{cells}</tr>')
    return "\n".join([*filter(None, lines), "</table>"])


def _cell(value: Any) -> str:
    """A float is shown rounded, with its exact value in the markup."""
    if not isinstance(value, float):
        return escape(_plain(value))
    shown = f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.3g}"
    return f'<data value="{float(value)!r}">{shown}</data>'


def _share(key: str, value: Any) -> Any:
    return f"{value:.1%}" if key == "khat_over_0.7" and value is not None else value


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
