"""Damaged and foreign files in a run are refused, and nothing in them is executed."""

import errno
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from commands import TRAIN, outcome, refusal, run, snapshot

from pyrovae.runs import Run

RESUME = ("train", "--out", "run", "--resume", "--epochs", "3")
EVALUATE = ("evaluate", "run", "--samples", "2", "--no-diagnostics")


class Malice:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})
        assert run(*TRAIN, "--patience", "5", "--out", folder / "run") == 0
        assert run(*TRAIN, "--set", "hidden=9", "--out", folder / "other") == 0
        assert run(*TRAIN, "--model", "gaussian", "--out", folder / "gaussian") == 0
    return folder


@pytest.fixture
def workspace(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})
    return tmp_path


def refused(capsys, command, words):
    assert words in refusal(capsys, *command)
    assert not Path("executed").exists()


def alike(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return one == other


@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize(
    ("file", "command"), [("checkpoint.pt", RESUME), ("weights.safetensors", EVALUATE)]
)
def test_truncated(workspace, capsys, file, command, part):
    path = workspace / "run" / file
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    refused(capsys, command, file)


@pytest.mark.parametrize(
    ("file", "load"), [("checkpoint.pt", "checkpoint"), ("weights.safetensors", "weights")]
)
def test_a_flipped_bit_is_seen_or_harmless(workspace, file, load):
    folder, seen = Run("run"), 0
    path, load = folder.path / file, getattr(folder, f"load_{load}")
    content, expected = path.read_bytes(), load()
    places = random.Random(0).sample(range(8 * len(content)), 300)
    for place in places:
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            found = load()
        except ValueError:
            seen += 1
        else:
            assert alike(found, expected)
    assert seen > 150


def test_a_flipped_bit_in_a_command(workspace, capsys):
    state = torch.load("run/checkpoint.pt", weights_only=True)
    weight = state["weights"]["model.decoder.layers.0.weight"].numpy().tobytes()
    for file, command in (("checkpoint.pt", RESUME), ("weights.safetensors", EVALUATE)):
        path = workspace / "run" / file
        content = bytearray(path.read_bytes())
        content[content.index(weight) + 5] ^= 4
        path.write_bytes(content)
        refused(capsys, command, file)


def malicious(state):
    torch.save(state | {"best_state": Malice()}, "run/checkpoint.pt")


def malicious_legacy(state):
    malice = state | {"scheduler": Malice()}
    torch.save(malice, "run/checkpoint.pt", _use_new_zipfile_serialization=False)


def bare_pickle(state):
    Path("run/checkpoint.pt").write_bytes(pickle.dumps(Malice()))


def other_content(state):
    torch.save(state["weights"], "run/checkpoint.pt")


def no_history(state):
    torch.save(state | {"history": []}, "run/checkpoint.pt")


def no_optimizer(state):
    torch.save(state | {"optimizer": {}}, "run/checkpoint.pt")


@pytest.mark.parametrize(
    "tamper",
    [malicious, malicious_legacy, bare_pickle, other_content, no_history, no_optimizer],
)
def test_tampered_checkpoints(workspace, capsys, tamper):
    tamper(torch.load("run/checkpoint.pt", weights_only=True))
    refused(capsys, RESUME, "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt .*was not loaded"):
        Run("run").load_checkpoint()
    assert not Path("executed").exists()
    assert run(*EVALUATE) == 0


def test_the_malice_would_work(workspace):
    pickle.loads(pickle.dumps(Malice()))
    assert Path("executed").exists()


def test_pickled_weights(workspace, capsys):
    Path("run/weights.safetensors").write_bytes(pickle.dumps(Malice()))
    refused(capsys, EVALUATE, "weights.safetensors")


@pytest.mark.parametrize("other", ["other", "gaussian"])
def test_files_of_another_run(workspace, capsys, other):
    for file, command in (("checkpoint.pt", RESUME), ("weights.safetensors", EVALUATE)):
        shutil.copy(f"{other}/{file}", f"run/{file}")
        refused(capsys, command, f"{file} is of another run")


def test_values_of_each_datum_survive_and_a_flipped_bit_in_them_is_seen(tmp_path):
    made, values = Run(tmp_path), {"log_prob": torch.randn(5), "curve": torch.randn(2, 5)}
    assert made.load_values("test") is None
    path = made.save_values("test", values, {"data": "abc", "curve": "[1, 10]"})
    found, about = made.load_values("test")
    assert alike(found, values)
    assert about == {"data": "abc", "curve": "[1, 10]"}
    content = path.read_bytes()
    for place in (content.index(b"abc"), content.index(b"[1, 10]") + 1, len(content) - 2):
        flipped = bytearray(content)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"test\.safetensors is damaged"):
            made.load_values("test")


def test_metrics_that_are_no_table(workspace, capsys):
    for text in ("epoch,train_elbo\n1,high\n", "epoch\n1,2,3\n", "epoch,lr\n1\n\xff"):
        Path("run/metrics.csv").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=r"metrics\.csv is damaged"):
            Run("run").history()


def test_weights_and_metrics_survive_a_round_trip(tmp_path):
    weights = {"a": torch.randn(3, 2).T, "b": torch.tensor(1), "c": torch.zeros(0, 3)}
    weights["d"] = weights["a"].double()
    made = Run(tmp_path)
    made.save_weights(weights)
    assert alike(made.load_weights(), weights)
    rows = [{"epoch": i, "valid_elbo": None, "seconds": i / 3} for i in (1, 2)]
    made.save_metrics(rows)
    assert made.history() == rows


class FullDisk:
    """Lets so many syncs pass, and then finds no space left."""

    def __init__(self, monkeypatch, spare):
        self.spare, self.sync = spare, os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, handle):
        self.spare -= 1
        if self.spare < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.sync(handle)


def test_a_full_disk_leaves_nothing_of_a_new_run(workspace, repository, monkeypatch, capsys):
    shutil.copy(repository / "models" / "bernoulli.py", "own.py")
    for spare, file in enumerate([*["programs/model.py"] * 2, *["config.json"] * 2]):
        with monkeypatch.context() as patch:
            FullDisk(patch, spare)
            error = refusal(capsys, *TRAIN, "--model", "own.py", "--out", "new")
            assert f"new/{file} cannot be written: No space left on device." in error
    with monkeypatch.context() as patch:
        FullDisk(patch, 0)
        refused(capsys, EVALUATE, "run/evaluation/test-")


def test_a_full_disk_at_any_moment_loses_no_run(trained, workspace, monkeypatch, capsys):
    assert run(*RESUME) == 0
    expected = outcome(workspace / "run")
    before, spare, evaluated = snapshot(trained / "run"), 0, set()
    while True:
        shutil.rmtree("run")
        shutil.copytree(trained / "run", "run")
        capsys.readouterr()
        with monkeypatch.context() as patch:
            FullDisk(patch, spare)
            code = run(*RESUME)
        if code == 0:
            break
        assert code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "No space left on device" in error
        after = snapshot(workspace / "run")
        assert after.keys() <= before.keys()
        assert before.keys() - after.keys() <= {"weights.safetensors"}
        Run("run").load_checkpoint()
        Run("run").load_weights()
        if (files := frozenset(after)) not in evaluated:
            assert run(*EVALUATE) == 0
            evaluated.add(files)
        assert run(*RESUME) == 0
        assert outcome(workspace / "run") == expected
        spare += 1
    assert spare > 8
