"""Each option lives in one place: parser, configuration, fit and the docs agree on it."""

import inspect
import sys
from dataclasses import fields

import pytest
from commands import DIGITS, PAIR, SIZES, TRAIN, config, run

import pyrovae
from pyrovae import cli
from pyrovae.runs import Run
from pyrovae.runs.config import PairConfig, RunConfig


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})


def test_the_docs_list_every_option(repository):
    sys.path.insert(0, str(repository / "docs" / "_site"))
    from options import options_page

    page = (repository / "docs" / "options.md").read_text(encoding="utf-8")
    assert page == options_page(), "write docs/options.md anew: make options"


def test_the_defaults_are_those_of_fit():
    taken = inspect.signature(pyrovae.fit).parameters
    asked = RunConfig.of({"model": "m", "guide": "g", "data": "d"})
    for name in ("objective", "epochs", "particles", "lr", "clip_norm", "patience", "precision"):
        assert getattr(asked, name) == taken[name].default


def test_a_configuration_is_read_as_it_was_written(tmp_path):
    given = ["--objective", "beta_elbo", "--set", "objective.beta=2", "--clip-norm", "9"]
    given += ["--patience", "7", "--schedule", "cosine", "--compile", "off", "--seed", "3"]
    assert run(*TRAIN, *given, "--particles", "2", "--out", tmp_path / "r") == 0
    stored = config(tmp_path / "r")
    keys = {"command", "model", "guide", "data", "objective_settings", "device", "seed", "versions"}
    keys |= {"identity", "objects", "resumed", "sha256", "signature", "unrecovered"}
    names = {each.name for each in fields(RunConfig)} - {each.name for each in fields(PairConfig)}
    assert stored.keys() == keys | names
    asked = RunConfig.of({}, Run(tmp_path / "r").config)
    assert asked.settings["objective"] == {"beta": 2}
    assert asked.stored(1258) == {name: stored[name] for name in names | {"objective_settings"}}
    again = RunConfig.of(
        {"epochs": 5, "settings": ["objective.beta=3"]}, Run(tmp_path / "r").config
    )
    assert (again.epochs, again.batch_size, again.binarize) == (5, 64, "dynamic")
    assert again.settings["objective"] == {"beta": 3}


def test_defects_keep_their_traceback_and_mistakes_show_one_if_asked(monkeypatch, capsys):
    mistake = ["check", *PAIR, *DIGITS, *SIZES[:4], "--binarize", "dynmic"]
    assert run(*mistake) == 2
    assert "Traceback" not in capsys.readouterr().err
    for given in (["--traceback", *mistake], [*mistake, "--traceback"]):
        assert run(*given) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("Traceback")
        assert shown.splitlines()[-1].startswith("pyrovae: error: ")
    for defect in (ValueError, TypeError, NotImplementedError):

        def fail(*arguments, error=defect):
            raise error("of ours")

        monkeypatch.setitem(cli.COMMANDS, "list", (cli.COMMANDS["list"][0], fail))
        monkeypatch.setattr("pyrovae.cli.error_place", lambda *arguments, **options: "")
        with pytest.raises(defect, match="of ours"):
            run("list")
