"""The guide to a model of one's own works as it is pasted, from the first block to the last."""

import contextlib
import io
import re
import shlex
import sys

from pyrovae.cli import main

FENCE = re.compile(r"```(python|sh)\n(.*?)```", re.DOTALL)


def test_every_block_runs_in_its_order(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before, namespace = set(sys.modules), {"__name__": "write_your_own"}
    text = (repository / "docs" / "write-your-own.md").read_text(encoding="utf-8")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for language, block in FENCE.findall(text):
            if language == "sh":
                _shell(block)
            elif block.startswith("# my_"):
                name, _, source = block.removeprefix("# ").partition("\n")
                (tmp_path / name).write_text(source, encoding="utf-8")
            else:
                exec(compile(block, "write-your-own.md", "exec"), namespace)
    for name in set(sys.modules) - before:
        if name.startswith(("my_", "broken_", "normal_")):
            del sys.modules[name]
    assert "Student-t minus normal prior" in printed.getvalue()
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()


def _shell(block):
    for line in block.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "pyrovae"
        assert main(arguments) == 0
