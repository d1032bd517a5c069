"""Every page's programs and commands run as they are pasted, with fewer epochs and samples."""

import re
import shlex

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from commands import run
from PIL import Image

import pyrovae
from pyrovae.data.images import draw_shapes
from pyrovae.guides.mean_field import MeanField
from pyrovae.guides.table import Table as TableGuide
from pyrovae.models.bernoulli import Bernoulli
from pyrovae.models.table import Table

# Pages whose programs a test of their own runs.
ELSEWHERE = {
    "README.md": "test_readme.py",
    "arviz.md": "test_inference_data.py",
    "diagnostics.md": "test_diagnostics_docs.py",
    "export.md": "test_exporting.py",
    "objectives.md": "test_objectives_docs.py",
    "python.md": "test_python_page.py",
    "sequences.md": "test_sequence.py",
    "theory.md": "test_theory.py",
    "write-your-own.md": "test_write_your_own.py",
}
HERE = {"check.md", "evaluation.md", "imputation.md", "models.md", "tuning.md"}
FEWER = {"epochs=20": "epochs=2", "epochs=100": "epochs=2", "10_000": "200", "=1000)": "=50)"}
FEWER |= {"n_trials=12": "n_trials=5"}
QUICK = {
    "train": ["--epochs", "1", "--batch-size", "50"],
    "check": ["--particles", "4"],
    "evaluate": ["--samples", "10"],
}


def blocks(path, language):
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def pages(repository):
    return [repository / "README.md", *(repository / "docs").glob("*.md")]


def test_no_page_has_a_program_that_no_test_runs(repository):
    found = {path.name for path in pages(repository) if blocks(path, "(?:python|sh)")}
    assert found == {*ELSEWHERE} | HERE
    for page, test in ELSEWHERE.items():
        (file,) = (repository / "tests").rglob(test)
        assert page in file.read_text(encoding="utf-8")


def execute(source, names):
    for many, few in FEWER.items():
        source = source.replace(many, few)
    exec(compile(source, "page", "exec"), names)
    return names


@pytest.fixture
def folder(repository, tmp_path, monkeypatch):
    """Files that commands of the pages name."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"age": rng.normal(60, 9, 300), "creatinine": rng.gamma(2.0, 1.0, 300)})
    frame["sex"] = rng.integers(0, 2, 300)
    frame.loc[::5, "creatinine"] = np.nan
    frame.to_csv(tmp_path / "patients.csv", index=False)
    (tmp_path / "my_model.py").write_text(blocks(repository / "docs" / "check.md", "python")[1])
    (tmp_path / "pictures").mkdir()
    for i, x in enumerate(draw_shapes(300, size=8).x):
        Image.fromarray(x.transpose(1, 2, 0)).save(tmp_path / "pictures" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})
    return frame


def test_the_check_of_a_page(repository, folder, capsys):
    data = pyrovae.load_data("digits", binarize="dynamic")
    small = {"latent": 2, "hidden": (8,)}
    names = {"model": Bernoulli(data.shape, **small), "guide": MeanField(data.shape, **small)}
    report = execute(
        blocks(repository / "docs" / "check.md", "python")[0],
        names | {"pyrovae": pyrovae, "data": data},
    )["report"]
    assert report.passed
    # The page's own model has a mistake, which its command finds on the line that has it.
    (command,) = blocks(repository / "docs" / "check.md", "sh")
    assert run(*shlex.split(command)[1:], *QUICK["check"]) == 1
    assert "my_model.py:" in capsys.readouterr().out


def test_the_estimates_of_a_page_hold_its_exact_value(repository, capsys):
    (source,) = blocks(repository / "docs" / "evaluation.md", "python")
    names = execute(source, {})
    exact = names["model"].log_prob(names["x"]).mean().item()
    assert f"exact {exact:.3f}" in capsys.readouterr().out
    assert names["ais"].mean < exact + 4 * names["ais"].mean_standard_error


def test_the_gaps_of_a_page(repository, folder):
    whole, line = blocks(repository / "docs" / "imputation.md", "python")
    given = {"pyrovae": pyrovae, "frame": folder, "Table": Table, "TableGuide": TableGuide}
    found = execute(whole, given)["found"]
    assert not found.filled.isnan().any()
    x, mask = torch.zeros(2, 3), torch.tensor([[True, False, True]] * 2)
    with pyro.plate("data", 2):
        execute(line, {"pyro": pyro, "dist": dist, "loc": x, "scale": 1.0, "mask": mask, "x": x})


def test_the_tuning_of_a_page_chooses_on_validation_data(repository):
    from optuna.logging import WARNING, set_verbosity

    set_verbosity(WARNING)
    names = {}
    for block in blocks(repository / "docs" / "tuning.md", "python"):
        execute(block, names)
    study, found, data = names["study"], names["found"], names["data"]
    pruned = [trial for trial in study.trials if trial.state.name == "PRUNED"]
    assert pruned
    assert len(pruned) + len(found) == len(study.trials)
    assert study.best_value == max(ll.mean for ll in found.values())
    valid = pyrovae.log_likelihood(*names["pairs"][names["chosen"]], data.valid, num_samples=2)
    assert {ll.data for ll in found.values()} == {valid.data} != {names["final"].data}


def test_the_priors_of_a_page(repository):
    (lines,) = blocks(repository / "docs" / "models.md", "python")
    for line in lines.splitlines():
        names = {"pyro": pyro, "dist": dist, "self": Bernoulli((4,), latent=3)}
        assert execute(line, names)["z"].shape == (3,)


@pytest.mark.parametrize("page", ["imputation.md", "models.md"])
def test_the_commands_of_a_page(repository, folder, page):
    for block in blocks(repository / "docs" / page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            program, command, *options = shlex.split(line)
            assert program == "pyrovae"
            narrow = ["--set", "channels=(4, 4)"] if "residual" in options else []
            assert run(command, *options, *QUICK.get(command, []), *narrow) == 0


def test_the_check_of_the_readme_passes_on_its_own_pair(repository, tmp_path, monkeypatch):
    (pair,) = (text for text in blocks(repository / "README.md", "python") if "class " in text)
    definitions = pair.partition("\ndata = ")[0]
    for name in ("my_model.py", "my_guide.py"):
        (tmp_path / name).write_text(definitions, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (command,) = (text for text in blocks(repository / "README.md", "sh") if "--model my" in text
                  and "check" in text)  # fmt: skip
    assert run(*shlex.split(command)[1:]) == 0
