"""Runs are compared datum by datum, on the same data, or not at all."""

import re
import shutil

import pyro
import pyro.distributions as dist
import pytest
import torch
from commands import TRAIN, refusal, run, snapshot

from pyrovae._tools.files import sealed
from pyrovae.reporting import render_comparison
from pyrovae.runs import Run
from pyrovae.runs.compare import HEAD, compare_runs
from pyrovae.runs.evaluate import _densities
from pyrovae.runs.results import from_tensors, load_results

SHORT = ("--samples", "30", "--no-diagnostics")
LONGER = (*TRAIN, "--epochs", "4")
TRAINED = {
    "short": TRAIN,
    "long": LONGER,
    "weighted": (*TRAIN, "--objective", "beta_elbo", "--set", "objective.beta=2"),
    "grey": (*TRAIN, "--binarize", "threshold"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    for name, command in TRAINED.items():
        with pytest.MonkeyPatch.context() as patch:
            if name in ("grey", "long"):  # no page shows them
                patch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})
            assert run(*command, "--out", folder / name) == 0
        assert run("evaluate", folder / name, *SHORT) == 0
    return folder


@pytest.fixture(autouse=True)
def workspace(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def estimate(name):
    return from_tensors(*Run(name).load_values("test"))


def test_the_difference_is_paired_and_says_which_is_better(capsys):
    capsys.readouterr()
    assert run("compare", "short", "long") == 0
    text = capsys.readouterr().out
    each = estimate("long").log_prob.double() - estimate("short").log_prob.double()
    found, error = each.mean().item(), each.std().item() / len(each) ** 0.5
    assert found > 2 * error
    assert f"long is better by {found:.3f} ± {error:.3f} nats per datum, paired over 359" in text
    assert f"log p(x) of long less that of short: {found:+.3f} ± {error:.3f}" in text
    other = compare_runs(["long", "short"])
    assert other.differences[0].difference == pytest.approx(-found)
    assert other.verdicts[0].startswith("long is better by")
    bounds = [Run(name).load_values("test")[0]["elbo"] for name in ("long", "short")]
    paired = (bounds[1] - bounds[0]).double()
    assert other.elbo_differences[0][0] == pytest.approx(paired.mean().item())
    spread = max(b.std().item() for b in bounds) / 359**0.5
    assert other.elbo_differences[0][1] < spread


def test_the_table_has_what_the_results_have(capsys):
    capsys.readouterr()
    assert run("compare", "long", "short", "weighted") == 0
    lines = capsys.readouterr().out.splitlines()
    assert tuple(re.split(r"\s{2,}", lines[1])) == HEAD
    for line, name in zip(lines[2:5], ("long", "short", "weighted"), strict=True):
        found, row = Run(name).read_json("results.json")["test"], re.split(r"\s{2,}", line)
        assert row[0] == name
        assert row[4] == f"{found['elbo']['trace_mean_field_elbo']['mean']:.3f}"
        ll = found["log_likelihood"]
        bound = "≥ " * load_results(Run(name))["test"].is_bound
        assert row[5] == f"{bound}{ll['mean']:.3f} ± {ll['standard_error']:.3f}"
        assert row[7] == f"{found['kl']:.3f}"
    assert "beta_elbo, beta=2" in lines[4]
    assert len([line for line in lines if "paired over" in line]) == 2


def test_a_run_cannot_be_told_from_itself():
    shutil.copytree("short", "copy")
    found = compare_runs(["short", "copy"])
    assert [each.difference for each in found.differences] == [0]
    assert found.verdicts[0].startswith("copy and short cannot be told apart")


def test_what_cannot_be_compared_is_refused_with_the_command_to_run(workspace, capsys, monkeypatch):
    monkeypatch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})
    assert "two runs or more to compare, got 1" in refusal(capsys, "compare", "short")
    assert "nothing holds no run" in refusal(capsys, "compare", "short", "nothing")
    said = refusal(capsys, "compare", "short", "long", "--split", "valid")
    assert "short was not evaluated on its valid data yet" in said
    assert "pyrovae evaluate short --split valid" in said
    said = refusal(capsys, "compare", "short", "grey")
    assert "binarize is dynamic and threshold" in said
    assert "pyrovae evaluate grey --split test" in said
    assert run("evaluate", "grey", *SHORT, "--images", "100") == 0
    assert "Train both on one data set" in refusal(capsys, "compare", "short", "grey")
    assert run("evaluate", "long", *SHORT, "--images", "100") == 0
    said = refusal(capsys, "compare", "short", "long")
    assert "short was evaluated on 359 data and long on 100" in said
    assert "pyrovae evaluate long --split test" in said
    assert run("train", "--out", "short", "--resume", "--epochs", "3") == 0
    said = refusal(capsys, "compare", "short", "weighted")
    assert "short was trained further since it was evaluated" in said


def test_estimates_that_hide_more_or_are_of_another_kind_are_refused(capsys):
    shutil.copytree("short", "copy")
    assert run("evaluate", "copy", "--samples", "2", "--no-diagnostics") == 0
    said = refusal(capsys, "compare", "short", "copy")
    assert "with 30 samples and copy by importance sampling from the guide with 2" in said
    assert "pyrovae evaluate copy --split test --samples 30" in said
    assert run("evaluate", "copy", "--samples", "30", "--refine", "2", "--no-diagnostics") == 0
    said = refusal(capsys, "compare", "short", "copy")
    assert "evaluate with the same --samples, --refine and --defensive" in said
    found = Run("long").read_json("results.json")["test"]
    assert found["densities"] == []
    Run("long").write_json("results.json", {"test": sealed(found | {"densities": ["x"]})})
    said = refusal(capsys, "compare", "short", "long")
    assert "the logarithm of a probability in short and of a density in long" in said


@pytest.mark.parametrize("masked", [False, True])
def test_an_evaluation_knows_which_sites_have_densities(masked):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).mask(not masked), obs=x)
            pyro.sample("n", dist.Poisson(z.exp()), obs=torch.ones(len(x)))
            pyro.deterministic("twice", 2 * z)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    assert _densities((model, guide, torch.randn(9))) == ["x"]


def test_results_and_values_of_two_evaluations_are_not_mixed(capsys):
    made = Run("short")
    found = made.read_json("results.json")["test"]
    found["log_likelihood"]["num_samples"] = 31
    made.write_json("results.json", {"test": sealed(found)})
    said = refusal(capsys, "compare", "short", "long")
    assert "pyrovae evaluate short --split test --fresh" in said


def test_runs_of_one_name_are_told_apart_by_their_folders(workspace):
    for name in ("a", "b"):
        shutil.copytree("short", workspace / name / "run")
    names = [each.name for each in compare_runs(["a/run", "b/run"]).runs]
    assert names == ["a/run", "b/run"]
    names = [each.name for each in compare_runs(["short", "short"]).runs]
    assert len(set(names)) == 2


def test_runs_over_beta_lie_on_one_curve():
    assert compare_runs(["short", "weighted"]).joined
    assert not compare_runs(["short", "long"]).joined


def test_the_page_has_both_runs_side_by_side_and_nothing_from_elsewhere(workspace, capsys):
    before = snapshot(workspace)
    assert run("compare", "short", "weighted", "--out", "c.html") == 0
    assert "The comparison is c.html" in capsys.readouterr().out
    assert snapshot(workspace).keys() - before.keys() == {"c.html"}
    page = (workspace / "c.html").read_text()
    assert page == render_comparison(compare_runs(["short", "weighted"]))
    words = re.findall(r'alt="([^"]*)"', page)
    for name in ("short", "weighted"):
        assert any(word.startswith(f"{name}. Samples") for word in words)
        assert any(word.startswith(f"{name}. Data, and each datum") for word in words)
    assert sum(word.startswith("The importance-weighted bound") for word in words) == 1
    assert sum(word.startswith("Rate and distortion") for word in words) == 1
    assert page.count("src=") == page.count("data:image/png;base64,") == len(words)
    assert not re.search(r"<script|<link|<a |@import|url\(", page)
    (verdict,) = compare_runs(["short", "weighted"]).verdicts
    assert verdict in page
