"""Two at once, kills, links and pipes: nothing is lost, mixed up or written elsewhere."""

import os
import shlex
import shutil
import signal
import stat
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest
import torch
from commands import TRAIN, config, outcome, refusal, rewrite, run, snapshot
from forks import Fork

from pyrovae._tools.files import (
    locked,
    pack_tensors,
    remove_temporary,
    sealed,
    unpack_tensors,
    write_atomic,
)
from pyrovae.evidence.tiles import Evaluation
from pyrovae.runs import TRAINING, Run
from pyrovae.runs.results import load_finding, load_results, save_finding

SHORT = ("--samples", "2", "--no-diagnostics")
RESUME = ("train", "--out", "run", "--resume", "--epochs", "3")
OWN = ["--model", "own.py"]


pytestmark = pytest.mark.usefixtures("workspace")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, repository):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})
        shutil.copy(repository / "models" / "bernoulli.py", "own.py")
        assert run(*TRAIN, *OWN, "--out", "run") == 0
        assert run("evaluate", "run", *SHORT) == 0
        twin, whole = Run("twin"), Run("run")
        shutil.copytree("run", "twin")
        rewrite(twin.path, config(twin.path) | {"identity": "0" * 32})
        weights = whole.load_weights()
        twin.save_checkpoint(whole.load_checkpoint())
        twin.file("weights.safetensors").unlink(missing_ok=True)
        twin.write("weights.safetensors", pack_tensors(weights, {"run": twin.identity}))
        values, about = whole.load_values("test")
        twin.save_values("test", values, about)
        found = whole.read_json("results.json")["test"] | {"run": twin.identity}
        twin.write_json("results.json", {"test": sealed(found)})
    return folder


@contextmanager
def held(path):
    """Another process holds a lock file inside, and is then killed."""
    fork = Fork(_hold, path)
    assert fork.stdout.readline() == "held\n"
    yield
    fork.end(signal.SIGKILL)


def _hold(path):
    with locked(path, "held"):
        print("held", flush=True)
        signal.pause()


def _write_half(path):
    def wait(handle):
        print("here", flush=True)
        signal.pause()

    os.fsync = wait
    write_atomic(path, b"theirs")


@pytest.mark.parametrize("write", range(4))
def test_a_kill_while_results_are_written_mixes_no_evaluations(workspace, monkeypatch, write):
    """Of a second evaluation with more samples, at each of its writes."""
    counted, made, plain = iter(range(9)), Run("run"), Run.write

    def killed(self, name, content):
        if ("results.json" in name or "safetensors" in name) and next(counted) == write:
            raise KeyboardInterrupt
        return plain(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write", killed)
        assert run("evaluate", "run", "--samples", "3", "--no-diagnostics") == (130 * (write < 3))
    finding = load_finding(made, "test")
    ll = finding.log_likelihood
    assert ll.num_samples == finding.results.log_likelihood.num_samples == (2 if write < 2 else 3)
    assert finding.results.log_likelihood.mean == pytest.approx(ll.mean)
    stored = made.read_json("results.json").get("test")
    assert stored is None or stored["log_likelihood"]["num_samples"] == ll.num_samples
    assert run("report", "run") == 0


def test_two_trainings_into_one_directory(workspace, capsys):
    with held(workspace / "run" / TRAINING):
        before = outcome(workspace / "run")
        capsys.readouterr()
        assert run(*RESUME) == 2
        assert "run is being trained by another process" in capsys.readouterr().err
        assert outcome(workspace / "run") == before
        (workspace / "new").mkdir()
        with held(workspace / "new" / TRAINING):
            assert run(*TRAIN, "--out", "new") == 2
            assert "new is being trained by another process" in capsys.readouterr().err
    assert run(*RESUME) == 0
    assert run(*TRAIN, "--out", "new") == 0
    assert not [path for path in workspace.rglob("*") if path.suffix in (".lock", ".tmp")]


def test_two_evaluations_of_one_split_and_of_two(workspace, capsys):
    (workspace / "run" / "evaluation").mkdir(exist_ok=True)
    with held(workspace / "run" / "evaluation" / ".test.lock"):
        assert run("evaluate", "run", *SHORT) == 2
        assert "test data of run are being evaluated by another" in capsys.readouterr().err
        assert run("evaluate", "run", *SHORT, "--split", "valid") == 0
    assert run("evaluate", "run", *SHORT) == 0
    assert load_results(Run("run")).keys() == {"test", "valid"}


def test_results_that_land_at_the_same_time_are_both_kept(workspace):
    """One evaluation lands while another waits to write beside what it has read."""
    made, threads = Run("run"), []
    finding = load_finding(made)
    with locked(made.file(".results.lock"), "held"):
        for split in ("valid", "train"):
            threads.append(Thread(target=save_finding, args=(made, split, finding)))
            threads[-1].start()
            threads[-1].join(0.2)
            assert threads[-1].is_alive()
    for thread in threads:
        thread.join()
    assert load_results(made).keys() == {"test", "valid", "train"}


def test_what_a_kill_leaves_at_the_start_is_taken(workspace, capsys):
    for resume in ([], ["--resume"]):
        shutil.rmtree("new", ignore_errors=True)
        Path("new/programs/model").mkdir(parents=True)
        begun = "programs/model.py", "programs/model/helpers.py", ".config.json.0a1b2c3d.tmp"
        for name in (TRAINING, *begun):
            Path("new", name).write_text("half")
        assert run(*TRAIN, *OWN, "--out", "new", *resume) == 0
        assert not list(Path("new").glob(".*"))
    Path("full").mkdir()
    Path("full", TRAINING).touch()
    Path("full", "thesis.tex").write_text("precious")
    assert "full exists and is not empty" in refusal(capsys, *TRAIN, "--out", "full")
    Path("sources/programs").mkdir(parents=True)
    Path("sources/programs/model.py").write_text("mine")
    assert "sources exists and is not" in refusal(capsys, *TRAIN, "--out", "sources")


def test_temporary_files_of_killed_writers_are_removed_and_those_of_others_kept(workspace):
    path = workspace / "a.json"
    other = Fork(_write_half, path)
    assert other.stdout.readline() == "here\n"
    (left,) = workspace.glob(".a.json.*.tmp")
    write_atomic(path, b"mine")
    assert left.exists()
    other.end(signal.SIGKILL)
    remove_temporary(workspace, "b.json")
    assert left.exists()
    write_atomic(path, b"mine")
    assert not left.exists()
    assert path.read_bytes() == b"mine"
    for folder in ("", "figures", "evaluation", "programs"):
        (workspace / "run" / folder).mkdir(exist_ok=True)
        (workspace / "run" / folder / ".x.png.00000000.tmp").touch()
    assert run(*RESUME) == 0
    assert not list((workspace / "run").rglob(".*"))


def test_the_lock_of_a_process_that_is_gone_is_free(workspace):
    path = workspace / "a.lock"
    with held(path), pytest.raises(ValueError, match="taken"), locked(path, "taken"):
        pass
    with locked(path, "taken"):
        pass
    assert not path.exists()


def test_new_files_have_the_permissions_that_the_user_gives(workspace):
    before = os.umask(0o077)
    try:
        assert run(*TRAIN, "--out", "new") == 0
    finally:
        os.umask(before)
    for path in (workspace / "new").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


PARTS = {
    "checkpoint.pt": RESUME,
    "weights.safetensors": ("evaluate", "run", *SHORT),
    "results.json": ("report", "run"),
    "evaluation/test.safetensors": ("report", "run"),
}


def error_of(capsys, *command):
    """The last sentence of a command that is refused."""
    capsys.readouterr()
    assert run(*command) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_another_run_is_refused(capsys, name):
    shutil.copy(f"twin/{name}", f"run/{name}")
    assert f"run/{name} is of another run" in error_of(capsys, *PARTS[name])
    assert run(*(each.replace("run", "twin") for each in PARTS[name])) == 0


def test_a_configuration_of_another_run_is_refused(capsys):
    shutil.copy("twin/config.json", "run/config.json")
    assert "is of another run" in error_of(capsys, *RESUME)


def test_a_digit_that_changed_in_a_configuration_is_seen(capsys):
    path = Path("run/config.json")
    path.write_text(path.read_text().replace('"batch_size": 64', '"batch_size": 65'))
    assert "config.json is damaged" in error_of(capsys, *RESUME)
    assert "checksum is wrong" in error_of(capsys, "evaluate", "run")


def test_an_edited_program_is_refused(capsys):
    path = Path("run/programs/model.py")
    path.write_text(path.read_text() + "\n")
    for command in (RESUME, ("evaluate", "run", *SHORT), ("sample", "run")):
        said = error_of(capsys, *command)
        assert "run/programs/model.py was edited since the run was made" in said


def test_going_on_with_an_edited_file_is_refused(capsys):
    Path("other.py").write_text(Path("own.py").read_text())
    assert "model.name = own.py" in error_of(capsys, *RESUME, "--model", "other.py")
    Path("own.py").write_text(Path("own.py").read_text() + "\n")
    said = error_of(capsys, *RESUME, *OWN)
    assert "own.py is not what the run was made with" in said
    assert "leave --model out" in said
    assert run(*RESUME) == 0


def test_each_session_records_its_versions(monkeypatch):
    first = config(Path("run"))["versions"]
    monkeypatch.setattr("pyrovae.runs.experiment.version", lambda name: "9.9")
    assert run(*RESUME) == 0
    found = config(Path("run"))
    assert found["versions"] == first
    now = dict.fromkeys(first, "9.9") | {"python": first["python"]}
    assert found["resumed"] == [{"after_epoch": 2, "versions": now}]
    assert run(*RESUME[:-1], "4") == 0
    assert config(Path("run"))["resumed"] == found["resumed"]


def stopped_evaluation(monkeypatch):
    """The checkpoint of an evaluation that was stopped after four of its six tiles."""
    keep = Evaluation.keep

    def stop(task, index, found):
        if index == 4:
            raise KeyboardInterrupt
        keep(task, index, found)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "keep", stop)
        assert run("evaluate", "run", *SHORT) == 130
    (path,) = Path("run/evaluation").glob("*.checkpoint")
    return path


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(content)


def spoilt(path, change, signed=""):
    """Write other numbers under a right checksum, as no damage does."""
    found, about = unpack_tensors(path)
    change(found)
    path.write_bytes(pack_tensors({n: v.contiguous() for n, v in found.items()}, about, signed))


def test_damage_in_what_an_evaluation_keeps_is_seen_and_done_again(monkeypatch, capsys):
    before = load_results(Run("run"))["test"]
    path = stopped_evaluation(monkeypatch)
    flipped(path)
    capsys.readouterr()
    assert run("evaluate", "run", *SHORT) == 0
    assert "It was put aside, and its data are done again" in capsys.readouterr().err
    assert load_results(Run("run"))["test"] == before


@pytest.mark.parametrize("signed", ["", "another"], ids=["by nobody", "of another evaluation"])
def test_plausible_numbers_that_somebody_put_there_are_done_again(monkeypatch, capsys, signed):
    before = load_results(Run("run"))["test"]
    path = stopped_evaluation(monkeypatch)
    spoilt(path, lambda found: found["log_prob"].add_(0.25), signed)
    capsys.readouterr()
    assert run("evaluate", "run", *SHORT) == 0
    assert "was not written here by you, or under another name" in capsys.readouterr().err
    assert load_results(Run("run"))["test"] == before


def test_what_a_trusted_run_from_elsewhere_has_finished_is_taken(monkeypatch, tmp_path_factory):
    path = stopped_evaluation(monkeypatch)
    found = unpack_tensors(path)[0]["log_prob"]
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("elsewhere")))
    assert run("evaluate", "run", *SHORT, "--trust") == 0
    assert torch.equal(Run("run").load_values("test")[0]["log_prob"][: len(found)], found)
    assert not list(path.parent.glob("*.damaged"))


SPOILT = {
    "NaN": lambda found: found["log_prob"].fill_(torch.nan),
    "repeated": lambda found: found.update({n: torch.cat([v, v]) for n, v in found.items()}),
    "short": lambda found: found.update({n: v[:100] for n, v in found.items()}),
    "nameless": lambda found: found.pop("log_prob"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_tiles_that_cannot_be_are_refused(monkeypatch, capsys, how):
    path = stopped_evaluation(monkeypatch)
    spoilt(path, SPOILT[how], path.name)
    assert f"{path} is damaged" in error_of(capsys, "evaluate", "run", *SHORT)
    assert run("evaluate", "run", *SHORT, "--fresh") == 0


LINKS = {
    "figures": ("report", "run"),
    "results.json": ("evaluate", "run", *SHORT),
    "programs/model.py": ("evaluate", "run", *SHORT),
    "programs": ("evaluate", "run", *SHORT),
    "evaluation": ("evaluate", "run", *SHORT),
    "checkpoint.pt": RESUME,
    "weights.safetensors": ("evaluate", "run", *SHORT),
    "config.json": ("report", "run"),
    "metrics.csv": ("report", "run"),
    "explorer.safetensors": ("report", "run"),
    "report.html": ("report", "run"),
}


@pytest.mark.parametrize("name", LINKS)
def test_no_link_in_a_run_is_followed(workspace, capsys, name):
    path = workspace / "run" / name
    other = workspace / "elsewhere"
    if path.exists():
        path.rename(other)
    elif name == "figures":
        other.mkdir()
    else:
        other.write_text("precious")
    path.symlink_to(other)
    before = other.read_bytes() if other.is_file() else snapshot(other)
    assert f"{name} is no " in error_of(capsys, *LINKS[name])
    assert (other.read_bytes() if other.is_file() else snapshot(other)) == before


@pytest.mark.parametrize("name", ["config.json", "results.json", "checkpoint.pt", "metrics.csv"])
def test_a_pipe_in_a_run_is_refused_and_not_waited_for(workspace, capsys, name):
    path = workspace / "run" / name
    path.unlink()
    os.mkfifo(path)
    command = RESUME if name == "checkpoint.pt" else ("report", "run")
    assert f"{name} is no plain file" in error_of(capsys, *command)


def test_a_comparison_overwrites_no_other_file(workspace, capsys):
    shutil.copytree("run", "copy")
    before = snapshot(workspace)
    os.mkfifo(workspace / "pipe.html")
    for out in ("run/config.json", "run/report.html", "own.py", "pipe.html"):
        error_of(capsys, "compare", "run", "copy", "--out", out)
    (workspace / "pipe.html").unlink()
    assert snapshot(workspace) == before


def test_home_is_expanded_and_paths_in_hints_are_quoted(workspace, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(workspace))
    assert run("train", "--model", "~/own.py", *TRAIN[3:], "--out", "~/a run") == 0
    hint = shlex.split(capsys.readouterr().out.splitlines()[-1].partition("now: ")[2])
    assert hint == ["pyrovae", "evaluate", str(workspace / "a run")]
    assert run("evaluate", "~/a run", *SHORT) == 0
