"""The page on diagnostics runs as it is pasted."""

import re

import pytest

PAGE = "docs/diagnostics.md"


def test_the_block_runs(repository, capsys):
    text = (repository / PAGE).read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    namespace = {"__name__": "diagnostics"}
    exec(compile(block, PAGE, "exec"), namespace)
    printed = capsys.readouterr().out
    assert "8 of 8 units are active" in printed
    rates = [point.rate for point in namespace["curve"]]
    assert rates == sorted(rates, reverse=True)
    found, gaps = namespace["found"], namespace["gaps"]
    assert found.sites["z"].kl_total == pytest.approx(found.rate.double().mean().item(), rel=1e-4)
    assert found.probe["z"].knn > 0.5
    exact = namespace["model"].log_prob(namespace["data"].test[:64]).mean()
    assert gaps.log_prob.mean == pytest.approx(exact.item(), abs=0.05)
