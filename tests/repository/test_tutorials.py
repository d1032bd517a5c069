"""Tutorials use public names, and `make docs`, which runs them, fails where one of them fails."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "tutorials"
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
TUTORIALS = sorted(FOLDER.glob("*.py"))


@pytest.fixture
def site(repository, monkeypatch):
    """The module that runs them."""
    monkeypatch.syspath_prepend(str(repository / "docs" / "_site"))
    yield importlib.import_module("tutorials")
    sys.modules.pop("tutorials")


def used(tree):
    """What a program takes from pyrovae, as pairs of a module and a name of it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "pyrovae":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pyrovae":
            yield "pyrovae", node.attr


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_uses_public_names_and_ends_in_a_number(site, path):
    parts = site.cells(path.read_text(encoding="utf-8"))
    assert parts[0][0] == "markdown"
    assert parts[0][1].startswith("# ")
    said = "\n".join(body for kind, body in parts if kind == "markdown")
    links = [link for link in LINK.findall(said) if "://" not in link]
    assert all((FOLDER / link).exists() for link in links), links
    code = [body for kind, body in parts if kind == "code"]
    assert "print(" in code[-1]
    for module, name in used(ast.parse("\n".join(code))):
        home = importlib.import_module(module)
        assert name in getattr(home, "__all__", dir(home)), f"{module}.{name}"
        assert not any(part.startswith("_") for part in [*module.split("."), name])


def test_every_tutorial_is_in_the_readme_and_in_the_navigation(repository):
    readme = (repository / "README.md").read_text(encoding="utf-8")
    navigation = (repository / "mkdocs.yml").read_text(encoding="utf-8")
    assert len(TUTORIALS) >= 6
    for path in TUTORIALS:
        assert f"](docs/tutorials/{path.name})" in readme
        assert f": tutorials/{path.stem}.md\n" in navigation


def test_a_page_has_what_the_cells_print_and_draw(site, tmp_path):
    program = tmp_path / "small.py"
    program.write_text(
        "# %% [markdown]\n# # Small\n#\n# text\n\n# %%\nimport matplotlib.pyplot as plt\n\n"
        "plt.figure().suptitle('a line')\n\n# %%\nn = 2\nprint(f'{n} cells')\n",
        encoding="utf-8",
    )
    site.page(program, tmp_path)
    assert (tmp_path / "small-1.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "small.md").read_text(encoding="utf-8")
    assert text.startswith("# Small\n\ntext\n")
    assert "![a line](small-1.png)" in text
    assert "```python\nn = 2\nprint(f'{n} cells')\n```\n\n```text\n2 cells\n```\n" in text


def test_a_cell_that_fails_fails_the_build_with_its_line(site, tmp_path):
    program = tmp_path / "broken.py"
    program.write_text("# %%\na = 1\n\n# %%\n\nassert a == 2\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"broken.py failed(.|\n)*line 6(.|\n)*AssertionError"):
        site.pages([program])
    with pytest.raises(ValueError, match="begin with"):
        site.cells("import torch\n# %%\n")
