"""The mission with its values on a GPU that is not there: `tests/helpers/stand_in.py`."""

from copy import deepcopy

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from stand_in import stand_in
from test_on_device import agree, data, make

import pyrovae
from pyrovae._tools.seeding import Stream, seeded
from pyrovae.cli import main
from pyrovae.compiling.graph import Graph
from pyrovae.evidence.tiles import _exchange
from pyrovae.pairs.pair import Pair

CUDA = torch.device("cuda")


@pytest.fixture
def reads():
    with stand_in() as counted:
        yield counted


def fit(name, epochs=4, state=None, batch_size=4, **options):
    model, guide, args = make(name, CUDA)
    return pyrovae.fit(
        model, guide, data(*args), objective="trace_elbo", epochs=epochs, batch_size=batch_size,
        lr=1e-2, seed=3, state=state, progress=False, **options,
    )  # fmt: skip


def test_it_refuses_tensors_of_two_devices_and_has_a_stream_of_its_own(reads):
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device="cuda") + torch.ones(2)
    torch.manual_seed(0)
    here = torch.rand(2)
    torch.cuda.manual_seed(1)
    torch.manual_seed(0)
    there = torch.rand(2, device="cuda")
    assert torch.equal(torch.rand(2), here)
    assert there.is_cuda
    assert not torch.equal(there.cpu(), here)


def test_a_stream_of_random_numbers_goes_on_where_it_was_left(reads):
    stream = Stream(5, CUDA, 1)
    with stream():
        found = [torch.randn(3, device="cuda")]
    torch.rand(7, device="cuda")
    with stream():
        found.append(torch.randn(20, device="cuda"))
    with seeded(5, CUDA, 1):
        for each in found:
            assert torch.equal(each.cpu(), torch.randn(len(each), device="cuda").cpu())


@pytest.mark.parametrize("name", ["bernoulli-mean_field", "table"])
def test_a_graph_holds_nothing_of_the_cpu_and_is_replayed(reads, name):
    """A plate of Pyro's makes a tensor on the CPU, which no CUDA graph could hold."""
    model, guide, args = make(name, CUDA)
    pair = Pair(model, guide)

    def score(*args):
        with torch.no_grad():
            return [pair.trace(*args)[1].log_prob_sum()]

    graph = Graph(score, tuple(args), pair)
    assert graph.run is not graph._launched  # as it is where it is launched kernel by kernel
    for rows in (args, [arg.flip(0) for arg in args]):
        torch.cuda.manual_seed(5)
        found = graph(*rows)[0].item()
        torch.cuda.manual_seed(5)
        assert found == pytest.approx(score(*rows)[0].item(), rel=1e-5)


def test_what_processes_found_on_their_gpus_is_joined_on_the_cpu(reads, monkeypatch):
    def gather(parts, found):
        parts[:] = [found] * len(parts)

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    joined = _exchange([{"log_prob": torch.ones(3, device="cuda")}], 2)
    assert [tile["log_prob"].device.type for tile in joined] == ["cpu", "cpu"]


@pytest.mark.parametrize("compile", [False, True])
def test_training_lowers_the_loss_and_resumes_to_the_last_bit(reads, compile):
    states = []
    whole = fit(
        "masked", compile=compile, on_epoch=lambda f: states.append(deepcopy(f.state_dict()))
    )
    resumed = fit("masked", state=states[1], compile=compile)
    losses = [row["train_loss"] for row in whole.history]
    assert losses == [row["train_loss"] for row in resumed.history]
    assert losses[-1] < losses[0]
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert one.is_cuda
        assert torch.equal(one, other)


def test_what_the_host_waits_for_in_an_epoch_does_not_grow_with_its_steps(reads):
    counts = []
    for batch_size in (4, 2):
        before = sum(reads.values())
        with pyro.validation_enabled(False):
            fit("bernoulli-mean_field", 1, batch_size=batch_size, compile=False)
        counts.append(sum(reads.values()) - before)
    assert counts[0] == counts[1]


def test_functions_state_their_parameters_where_they_are_asked_to(reads):
    def model(x):
        weight = pyro.param("w", lambda: x.new_full((2, 4), 0.1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ weight).to_event(1), obs=x)

    def guide(x):
        weight = pyro.param("v", lambda: x.new_full((4, 2), 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ weight, 1.0).to_event(1))

    x = torch.ones(16, 4)
    pyrovae.fit(model, guide, x, epochs=1, device="cuda", compile=False, progress=False)
    assert pyro.param("w").is_cuda
    assert pyro.param("v").is_cuda
    assert pyrovae.elbo(model, guide, x).elbo.is_cuda


@pytest.mark.parametrize("name", ["bernoulli-mean_field", "sequence"])
def test_evaluation_takes_rows_of_the_cpu_and_agrees_with_it(reads, name):
    home, (model, guide, args) = make(name, "cpu"), make(name, CUDA)
    rows, how = [arg.cpu() for arg in args], {"num_samples": 500}
    found = pyrovae.log_likelihood(model, guide, *rows, **how, seed=1, compile=True)
    agree(found, pyrovae.log_likelihood(*home[:2], *home[2], **how, seed=0))
    eager = pyrovae.log_likelihood(model, guide, *args, **how, seed=1, compile=False)
    torch.testing.assert_close(found.log_prob.cpu(), eager.log_prob.cpu(), rtol=1e-4, atol=1e-3)
    chains = {"num_chains": 16, "num_temperatures": 4, "num_steps": 1, "seed": 4}
    agree(pyrovae.annealed_log_likelihood(model, guide, *rows, **chains), found)


def test_a_run_whose_data_are_on_disk_is_trained_and_evaluated(reads, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
    x[::7, 2] = np.nan
    np.save("x.npy", x)
    train = (
        "train --model gaussian --guide mean_field --data x.npy --missing mask --memory 1e-6 "
        "--device cuda --compile off --epochs 2 --set latent=2 --set hidden=[16] --out run"
    )
    evaluate = (
        "evaluate run --samples 20 --images 4 --refine 2 --annealed 2 --temperatures 3 "
        "--calibrate 50 --device cuda"
    )
    assert [main(command.split()) for command in (train, evaluate)] == [0, 0]
    assert next(pyrovae.load("run", device="cuda").model.parameters()).is_cuda
