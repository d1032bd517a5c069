"""The parts that pages are made of: numbers, tables and figures, as HTML."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from pyrovae._tools import InputError

__all__ = ["cell", "figure", "figures_of", "flatten", "name_of", "plain", "section", "table"]

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
    "latent_space": "Where the guide puts the data: posterior means.",
    "samples": "Samples: z drawn from the prior, then decoded.",
    "reconstructions": "Data, and each datum encoded and decoded again.",
    "interpolations": "From one datum to another along a line between their latents.",
    "manifold": "What the model decodes across the latent plane.",
}


def figures_of(
    figures: Mapping[str, bytes], kinds: Sequence[str] = ("",), layout: str = "figures"
) -> str:
    """Figures of some kinds in their order; those of no known kind if none is named.

    Args:
        figures: PNG by name.
        kinds: Keys of the captions; ``latent_space_u`` is of the kind ``latent_space``.
        layout: The classes of what holds them.
    """
    named = [name for kind in kinds for name in figures if _kind(name) == kind]
    drawn = [figure(name, figures[name]) for name in named]
    return "\n".join([f'<div class="{layout}">', *drawn, "</div>"]) if drawn else ""


def figure(name: str, png: bytes, of: str = "") -> str:
    """A picture with its caption, which is also the text in place of it.

    Args:
        name: Its name, which says what to write below it.
        png: Its content.
        of: What it is of, to be written first.

    Raises:
        ValueError: If it is no PNG.
    """
    if png[:8] != b"\x89PNG\r\n\x1a\n":
        raise InputError(f"Expected the figure {name!r} to be a PNG, got a file of {png[:8]!r}.")
    width, height = (int.from_bytes(png[at : at + 4], "big") // 2 for at in (16, 20))
    kind = _kind(name)
    text = " ".join(filter(None, [CAPTIONS.get(kind), name[len(kind) :].strip("_")]))
    head = f"<strong>{escape(of)}.</strong> " if of else ""
    alt = escape(f"{of}. {text}" if of else text)
    return (
        f'<figure><img src="data:image/png;base64,{b64encode(png).decode()}" alt="{alt}" '
        f'width="{width}" height="{height}"><figcaption>{head}{escape(text)}</figcaption></figure>'
    )


def section(title: str, *parts: str) -> str:
    """Parts under a heading; nothing if all of them are empty."""
    found = [part for part in parts if part]
    return "\n".join([f"<section><h2>{escape(title)}</h2>", *found, "</section>"]) if found else ""


def table(rows: Sequence[Sequence[Any]], *head: str) -> str:
    """Rows of a name and its values; values that are numbers keep all their digits."""
    if not rows:
        return ""
    kind = "numbers" if head else "behind"
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = [f'<table class="{kind}">', f"<thead><tr>{top}</tr></thead>" if head else ""]
    for name, *values in rows:
        cells = "".join(f"<td>{cell(value)}</td>" for value in values)
        lines.append(f'<tr><th scope="row">{escape(str(name))}</th>{cells}</tr>')
    return "\n".join([*filter(None, lines), "</table>"])


def cell(value: Any) -> str:
    """A float is shown rounded, with its exact value in the markup."""
    if not isinstance(value, float):
        return escape(plain(value))
    shown = f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.3g}"
    return f'<data value="{float(value)!r}">{shown}</data>'


def plain(value: Any) -> str:
    """A value as text: itself, or as JSON writes it; nothing for None."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def name_of(part: Any) -> str:
    """What a model, a guide or a data set of a configuration is called."""
    return plain((part.get("name") if isinstance(part, Mapping) else part) or "unnamed")


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings by their paths, ``a.b.c``."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from flatten(part, f"{path}.{key}" if path else str(key))
    else:
        yield path or "name", value


def _kind(name: str) -> str:
    """The caption that fits: ``latent_space_u`` is the latent space of the site u."""
    return next((kind for kind in CAPTIONS if f"{name}_".startswith(f"{kind}_")), "")
