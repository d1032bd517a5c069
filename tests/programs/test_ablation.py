"""The script behind the table of recipes: paired with the recipe, and stopped without harm."""

import json
import sys

import ablation
import pytest
import torch

TINY = ["--small", "--epochs", "2", "--images", "20", "--samples", "20"]


@pytest.fixture
def written(tmp_path, monkeypatch):
    def run(*names, runs="runs"):
        given = ["ablation.py", *TINY, "--runs", str(tmp_path / runs), "--only", *names]
        given += ["--out", str(tmp_path / "out.json"), "--figure", str(tmp_path / "figure.png")]
        monkeypatch.setattr(sys, "argv", given)
        ablation.main()
        assert (tmp_path / "figure.png").stat().st_size > 10_000
        return json.loads((tmp_path / "out.json").read_text())

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def test_variants_differ_from_the_recipe_image_by_image(written):
    found = written("recipe", "mean", "schedule-free")
    assert found["worth adding"] == ["mean"]
    rows = found["rows"]
    base = rows["recipe/0"]
    for split, prefix in (("validation NLL", ""), ("test NLL", "test: ")):
        for row in rows.values():
            paired = row[f"{prefix}less the recipe"]
            assert paired == pytest.approx(row[split] - base[split], abs=2e-3)
    # Paired, the error is a fraction of that of the level.
    assert rows["schedule-free/0"]["±"] < 0.2 * rows["schedule-free/0"]["± over data"]


def test_a_stopped_variant_goes_on_where_it_was(written, monkeypatch):
    whole, keep = written("kl", runs="whole")["rows"]["kl/0"], ablation._keep

    def stop(path, found):
        keep(path, found)
        raise KeyboardInterrupt

    for _ in range(2):  # after an epoch of two, and before the estimate
        with monkeypatch.context() as patch:
            patch.setattr(ablation, "_keep", stop)
            with pytest.raises(KeyboardInterrupt):
                written("kl")
    again = written("kl")["rows"]["kl/0"]
    assert {**again, "CPU minutes": 0} == {**whole, "CPU minutes": 0}
