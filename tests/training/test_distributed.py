"""Two processes train as well as one; what one of them cannot survive ends both, and is resumed."""

import os
import re
import shutil
import signal

import pytest
import torch
from commands import history, outcome, run
from processes import COMMAND, SAME, torchrun, trained

from pyrovae.training.distributed import ProcessLost, World, join

FILE = """
import os, signal
from pyrovae.models.bernoulli import Bernoulli

steps = []

class Model(Bernoulli):
    def forward(self, x):
        super().forward(x)
        steps.append(self.training)
        if sum(steps) == 30 and os.environ.get("RANK") == "1":
            {end}
"""
KILLED = FILE.format(end="os.kill(os.getpid(), signal.SIGKILL)")
FAILED = FILE.format(end="raise ValueError('row 7 is bad')")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    code, _, errors = torchrun(folder)
    assert code == 0, errors
    assert "Warning" not in errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_trained_losses_agree_within_their_error(ranks):
    difference = ranks[0]["trained"] / trained() - 1
    error = difference.std(1) / difference.shape[1] ** 0.5
    assert ((error > 0) & (error < 0.01)).all()
    assert (difference.mean(1).abs() < 4 * error).all()


def test_ranks_share_the_order_of_the_data_and_draw_noise_of_their_own(ranks):
    (order, noise), (other_order, other) = (rank["noise"] for rank in ranks)
    assert torch.equal(order, other_order)
    correlation = torch.corrcoef(torch.stack([noise, other]))[0, 1]
    assert abs(correlation) < 4 / 1000**0.5


@pytest.mark.parametrize("name", SAME)
def test_weights_and_history_are_the_same_on_both(ranks, name):
    first, second = (rank[name] for rank in ranks)
    assert first["history"] == second["history"]
    for key, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][key]), key


def test_batch_statistics_and_initial_weights_are_those_of_rank_0(ranks):
    first, second = (rank["norm"] for rank in ranks)
    assert first["model.net.1.num_batches_tracked"] == 5
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_processes_that_part_stop_with_the_parameter_that_shows_it(ranks):
    for rank in ranks:
        assert rank["diverged"].startswith("Rank 1 strayed from rank 0, seen in guide.encoder.")


def test_rank_0_alone_writes_and_speaks(ranks):
    first, second = ranks
    assert (first["code"], second["code"]) == (0, 0)
    assert {"config.json", "checkpoint.pt", "weights.safetensors"} <= set(first["written"])
    assert "2 epochs: ELBO" in first["said"]
    assert (second["written"], second["said"]) == ([], "")
    assert "invalid float value: 'fast'" in first["usage"]
    assert second["usage"] == ""
    assert (first["refusal"] + second["refusal"]).count(
        "pyrovae: error: Expected a learning rate > 0"
    ) == 1
    assert all(
        rank[name]["told"] == told
        for rank, told in zip(ranks, ([1, 2], []), strict=True)
        for name in SAME
    )


def test_what_rank_0_shares_is_what_both_have(ranks):
    for rank in ranks:
        assert rank["shared"] == {"rank": 0, "x": [0.0, None]}


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})
    (tmp_path / "killed.py").write_text(KILLED)
    (tmp_path / "failed.py").write_text(FAILED)
    return tmp_path


def test_a_killed_rank_and_a_failing_one(workspace):
    command = [*COMMAND, "--epochs", "4", "--model"]
    code, _, killed = torchrun(*command, "killed.py", "--out", "a run")
    assert code == 1
    again = "torchrun --nproc-per-node 2 -m pyrovae train --out 'a run' --resume"
    assert re.findall("pyrovae:.*", killed) == [
        f"pyrovae: stopped after epoch 2; go on with: {again}"
    ]
    shutil.copytree("a run", "another")
    resume = ["train", "--out", "a run", "--resume"]
    straight = [*command, "bernoulli", "--out", "straight"]
    code, _, failed = torchrun(
        *resume, "--", *straight, "--", *command, "failed.py", "--out", "failed"
    )
    assert code == 1
    cause, advice = sorted(re.findall("pyrovae: (?!executing).*", failed))
    assert cause.startswith("pyrovae: error: ")
    assert cause.endswith("ValueError: row 7 is bad")
    assert advice.endswith(
        "stopped after epoch 2; go on with: " + again.replace("'a run'", "failed")
    )
    assert "cli.py" not in killed + failed  # no traceback of the commands, only torchrun's
    assert len(history(workspace / "failed")) == 2
    assert outcome(workspace / "a run") == outcome(workspace / "straight")
    assert run("train", "--out", "another", "--resume") == 0
    assert len(history(workspace / "another")) == 4


def test_without_torchrun_nothing_is_started(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert join().size == 1
    assert not torch.distributed.is_initialized()
    world = World()
    assert world.share(sentinel := object()) is sentinel
    assert torch.equal(world.rows(torch.arange(7)), torch.arange(7))
    assert world.place("cuda") == torch.device("cuda")
    assert world.command == ["pyrovae"]


def test_an_environment_that_names_no_meeting_place_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="RANK, MASTER_ADDR, MASTER_PORT is not set"):
        join()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert World(3, 4).place("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="found 2: use --nproc-per-node 2, or --device cpu"):
        World(3, 4).place("cuda")


def test_the_command_to_go_on_with_names_the_machines(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    expected = ["torchrun", "--nnodes", "2", "--nproc-per-node", "4", "-m", "pyrovae"]
    assert World(0, 8).command == expected


def test_what_is_said_of_a_lost_process_is_not_cut_short():
    """torchrun's SIGTERM may come while an exception is handled, or after a command has ended."""

    def loses(error):
        with World(0, 2).as_one():
            try:
                raise error
            except error:
                os.kill(os.getpid(), signal.SIGTERM)
                raise ProcessLost("stopped") from None

    before = signal.getsignal(signal.SIGTERM)
    try:
        for error in (ConnectionError, RuntimeError):
            with pytest.raises(ProcessLost):
                loses(error)
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt), World(0, 2).as_one():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
