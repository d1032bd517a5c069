"""Damaged and forged files: one sentence and exit code 2, or numbers; no traceback, no hang.

``make soak`` spoils ten thousand.
"""

import collections
import os
import random
import shutil
import signal
import traceback
from pathlib import Path

import fuzz
import numpy as np
import pytest
from commands import run

from pyrovae.evidence.tiles import Evaluation

INPUTS = int(os.environ.get("PYROVAE_INPUTS", "30"))
FIRST = int(os.environ.get("PYROVAE_FIRST", "0"))  # for many inputs in several parts
# Inputs that once ended in a traceback.
FOUND = (24, 306, 754, 1328, 1877, 3663, 4410, 4431, 4462, 5323, 7862)
SECONDS = 60
PAIR = ["--model", "bernoulli", "--guide", "mean_field", "--set", "hidden=4", "--set", "latent=2"]
FAST = ["--batch-size", "20", "--epochs", "2", "--binarize", "threshold"]
EVALUATE = ["evaluate", "run", "--samples", "2", "--no-diagnostics"]
COMMANDS = {
    "config.json": [
        EVALUATE,
        ["train", "--out", "run", "--resume", "--epochs", "3"],
        ["compare", "run", "twin"],
        ["report", "run"],
    ],
    "results.json": [EVALUATE, ["compare", "run", "twin"], ["report", "run"]],
    "checkpoint.pt": [["train", "--out", "run", "--resume", "--epochs", "3"]],
    "weights.safetensors": [EVALUATE, ["compare", "run", "twin"], ["sample", "run", "-n", "2"]],
    "metrics.csv": [["report", "run"], ["train", "--out", "run", "--resume", "--epochs", "3"]],
    "evaluation/test.safetensors": [["compare", "run", "twin"], ["report", "run"]],
    "evaluation/*.checkpoint": [EVALUATE],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with an evaluation, another that was stopped, and data files."""
    folder = tmp_path_factory.mktemp("whole")
    x = np.random.default_rng(0).integers(0, 2, (200, 6))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})
        np.save("x.npy", x)
        shutil.copy("x.npy", "whole.npy")
        np.savez("x.npz", x=x, y=np.arange(200) % 3)
        names = ",".join([*"abcdef", "label"])
        table = np.column_stack([x, np.arange(200) % 3])
        np.savetxt("x.csv", table, "%d", delimiter=",", header=names, comments="")
        assert run("train", *PAIR, "--data", "whole.npy", *FAST, "--out", "run") == 0
        assert run("evaluate", "run", "--samples", "3", "--no-diagnostics") == 0
        shutil.copytree("run", "twin")
        keep = Evaluation.keep

        def stop(task, index, found):
            keep(task, index, found)
            raise KeyboardInterrupt

        patch.setattr(Evaluation, "keep", stop)
        assert run(*EVALUATE, "--split", "train") == 130
    return folder


class Hang(BaseException):
    """A command took longer than a minute."""


def ring(number, frame):
    raise Hang


def attempt(capsys, name, command):
    """What is wrong with how a command ends on a spoilt file; nothing if it is right."""
    signal.alarm(SECONDS)
    try:
        code = run(*command)
    except SystemExit as stop:
        code = stop.code
    except Hang:
        return f"{name}: {command} hangs"
    except Exception:
        return f"{name}: {command}: {traceback.format_exc()}"
    finally:
        signal.alarm(0)
    error = capsys.readouterr().err
    # A rate that was made too high ends training with 1, as it should.
    if code not in (0, 1, 2) or (code == 1 and "not finite" not in error):
        return f"{name}: {command} ended with {code}: {error}"
    if "Traceback" in error or (code == 2 and "pyrovae: error: " not in error):
        return f"{name}: {command} said: {error}"
    return None


def spoilt(rng):
    """Spoil a file of the working folder; its name, and a command that reads it."""
    name = rng.choice([*fuzz.SPOILERS])
    path = next(Path("run").glob(name)) if name in COMMANDS else Path(name)
    spoil = fuzz.spoil_bytes if rng.random() < 0.35 else fuzz.SPOILERS[name]
    spoil(path, rng)
    if name in COMMANDS:
        command = rng.choice(COMMANDS[name])
        if name.endswith(".checkpoint"):
            command = [*command, "--split", "train"]
    else:
        command = ["train", *PAIR, "--data", name, *FAST, "--out", "new"]
    return f"{name} ({spoil.__name__})", command


@pytest.mark.filterwarnings("default")
def test_spoilt_files_end_in_a_sentence(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})
    monkeypatch.setattr("pyrovae.reporting.draw_findings", lambda *arguments, **options: {})
    monkeypatch.setattr("pyrovae.reporting.plots.learning_curves", lambda history: None)
    monkeypatch.setattr(
        "pyrovae.reporting.plots.png", lambda figure: b"\x89PNG\r\n\x1a\n" + bytes(20)
    )
    before = signal.signal(signal.SIGALRM, ring)
    failures, counts = [], collections.Counter()
    for number in (*range(FIRST, FIRST + INPUTS), *FOUND):
        folder = tmp_path / f"{number}"
        shutil.copytree(whole, folder)
        monkeypatch.chdir(folder)
        name, command = spoilt(random.Random(number))
        wrong = attempt(capsys, f"{number}: {name}", command)
        failures += [wrong] if wrong else []
        counts[name] += 1
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(folder)
    signal.signal(signal.SIGALRM, before)
    with capsys.disabled():
        if INPUTS > 100:
            print(f"\n{INPUTS} spoilt inputs, {len(failures)} failures: {dict(counts)}")
    assert not failures, "\n".join(failures)
