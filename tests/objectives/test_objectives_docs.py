"""The page on objectives names them all, and its blocks run from the first to the last."""

import re

import torch

from pyrovae.objectives import OBJECTIVES, make_objective

PAGE = "docs/objectives.md"


def test_every_objective_is_there_with_options_that_it_takes(repository):
    text = (repository / PAGE).read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert rows == [name for name in rows if name in OBJECTIVES]
    assert sorted(rows) == sorted(OBJECTIVES)
    trained = re.findall(r'(?:train|make_objective)\("(\w+)"', text)
    assert set(trained) == OBJECTIVES.keys()
    for name, options in re.findall(r'make_objective\("(\w+)", (.*?)\)[,).\n]', text):
        assert make_objective(name, **eval(f"dict({options})"))


def test_the_blocks_run_in_their_order(repository, capsys):
    torch.manual_seed(0)
    text = (repository / PAGE).read_text(encoding="utf-8")
    namespace = {"__name__": "objectives"}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, PAGE, "exec"), namespace)
    assert namespace["nats"].shape == (8,)
    assert (namespace["nats"] < 0).all()
    assert "tensor" in capsys.readouterr().out
