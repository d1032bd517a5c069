"""The page on diagnostics runs as it is pasted."""

import re

import pytest

PAGE = "docs/diagnostics.md"


def test_the_blocks_run(repository, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (repository / PAGE).read_text(encoding="utf-8")
    first, recipe = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    namespace = {"__name__": "diagnostics"}
    exec(compile(first, PAGE, "exec"), namespace)
    assert "8 of 8 units are active" in capsys.readouterr().out
    found, gaps = namespace["found"], namespace["gaps"]
    assert found.sites["z"].kl_total == pytest.approx(found.rate.double().mean().item(), rel=1e-4)
    assert found.probe["z"].knn > 0.5
    assert namespace["sbc"].shape != "misshapen"
    assert (tmp_path / "calibration.png").stat().st_size > 1000
    exact = namespace["model"].log_prob(namespace["data"].test[:64]).mean()
    assert gaps.log_prob.mean == pytest.approx(exact.item(), abs=0.05)
    exec(compile(recipe, PAGE, "exec"), namespace)
    betas, rates, distortions = zip(*namespace["curve"], strict=True)
    assert len(betas) == 3
    assert list(rates) == sorted(rates, reverse=True)
    assert list(distortions) == sorted(distortions)
