"""The same command gives the same numbers, and an interruption changes none of them."""

import math
import os
import shutil
import signal
from dataclasses import fields

import numpy as np
import pytest
import torch
from commands import TRAIN as STEPS
from commands import config, history, outcome, refusal, rewrite, run, snapshot
from forks import Fork, run_command

import pyrovae
from pyrovae.runs import Run, experiment
from pyrovae.runs.config import RECIPES, Recipe, RunConfig

TRAIN = [*STEPS, "--batch-size", "256"]
VARIANTS = {
    "adam": [],
    "cosine": ["--schedule", "cosine"],
    "recipe": ["--recipe", "long", "--average", "0.9", "--valid-samples", "3"],
    "normalized": ["--schedule", "iwae", "--normalize-gradients"],
    "particles": ["--particles", "3", "--objective", "trace_mean_field_elbo", "--clip-norm", "10"],
    "grey": ["--model", "gaussian", "--binarize", "none", "--set", "model.scale=pixel"],
}
# After which epochs: of what differs in a loss, a model or a schedule's name alone, after one.
STOPS = {"adam": [1, 2, 3], "recipe": [1, 2, 3], "normalized": [1], "particles": [2], "grey": [2]}
PATIENCE = ["--patience", "2", "--lr", "0.2"]
EPOCHS = 20


@pytest.fixture(scope="module")
def cosine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cosine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})
        assert run(*TRAIN, *VARIANTS["cosine"], "--out", folder / "r") == 0
    np.save(folder / "x.npy", np.ones((200, 1, 8, 8), np.float32))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run ``r``, and ``whole``, which was asked for more epochs from the start."""
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})
        assert run(*TRAIN, "--out", "r") == 0
        assert run(*TRAIN, "--epochs", "5", "--out", "whole") == 0
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The command of a run of some epochs, and what it comes to where nothing interrupts it."""
    command, out = [*STEPS, "--epochs", EPOCHS, *VARIANTS["cosine"]], tmp_path_factory.mktemp("w")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})
        assert run(*command, "--out", out / "r") == 0
    assert len(history(out / "r")) == EPOCHS
    return command, outcome(out / "r")


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})
    return tmp_path


@pytest.fixture
def stop_in(monkeypatch):
    """Presses Ctrl-C in an epoch, between the checkpoint and the metrics."""

    def run_until(epoch, *arguments):
        save = Run.save_checkpoint

        def stop(self, state):
            save(self, state)
            if len(state["history"]) == epoch:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Run, "save_checkpoint", stop)
            return run(*arguments)

    return run_until


def alike(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def interrupted(signum, epoch, *arguments):
    """Start a process, send it a signal when it tells of an epoch, and wait for its end."""
    fork = Fork(run_command, arguments)
    for line in fork.stdout:
        if line.startswith(f"epoch {epoch}/"):
            os.kill(fork.pid, signum)
            break
    code, _, error = fork.end()
    return code, error


@pytest.mark.parametrize("options", [[], ["--resume"]])
def test_a_command_gives_the_same_run_twice_and_goes_on_with_no_run_from_its_start(
    plain, workspace, options
):
    assert run(*TRAIN, "--out", "again", *options) == 0
    assert outcome(workspace / "again") == outcome(plain / "r")


def test_another_seed_gives_another_run(plain, workspace):
    assert run(*TRAIN, "--seed", "9", "--out", "9") == 0
    assert history(workspace / "9") != history(plain / "r")


@pytest.mark.parametrize("variant", STOPS)
def test_stopping_after_any_epoch_changes_nothing(workspace, stop_in, variant):
    command = [*TRAIN, *VARIANTS[variant], "--epochs", "3"]
    assert run(*command, "--out", "whole") == 0
    expected = outcome(workspace / "whole")
    assert len(expected[0]) == 3
    for epoch in STOPS[variant]:
        out = workspace / f"{epoch}"
        assert stop_in(epoch, *command, "--out", out) == 130
        assert not (out / "weights.safetensors").exists()
        if epoch == 2:
            assert run("evaluate", out, "--samples", "1", "--images", "50") == 0
        assert run("train", "--out", out, "--resume") == 0
        assert outcome(out) == expected
        assert config(out)["command"].endswith(f"--out {out}")


def test_kill_and_resume(whole, workspace):
    command, expected = whole
    assert interrupted(signal.SIGKILL, 3, *command, "--out", "killed")[0] == -signal.SIGKILL
    assert 3 <= len(history(workspace / "killed")) < EPOCHS
    assert run("train", "--out", "killed", "--resume") == 0
    assert outcome(workspace / "killed") == expected


def test_ctrl_c_tells_how_to_resume(whole, workspace):
    command, expected = whole
    code, error = interrupted(signal.SIGINT, 3, *command, "--out", "a run")
    assert code == 130
    done = len(history(workspace / "a run"))
    assert 3 <= done < EPOCHS
    again = "go on with: pyrovae train --out 'a run' --resume"
    assert error == f"pyrovae: stopped after epoch {done}; {again}\n"
    assert run("train", "--out", "a run", "--resume") == 0
    assert outcome(workspace / "a run") == expected


def test_ctrl_c_in_the_first_epoch_leaves_nothing(workspace, monkeypatch, capsys):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "fit", stop)
    assert run(*TRAIN, "--out", "r") == 130
    assert "nothing was written" in capsys.readouterr().err
    assert not list(workspace.iterdir())


def test_cosine(workspace):
    assert run(*TRAIN, *VARIANTS["cosine"], "--epochs", "4", "--out", "r") == 0
    rates = [float(row["lr"]) for row in history(workspace / "r")]
    assert rates == pytest.approx([0.005 * (1 + math.cos(math.pi * i / 4)) for i in range(4)])


def test_more_epochs(plain, workspace, stop_in):
    shutil.copytree(plain, workspace, dirs_exist_ok=True)
    assert (workspace / "r" / "weights.safetensors").exists()
    assert stop_in(3, "train", "--out", "r", "--resume", "--epochs", "5") == 130
    assert not (workspace / "r" / "weights.safetensors").exists()
    assert run("train", "--out", "r", "--resume") == 0
    assert outcome(workspace / "r") == outcome(workspace / "whole")
    first, second = config(workspace / "r")["command"].split(" && ")
    assert first.endswith("--batch-size 256 --out r")
    assert second == "pyrovae train --out r --resume --epochs 5"
    before = snapshot(workspace / "r")
    assert run("train", "--out", "r", "--resume") == 0
    assert snapshot(workspace / "r") == before


def test_a_recipe_is_recorded_as_the_options_that_it_stands_for(workspace):
    assert run(*TRAIN, "--recipe", "long", "--average", "0.9", "--out", "r") == 0
    found = config(workspace / "r")
    assert found["recipe"] == "long"
    assert (found["schedule"], found["lr_warm_up"], found["average"]) == ("cosine", 1, 0.9)
    assert found["model"]["settings"]["mean"] == "data"
    assert run(*TRAIN, "--recipe", "long", "--average", "0.9", "--out", "r", "--resume") == 0
    state = Run("r").load_checkpoint()
    assert alike(Run("r").load_weights(), state["average"])
    assert not alike(state["average"], state["weights"])
    (workspace / "r" / "weights.safetensors").unlink()
    assert alike(Run("r").load_weights(), state["average"])


def test_a_recipe_says_in_one_place_what_it_stands_for(monkeypatch):
    """The option's words are its own, and a setting is added where a program leaves it open."""
    words = {each.name: each for each in fields(RunConfig)}["recipe"].metadata["help"]
    assert words.endswith(str(RECIPES["long"]))
    assert "average=0.999, and model.mean=data where the model takes a mean" in words
    asked = {"data": "digits", "binarize": "dynamic", "recipe": "long"}
    for settings, expected in ({"mean": "data"}, "data"), ({}, None), ({"latent": 3}, None):
        monkeypatch.setitem(RECIPES, "long", Recipe({"lr": 0.1}, {"model": settings}))
        options = RunConfig.of(asked | {"model": "bernoulli", "guide": "mean_field"})
        made = experiment.build(options).config.model.settings
        assert (options.lr, made["mean"], made["latent"]) == (0.1, expected, 20)


def test_the_pixels_start_at_the_mean_of_the_training_data(workspace, capsys):
    own = ("two_layer", "ladder", "gmvae")  # of which each has a guide of its name
    for name in ("bernoulli", "vamp_prior", "flow_prior", "mixture_prior", *own):
        options = RunConfig.of({"model": name, "guide": name if name in own else "mean_field",
                                "data": "digits", "binarize": "dynamic",
                                "settings": ["model.mean=data"]})  # fmt: skip
        made = experiment.build(options)
        expected = made.data.train.mean(0).flatten().clamp(1e-3, 1 - 1e-3)
        torch.testing.assert_close(made.model.decoder.last.bias.sigmoid(), expected)
        assert made.config.model.settings["mean"] == "data"
    assert run(*TRAIN, "--set", "model.mean=data", "--out", "r") == 0
    assert run("train", "--out", "r", "--resume", "--epochs", "3") == 0
    assert run("evaluate", "r", "--samples", "1", "--no-diagnostics") == 0


@pytest.mark.parametrize(
    ("option", "asked", "was"),
    [("--model", "gaussian", "bernoulli"), ("--data", "mnist", "digits"), ("--lr", "0.5", "0.01")],
)
def test_another_pair_data_or_setting_is_refused_by_its_name(plain, capsys, option, asked, was):
    said = refusal(capsys, "train", "--out", plain / "r", "--resume", option, asked)
    assert f"made with {option[2:]} = {was}, and --resume was asked for {asked}: leave" in said


def test_a_run_of_before_an_option_goes_on(plain, workspace):
    shutil.copytree(plain, workspace, dirs_exist_ok=True)
    older = config(workspace / "r")
    for name in ("recipe", "average", "lr_warm_up", "normalize_gradients", "valid_samples"):
        del older[name]
    rewrite(workspace / "r", older)
    assert run("train", "--out", "r", "--resume", "--epochs", "5") == 0
    assert outcome(workspace / "r") == outcome(workspace / "whole")


@pytest.mark.parametrize(
    "option",
    [
        "--model gaussian",
        "--guide linear_gaussian",
        "--data x.npy",
        "--binarize static",
        "--objective trace_mean_field_elbo",
        "--batch-size 32",
        "--particles 2",
        "--lr 0.02",
        "--schedule none",
        "--epochs 3",
        "--clip-norm 5",
        "--patience 3",
        "--seed 1",
        "--set latent=3",
        "--set model.activation=Tanh",
    ],
)
def test_contradictions_are_refused(cosine, workspace, capsys, option):
    shutil.copytree(cosine, workspace, dirs_exist_ok=True)
    error = refusal(capsys, "train", "--out", "r", "--resume", *option.split())
    assert "The run was made with" in error or option.startswith(("--guide", "--model"))


def test_the_same_options_again_are_no_contradiction(cosine, workspace):
    shutil.copytree(cosine, workspace, dirs_exist_ok=True)
    before = snapshot(workspace)
    assert run(*TRAIN, *VARIANTS["cosine"], "--out", "r", "--resume") == 0
    assert snapshot(workspace) == before


def test_early_stopping_keeps_the_best_weights(workspace, stop_in):
    command = [*TRAIN, *PATIENCE, "--epochs", "40"]
    assert run(*command, "--out", "whole") == 0
    elbos = [float(row["valid_elbo"]) for row in history(workspace / "whole")]
    best = elbos.index(max(elbos)) + 1
    assert len(elbos) == best + 2 < 40
    loaded = experiment.load_experiment(Run("whole"))
    seed = experiment.subseed(loaded.config.seed, 0)
    found = pyrovae.elbo(loaded.model, loaded.guide, loaded.data.valid, seed=seed)
    assert found.mean == max(elbos)
    for epoch in (best, best + 1, best + 2):
        assert stop_in(epoch, *command, "--out", str(epoch)) == 130
        assert run("train", "--out", str(epoch), "--resume") == 0
        assert outcome(workspace / str(epoch)) == outcome(workspace / "whole")
