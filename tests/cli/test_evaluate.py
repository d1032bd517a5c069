"""What an evaluation writes is what the library finds, and stopping it changes nothing."""

import json
import shutil

import numpy as np
import pytest
import torch
from commands import DIGITS, TRAIN, refusal, run, snapshot

import pyrovae
from pyrovae import inference_data
from pyrovae.evidence.tiles import Evaluation
from pyrovae.reporting.posterior_figures import guide_calibration
from pyrovae.runs import Run, experiment
from pyrovae.runs.config import EvaluationConfig
from pyrovae.runs.evaluate import SEED, _Unfinished, evaluate
from pyrovae.runs.results import first_data, from_tensors, load_finding
from pyrovae.training.distributed import World

LINEAR = ["train", "--model", "linear_gaussian", "--guide", "mean_field", "--data", "digits"]
LINEAR += ["--set", "latent=2", "--set", "guide.hidden=8", "--epochs", "3", "--lr", "0.01"]
SHORT = ("--samples", "30", "--no-diagnostics")


pytestmark = pytest.mark.usefixtures("workspace")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})
        assert run(*LINEAR, "--out", folder / "linear") == 0
        assert run(*TRAIN, "--out", folder / "run") == 0
    return folder


def results(name, split="test"):
    return json.loads((Run(name).path / "results.json").read_text())[split]


def values(name, prefix=""):
    return from_tensors(*Run(name).load_values("test"), prefix)


def alike(one, other):
    for name in ("log_prob", "standard_error", "ess", "khat", "smoothed"):
        torch.testing.assert_close(
            getattr(one, name), getattr(other, name), rtol=0, atol=0, equal_nan=True
        )
    assert one.curve.num_samples == other.curve.num_samples
    assert torch.equal(one.curve.log_prob, other.curve.log_prob)
    assert (one.data, one.seed, one.method) == (other.data, other.seed, other.method)


def kept(name):
    return sorted(path.name for path in (Run(name).path / "evaluation").iterdir())


def test_what_is_written_is_what_the_library_finds():
    assert run("evaluate", "run", "--samples", "50", "--images", "120") == 0
    made = experiment.load_experiment(Run("run"))
    x, labels = made.data.test[:120], made.data.labels.test[:120]
    pair = made.model, made.guide
    ll = pyrovae.log_likelihood(*pair, x, num_samples=50, seed=SEED)
    alike(values("run"), ll)
    found = results("run")
    assert found["log_likelihood"]["mean"] == ll.mean
    assert found["log_likelihood"]["curve"] == {str(k): v for k, v in ll.curve.mean.items()}
    assert (found["num_data"], found["num_data_of_split"]) == (120, 359)
    diagnosis = pyrovae.diagnose(*pair, x, labels=labels, seed=SEED)
    seen, bound = found["diagnostics"], found["elbo"]["trace_mean_field_elbo"]
    assert seen["sites"] == diagnosis.summary()["sites"]
    assert seen["rate"]["mean"] == pytest.approx(diagnosis.rate.mean().item(), rel=0.05)
    whole = seen["rate"]["mean"] + seen["distortion"]["mean"]
    assert -whole == pytest.approx(bound["mean"], abs=1e-4)
    assert found["reconstruction"] - found["kl"] == pytest.approx(bound["mean"], abs=1e-4)
    assert f"the rate of {seen['rate']['mean']:.3f} nats" in seen["verdict"]
    draws = inference_data.load("run/inference_test.nc")
    assert draws["posterior"]["z"].shape == (1, 100, 100, 2)
    np.testing.assert_allclose(draws["sample_stats"]["log_prob"], ll.log_prob[:100])
    np.testing.assert_array_equal(draws["observed_data"]["datum"], range(100))
    assert draws.attrs["split"] == "test"
    assert kept("run") == ["test.safetensors"]


def test_all_estimates_of_a_linear_gaussian_agree_with_its_exact_value():
    options = ["--samples", "2000", "--annealed", "8", "--temperatures", "40", "--images", "64"]
    assert run("evaluate", "linear", *options, "--no-diagnostics") == 0
    made, found = experiment.load_experiment(Run("linear")), results("linear")
    exact = made.model.log_prob(made.data.test[:64]).double().mean().item()
    for part in (found["log_likelihood"], found["annealed"]):
        assert part["mean"] == pytest.approx(exact, abs=4 * part["standard_error"] + 1e-3)
    ais, ll = values("linear", "annealed."), values("linear")
    over = found["annealed"]["over_importance_sampling"]
    assert over["mean"] == pytest.approx((ais.log_prob - ll.log_prob).mean().item())
    noise = (ais.standard_error.square() + ll.standard_error.square()).sum().sqrt() / 64
    assert over["standard_error"] == pytest.approx(noise.item())
    gap = found["bidirectional"]["gap"]
    assert abs(gap["mean"]) < 4 * gap["standard_error"] + 0.05
    assert found["bidirectional"]["num_data"] == 64


def test_annealing_starts_where_it_is_told(capsys):
    options = ["--annealed", "4", "--temperatures", "5", "--images", "8", "--no-diagnostics"]
    for start in ("guide", "prior"):
        assert run("evaluate", "linear", *SHORT, *options, "--initial", start) == 0
        assert f"sampling from the {start}" in values("linear", "annealed.").method


def test_a_guide_is_calibrated_where_that_is_asked_for(capsys):
    assert run("evaluate", "linear", *SHORT, "--images", "40", "--calibrate", "60") == 0
    said, found = capsys.readouterr().out, results("linear")["calibration"]
    made = experiment.load_experiment(Run("linear"))
    pair, x = (made.model, made.guide), made.data.test[:40]
    assert found == pyrovae.calibrate(*pair, x, n=60, seed=SEED).summary()
    assert " ".join(found["verdict"].split()[:6]) in " ".join(said.split())
    figure = guide_calibration({"": load_finding(Run("linear"))})
    assert [a.get_title("left") for a in figure.axes] == ["guide", "resampled by weights"]
    before = results("linear")
    assert run("evaluate", "linear", *SHORT, "--images", "40", "--calibrate", "20") == 2
    assert "Expected --calibrate >= 50, got 20" in capsys.readouterr().err
    assert results("linear") == before


def test_proposals_are_handed_on(capsys):
    assert run("evaluate", "run", *SHORT, "--refine", "5", "--defensive", "0.25") == 0
    found, ll = results("run"), values("run")
    assert "refined for each datum and, for 25%" in found["log_likelihood"]["method"]
    assert "refined guide" in capsys.readouterr().out
    gap = (ll.curve.log_prob[0] - ll.guide_elbo).double()
    assert found["amortization_gap"]["mean"] == pytest.approx(gap.mean().item())


def stop_after(monkeypatch, count):
    """Press Ctrl-C when so many tiles are finished; counts those that are worked on."""
    worked, keep = [], Evaluation.keep

    def counted(task, index, found):
        if len(worked) == count:
            raise KeyboardInterrupt
        worked.append(index)
        keep(task, index, found)

    monkeypatch.setattr(Evaluation, "keep", counted)
    return worked


def test_a_stopped_evaluation_goes_on_and_ends_as_if_it_had_not_been(monkeypatch, capsys):
    shutil.copytree("run", "whole")
    assert run("evaluate", "whole", *SHORT) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert run("evaluate", "run", *SHORT) == 130
    assert "go on with: pyrovae evaluate run --samples 30" in capsys.readouterr().err
    assert [name.partition(".")[2] for name in kept("run")] == ["checkpoint"]
    with monkeypatch.context() as patch:
        worked = stop_after(patch, None)
        assert run("evaluate", "run", *SHORT) == 0
    assert worked == [4, 5]
    alike(values("run"), values("whole"))
    assert results("run") == results("whole")
    assert kept("run") == ["test.safetensors"]


@pytest.mark.parametrize("other", [["--samples", "40"], ["--images", "300"], ["--split", "valid"]])
def test_what_another_evaluation_has_finished_stays_where_it_is(monkeypatch, other):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run("evaluate", "run", *SHORT) == 130
    (stopped,) = kept("run")
    assert run("evaluate", "run", *SHORT, *other) == 0
    assert stopped in kept("run")
    with monkeypatch.context() as patch:
        worked = stop_after(patch, None)
        assert run("evaluate", "run", *SHORT) == 0
    assert worked == [2, 3, 4, 5]


def test_other_weights_a_damaged_file_and_a_fresh_start_begin_anew(monkeypatch):
    def begun(*options):
        with monkeypatch.context() as patch:
            stop_after(patch, 2)
            assert run("evaluate", "run", *SHORT, *options) == 130

    def worked(*options):
        with monkeypatch.context() as patch:
            found = stop_after(patch, None)
            assert run("evaluate", "run", *SHORT, *options) == 0
        return found

    begun()
    assert worked("--fresh") == list(range(6))
    begun()
    (file,) = (name for name in kept("run") if "checkpoint" in name)
    (Run("run").path / "evaluation" / file).write_bytes(b"damaged")
    assert worked() == list(range(6))
    assert f"{file}.damaged" in kept("run")
    begun()
    assert run("train", "--out", "run", "--resume", "--epochs", "3") == 0
    assert worked() == list(range(6))


def test_processes_keep_files_of_their_own_and_one_clears_up(tmp_path):
    made = Run(tmp_path / "run")
    names = set()
    for size in (1, 2):
        for rank in range(size):
            files = _Unfinished(made, EvaluationConfig(), World(rank, size), {})
            names.add(files.of("samples").name)
    assert len(names) == 2
    with _Unfinished(made, EvaluationConfig(), World(0, 2), {}) as unfinished:
        file = unfinished.of("samples")
        for rank in range(2):
            file.with_name(f"{file.name}.{rank}").touch()
        unfinished.remove()
    assert not (made.path / "evaluation").exists()


def test_estimates_of_the_first_data_are_their_rows():
    torch.manual_seed(0)
    made = experiment.load_experiment(Run("run"))
    ll = pyrovae.log_likelihood(made.model, made.guide, made.data.test[:9], num_samples=20, seed=1)
    part = first_data(ll, 4)
    assert torch.equal(part.log_prob, ll.log_prob[:4])
    assert torch.equal(part.curve.log_prob, ll.curve.log_prob[:, :4])
    assert part.num_samples == 20


BAD = {
    "--samples 0": "--samples >= 1, got 0",
    "--images 0": "--images >= 1, got 0",
    "--annealed -1": "--annealed >= 0, got -1",
    "--temperatures -1": "--temperatures >= 0",
    "--refine -1": "--refine >= 0",
    "--defensive 1": "0 <= defensive < 1, got 1",
    "--images 1": "two data at least",
}


@pytest.mark.parametrize("options", BAD)
def test_options_that_make_no_sense(capsys, options):
    assert BAD[options] in refusal(capsys, "evaluate", "run", *options.split())


def test_weights_of_another_run_and_latents_that_cannot_be_annealed(workspace, capsys):
    shutil.copy("linear/weights.safetensors", "run/weights.safetensors")
    said = refusal(capsys, "evaluate", "run", *SHORT)
    assert "weights.safetensors is of another run: put back the file of this one" in said
    discrete = ["--model", "gmvae", "--guide", "gmvae", "--set", "hidden=[8]", *DIGITS]
    discrete += ["--objective", "trace_enum_elbo"]
    assert run("train", *discrete, "--epochs", "1", "--batch-size", "256", "--out", "y") == 0
    before = snapshot(workspace)
    said = refusal(capsys, "evaluate", "y", *SHORT, "--annealed", "4")
    assert "Latent 'y' is discrete" in said
    assert "sum it out" in said
    assert snapshot(workspace) == before


def test_no_data_of_a_split_are_refused(monkeypatch):
    made = experiment.load_experiment(Run("run"))
    monkeypatch.setattr(type(made.data), "split", lambda *_: ())
    with pytest.raises(ValueError, match="no valid split"):
        evaluate(Run("run"), made, EvaluationConfig(split="valid"))
