"""Two processes evaluate as one does; when one is lost, the other says how to go on."""

import json
import re
import shutil

import pytest
import torch
from commands import TRAIN, run
from processes import torchrun

from pyrovae import cli
from pyrovae.runs import Run
from pyrovae.training.distributed import World

FILE = """
import os, signal, time
from pyrovae.models.bernoulli import Bernoulli

calls = []

class Model(Bernoulli):
    def forward(self, x):
        super().forward(x)
        calls.append(len(x) == 64 and "GROUP_RANK" in os.environ)
        if sum(calls) == 4 and os.environ["RANK"] == "0":
            open("evaluating", "w").close()
        if sum(calls) == 4 and os.environ["RANK"] == "1" and not os.path.exists("killed"):
            while not os.path.exists("evaluating"):
                time.sleep(0.01)
            open("killed", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_two_processes_find_what_one_does_and_a_lost_one_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})
    (tmp_path / "own.py").write_text(FILE)
    assert run(*TRAIN, "--model", "own.py", "--out", "one") == 0
    shutil.copytree("one", "two")
    options = ["--samples", "200", "--images", "200", "--no-diagnostics"]
    _, _, killed = torchrun("evaluate", "two", *options)
    said = re.findall("pyrovae:.*", killed)
    assert len(said) == 2, killed
    executing, line = said
    assert "executing two/programs/model.py" in executing
    assert line == (
        "pyrovae: stopped; what is finished is kept; go on with: "
        f"torchrun --nproc-per-node 2 -m pyrovae evaluate two {' '.join(options)}"
    )
    code, printed, errors = torchrun("evaluate", "two", *options)
    assert code == 0, errors
    assert printed.count("log p(x), K = 200") == 1
    assert run("evaluate", "one", *options) == 0
    found = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert found[0] == found[1]
    (one, _), (two, _) = (Run(name).load_values("test") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=0, equal_nan=True)
    assert [path.name for path in (tmp_path / "two" / "evaluation").iterdir()] == [
        "test.safetensors"
    ]


def test_other_commands_are_for_one_process():
    with pytest.raises(ValueError, match="for train and evaluate alone"):
        cli._run(["list"], World(0, 2))
