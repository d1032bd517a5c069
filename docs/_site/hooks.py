"""What the site adds to docs/: README, tutorials as they ran, reference, and equations."""

from __future__ import annotations

import html
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

HOME = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(HOME / "docs" / "_site"))
from tutorials import pages  # noqa: E402

ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
ROOT_PAGES |= {"CHANGELOG.md": "changelog.md"}
REFERENCE = "reference"
CORE = "core.md"
TUTORIALS = "tutorials"
LINK = re.compile(r"\]\(([^()\s:]+)\)")
DEFINITION = re.compile(r"^(class|def|async def) [^_]", re.MULTILINE)  # what a page can document
EQUATION = re.compile(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', re.DOTALL)


def on_config(config: Any) -> Any:
    """Add to the navigation what depends on the tree."""
    sections = {title: pages for entry in config.nav for title, pages in entry.items()}
    if (HOME / "docs" / CORE).exists():
        sections["Background"].insert(0, {"The readable core": CORE})
    pages = [{"The public face": f"{REFERENCE}/index.md"}]
    pages += [{title: f"{REFERENCE}/{title}.md"} for title in reference()]
    config.nav.insert(-1, {"Reference": pages})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that stand at the repository's root, and those of the reference."""
    for name, page in ROOT_PAGES.items():
        text = (HOME / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=from_root(text)))
    for title, modules in reference().items():
        text = folder_page(title, modules)
        files.append(File.generated(config, f"{REFERENCE}/{title}.md", content=text))
    files.append(File.generated(config, f"{REFERENCE}/index.md", content=face_page()))
    for name, content in pages(sorted((HOME / "docs" / TUTORIALS).glob("*.py"))).items():
        files.append(File.generated(config, f"{TUTORIALS}/{name}", content=content))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Lead links to files that have no page, such as lines of code, to the repository.

    A link to a tutorial's program leads to the page with its outputs.
    """
    folder = posixpath.dirname(page.file.src_uri)

    def lead(found: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join(folder, found[1]))
        if place.startswith("../"):
            return f"]({config.repo_url}/blob/main/{place[3:]})"
        if place.startswith(f"{TUTORIALS}/") and place.endswith(".py"):
            return f"]({found[1].removesuffix('.py')}.md)"
        return found[0]

    return LINK.sub(lead, markdown)


def on_page_content(rendered: str, **_: Any) -> str:
    """Turn equations from LaTeX into MathML, which browsers draw without a script or a font."""

    def mathml(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        return convert(html.unescape(found[2]).strip(), display=display)

    return EQUATION.sub(mathml, rendered)


def from_root(text: str) -> str:
    """The text of a page of the root, with its links as they are from docs/."""
    text = text.replace("](docs/", "](")
    for name, page in ROOT_PAGES.items():
        text = text.replace(f"]({name})", f"]({page})")
    return text


def reference() -> dict[str, list[str]]:
    """The modules to document, by the page that they are on: a folder's, or their own."""
    pages: dict[str, list[str]] = {}
    for path in sorted((HOME / "pyrovae").rglob("*.py")):
        parts = path.relative_to(HOME).with_suffix("").parts
        private = any(part.startswith("_") for part in parts if part != "__init__")
        if not private and DEFINITION.search(path.read_text(encoding="utf-8")):
            module = ".".join(part for part in parts if part != "__init__")
            pages.setdefault(parts[1], []).append(module)
    for kind in ("models", "guides"):
        files = sorted((HOME / kind).glob("[!_]*.py"))
        pages[kind] = [f"{kind}.{path.stem}" for path in files]
    return pages


def folder_page(title: str, modules: list[str]) -> str:
    """A page of reference, with each module under a heading of its own."""
    package = f"pyrovae.{title}"
    folder = HOME / ("pyrovae" if title not in ("models", "guides") else "") / title / "__init__.py"
    intro = ""
    if folder.exists() and package not in modules:
        intro = griffe.visit("_", folder, folder.read_text(encoding="utf-8")).docstring.value
    entries = (f"::: {module}\n" for module in modules)
    if title in ("models", "guides"):  # to be read, and installed below pyrovae
        options = "    options:\n      show_source: true\n      heading: pyrovae."
        entries = (f"::: {module}\n{options}{module}\n" for module in modules)
    return "\n\n".join([f"# `{package}`", intro, *entries])


def face_page() -> str:
    """The names of ``pyrovae.__all__``, each with its first sentence and a link to the rest."""
    package = griffe.load("pyrovae", search_paths=[HOME])
    rows, here = ["| name | what it is |", "| --- | --- |"], []
    for name in package.exports:
        found = package[str(name)].final_target
        said = found.docstring.value.split("\n\n")[0].replace("\n", " ").replace("|", r"\|")
        rows.append(f"| [`pyrovae.{name}`][{found.path}] | {said} |")
        if "._" in found.path:  # its module has no page, because that is not for users
            here.append(f"\n::: {found.path}\n")
    return "\n".join(["# The public face", "", package.docstring.value, "", *rows, *here])
