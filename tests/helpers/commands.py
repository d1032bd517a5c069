"""Commands on tiny nets, and what they leave on disk."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from pyrovae._tools import trust
from pyrovae._tools.files import checksum, sealed, unpack_tensors
from pyrovae.cli import main

SIZES = ["--set", "hidden=8", "--set", "latent=2", "--batch-size", "64", "--lr", "0.01"]
PAIR = ["--model", "bernoulli", "--guide", "mean_field"]
DIGITS = ["--data", "digits", "--binarize", "dynamic"]
TRAIN = ["train", *PAIR, *DIGITS, *SIZES, "--epochs", "2"]
EVIL = "__import__('pathlib').Path('executed').touch()\n"


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, and every folder."""
    found = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in found}


def refusal(capsys: Any, *arguments: object, code: int = 2) -> str:
    """The sentence with which a command is refused; it leaves the working folder as it was."""
    before = snapshot(Path())
    capsys.readouterr()
    assert run(*arguments) == code
    shown = capsys.readouterr()
    assert shown.err.startswith("pyrovae: error: ")
    assert shown.err.count("\n") == 1
    assert "Traceback" not in shown.err
    assert "Trace Shapes" not in shown.err
    assert shown.out == ""
    assert snapshot(Path()) == before
    return shown.err


def history(folder: Path) -> list[dict[str, str]]:
    """The metrics as they are spelled, without the seconds."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def outcome(folder: Path) -> tuple[list[dict[str, str]], str]:
    """What two runs of one experiment have in common, to the last bit."""
    return history(folder), checksum(unpack_tensors(folder / "weights.safetensors")[0])


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def rewrite(folder: Path, content: dict) -> None:
    """Give a run another configuration, as if it had been written so by its user."""
    content = sealed(content)
    content["signature"] = trust.sign(content["sha256"])
    (folder / "config.json").write_text(json.dumps(content))


def train_watched(folder, repository, *further):
    """Train a program that leaves a file ``executed`` where it runs, and run more commands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})
        source = (repository / "models" / "bernoulli.py").read_text()
        Path("own.py").write_text(source + EVIL)
        for command in ([*TRAIN, "--model", "own.py", "--out", "run"], *further):
            assert run(*command) == 0
    Path(folder, "executed").unlink()
    return folder
