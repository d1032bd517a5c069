"""Inductor as it is used here: kernels compiled together, and kept from one process to the next."""

# What is private in torch here was seen in 2.14; where it is otherwise, Inductor compiles in its
# own way, in a process a kernel.

from __future__ import annotations

import copy
import functools
import hashlib
import os
import platform
import re
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

FOLDER = "TORCHINDUCTOR_CACHE_DIR"
# Kernels a file. A compiler process takes 2.7 s for torch's vector headers and for linking, and 0.2
# s for a kernel: with fewer a file, two processes take longer than one.
TOGETHER = 24
# torch's own random numbers instead of Inductor's: the streams of a seed are those of an eager run,
# and on a CPU its generator is three times as fast. What it would assert of shapes and strides at
# every call is looked at in :class:`~pyrovae.compiling.graph.Graph`, where a tensor has moved.
ALWAYS = {"fallback_random": True, "size_asserts": False}
# Inductor would compile programs, for 8 s, to see whether the compiler knows the processor's vector
# instructions. The kernels themselves show it; see also :func:`_no_trials`.
AT_FIRST = {"cpp.vec_isa_ok": True}

# What a kernel's file is made of: includes, and one function.
KERNEL = re.compile(
    r'(?P<head>(?:\s*#(?:include|pragma)[^\n]*\n)*)\s*extern "C"\s*void\s+kernel(?P<rest>\(.*)',
    re.S,
)
BINDINGS = r"""
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cstdlib>
#include <exception>
#include <tuple>
#include <type_traits>
#include <utility>

static void* (*data_of)(PyObject*);

template <typename T> static T taken(PyObject* arg) {
    if constexpr (std::is_pointer_v<T>) return static_cast<T>(data_of(arg));
    else if constexpr (std::is_floating_point_v<T>) return static_cast<T>(PyFloat_AsDouble(arg));
    else return static_cast<T>(PyLong_AsSsize_t(arg));
}

// Other threads of Python's run meanwhile, as they do during torch's own kernels.
struct Released {
    PyThreadState* const state = PyEval_SaveThread();
    ~Released() { PyEval_RestoreThread(state); }
};

template <auto kernel> struct Bound;
template <typename... A, void (*kernel)(A...)> struct Bound<kernel> {
    template <size_t... N> static void run(PyObject* const* args, std::index_sequence<N...>) {
        std::tuple<A...> const all{taken<A>(args[N])...};
        if (PyErr_Occurred()) return;
        Released const released;
        kernel(std::get<N>(all)...);
    }
    static PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
        if (count != static_cast<Py_ssize_t>(sizeof...(A))) {
            PyErr_Format(PyExc_TypeError, "expected %zu arguments, got %zd", sizeof...(A), count);
            return nullptr;
        }
        try {
            run(args, std::index_sequence_for<A...>{});
        } catch (std::exception const& error) {
            PyErr_SetString(PyExc_RuntimeError, error.what());
        }
        if (PyErr_Occurred()) return nullptr;
        Py_RETURN_NONE;
    }
};

static PyMethodDef methods[] = {
METHODS
    {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "kernels", nullptr, -1, methods};

PyMODINIT_FUNC PyInit_kernels() {
    const char* address = std::getenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR");
    if (address == nullptr) {
        PyErr_SetString(PyExc_RuntimeError, "torch did not say where a tensor's data are");
        return nullptr;
    }
    data_of = reinterpret_cast<decltype(data_of)>(std::strtoull(address, nullptr, 10));
    return PyModule_Create(&definition);
}
"""
# Where a library of 64 bits (ELF) says it.
SECTIONS = (("Q", 40), ("HH", 58))
METHOD = '    {"NAME", (PyCFunction)(void (*)(void))Bound<&NAME>::call, METH_FASTCALL, ""},'


def compiled(record: GraphModule, inputs: list[Tensor]) -> Callable[..., list[Tensor]]:
    """A record of tensor operations as compiled code; inputs have the shapes of every call.

    What was compiled before, by this user on this machine, is loaded: from the folder that
    TORCHINDUCTOR_CACHE_DIR names, or else ``~/.cache/pyrovae/inductor``.
    """
    with warnings.catch_warnings():
        # Of Inductor's warnings (too few cores for autotuning, unsupported complex kernels, and of
        # torch.jit at its first import in torch 2.11) none says anything that a person who trains
        # could act on.
        warnings.simplefilter("ignore")
        try:
            with _folder(_own_cache()), _kernels_together(), _no_trials():
                # compile_fx changes the record.
                return _by_inductor(copy.deepcopy(record), inputs, ALWAYS | AT_FIRST)
        except Exception:
            # The compiler may not know the processor, a file in the cache may be spoilt.
            with tempfile.TemporaryDirectory() as fresh, _folder(Path(fresh), even_if_set=True):
                return _by_inductor(record, inputs, ALWAYS)


def _by_inductor(
    record: GraphModule, inputs: list[Tensor], options: dict[str, Any]
) -> Callable[..., list[Tensor]]:
    # torch.compile would trace the programs again with Dynamo, which breaks the graph at Pyro's
    # handlers, whereas compile_fx takes a record. It has no public name.
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # Graphs are looked up in the cache only where there is a ShapeEnv, though none has a symbol.
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with tracing(TracingContext(mode)):
        # Code is for a number of threads, which the cache of some versions does not look at.
        options = options | {"cpp.threads": torch.get_num_threads()}
        done: Any = compile_fx(record, inputs, config_patches=options, ignore_shape_env=True)
        return done


def _own_cache() -> Path:
    """The user's folder for compiled code, or if others may write to it, one for this process.

    What lies there is executed. Inductor's own folder is one in /tmp, whose name everybody knows.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = folder / "pyrovae" / "inductor"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        own = os.name != "posix" or (found.st_uid == os.getuid() and not found.st_mode & 0o022)
        if own and os.access(folder, os.W_OK):
            (folder / _processor()).mkdir(mode=0o700, exist_ok=True)
            return folder / _processor()
    except (OSError, RuntimeError):  # No home, or none to write to.
        pass
    return Path(_for_now().name)


@functools.cache
def _processor() -> str:
    """A name for the processor: what is compiled for one may crash another with the same home."""
    about, info = [platform.machine(), platform.processor()], Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        about += sorted({each for each in lines if each.startswith(("model", "flags", "Features"))})
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]


@functools.cache
def _for_now() -> tempfile.TemporaryDirectory[str]:
    """A folder that is removed when the process ends."""
    return tempfile.TemporaryDirectory()


@contextmanager
def _folder(folder: Path, even_if_set: bool = False) -> Iterator[None]:
    """Let Inductor keep what it compiles in a folder, for a block."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    before = os.environ.get(FOLDER)
    # torch sets the variable itself where it looks for the first time.
    if even_if_set or before in (None, default_cache_dir()):
        os.environ[FOLDER] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(FOLDER, None)
        if before is not None:
            os.environ[FOLDER] = before


@contextmanager
def _kernels_together() -> Iterator[None]:
    """Compile the C++ kernels of a graph in few files, instead of each in a process of its own."""
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile, get_compile_threads
    from torch._inductor.codecache import LambdaFuture

    before: Any = AsyncCompile.cpp_pybinding
    # With one thread, as where there is one core, torch takes what is returned for the kernel
    # itself. It sets one on Windows too.
    threads = max(get_compile_threads(), 2 if os.name == "posix" else 1)
    graphs: dict[AsyncCompile, _Kernels] = {}

    def cpp_pybinding(self: AsyncCompile, argtypes: list[str], source: str) -> Any:
        if threads <= 1 or not KERNEL.fullmatch(source):
            return before(self, argtypes, source)
        return LambdaFuture(graphs.setdefault(self, _Kernels()).add(source))

    patched: Any = AsyncCompile
    patched.cpp_pybinding = cpp_pybinding
    try:
        with config.patch(compile_threads=threads):
            yield
    finally:
        patched.cpp_pybinding = before


@contextmanager
def _no_trials() -> Iterator[None]:
    """Compile for AVX-512 without its extensions, bf16, VNNI, AMX, and without Triton's key.

    Each would be tried by a program of its own, 2 s in all, and no kernel of float32 has them. The
    key takes 0.4 s, all of Triton's files, and is thrown away where there is no GPU.
    """
    from torch._inductor import cpu_vec_isa
    from torch._inductor.runtime import triton_compat

    sets: Any = cpu_vec_isa.VecISA
    found: list[Any] = [cpu_vec_isa.valid_vec_isa_list]
    found += [type(each).__bool__ for each in cpu_vec_isa.supported_vec_isa_list]
    compat: Any = triton_compat
    before, key = sets.check_build, compat.triton_key
    sets.check_build = lambda self, code: False
    if not torch.cuda.is_available():
        compat.triton_key = lambda: ""
    try:
        yield
    finally:
        sets.check_build, compat.triton_key = before, key
        # Whatever else this process compiles may have them.
        for each in found:
            getattr(each, "cache_clear", int)()


class _Kernels:
    """The C++ kernels of a graph, compiled when the first of them is asked for."""

    def __init__(self) -> None:
        self.sources: list[str] = []
        self.files: list[Callable[[], Any]] = []

    def add(self, source: str) -> Callable[[], Any]:
        """Take a kernel's source; what gives the kernel later."""
        number = len(self.sources)
        self.sources.append(source)
        return lambda: self.get(number)

    def get(self, number: int) -> Any:
        """A kernel as a function of tensors and numbers."""
        from torch._inductor.async_compile import AsyncCompile

        if not self.files:
            parts = range(0, len(self.sources), TOGETHER)
            texts = [_file(self.sources[start : start + TOGETHER]) for start in parts]
            self.files = [
                _library().load_async(text, "cpu", submit_fn=AsyncCompile.submit) for text in texts
            ]
        return getattr(self.files[number // TOGETHER](), f"kernel_{number % TOGETHER}")


def _file(sources: list[str]) -> str:
    """One file of several kernels, each under a name of its own."""
    heads: dict[str, None] = {}
    bodies, methods = [], []
    for number, found in enumerate(map(KERNEL.fullmatch, sources)):
        if found is not None:
            name = f"kernel_{number}"
            heads |= dict.fromkeys(found["head"].splitlines())
            bodies.append(f'extern "C" void {name}{found["rest"]}')
            methods.append(METHOD.replace("NAME", name))
    return "\n".join([*heads, *bodies, BINDINGS.replace("METHODS", "\n".join(methods))])


@functools.cache
def _library() -> Any:
    """What compiles and loads such a file."""
    from torch._inductor import codecache
    from torch._inductor.utils import clear_on_fresh_cache

    base: Any = codecache.CppPythonBindingsCodeCache

    @clear_on_fresh_cache
    class Library(base):
        cache: ClassVar[dict[str, Callable[[], Any]]] = {}
        cache_clear = staticmethod(cache.clear)
        entry_function = "kernels"

        @classmethod
        def _get_uncompiled_header(cls, device: str) -> str | None:
            # A precompiled header takes three times as long as a file that includes it.
            return None

        @classmethod
        def _load_library_inner(cls, path: str, key: str) -> Any:
            if _is_cut_short(Path(path)):
                os.unlink(path)
                raise OSError(f"{path} is cut short")
            return super()._load_library_inner(path, key)

    return Library


def _is_cut_short(library: Path) -> bool:
    """Whether a library's end is missing, as after a power cut; loading it would kill."""
    content = library.read_bytes()
    if not content.startswith(b"\x7fELF\x02\x01"):
        return False
    # The table of sections comes last: where it begins, and the size and number of its entries.
    (begin,), (size, number) = (struct.unpack_from("<" + f, content, o) for f, o in SECTIONS)
    return len(content) < begin + size * number
