"""The README's programs and commands run as they are pasted."""

import contextlib
import io
import math
import re
import shlex

import numpy as np
import pytest
import torch

import pyrovae
from pyrovae.cli import main
from pyrovae.guides.mean_field import MeanField

EVERYWHERE = {"--help", "--device", "--data-root", "--traceback", "--trust"}
COMMANDS = ("train", "check", "evaluate", "compare", "sample", "report", "export", "list")


def _blocks(repository, language="python"):
    text = (repository / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


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


@pytest.fixture
def own(repository, tmp_path, monkeypatch):
    """A folder with the files that the commands name: the shipped model with its prior swapped."""
    shipped, swapped = _blocks(repository)[2].splitlines()
    model = (repository / "models" / "bernoulli.py").read_text(encoding="utf-8")
    assert shipped.removeprefix("# ") in model
    (tmp_path / "my_model.py").write_text(model.replace(shipped.removeprefix("# "), swapped))
    guide = (repository / "guides" / "mean_field.py").read_text(encoding="utf-8")
    (tmp_path / "my_guide.py").write_text(guide, encoding="utf-8")
    np.save(tmp_path / "my_data.npy", np.random.default_rng(0).normal(size=(200, 6)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})
    return tmp_path


def _commands(repository):
    """The commands that the README shows, without those that only list what there is."""
    text = "".join(_blocks(repository, "sh")).replace("\\\n", " ")
    found = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [
        words[1:] for words in found if words[:1] == ["pyrovae"] and not {"M", "DIR"} & {*words}
    ]


def test_the_commands_run(repository, own):
    commands = [words for words in _commands(repository) if words != ["list"]]
    assert {words[0] for words in commands} >= {"train", "check", "evaluate"}
    for words in commands:
        quick = ["--epochs", "1", "--batch-size", "100"] if words[0] == "train" else []
        quick += ["--samples", "10"] if words[0] == "evaluate" else []
        assert main([*words, *quick]) == 0, words
    assert "Laplace" in (own / "my_model.py").read_text(encoding="utf-8")
    assert (own / "runs" / "laplace" / "results.json").is_file()


def test_the_options_are_those_of_the_commands(repository, capsys):
    (synopsis,) = (text for text in _blocks(repository, "sh") if "train --model M" in text)
    for part in re.split(r"^pyrovae ", synopsis, flags=re.MULTILINE)[1:]:
        command, shown = part.split()[0], {*re.findall(r"--[a-z-]+|-n\b", part)}
        assert command in COMMANDS
        with pytest.raises(SystemExit):
            main([command, "--help"])
        known = {*re.findall(r"--[a-z-]+|-n\b", capsys.readouterr().out)}
        assert shown <= known
        assert command == "check" or known - shown <= EVERYWHERE


def test_the_likelihoods_fit_the_shipped_model(repository):
    source = (repository / "models" / "bernoulli.py").read_text(encoding="utf-8")
    (observed,) = re.findall(r"pyro\.sample\(\"x\".*", source)
    for line in _blocks(repository)[3].splitlines():
        names = {"__name__": "swapped"}
        exec(compile(source.replace(observed, line), "swapped.py", "exec"), names)
        model, guide = names["Bernoulli"]((1, 4, 4), latent=2), MeanField((1, 4, 4), latent=2)
        assert math.isfinite(pyrovae.elbo(model, guide, torch.rand(8, 1, 4, 4), seed=0).mean)


@pytest.mark.parametrize("name", ["demo", "test", "docs"])
def test_the_make_commands_exist(repository, name):
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{name}:", makefile, re.MULTILINE)
    assert f"make {name}" in (repository / "README.md").read_text(encoding="utf-8")
