"""A training is followed elsewhere: every epoch is recorded once, also where it goes on."""

import copy
import csv
import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from commands import TRAIN, refusal, run

import pyrovae
from pyrovae._tools import InputError
from pyrovae.guides.linear_gaussian import LinearGaussian as ExactGuide
from pyrovae.models.linear_gaussian import LinearGaussian
from pyrovae.tracking import CSV, MLflow, TensorBoard, WandB

LOSS = "train/loss"


def train(on_epoch, epochs=2, **options):
    torch.manual_seed(0)
    data = torch.randn(40, 4)
    pair = LinearGaussian((4,), 2), ExactGuide((4,), 2)
    return pyrovae.fit(
        *pair, data, epochs=epochs, seed=0, compile=False, on_epoch=on_epoch, **options
    )


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database takes seconds to make
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")  # nor anything else over a network
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/store")
    monkeypatch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})
    return tmp_path


def in_csv():
    with open("followed.csv", newline="") as file:
        losses = {int(row["epoch"]): float(row["train_loss"]) for row in csv.DictReader(file)}
    with open("followed.json") as file:
        return losses, json.load(file)


def in_tensorboard(place="events"):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(place)
    found.Reload()
    events = found.Scalars(LOSS)
    assert len({each.step for each in events}) == len(events)
    (text,) = found.Tensors("config/text_summary")
    told = text.tensor_proto.string_val[0].decode()
    return {e.step: e.value for e in events}, json.loads(told.strip("`").removeprefix("json"))


def in_mlflow():
    from mlflow import MlflowClient

    client = MlflowClient()
    home = client.get_experiment_by_name("pyrovae").experiment_id
    (found,) = client.search_runs([home])
    assert found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, LOSS)
    assert len({each.step for each in history}) == len(history)
    return {each.step: each.value for each in history}, found.data.params


def in_wandb():
    """All that was recorded offline, of every session; the files are logs as LevelDB has them."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its service writes on for a moment when a run has finished
    losses, config = {}, {}
    for path in sorted(Path().glob("wandb/offline-run-*/run-*.wandb")):
        content, place, part = path.read_bytes(), 7, b""  # behind the head of the file
        while place + 7 <= len(content):
            size, kind = struct.unpack("<HB", content[place + 4 : place + 7])
            part += content[place + 7 : place + 7 + size]
            place += 7 + size
            if kind in (1, 4):  # the whole of a record, or its end
                record, part = Record.FromString(part), b""
                items = {"".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
                if LOSS in items:
                    epoch = int(json.loads(items["epoch"]))
                    assert epoch not in losses
                    losses[epoch] = json.loads(items[LOSS])
                for item in record.run.config.update:
                    config[item.key] = json.loads(item.value_json)
    return losses, config


TRACKERS = {
    "csv": (lambda: CSV("followed.csv"), in_csv),
    "tensorboard": (lambda: TensorBoard("events"), in_tensorboard),
    "mlflow": (lambda: MLflow(id="one"), in_mlflow),
    "wandb": (lambda: WandB(mode="offline", id="one"), in_wandb),
}


# Weights & Biases has a service of its own, and with it a second of CPU time: half of that is its
# import, and a third its three sessions (wandb 0.31).
@pytest.mark.parametrize("name", TRACKERS)
def test_every_epoch_is_recorded_once_where_a_training_goes_on(name):
    if name == "wandb":
        pytest.importorskip("wandb")
    make, read = TRACKERS[name]
    states = {}
    keep = lambda fit: states.update({len(fit.history): copy.deepcopy(fit.state_dict())})  # noqa: E731
    train([keep, make()])
    # From the end, and then from an epoch before what was recorded last.
    train(make(), 3, state=states[2])
    whole = train(make(), 4, state=states[1])
    losses, config = read()
    expected = {row["epoch"]: row["train_loss"] for row in whole.history}
    assert losses.keys() == expected.keys()
    assert losses == pytest.approx(expected, rel=1e-6)
    assert str(config["model"]) == "LinearGaussian"
    assert str(config["lr"]) == "0.001"


class Watching:
    """A callback that is told how a training ends."""

    def __init__(self):
        self.heard = []

    def __enter__(self):
        self.heard.append("begin")

    def __call__(self, fit):
        self.heard.append(len(fit.history))

    def __exit__(self, kind, error, trace):
        self.heard.append(kind)


@pytest.mark.parametrize("out", [None, "run"])
def test_callbacks_are_entered_and_left_with_what_ends_the_training(out):
    first, second, failing = Watching(), Watching(), Watching()
    train([first, second], out=out)
    assert first.heard == second.heard == ["begin", 1, 2, None]

    def stop(fit):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train([failing, stop], out=out and "other")
    assert failing.heard == ["begin", 1, KeyboardInterrupt]


def test_a_training_that_fails_is_told_from_one_that_ends():
    from mlflow import MlflowClient

    def fail(fit):
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        train([MLflow(name="it"), fail])
    client = MlflowClient()
    home = client.get_experiment_by_name("pyrovae").experiment_id
    (found,) = client.search_runs([home])
    assert (found.info.status, found.info.run_name) == ("FAILED", "it")


def test_the_command_follows_a_run_that_is_resumed(capsys):
    assert run(*TRAIN, "--track", "csv,mlflow,tensorboard", "--out", "r") == 0
    again = ("train", "--out", "r", "--resume", "--epochs", "3", "--track", "mlflow")
    assert run(*again, "--tensorboard") == 0
    history = {row["epoch"]: row["train_loss"] for row in pyrovae.load("r").history}
    losses, config = in_mlflow()
    assert losses == pytest.approx(history)
    assert config["data.binarize"] == "dynamic"
    losses, config = in_tensorboard("r/tensorboard")
    assert losses == pytest.approx(history, rel=1e-6)
    assert config["identity"] == pyrovae.load("r").config.identity
    said = refusal(capsys, *TRAIN, "--track", "mlflo", "--out", "other")
    assert "got 'mlflo' (did you mean 'mlflow'?)" in said


def test_a_missing_package_is_named_before_training(monkeypatch, capsys):
    for name, package in (("tensorboard", "tensorboard"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, package, None)
        said = refusal(capsys, *TRAIN, "--track", name, "--out", "r")
        assert f"needs {package}: pip install 'pyrovae[tracking]'." in said


def test_a_store_that_is_not_there_is_told_before_training(monkeypatch):
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    seen = []
    with pytest.raises(InputError, match="MLflow refuses: "):
        train([MLflow(uri="file:elsewhere"), seen.append])
    assert not seen
