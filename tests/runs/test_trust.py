"""A run that somebody sent executes nothing, reads and makes nothing, until its user trusts it."""

import shutil
from pathlib import Path

import pytest
from commands import EVIL, TRAIN, config, refusal, rewrite, run, snapshot, train_watched

from pyrovae._tools import trust
from pyrovae._tools.files import sealed
from pyrovae.runs import Run

SHORT = ("--samples", "2", "--no-diagnostics")
COMMANDS = {
    "evaluate": ("evaluate", "run", *SHORT),
    "sample": ("sample", "run", "-n", "4"),
    "export": ("export", "run", "--what", "decoder"),
    "resume": ("train", "--out", "run", "--resume", "--epochs", "3"),
}


pytestmark = pytest.mark.usefixtures("workspace")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, repository):
    return train_watched(
        tmp_path_factory.mktemp("trained"), repository, ["evaluate", "run", *SHORT]
    )


@pytest.fixture
def elsewhere(tmp_path_factory, monkeypatch):
    """Another machine, or another user: other state."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("elsewhere")))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_from_elsewhere_is_executed_with_trust_alone(elsewhere, capsys, command):
    said = refusal(capsys, *COMMANDS[command])
    digest = config(Path("run"))["model"]["sha256"]
    assert f"executes run/programs/model.py (sha256 {digest})" in said
    assert "Add --trust" in said
    assert not Path("executed").exists()
    assert run(*COMMANDS[command], "--trust") == 0
    assert f"pyrovae: executing run/programs/model.py (sha256 {digest})" in capsys.readouterr().err
    assert Path("executed").exists()


def test_a_run_of_your_own_is_executed_and_told_of(capsys):
    assert run(*COMMANDS["evaluate"]) == 0
    assert "pyrovae: executing run/programs/model.py (sha256 " in capsys.readouterr().err


def test_a_run_that_you_went_on_with_is_your_own(elsewhere, capsys):
    assert run(*COMMANDS["resume"], "--trust") == 0
    assert run(*COMMANDS["evaluate"]) == 0


@pytest.mark.parametrize("command", [("report", "run"), ("compare", "run", "copy"), ("list",)])
def test_reports_comparisons_and_lists_execute_nothing(elsewhere, command):
    shutil.copytree("run", "copy")
    assert run(*command) == 0
    assert not Path("executed").exists()


@pytest.mark.parametrize("answer", ["", "n", "y"])
def test_a_terminal_is_asked(elsewhere, monkeypatch, capsys, answer):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda prompt: answer)
    assert run(*COMMANDS["evaluate"]) == (0 if answer == "y" else 2)
    shown = capsys.readouterr().err
    assert "executes run/programs/model.py (sha256 " in shown
    assert Path("executed").exists() == (answer == "y")


PATHS = ["../evil.py", "{}/evil.py", "programs/../../evil.py", "programs/guide.py"]


@pytest.mark.parametrize("path", PATHS)
def test_no_file_but_its_own_is_ever_executed(workspace, capsys, path):
    Path("evil.py").write_text(EVIL)
    Path("run/programs/guide.py").write_text(EVIL)
    path = path.format(workspace)
    stored = config(Path("run"))
    rewrite(Path("run"), stored | {"model": stored["model"] | {"file": path, "sha256": None}})
    for command in COMMANDS.values():
        assert "the model of a run is programs/model.py in it" in refusal(
            capsys, *command, "--trust"
        )
    rewrite(Path("run"), stored | {"model": stored["model"] | {"modules": {path: "0" * 64}}})
    if path != "programs/guide.py":
        assert "config.json is damaged" in refusal(capsys, *COMMANDS["sample"], "--trust")
    named = stored["model"] | {"name": str(workspace / "evil.py"), "file": None, "sha256": None}
    rewrite(Path("run"), stored | {"model": named})
    for command in COMMANDS.values():
        assert "the run holds no copy of it" in refusal(capsys, *command, "--trust")
    assert not Path("executed").exists()


def test_data_are_neither_looked_for_nor_downloaded_before_trust(workspace, monkeypatch, capsys):
    stored = config(Path("run"))
    data = {"load": "mnist", "root": str(workspace / "made")}
    content = sealed(stored | {"data": stored["data"] | data})
    Run("run").write_json("config.json", content | {"signature": stored["signature"]})
    for command in COMMANDS.values():
        said = refusal(capsys, *command)
        assert f"reads the data mnist in {workspace / 'made'}" in said
    assert not (workspace / "made").exists()


def test_a_signature_is_of_one_configuration_and_one_key(elsewhere):
    seal, other = "a" * 64, "b" * 64
    signature = trust.sign(seal)
    assert trust.is_own(seal, signature)
    assert not trust.is_own(other, signature)
    assert not trust.is_own(seal, "")
    assert not trust.is_own(seal, "ä")


def test_the_key_is_the_users_alone_and_stays(elsewhere, monkeypatch):
    import os

    trust.sign("a")
    path = Path(os.environ["XDG_STATE_HOME"]) / "pyrovae" / "key"
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(path.read_bytes()) == 32
    assert [each.name for each in path.parent.iterdir()] == ["key"]
    before = path.read_bytes()
    trust.sign("b")
    assert path.read_bytes() == before


def test_without_a_place_for_a_key_runs_are_made_and_trusted_by_hand(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert run(*TRAIN, "--out", "new") == 0
    assert config(Path("new"))["signature"] == ""
    assert run("evaluate", "new", *SHORT) == 2
    assert run("evaluate", "new", *SHORT, "--trust") == 0


def test_nothing_is_written_outside_by_a_report(elsewhere, workspace):
    before = snapshot(workspace)
    assert run("report", "run") == 0
    made = snapshot(workspace).keys() - before.keys()
    assert made
    assert all(name.startswith("run/") for name in made)
