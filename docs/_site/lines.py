"""Bring the line numbers of the documents' links to definitions up to date."""

import re
import sys
from pathlib import Path

LINK = re.compile(r"\[`([\w.]+)`\]\(([^)#\s]+)#L(\d+)\)")


def places(page: Path, name: str, link: str) -> list[int]:
    """The lines of a linked file on which a name is defined, innermost part alone."""
    start = re.compile(rf"\s*(def|class) {name.rpartition('.')[2]}\b")
    lines = (page.parent / link).read_text(encoding="utf-8").splitlines()
    return [number for number, line in enumerate(lines, 1) if start.match(line)]


def refresh(page: Path) -> None:
    """Point every link to the nearest line that defines what it names."""

    def one(match: re.Match) -> str:
        name, link, number = match.groups()
        found = min(places(page, name, link), key=lambda line: abs(line - int(number)))
        return f"[`{name}`]({link}#L{found})"

    page.write_text(LINK.sub(one, page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        refresh(path)
