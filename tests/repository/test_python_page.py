"""The snippets of docs/python.md run as pasted, one after the other."""

import re

import pyro


def test_the_snippets_run(repository, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    text = (repository / "docs" / "python.md").read_text(encoding="utf-8")
    names = {}
    with pyro.settings.context(module_local_params=False):
        for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(compile(snippet, "docs/python.md", "exec"), names)
    assert "nats per datum" in capsys.readouterr().out
    assert (names["flags"] == -1).mean() > 0.9
