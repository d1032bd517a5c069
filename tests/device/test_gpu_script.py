"""The script for a GPU: its parts are commands that can be run, and it keeps how each ended."""

import json
import sys
from pathlib import Path

import gpu
import literature
import pytest
import speed


@pytest.fixture
def script(tmp_path, monkeypatch):
    def script(*arguments):
        given = ["gpu.py", "--device", "cpu", "--small", "--out", str(tmp_path), *arguments]
        monkeypatch.setattr(sys, "argv", given)
        gpu.main()
        return json.loads((tmp_path / "gpu.json").read_text())

    return script


@pytest.mark.parametrize("size", [[], ["--small"]])
def test_every_part_is_a_command_that_its_script_takes(size, monkeypatch):
    found = gpu.parts(gpu._options().parse_args([*size, "--device", "cpu"]))
    for name, (_, script, *rest) in found.items():
        rest = [*map(str, rest)]
        monkeypatch.setattr(sys, "argv", [str(script), *rest])
        if name in ("steps", "log p(x)"):
            asked = speed.parse()
            for start in asked.only:
                assert any(known.startswith(start) for known in speed.sections(asked, None))
        elif name.startswith("literature"):
            assert literature._options().parse_args(rest).device == "cpu"
        else:
            assert "cpu" in rest
    assert {path.name for _, path, *_ in found.values() if isinstance(path, Path)} == {
        "gpu.py", "literature.py", "speed.py"
    }  # fmt: skip


def test_the_tests_run_and_are_not_run_again(script, monkeypatch):
    part = "tests, test_scores_of_the_same_draws_are_those_of_the_cpu"
    assert script("--only", part)[part]["ended"] == "well"
    monkeypatch.setattr(gpu, "_run", lambda *arguments: pytest.fail("run again"))
    script("--only", part)


def test_how_a_part_ended_is_kept(script, monkeypatch):
    stuck = [sys.executable, "-c", "import time; time.sleep(60)"]
    broken = [sys.executable, "-c", "raise SystemExit(3)"]
    monkeypatch.setattr(gpu, "parts", lambda options: {"stuck": stuck, "broken": broken})
    ended = script("--limit", "1")
    assert [part["ended"] for part in ended.values()] == ["stopped after 1 s", "with code 3"]
