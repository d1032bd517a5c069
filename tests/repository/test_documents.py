"""The documents lead to each other, and name one version of the package."""

import re
import sys
import tomllib

from markupsafe import escape

import pyrovae
from pyrovae.reporting import render_report
from pyrovae.reporting.glossary import GLOSSARY

LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def documents(repository):
    return [*repository.glob("*.md"), *(repository / "docs").glob("*.md")]


def test_links_lead_to_files(repository):
    links = [
        (path, link) for path in documents(repository) for link in LINK.findall(path.read_text())
    ]
    inside = [(path, link) for path, link in links if "://" not in link]
    assert len(inside) > 10
    assert not [f"{p.name}: {link}" for p, link in inside if not (p.parent / link).exists()]


def test_links_to_lines_lead_to_the_definition_that_they_name(repository):
    sys.path.insert(0, str(repository / "docs" / "_site"))
    from lines import LINK, places

    for path in documents(repository):
        for name, link, number in LINK.findall(path.read_text(encoding="utf-8")):
            found = places(path, name, link)
            assert int(number) in found, f"{path.name}: {name} is on {found}: run make lines"


def test_the_glossary_is_that_of_every_report(repository):
    page = (repository / "docs" / "glossary.md").read_text(encoding="utf-8")
    paragraphs = [" ".join(part.split()) for part in page.split("\n\n")]
    assert [each for each in paragraphs if each.startswith("**")] == [
        f"**{word}**: {meaning}" for word, meaning in GLOSSARY.items()
    ]
    report = render_report({}, {}, [], {})
    for word, meaning in GLOSSARY.items():
        assert f"<dt>{word}</dt><dd>{escape(meaning)}</dd>" in report


def test_every_page_is_in_the_navigation_of_the_site(repository):
    navigation = (repository / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {path.name for path in (repository / "docs").glob("*.md")}
    assert {page for page in pages if f": {page}\n" not in navigation} <= {"core.md"}  # by its hook


def test_the_version_is_the_same_everywhere(repository):
    declared = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))
    assert declared["project"]["version"] == pyrovae.__version__
    changes = (repository / "CHANGELOG.md").read_text(encoding="utf-8")
    assert pyrovae.__version__ in re.findall(r"^## (\S+)", changes, re.MULTILINE)


def test_make_says_what_it_makes(repository):
    text = (repository / "Makefile").read_text(encoding="utf-8")
    (targets,) = re.findall(r"^\.PHONY: (.*)", text, re.MULTILINE)
    said = {*re.findall(r"^# make (\w+)|`make (\w+)`", text, re.MULTILINE)}
    assert {*targets.split()} - {"clean"} <= {name for pair in said for name in pair}
