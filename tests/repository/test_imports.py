"""Imports point one way, cost little, and lead to names that exist and are explained."""

import ast
import importlib
import inspect
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "pyrovae"


def dotted(path):
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
HEAVY = {"arviz", "matplotlib", "pandas", "sklearn", "torchvision", "tqdm", "tensorboard"}
LEAVES = {"nn", "distributions", "_kl"}
# Each row may import the rows above it, and its own folder; so may a file of the last rows.
FLOORS = [
    {"_tools"},
    LEAVES,
    {"pairs", "data"},
    {"objectives"},
    {"compiling"},
    {"evidence", "sampling", "_forward", "_classify"},
    {"checking"},
    {"training"},
    {"diagnostics", "inference_data", "_predictive"},
    {"runs"},
    {"report"},
    {"__init__", "cli", "_parser", "_train_command", "_evaluate_command", "__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
SIDE_BY_SIDE = {
    ("_train_command", "_parser"), ("cli", "_parser"), ("cli", "_train_command"),
    ("cli", "_evaluate_command"), ("__main__", "cli"), ("inference_data", "_predictive"),
    ("sampling", "_forward"),
}  # fmt: skip
OFFERING = [
    name for name in FILES
    if name != "__main__" and not name.endswith(".__init__") and name not in
    {"pairs", "compiling", "evidence", "training"}
]  # fmt: skip
each_file = pytest.mark.parametrize("name", FILES)


def imported(path):
    """The full names that a file imports anywhere but under TYPE_CHECKING, with their line."""
    found, waiting = {}, [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= dict.fromkeys([alias.name for alias in node.names], node)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports by a relative name"
            found |= dict.fromkeys([f"{node.module}.{alias.name}" for alias in node.names], node)
        waiting.extend(ast.iter_child_nodes(node))
    return found


def inner(path):
    """The files of this package that a file imports, `from pyrovae import name` among them."""
    found = set()
    for name in imported(path):
        root, *rest = name.split(".")
        known = [part for n in (3, 2, 1) if (part := ".".join(rest[:n])) in FILES]
        found |= {(known or ["__init__"])[0]} if root == "pyrovae" else set()
    return found


def test_imports_are_acyclic():
    graph = {name: inner(path) - {name} for name, path in FILES.items()}
    list(TopologicalSorter(graph).static_order())
    assert "__init__" not in set().union(*graph.values())


@pytest.mark.parametrize("name", LIBRARY)
def test_a_folder_imports_only_folders_below_it(name):
    room = name.partition(".")[0]
    for other in {used.partition(".")[0] for used in inner(LIBRARY[name])} - {room}:
        assert FLOOR[other] < FLOOR[room] or (room, other) in SIDE_BY_SIDE, f"{name} -> {other}"


@pytest.mark.parametrize("name", LIBRARY)
def test_the_library_imports_no_program(name):
    assert not inner(LIBRARY[name]) & PROGRAMS.keys()
    source = LIBRARY[name].read_text(encoding="utf-8")
    if name != "runs.programs":
        assert "pyrovae.models" not in source
        assert "importlib.import_module" not in source


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_stand_on_leaves_alone(name):
    allowed = sys.stdlib_module_names | {"torch", "pyro"}
    for used in imported(PROGRAMS[name]):
        root = used.partition(".")[0]
        assert root in allowed or (root == "pyrovae" and used.split(".")[1] in LEAVES), used


@each_file
def test_heavy_packages_are_imported_where_they_are_used(name):
    for node in ast.parse(FILES[name].read_text(encoding="utf-8")).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not HEAVY & {used.partition(".")[0] for used in names}


def test_import_pyrovae_imports_nothing_heavy():
    code = "import pyro, sys; before = set(sys.modules); import pyrovae; "
    code += "print(*sorted(sys.modules.keys() - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added = done.stdout.split()
    assert "pyrovae.training.loop" in added
    assert not HEAVY & {name.partition(".")[0] for name in added}
    assert not [name for name in added if name.startswith(("pyrovae.models", "pyrovae.guides"))]


def public(name):
    """A module with the names that it offers."""
    loaded = importlib.import_module("pyrovae" if name == "__init__" else f"pyrovae.{name}")
    return loaded, loaded.__all__


@each_file
def test_every_file_says_what_it_is(name):
    assert ast.get_docstring(ast.parse(FILES[name].read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", OFFERING)
def test_public_names_exist_and_are_complete(name):
    loaded, names = public(name)
    assert len(set(names)) == len(names) > 0
    assert all(hasattr(loaded, each) for each in names)
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    defined = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    assert {each for each in defined if not each.startswith("_")} <= set(names)


@pytest.mark.parametrize("name", OFFERING)
def test_public_names_are_explained(name):
    loaded, names = public(name)
    for each in names:
        value = getattr(loaded, each)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, each
        for member, function in vars(value).items() if inspect.isclass(value) else ():
            method = isinstance(function, property | classmethod) or inspect.isfunction(function)
            assert member.startswith("_") or not method or function.__doc__, f"{each}.{member}"


@pytest.mark.parametrize("name", OFFERING)
def test_public_functions_are_annotated(name):
    loaded, names = public(name)
    for each in names:
        value = getattr(loaded, each)
        if inspect.isfunction(value):
            signature = inspect.signature(value)
            assert signature.return_annotation is not signature.empty, each
            hints = {n: p.annotation for n, p in signature.parameters.items()}
            assert inspect.Parameter.empty not in hints.values(), f"{each}{hints}"
