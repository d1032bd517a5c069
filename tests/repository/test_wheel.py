"""The wheel holds the package and nothing else, and works outside the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser

import pytest

SOURCES = ["pyproject.toml", "README.md", "LICENSE", "pyrovae", "models", "guides", "tests"]


def python(*arguments, cwd, **environment):
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(repository, tmp_path_factory):
    """A wheel built from a copy, so that the checkout stays as it is."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        source = repository / name
        clean = shutil.ignore_patterns("__pycache__", "*.egg-info")
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=clean)
        else:
            shutil.copy(source, copy)
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=copy)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    python("-m", "pip", "install", *options, "--target", target, wheel, cwd=target)
    return target


def test_contents(wheel, repository):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith("METADATA"))
        described = Parser().parsestr(archive.read(metadata).decode())
        (entries,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "pyrovae = pyrovae.cli:main" in archive.read(entries).decode()
    folders = {"pyrovae": "pyrovae", "models": "pyrovae/models", "guides": "pyrovae/guides"}
    expected = {
        f"{to}/{p.relative_to(repository / at).as_posix()}"
        for at, to in folders.items()
        for p in (repository / at).rglob("*")
        if p.suffix in (".py", ".j2", ".js")
    }
    info = metadata.partition("/")[0]
    assert {name for name in names if not name.startswith(info)} == expected | {"pyrovae/py.typed"}
    assert "pyrovae/models/bernoulli.py" in expected
    assert "pyrovae/reporting/templates/report.html.j2" in expected
    assert f"{info}/licenses/LICENSE" in names
    assert wheel.name.endswith("-py3-none-any.whl")
    assert described["Requires-Python"] == ">=3.11"
    needed = {
        line.split(">")[0].split(";")[0].strip() for line in described.get_all("Requires-Dist")
    }
    assert {"torch", "pyro-ppl", "arviz", "safetensors", "jinja2"} <= needed


def test_the_wheel_works_outside_the_checkout(installed, repository, tmp_path):
    outside = {"PYTHONPATH": str(installed), "cwd": tmp_path}
    code = "import pyrovae, pyrovae.cli, pyrovae.models.bernoulli as model; "
    code += "print(pyrovae.__file__, model.__file__, sep='\\n'); pyrovae.cli.main(['list']); "
    train = ["train", "--model", "bernoulli", "--guide", "mean_field", "--data", "digits"]
    train += ["--binarize", "threshold", "--set", "hidden=8", "--epochs", "1", "--out", "run"]
    code += f"pyrovae.cli.main({train})"
    package, model, *listed = python("-c", code, **outside).splitlines()
    assert package == str(installed / "pyrovae" / "__init__.py")
    assert model == str(installed / "pyrovae" / "models" / "bernoulli.py")
    names = {line.split()[0] for line in listed}
    for kind in ("models", "guides"):
        assert {path.stem for path in (repository / kind).glob("[a-z]*.py")} <= names
    assert [line for line in listed if line.startswith("epoch 1/1")]
    assert (tmp_path / "run" / "weights.safetensors").stat().st_size > 0
