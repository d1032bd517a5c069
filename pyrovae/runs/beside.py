"""A program's file and the modules beside it, which are imported for that program alone."""

from __future__ import annotations

import ast
import hashlib
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import resolve_name
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple, Self

from pyrovae._tools import InputError
from pyrovae._tools.source_lines import error_place

PREFIX = "pyrovae_program_"
INSTALLED = {"site-packages", "dist-packages"}
# Bytes of a file beside a program up to which a run has a copy of it: 16 MB.
LARGEST = 2**24
# What may stand between folders of such a file's path.
PLAIN = re.compile(r"\w[\w.-]*\Z")


class Sources(NamedTuple):
    """The bytes of a program's file, and of modules and data in a folder by their paths there."""

    source: bytes
    file: Path | None = None
    modules: Mapping[str, bytes] = {}
    folder: Path = Path()

    @classmethod
    def read(cls, file: Path, kind: str) -> Self:
        """A file with what it imports of its own folder, and that of it, and the data they name.

        What Python or an installed package has a module of is never looked for in the folder.
        """
        if not file.is_file():
            raise FileNotFoundError(f"No file {str(file)!r} to read the {kind} from.")
        source, folder = file.read_bytes(), file.resolve().parent
        return cls(source, file, imported(source, folder), folder).with_data()

    def with_data(self) -> Self:
        """These with the data beside them that they name, where they say so by ``__file__``."""
        data = {
            name: (self.folder / name).read_bytes()
            for path, name in self.data
            if b"__file__" in self.modules.get(path, self.source)
            and all(map(PLAIN.match, name.split("/")))
            and (self.folder / name).stat().st_size <= LARGEST
        }
        return self._replace(modules={**self.modules, **data})

    @property
    def data(self) -> list[tuple[str, str]]:
        """A file's path in the folder, empty for the program's, and that of a file it names."""
        found = []
        for path, node in self._nodes():
            if name := _joined(node):
                inner = Path(path).parent / name
                found += [(path, inner.as_posix())] if _is_file(self.folder / inner) else []
        return found

    def _nodes(self) -> Iterator[tuple[str, ast.AST]]:
        code = {path: source for path, source in self.modules.items() if path.endswith(".py")}
        for path, source in {"": self.source, **code}.items():
            yield from ((path, node) for node in _walked(source))

    @property
    def uncopied(self) -> list[str]:
        """What these files use beside them that is no part of this, in words."""
        own = getattr(self.file, "name", "")
        found = [
            f"{self.folder / name}, which {path or own} names"
            for path, name in self.data
            if name not in self.modules
        ]
        found += [
            f"what line {node.lineno} of {path or own} imports by a name that is made as it runs"
            for path, node in self._nodes()
            if isinstance(node, ast.Call) and _is_import(node) and _literal(node) is None
        ]
        return [*dict.fromkeys(found)]

    def load(self, kind: str) -> ModuleType:
        """Execute the file as a module of its own, past any cache of bytecode.

        Its modules are those of a package that is the program's alone.
        """
        digest = hashlib.sha256(self.source)
        for path, source in sorted(self.modules.items()):
            digest.update(path.encode() + source)
        name = f"{PREFIX}{kind}_{digest.hexdigest()[:12]}"
        _forget(name)
        module, package = ModuleType(name), ModuleType(f"{name}_beside")
        # Of a run's copy, data lie where modules do.
        module.__file__ = str(self.folder.resolve() / self.file.name if self.file else name)
        sys.modules[name] = module
        loader = _Beside(package.__name__, self)
        if self.modules:
            package.__path__, package.__loader__ = [], loader
            sys.modules[package.__name__] = package
            module.__package__ = package.__name__
            if _Beside not in sys.meta_path:
                sys.meta_path.append(_Beside)
        try:
            exec(loader.code(self.source, str(self.file or name)), vars(module))
        except (Exception, SystemExit) as error:
            _forget(name)
            reason = f"{type(error).__name__}: {error}"
            raise InputError(
                f"{error_place(error) or self.file}: the file cannot be run: {reason}"
            ) from error
        return module


class _Beside(Loader):
    """Finds and executes the modules beside a program in a package with a name of its own."""

    def __init__(self, package: str, sources: Sources) -> None:
        self.package = package
        self.modules = {p: code for p, code in sources.modules.items() if p.endswith(".py")}
        self.folder = sources.folder.resolve()
        self.names = {path.partition("/")[0].removesuffix(".py") for path in self.modules}

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, rest = name.partition(".")
        loader = getattr(sys.modules.get(package), "__loader__", None)
        if not isinstance(loader, cls):
            return None
        stem, modules = rest.replace(".", "/"), loader.modules
        is_folder = any(path.startswith(f"{stem}/") for path in modules)
        for path in (f"{stem}/__init__.py", f"{stem}.py"):
            if path in modules:
                file = str(loader.folder / path)
                spec = ModuleSpec(name, loader, origin=file, is_package=is_folder)
                spec.has_location = True
                return spec
        if not is_folder:
            raise ModuleNotFoundError(f"No module named {rest!r}", name=name)
        return ModuleSpec(name, None, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        file = Path(str(module.__file__))
        source = self.modules[file.relative_to(self.folder).as_posix()]
        exec(self.code(source, str(file)), vars(module))

    def code(self, source: bytes, file: str) -> CodeType:
        """Compile a source whose imports of modules beside it are of those in the package."""
        tree = ast.parse(source, file)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                node.names = [new for each in node.names for new in self._renamed(each)]
            elif isinstance(node, ast.ImportFrom) and not node.level and self._has(node.module):
                node.module = f"{self.package}.{node.module}"
            elif isinstance(node, ast.Call) and self._has(name := _literal(node)):
                node.args[0] = ast.Constant(f"{self.package}.{name}")
        return compile(ast.fix_missing_locations(tree), file, "exec", dont_inherit=True)

    def _has(self, name: str | None) -> bool:
        return str(name).partition(".")[0] in self.names

    def _renamed(self, each: ast.alias) -> Iterator[ast.alias]:
        top = each.name.partition(".")[0]
        if not self._has(each.name):
            yield each
            return
        yield ast.alias(f"{self.package}.{each.name}", each.asname or top)
        if not each.asname:  # `import parts.net` imports parts.net, and binds parts
            yield ast.alias(f"{self.package}.{top}", top)


def imported(source: bytes, folder: Path) -> dict[str, bytes]:
    """The modules of a folder that a source imports, and that they import, by their paths there."""
    modules: dict[str, bytes] = {}
    waiting = [("", source)]
    while waiting:
        for stem in _imported(*waiting.pop()):
            paths = (f"{stem}/__init__.py", f"{stem}.py")
            found = next((path for path in paths if (folder / path).is_file()), "")
            if found and found not in modules and not _is_installed(stem.partition("/")[0]):
                modules[found] = (folder / found).read_bytes()
                waiting.append((found, modules[found]))
    return modules


def _walked(source: bytes) -> list[ast.AST]:
    with suppress(SyntaxError, ValueError):  # which executing it tells
        return [*ast.walk(ast.parse(source))]
    return []


def _is_import(node: ast.AST) -> bool:
    """Whether a node is a call of importlib's import_module."""
    called = getattr(node, "func", None)
    return getattr(called, "attr", getattr(called, "id", "")) == "import_module"


def _literal(node: ast.AST) -> str | None:
    """The name that import_module is called with, if it is written there."""
    args = node.args if isinstance(node, ast.Call) and _is_import(node) else []
    value = args[0].value if args and isinstance(args[0], ast.Constant) else None
    return value if isinstance(value, str) else None


def _joined(node: ast.AST) -> str | None:
    """A string, or the path that the ends of ``folder / "parts" / "table.csv"`` make."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Call) and len(node.args) == 1:  # Path("parts") / "table.csv"
        return _joined(node.args[0])
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)):
        return None
    left, right = _joined(node.left), _joined(node.right)
    return f"{left}/{right}" if left and right else right


def _is_file(path: Path) -> bool:
    with suppress(OSError, ValueError):  # too long for a name, or with a zero in it
        # Without a suffix it may as well be a word that happens to be the name of a file.
        return path.suffix not in ("", ".py") and path.is_file()
    return False


def _imported(path: str, source: bytes) -> Iterator[str]:
    """What the source of a module at a path may import of the folder: ``parts``, ``parts/net``."""
    package = ".".join(["_", *Path(path).parts[:-1]])
    names: list[str] = []
    for node in _walked(source):
        name, ends = _literal(node), [""]
        if isinstance(node, ast.Import):
            names += [f"_.{each.name}" for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            ends += [f".{each.name}" for each in node.names]
        if name:
            with suppress(ImportError):  # above the folder
                base = resolve_name(name, package) if name.startswith(".") else f"_.{name}"
                names += [base + end for end in ends]
    for parts in (name.split(".")[1:] for name in names):
        yield from ("/".join(parts[:count]) for count in range(1, len(parts) + 1))


def _is_installed(name: str) -> bool:
    """Whether Python, this package or another one that is installed has a module of a name."""
    places = [place for place in sys.path if INSTALLED & {*Path(place).parts}]
    found = PathFinder.find_spec(name, places)
    known = name == "pyrovae" or name in sys.stdlib_module_names
    return known or (found is not None and found.loader is not None)


def _forget(name: str) -> None:
    for each in [each for each in sys.modules if each.startswith(name)]:
        del sys.modules[each]
