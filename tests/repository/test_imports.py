"""Imports point one way, cost little, and lead to names that exist and are explained."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from graphlib import TopologicalSorter

from tree import FILES, LIBRARY, PROGRAMS, imported, inner, parsed

HEAVY = {
    "arviz", "jinja2", "markupsafe", "matplotlib", "mlflow", "onnx", "onnxruntime", "onnxscript",
    "pandas", "sklearn", "tensorboard", "torchvision", "tqdm", "wandb",
}  # fmt: skip
# What is itself imported where it is used, and the package that it stands on.
LATER = {("estimator", "sklearn")}
LEAVES = {"nn", "distributions"}
# Each row may import the rows above it, and its own folder; so may a file of the last rows.
FLOORS = [
    {"_tools", "_start"},
    LEAVES | {"optim"},
    {"pairs", "data"},
    {"objectives"},
    {"compiling"},
    {"evidence", "sampling"},
    {"checking"},
    {"training"},
    {"diagnostics", "inference_data"},
    {"runs"},
    {"reporting", "estimator"},
    {"opening", "recording", "tracking"},
    {"exporting"},
    {"__init__", "cli", "__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
SIDE_BY_SIDE = {
    ("__main__", "cli"),
}  # fmt: skip
OFFERING = [
    name for name in FILES
    if name != "__main__" and not name.endswith(".__init__") and name not in
    {"pairs", "compiling", "evidence", "training"}
]  # fmt: skip


def test_imports_are_acyclic():
    graph = {name: inner(name) for name in FILES}
    list(TopologicalSorter(graph).static_order())
    assert "__init__" not in set().union(*graph.values())


def test_every_folder_has_its_floor_and_its_line_on_the_map(repository):
    rooms = {name.partition(".")[0] for name in LIBRARY}
    assert rooms == FLOOR.keys()
    table = re.findall(r"^\| (`.*?) \|", (repository / "docs" / "map.md").read_text(), re.MULTILINE)
    shown = [room for row in table for room in re.findall(r"`(\w+)(?:\.py|/)`", row)]
    assert {*shown} == rooms - {"__init__", "__main__"}
    floors = [FLOOR[room] for room in shown]
    assert floors == sorted(floors, reverse=True)


def test_a_folder_imports_only_folders_below_it():
    def below(room, other):
        return room == other or FLOOR[other] < FLOOR[room] or (room, other) in SIDE_BY_SIDE

    rooms = {name: name.partition(".")[0] for name in FILES}
    wrong = [
        f"{name} -> {other}"
        for name in LIBRARY
        for other in inner(name) & LIBRARY.keys()
        if not below(rooms[name], rooms[other])
    ]
    assert not wrong


def test_the_library_imports_no_program():
    assert not [name for name in LIBRARY if inner(name) & PROGRAMS.keys()]
    by_name = ("pyrovae.models", "importlib.import_module")
    sources = {name: path.read_text(encoding="utf-8") for name, path in LIBRARY.items()}
    naming = {name for name, source in sources.items() if any(word in source for word in by_name)}
    assert naming == {"runs.programs"}


def test_programs_stand_on_leaves_alone():
    allowed = sys.stdlib_module_names | {"torch", "pyro"}

    def stands(used):
        root, *rest = used.split(".")
        return root in allowed or (root == "pyrovae" and rest[0] in LEAVES)

    wrong = [
        f"{name} -> {used}" for name in PROGRAMS for used in imported(name) if not stands(used)
    ]
    assert not wrong


def test_heavy_packages_are_imported_where_they_are_used():
    wrong = [
        f"{name} -> {used}"
        for name in FILES
        for used in imported(name, when_loaded=True)
        if used.partition(".")[0] in HEAVY and (name, used.partition(".")[0]) not in LATER
    ]
    assert not wrong


FRESH = """
import io, signal, sys, pyro, torch
loaded, handler = set(sys.modules), signal.getsignal(signal.SIGINT)
import pyrovae
dir(pyrovae)
print(*sorted(sys.modules.keys() - loaded))
assert signal.getsignal(signal.SIGINT) is handler
from pyrovae.reporting import figures
assert not {"matplotlib", "sklearn"} & sys.modules.keys()
figures.image_grid(torch.rand(4, 1, 3, 3), title="").savefig(io.BytesIO())
figures.latent_space(torch.rand(9, 3), None).savefig(io.BytesIO())
assert "matplotlib.pyplot" not in sys.modules
pyrovae.VAE
assert "sklearn" in sys.modules
"""


def test_import_pyrovae_imports_nothing_heavy_and_leaves_ctrl_c_as_it_is():
    """Nor does a picture load pyplot; scikit-learn comes with the estimator."""
    command = [sys.executable, "-c", FRESH]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    added = done.stdout.split()
    assert "pyrovae.training.loop" in added
    assert not HEAVY & {name.partition(".")[0] for name in added}
    assert not [name for name in added if name.startswith(("pyrovae.models", "pyrovae.guides"))]


def test_every_file_says_what_it_is():
    assert not [name for name in FILES if not ast.get_docstring(parsed(name))]


def public(name):
    """A module with what it offers: the names of ``__all__``, or those without an underscore."""
    loaded = importlib.import_module("pyrovae" if name == "__init__" else f"pyrovae.{name}")
    defined = [
        node.name
        for node in parsed(name).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    return loaded, getattr(loaded, "__all__", defined)


def offered(kind):
    """Each public value of a kind, with its module's name and its own."""
    for name in OFFERING:
        loaded, names = public(name)
        values = ((each, getattr(loaded, each)) for each in names)
        yield from ((f"{name}.{each}", value) for each, value in values if kind(value))


def test_names_in_all_exist_and_are_complete():
    faces = 0
    for name in OFFERING:
        loaded, names = public(name)
        if not hasattr(loaded, "__all__"):
            continue
        faces += 1
        assert len(set(names)) == len(names) > 0, name
        assert all(hasattr(loaded, each) for each in names), name
        tree = parsed(name)
        defined = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        hidden = {each for each in defined if not each.startswith("_")} - set(names)
        assert not hidden, f"{name} defines {hidden} and does not offer them in __all__"
    assert faces > len(PROGRAMS)


def test_public_names_are_explained():
    def members(value):
        for member, function in vars(value).items():
            method = isinstance(function, property | classmethod) or inspect.isfunction(function)
            if method and not member.startswith("_"):
                yield member, function

    bare = [name for name, value in offered(inspect.isfunction) if not value.__doc__]
    for name, value in offered(inspect.isclass):
        bare += [] if value.__doc__ else [name]
        bare += [f"{name}.{member}" for member, method in members(value) if not method.__doc__]
    assert not bare


def test_public_functions_are_annotated():
    bare = []
    for name, value in offered(inspect.isfunction):
        signature = inspect.signature(value)
        hints = [
            signature.return_annotation,
            *(p.annotation for p in signature.parameters.values()),
        ]
        bare += [name] if inspect.Signature.empty in hints else []
    assert not bare
