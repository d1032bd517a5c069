"""The snippets of docs/python.md run as pasted, one after the other."""

import re

import pyro
import torch
from commands import TRAIN, run


def test_the_snippets_run(repository, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    text = (repository / "docs" / "python.md").read_text(encoding="utf-8")
    names = {}
    assert run(*TRAIN, "--out", "runs/digits") == 0
    with pyro.settings.context(module_local_params=False):
        for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(compile(snippet, "docs/python.md", "exec"), names)
    assert (tmp_path / "runs" / "digits" / "report.html").exists()
    assert "nats per datum" in capsys.readouterr().out
    state = {f"model.{name}": each for name, each in names["model"].state_dict().items()}
    assert all(torch.equal(names["weights"][name], each.cpu()) for name, each in state.items())
    assert (names["flags"] == -1).mean() > 0.9
