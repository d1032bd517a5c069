"""What the command line hands to programs and objectives: settings, context, precision."""

import pytest
from commands import DIGITS, PAIR, SIZES, config, history, outcome, refusal, run

from pyrovae._tools import precision

M2 = ["--model", "semi_supervised", "--guide", "semi_supervised", "--objective", "trace_enum_elbo"]
LABELS = [*DIGITS, "--context", "labels", "--labelled", "50"]
SMALL = ["--set", "hidden=[8]", "--set", "latent=2", "--batch-size", "256"]


@pytest.fixture(autouse=True)
def _workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_pictures(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})
        yield patch


def test_check_prints_its_table_and_says_by_its_exit_whether_it_passed(tmp_path, capsys):
    assert run("check", *PAIR, *DIGITS, "--set", "hidden=8", "--particles", "8") == 0
    assert "passed   capture" in capsys.readouterr().out
    (tmp_path / "own.py").write_text(
        "import pyro, pyro.distributions as dist\n"
        "def guide(x):\n"
        "    with pyro.plate('data', len(x)):\n"
        "        pyro.sample('y', dist.Normal(x.new_zeros(2), 1.0).to_event(1))\n"
    )
    pair = ["--model", "bernoulli", "--guide", "own.py", "--set", "model.latent=2"]
    assert run("check", *pair, *DIGITS) == 1
    assert "FAILED   sites" in capsys.readouterr().out


def test_labels_that_are_partly_shown_train_evaluate_and_resume(tmp_path, no_pictures):
    command = ["train", *M2, *LABELS, *SMALL]
    assert run(*command, "--epochs", "2", "--out", "whole") == 0
    shown = config(tmp_path / "whole")["data"]
    assert (shown["context"], shown["labelled"]) == ("labels", 50)
    assert run(*command, "--epochs", "1", "--out", "part") == 0
    no_pictures.undo()  # those of a pair that sees labels
    assert run("train", "--out", "part", "--resume", "--epochs", "2") == 0
    assert outcome(tmp_path / "part") == outcome(tmp_path / "whole")
    assert run("evaluate", "part", "--samples", "4") == 0
    assert run("sample", "part", "-n", "4") == 0


@pytest.mark.usefixtures("no_pictures")
def test_an_objectives_settings_are_kept_and_refused_where_they_say_nothing(tmp_path, capsys):
    command = ["train", *PAIR, *DIGITS, *SIZES, "--objective", "warm_up_elbo"]
    short = [*command, "--epochs", "2", "--set", "objective.warm_up=20", "--out", "short"]
    assert run(*short) == 0
    assert config(tmp_path / "short")["objective_settings"] == {"warm_up": 20}
    assert run("train", "--out", "short", "--resume", "--epochs", "3") == 0
    assert len(history(tmp_path / "short")) == 3
    capsys.readouterr()
    assert run("train", "--out", "short", "--resume", "--epochs", "2") == 0
    assert "No epoch was added: 2 were asked for" in capsys.readouterr().out
    long = [*command, "--epochs", "2", "--set", "objective.warm_up=999", "--out", "new"]
    assert "longer than the training" in refusal(capsys, *long)
    typo = [*command, "--set", "objective.warmup=3", "--out", "new"]
    assert "did you mean 'warm_up'" in refusal(capsys, *typo)


def test_a_resumed_warm_up_goes_on_where_it_was(tmp_path, no_pictures):
    command = ["train", *PAIR, *DIGITS, *SIZES, "--objective", "warm_up_elbo"]
    command += ["--set", "objective.warm_up=30"]
    assert run(*command, "--epochs", "2", "--out", "part") == 0
    assert run("train", "--out", "part", "--resume", "--epochs", "3") == 0
    assert run(*command, "--epochs", "3", "--out", "three") == 0
    assert outcome(tmp_path / "part") == outcome(tmp_path / "three")


def test_precision_is_recorded_and_checked(tmp_path, capsys, monkeypatch, no_pictures):
    monkeypatch.setattr(precision, "rounds", lambda *_: True)
    command = ["train", *PAIR, *DIGITS, *SIZES, "--epochs", "1"]
    assert run(*command, "--precision", "bf16", "--out", "low") == 0
    assert config(tmp_path / "low")["precision"] == "bf16"
    assert "did you mean 'bf16'" in refusal(capsys, *command, "--precision", "fb16", "--out", "new")


def test_a_prior_made_of_the_guide_is_built_from_it(tmp_path):
    pair = ["--model", "vamp_prior", "--guide", "mean_field", "--set", "model.components=3"]
    assert run("train", *pair, *DIGITS, *SIZES, "--epochs", "1", "--out", "vamp") == 0
    assert run("evaluate", "vamp", "--samples", "4") == 0
