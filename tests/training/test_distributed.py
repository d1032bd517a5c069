"""Two processes train as one does; what one of them cannot survive ends both, and is resumed."""

import re
import shutil

import pytest
import torch
from commands import history, run
from processes import COMMAND, SAME, torchrun, train
from torch import nn

from pyrovae.training.distributed import World, join
from pyrovae.training.flat import FlatSum

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
    done = torchrun(folder)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def close(rows, others):
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        for name, value in row.items():
            if value is None or value == "":
                assert other[name] == value
            else:
                assert float(other[name]) == pytest.approx(float(value), rel=2e-6, abs=2e-6), name


@pytest.mark.parametrize("name", SAME)
def test_the_loss_curve_is_that_of_one_process(ranks, name):
    alone = train(name)
    for rank in ranks:
        close(alone["history"], rank[name]["history"])
        torch.testing.assert_close(rank[name]["weights"], alone["weights"], rtol=1e-5, atol=1e-6)


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
    assert all(
        rank[name]["told"] == told
        for rank, told in zip(ranks, ([1, 2], []), strict=True)
        for name in SAME
    )


def test_what_rank_0_shares_is_what_both_have(ranks):
    for rank in ranks:
        assert rank["shared"]["rank"] == 0
        assert torch.equal(rank["shared"]["x"], torch.zeros(2))


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pyrovae.report.draw_run", lambda *arguments: {})
    (tmp_path / "killed.py").write_text(KILLED)
    (tmp_path / "failed.py").write_text(FAILED)
    return tmp_path


def test_a_killed_rank_and_a_failing_one(workspace):
    command = [*COMMAND, "--epochs", "4", "--model"]
    killed = torchrun(*command, "killed.py", "--out", "a run")
    assert killed.returncode == 1
    (line,) = re.findall("pyrovae:.*", killed.stderr)
    again = "torchrun --nproc-per-node 2 -m pyrovae train --out 'a run' --resume"
    assert line == (
        f"pyrovae: rank 1 of 2 processes is gone or does not answer; stopped after epoch 2; go on "
        f"with: {again}"
    )
    shutil.copytree("a run", "another")
    resume = ["train", "--out", "a run", "--resume"]
    failed = torchrun(*resume, "--", *command, "failed.py", "--out", "failed")
    (line,) = re.findall("pyrovae:.*", failed.stderr)
    assert line.startswith("pyrovae: error: ")
    assert line.endswith("ValueError: row 7 is bad")
    assert failed.stderr.count("Traceback") == killed.stderr.count("Traceback") == 1
    assert set(re.findall(r"exitcode *: (\d)", failed.stderr)) == {"2"}
    assert len(history(workspace / "failed")) == 2
    assert run(*command, "killed.py", "--out", "alone") == 0
    assert run("train", "--out", "another", "--resume") == 0
    for folder in ("a run", "another"):
        assert len(history(workspace / folder)) == 4
        close(history(workspace / "alone"), history(workspace / folder))


def test_without_torchrun_nothing_is_started():
    assert join().size == 1
    assert not torch.distributed.is_initialized()
    world = World()
    assert world.share(sentinel := object()) is sentinel
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
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert World(3, 4).place("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="found 2: use --nproc-per-node 2, or --device cpu"):
        World(3, 4).place("cuda")


def test_the_command_to_go_on_with_names_the_machines(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    expected = ["torchrun", "--nnodes", "2", "--nproc-per-node", "4", "-m", "pyrovae"]
    assert World(0, 8).command == expected


class Twice:
    """Stands for another process that has the same share."""

    def __init__(self, other=0.0):
        self.other = other

    def __call__(self, flat):
        flat.mul_(2).add_(self.other)


def parameters(*shapes):
    return [nn.Parameter(torch.zeros(shape)) for shape in shapes]


def test_numbers_and_gradients_are_summed_at_once():
    leaves, total = parameters((2, 3), ()), FlatSum(Twice())
    found = []
    for step in range(2):
        leaves[0].grad, leaves[1].grad = torch.full((2, 3), 1.0 + step), torch.tensor(5.0)
        numbers = [torch.tensor(3.0 + step, dtype=torch.float64), torch.tensor(1.0 + step)]
        found += total(leaves, numbers, True)
        assert torch.equal(leaves[0].grad, torch.full((2, 3), 2.0 + 2 * step))
        assert leaves[1].grad.item() == 10
    assert [n.item() for n in found] == [6, 2, 8, 4]
    assert [n.dtype for n in found] == [torch.float64, torch.float32] * 2


def test_a_share_that_does_not_count_adds_nothing():
    leaves, total = parameters((2,)), FlatSum(Twice(torch.tensor([7.0, 1.0, 4.0, 4.0])))
    for _ in range(2):
        leaves[0].grad = torch.full((2,), float("nan"))
        (loss,) = total(leaves, [torch.tensor(float("nan"))], False)
        assert loss.item() == 7
        assert leaves[0].grad.tolist() == [4, 4]


def test_a_gradient_that_no_process_has_stays_none():
    leaves, total = (
        parameters((1,), (1,), (1,)),
        FlatSum(Twice(torch.tensor([0, 0, 0, 1, 0, 0, 9.0]))),
    )
    leaves[0].grad = torch.ones(1)
    total(leaves, [torch.tensor(0.0)], True)
    assert leaves[0].grad.item() == 2
    assert leaves[1].grad is None
    assert leaves[2].grad.item() == 9


def test_float64_parameters_are_summed_in_float64():
    leaf = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    leaf.grad = torch.full((1,), 1 + 1e-12, dtype=torch.float64)
    FlatSum(Twice())([leaf, *parameters((1,))], [torch.tensor(0.0)], True)
    assert leaf.grad.item() == 2 + 2e-12
