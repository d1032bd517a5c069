"""The README's programs run as they are pasted."""

import contextlib
import io
import re

import pytest

FENCE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def _blocks(repository):
    return FENCE.findall((repository / "README.md").read_text(encoding="utf-8"))


def _run(block):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    return printed.getvalue()


def test_the_first_snippet_prints_an_estimate_beside_the_exact_value(repository):
    first = _blocks(repository)[0]
    assert len(first.splitlines()) <= 25
    bound, estimate, exact = (line.split() for line in _run(first).splitlines())
    value, error = float(estimate[2]), float(estimate[4].rstrip(","))
    assert abs(value - float(exact[1])) < 4 * error + 0.001
    assert float(bound[1]) < float(exact[1])
    assert error < 0.05


def test_the_pair_in_full_trains(repository):
    printed = _run(_blocks(repository)[1])
    assert re.fullmatch(r"log p\(x\) -\d+\.\d+ ± 0\.\d+ nats per datum\n", printed)


def test_the_line_to_swap_stands_in_the_shipped_model(repository):
    swap = _blocks(repository)[2]
    original = swap.splitlines()[0].removeprefix("# ")
    source = (repository / "models" / "bernoulli.py").read_text(encoding="utf-8")
    assert sum(line.strip() == original for line in source.splitlines()) == 1


@pytest.mark.parametrize("name", ["demo", "test"])
def test_the_two_commands_exist(repository, name):
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{name}:", makefile, re.MULTILINE)
    assert f"make {name}" in (repository / "README.md").read_text(encoding="utf-8")
