"""Docstrings as Markdown: their equations and references are reStructuredText, for editors."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

import griffe

BLOCK = re.compile(r"^([ ]*)\.\. math::[ ]*(.*(?:\n(?:\1[ ]+\S.*))*)", re.MULTILINE)
INLINE = re.compile(r":math:`([^`]*)`")
ROLE = re.compile(r":\w+:`~?([^`]*)`")


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, a class, a function or an attribute."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring with ``$`` around its equations and plain code for its references."""
    text = BLOCK.sub(lambda found: _equation(found[1], found[2]), text)
    text = INLINE.sub(lambda found: f"${' '.join(found[1].split())}$", text)
    text = ROLE.sub(r"`\1`", text)
    return re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


def _equation(indent: str, lines: str) -> str:
    body = " ".join(dedent(lines).split())
    return f"\n{indent}$$\n{indent}{body}\n{indent}$$\n"
