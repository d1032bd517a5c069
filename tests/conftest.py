"""Every test starts from the same state: one thread, a seed, an empty parameter store."""

import os
import shutil
from getpass import getuser
from pathlib import Path
from tempfile import gettempdir

import pyro
import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
# What one run of the tests has compiled, the next one loads; nothing is written to the home.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", str(Path(gettempdir()) / f"pyrovae-tests-{getuser()}")
)
# Where it is imported, Inductor starts a process that imports torch too, for kernels of a GPU.
os.environ.setdefault("TORCH_WARM_POOL", "0")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where the tests marked gpu run")


@pytest.fixture(autouse=True, scope="session")
def _own_key(tmp_path_factory):
    """The key that signs runs is one of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True)
def _fresh():
    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.settings.context(module_local_params=False), pyro.validation_enabled(True):
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def workspace(trained, tmp_path, monkeypatch):
    """A folder to work in, with a copy of what the module's ``trained`` fixture has made."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})
    return tmp_path
