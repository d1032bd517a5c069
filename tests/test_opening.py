"""A run that the command line wrote is opened, evaluated and reported from Python."""

import shutil
from pathlib import Path

import pytest
import torch
from commands import run, train_watched

import pyrovae

SHORT = {"samples": 4, "no_diagnostics": True}


pytestmark = pytest.mark.usefixtures("workspace")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, repository):
    return train_watched(tmp_path_factory.mktemp("trained"), repository)


def test_an_open_run_is_ready_to_use():
    opened = pyrovae.load("run")
    assert opened.config.model.name == "own.py"
    assert [row["epoch"] for row in opened.history] == [*range(1, opened.config.epochs + 1)]
    assert opened.results == {}
    assert not Path("executed").exists()  # only what follows executes the programs
    stored = opened.run.load_weights()
    assert opened.data.test.shape[1:] == opened.data.shape
    weights = {f"model.{n}": v for n, v in opened.model.state_dict().items()}
    assert all(torch.equal(v.cpu(), stored[n]) for n, v in weights.items() if n in stored)
    assert weights.keys() & stored.keys()
    assert opened.model is opened.model
    parts = pyrovae.elbo(opened.model, opened.guide, *opened.data.split("valid"), seed=0)
    assert abs(parts.mean - opened.history[-1]["valid_elbo"]) < 1.0


def test_an_evaluation_from_python_is_that_of_the_command(capsys):
    shutil.copytree("run", "other")
    assert run("evaluate", "other", "--samples", "4", "--no-diagnostics") == 0
    found = pyrovae.evaluate("run", **SHORT)
    assert found.log_likelihood == pyrovae.load("other").results["test"].log_likelihood
    opened = pyrovae.load("run")
    assert opened.results["test"] == found
    assert f"log p(x): test {found.headline}" in repr(opened)
    assert len(repr(opened).splitlines()) <= 10
    assert opened.report() == pyrovae.report("run") == Path("run", "report.html")
    assert f"{found.log_likelihood.mean:.3f}" in Path("run", "report.html").read_text()


def test_a_run_from_elsewhere_is_executed_with_trust_alone(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("elsewhere")))
    opened = pyrovae.load("run")
    assert opened.history
    for part in ("model", "guide", "data"):
        with pytest.raises(
            pyrovae.InputError, match=r"executes run/programs/model.py .*trust=True"
        ):
            getattr(opened, part)
    with pytest.raises(pyrovae.InputError, match="was not made here by you"):
        pyrovae.evaluate(opened, **SHORT)
    assert not Path("executed").exists()
    assert callable(pyrovae.load("run", trust=True).model)
    assert Path("executed").exists()


def test_what_is_no_run_or_no_option_is_refused():
    with pytest.raises(pyrovae.InputError, match="Nothing to report yet"):
        pyrovae.report("run")
    with pytest.raises(pyrovae.InputError, match="holds no run"):
        pyrovae.load("nowhere")
    with pytest.raises(TypeError, match=r"no option 'sample' \(did you mean 'samples'\?\)"):
        pyrovae.evaluate("run", sample=4)


def test_both_orders_of_encode_are_one():
    opened = pyrovae.load("run")
    x, *context = opened.data.split("test")
    one = pyrovae.encode(opened.guide, x, *context)
    two = pyrovae.encode(opened.model, opened.guide, x, *context)
    assert all(torch.equal(one[name], two[name]) for name in one | two)
