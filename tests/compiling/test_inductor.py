"""Kernels compiled together, kept on disk, and compiled anew where what is kept cannot be used."""

import os

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from pyrovae.compiling import inductor
from pyrovae.compiling.graph import record
from pyrovae.compiling.inductor import FOLDER, KERNEL, compiled
from pyrovae.pairs.pair import Pair

ARGS = (torch.linspace(-2, 2, 128 * 784).reshape(128, 784), torch.linspace(0, 1, 784 * 8))


def programs(x):
    """A pair of which nothing is asked."""


def traced():
    """A record of three kernels around a matrix product, and its values."""

    def function(x, w):
        y = torch.tanh(x @ w.reshape(784, 8)).exp()
        return [y.logsumexp(-1), (y @ y.T).sigmoid().sum(0), w.cumsum(0).relu()]

    return record(function, ARGS, Pair(programs, programs)), function(*ARGS)


def agree(found, expected):
    return all(torch.allclose(*each, rtol=1e-5) for each in zip(found, expected, strict=True))


@pytest.mark.inductor
def test_kernels_share_a_file_that_is_loaded_again_but_not_where_it_is_cut_short(
    tmp_path, monkeypatch
):
    # Imported here: it takes a second.
    from torch._dynamo.utils import counters
    from torch._inductor import config

    monkeypatch.setenv(FOLDER, str(tmp_path))
    graph, expected = traced()
    # One thread, as on one core, is no reason for a compiler process a kernel.
    with torch.no_grad(), config.patch(compile_threads=1):
        assert agree(compiled(graph, [*ARGS])(*ARGS), expected)
        libraries = [*tmp_path.rglob("*.main.so")]
        assert len(libraries) == 1
        # Nothing is compiled to try what the processor can do.
        assert [*tmp_path.rglob("*.so")] == libraries
        text = libraries[0].with_suffix(".cpp").read_text()
        assert text.count("#include <torch/csrc/inductor/cpp_prefix.h>") == 1
        assert text.count('extern "C" void kernel_') >= 3
        counters.clear()
        assert agree(compiled(traced()[0], [*ARGS])(*ARGS), expected)
        assert counters["aot_autograd"]["autograd_cache_hit"] == 1
    assert os.environ[FOLDER] == str(tmp_path)
    content = libraries[0].read_bytes()
    # Not in place: this process has it loaded.
    libraries[0].unlink()
    libraries[0].write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match="cut short"):
        inductor._library()._load_library_inner(str(libraries[0]), "cut")
    assert not libraries[0].exists()


@pytest.mark.inductor
def test_what_inductor_cannot_do_in_this_way_it_does_in_its_own(tmp_path, monkeypatch):
    from torch._inductor import config

    def broken(sources):
        raise OSError("no such compiler")

    monkeypatch.setattr(inductor, "_file", broken)
    monkeypatch.setenv(FOLDER, str(tmp_path))
    graph = record(lambda x: [x.tanh().relu()], ARGS[:1], Pair(programs, programs))
    own_way = {"compile_threads": 2, "cpp_cache_precompile_headers": False, "cpp.vec_isa_ok": True}
    with torch.no_grad(), config.patch(own_way):
        assert agree(compiled(graph, [*ARGS[:1]])(ARGS[0]), [ARGS[0].tanh().relu()])
    assert not [*tmp_path.rglob("*.main.so")]


def test_what_is_compiled_is_kept_in_a_folder_that_the_user_alone_may_write(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(FOLDER, raising=False)
    folder = inductor._own_cache()
    assert folder.parent == tmp_path / "pyrovae" / "inductor"
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    with inductor._folder(folder):
        assert os.environ[FOLDER] == str(folder)
    assert FOLDER not in os.environ
    # As torch sets it for itself.
    monkeypatch.setenv(FOLDER, default_cache_dir())
    with inductor._folder(folder):
        assert os.environ[FOLDER] == str(folder)
    assert os.environ[FOLDER] == default_cache_dir()
    folder.parent.chmod(0o770)
    assert inductor._own_cache() == inductor._own_cache() != folder
    assert inductor._own_cache().stat().st_mode & 0o777 == 0o700


def test_a_folder_that_the_user_names_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, "elsewhere")
    with inductor._folder(tmp_path):
        assert os.environ[FOLDER] == "elsewhere"
    with inductor._folder(tmp_path, even_if_set=True):
        assert os.environ[FOLDER] == str(tmp_path)
    assert os.environ[FOLDER] == "elsewhere"


def test_a_kernel_that_is_more_than_one_function_is_compiled_alone():
    head, body = "\n#include <torch/csrc/inductor/cpp_prefix.h>\n", "(float* x)\n{\n}\n"
    assert KERNEL.fullmatch(f'{head}extern "C"  void  kernel{body}')
    assert not KERNEL.fullmatch(f'{head}static int n;\nextern "C"  void  kernel{body}')
    assert not KERNEL.fullmatch(f'{head}extern "C" __declspec(dllexport) void kernel{body}')
