"""The files of the package, and what each of them imports."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "pyrovae"


def dotted(path: Path) -> str:
    """A file's module below ``pyrovae``: ``pairs.traces``, or ``pairs`` for an ``__init__.py``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "__init__"


LIBRARY = {dotted(p): p for p in sorted(PACKAGE.rglob("*.py"))}
PROGRAMS = {
    f"{kind}.{p.stem}": p
    for kind in ("models", "guides")
    for p in sorted((REPOSITORY / kind).glob("*.py"))
}
FILES = LIBRARY | PROGRAMS


def parsed(name: str) -> ast.Module:
    """A file's syntax tree."""
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def imported(name: str, *, when_loaded: bool = False) -> list[str]:
    """The full names that a file imports, but for those that only the type checker reads.

    With ``when_loaded``, those that importing the file itself imports: not what is imported inside
    a function.
    """
    return [used for node in _nodes([parsed(name)], when_loaded) for used in _names(node, name)]


def inner(name: str, *, when_loaded: bool = False) -> set[str]:
    """The files of the package that a file imports, `from pyrovae import name` among them."""
    found = set()
    for used in imported(name, when_loaded=when_loaded):
        root, *rest = used.split(".")
        known = [part for n in (3, 2, 1) if (part := ".".join(rest[:n])) in FILES]
        found |= {(known or ["__init__"])[0]} if root == "pyrovae" else set()
    return found - {name}


def _nodes(waiting: Iterable[ast.AST], when_loaded: bool) -> Iterator[ast.AST]:
    for node in waiting:
        checked = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if not checked and not (later and when_loaded):
            yield node
            yield from _nodes(ast.iter_child_nodes(node), when_loaded)


def _names(node: ast.AST, name: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{name}, line {node.lineno}: imports by a relative name"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []
