"""The script behind the table of the literature: it runs to its end, and goes on where it was."""

import json
import sys

import literature
import pytest
import torch
from torch.nn.utils import parameters_to_vector

import pyrovae
from pyrovae.guides.mean_field import MeanField
from pyrovae.runs import Run

TINY = ["--small", "--test", "10", "--images", "4", "--simulated", "2", "--chains", "2"]
TINY += ["--temperatures", "2", "--samples", "20"]


@pytest.fixture
def rows(tmp_path, monkeypatch):
    def written(*arguments, runs="runs"):
        out = tmp_path / f"{runs}.json"
        given = ["literature.py", *TINY, "--runs", str(tmp_path / runs), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", [*given, *arguments])
        literature.main()
        return json.loads(out.read_text())["rows"]

    return written


def _lasting(row):
    """What does not depend on the time that it took."""
    return {k: v for k, v in row.items() if "seconds" not in k and "hours" not in k}


def test_a_row_has_every_number_of_its_table(rows):
    found = rows("--only", "gated-vamp", "iwae-5")
    assert list(found) == ["iwae-5/0", "gated-vamp/0"]
    # Both begin with an epoch of another row.
    assert [row["steps"] for row in found.values()] == [39, 39]
    assert [row["begins with"] for row in found.values()] == ["vae", "gated-vae"]
    assert [row["particles with a gradient"] for row in found.values()] == [3, 1]
    for row in found.values():
        assert row["NLL"] == row["curve"]["NLL"][-1] < row["curve"]["NLL"][0]
        assert -row["ELBO"] == pytest.approx(row["rate"] + row["distortion"], rel=1e-4)
        assert row["curve of training"]["epoch"] == [1, 2]
        assert {"annealed NLL", "bidirectional gap", "amortization gap", "active units"} <= set(row)


def test_a_row_without_another_begins_with_itself(rows, monkeypatch):
    trained, kept = [], literature.train_run

    def train(folder, made, **options):
        start = parameters_to_vector(made.model.parameters()).detach().clone()
        fit = kept(folder, made, **options)
        trained.append((start, parameters_to_vector(fit.model.parameters()).detach().clone()))
        return fit

    monkeypatch.setattr(literature, "train_run", train)
    found = rows("--only", "gated-vae", "--before", "1")["gated-vae/0"]
    assert (found["begins with"], found["epochs before"], found["steps"]) == ("gated-vae", [1], 39)
    (start, first), (again, last) = trained
    assert not torch.equal(start, first)
    assert torch.equal(again, first)
    assert not torch.equal(again, last)


def test_a_flow_begins_as_the_normal_that_it_transforms(rows, monkeypatch):
    seen, kept = [], literature.begin

    def begin(made, x, row, options):
        kept(made, x, row, options)
        normal = MeanField(made.data.shape, latent=4, hidden=(4, 4), activation="GLU")
        taken = made.guide.state_dict()
        normal.load_state_dict({n: taken[n][: len(v)] for n, v in normal.state_dict().items()})
        bounds = [pyrovae.elbo(made.model, g, x[:20], seed=0) for g in (normal, made.guide)]
        seen.append([each.elbo.mean().item() for each in bounds])

    monkeypatch.setattr(literature, "begin", begin)
    found = rows("--only", "gated-flow-both", "--before", "1", "--epochs", "1")["gated-flow-both/0"]
    assert found["begins with"] == "gated-flow-prior"
    ((one, two),) = seen
    assert one == pytest.approx(two, rel=1e-5)


def test_a_row_begins_with_another_of_two_cosines(rows, tmp_path, monkeypatch):
    begun, kept = [], literature.begin

    def begin(made, x, row, options):
        kept(made, x, row, options)
        begun.append((row.name, parameters_to_vector(made.guide.parameters()).detach().clone()))

    monkeypatch.setattr(literature, "begin", begin)
    found = rows("--only", "iwae-5", "--before", "2,1", "--epochs", "1")["iwae-5/0"]
    assert (found["begins with"], found["epochs before"], found["steps"]) == ("vae", [2, 1], 52)
    assert [name for name, _ in begun] == ["vae", "iwae-5"]
    first = Run(tmp_path / "runs" / "vae-split-2+1-0").load_weights()
    assert (tmp_path / "runs" / "iwae-5-split-2,1+1-0").is_dir()
    guide = [first[name].flatten() for name in first if name.startswith("guide")]
    assert begun[1][1].norm() == pytest.approx(torch.cat(guide).norm().item(), rel=1e-6)


def test_a_row_that_began_with_another_goes_on_from_itself(rows, tmp_path, monkeypatch):
    begun, kept = [], literature.begin

    def begin(made, x, row, options):
        kept(made, x, row, options)
        begun.append((row.before, {n: v.clone() for n, v in made.model.state_dict().items()}))

    monkeypatch.setattr(literature, "begin", begin)
    found = rows("--only", "gated-vamp", "--before", "1", "1", "--epochs", "1")["gated-vamp/0"]
    assert (found["epochs before"], found["steps"]) == ([1, 1], 39)
    assert [before for before, _ in begun] == [("1",), ("1", "1")]
    folder = Run(tmp_path / "runs" / "gated-vamp-split-1+1-0")
    weights = folder.load_weights()
    for name, value in begun[1][1].items():
        torch.testing.assert_close(weights[f"model.{name}"], value, msg=name)


def test_a_stopped_row_goes_on_where_it_was(rows, monkeypatch, tmp_path):
    whole = rows("--only", "vae", runs="whole")["vae/0"]

    def stop(*arguments):
        raise KeyboardInterrupt

    save = Run.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_checkpoint", lambda run, state: (save(run, state), stop()))
        with pytest.raises(KeyboardInterrupt):
            rows("--only", "vae")
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(Run(folder).load_checkpoint()["history"]) == 1
    with monkeypatch.context() as patch:
        patch.setattr(literature, "sandwich", stop)
        with pytest.raises(KeyboardInterrupt):
            rows("--only", "vae")
    monkeypatch.setattr(literature, "sampled", stop)
    monkeypatch.setattr(pyrovae.SVI, "update", stop)
    assert _lasting(rows("--only", "vae")["vae/0"]) == _lasting(whole)
    each = torch.load(folder / "literature-log-prob.pt", weights_only=True)
    assert -each.double().mean().item() == pytest.approx(whole["NLL"], rel=1e-4)


def test_the_logits_start_at_the_means_of_all_that_is_trained_on(rows, monkeypatch, tmp_path):
    seen = []

    def stop(run, made, **options):
        seen.append(made)
        raise KeyboardInterrupt

    monkeypatch.setattr(literature, "train_run", stop)
    with pytest.raises(KeyboardInterrupt):
        rows("--only", "two-layer-vae", "--all", "--epochs", "4")
    (made,) = seen
    assert (len(made.data.train), len(made.data.intensities), made.data.valid) == (1438, 1438, None)
    assert made.config.objective_settings == {"warm_up": 15}
    mean = made.model.decoder.last.bias.sigmoid().view(8, 8)
    expected = made.data.train.mean((0, 1)).clamp(1e-3, 1 - 1e-3)
    assert (mean - expected).abs().max() < 1e-5
    grey = made.data.intensities.double().mean((0, 1, 2, 3)) / made.data.scale
    assert abs(grey - made.data.train.double().mean()) < 0.01


def test_a_row_begins_with_what_another_has_learned(rows, monkeypatch, tmp_path):
    seen, train = [], literature.train_run

    def spy(run, made, **options):
        before = [each.detach().clone() for each in made.guide.parameters()]
        before += [each.detach().clone() for each in made.model.decoder.parameters()]
        seen.append((run.path.name, before, made))
        return train(run, made, **options)

    monkeypatch.setattr(literature, "train_run", spy)
    row = rows("--only", "gated-vamp", "--epochs", "2", "--before", "3")["gated-vamp/0"]
    (first, _, other), (second, begun, made) = seen
    assert (first, second) == ("gated-vae-split-3-0", "gated-vamp-split-3+2-0")
    learned = [*other.guide.parameters(), *other.model.decoder.parameters()]
    assert all(map(torch.equal, begun, learned))
    assert row["steps"] == 13 * (3 + 2)
    costs = [Run(tmp_path / "runs" / name).read_json("cost.json") for name in (first, second)]
    assert row["hours"] == pytest.approx(sum(each["clock"] for each in costs) / 3600, rel=1e-3)
    assert row["CPU hours"] == pytest.approx(sum(each["cpu"] for each in costs) / 3600, rel=1e-3)
    # A resumed row is not begun again: it has weights of its own.
    again = rows("--only", "gated-vamp", "--epochs", "2", "--before", "3")["gated-vamp/0"]
    assert _lasting(again) == _lasting(row)
    assert not all(map(torch.equal, made.guide.parameters(), other.guide.parameters()))
