"""Data on disk train a pair as the same data in memory do, to the last bit."""

import numpy as np
import pytest
import torch

import pyrovae
from pyrovae.data import Dataset
from pyrovae.data.disk import Disk, ahead
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.gaussian import Gaussian

SMALL = 2**-17  # GiB, 8 KiB: an epoch comes in several parts


@pytest.fixture
def file(tmp_path):
    x = np.random.default_rng(0).normal(size=(400, 6)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    return tmp_path / "x.npy"


def trained(data, **options):
    torch.manual_seed(0)
    pair = Gaussian((6,), latent=2, hidden=4), MeanField((6,), latent=2, hidden=4)
    fit = pyrovae.fit(*pair, data, batch_size=20, lr=0.01, seed=0, **options)
    return fit, fit.svi.pair.state_dict()


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("compile", [False, True])
def test_the_same_weights_as_in_memory(file, compile, monkeypatch):
    # Captured, but not handed to Inductor, which takes seconds.
    monkeypatch.setattr("pyrovae.compiling.graph._compile", lambda graph, inputs: graph)
    on_disk = pyrovae.load_data(file, memory=SMALL)
    assert on_disk.disk is not None
    assert len(list(on_disk.parts(torch.arange(280).split(20))[1])) > 1
    held = Dataset("held", on_disk.shape, on_disk.train.clone(), on_disk.valid, on_disk.test)
    one, weights = trained(on_disk, epochs=2, compile=compile)
    two, others = trained(held, epochs=2, compile=compile)
    assert same(weights, others)
    assert [row["valid_elbo"] for row in one.history] == [row["valid_elbo"] for row in two.history]
    if compile:
        return
    first, _ = trained(on_disk, epochs=1, compile=compile)
    _, resumed = trained(on_disk, epochs=2, compile=compile, state=first.state_dict())
    assert same(weights, resumed)


def test_a_memmap_with_context(file):
    x = np.load(file, mmap_mode="r")
    site = torch.arange(400)
    data = Dataset.of((x, site))
    assert data.disk is not None
    data = Dataset("x", data.shape, data.train, context=data.context, disk=Disk(x, SMALL))
    order = torch.randperm(400)
    load, parts = data.parts(order.split(13))
    rows = [load(index) for batches in parts for index in batches]
    assert torch.equal(torch.cat([each for _, each in rows]), order)
    assert torch.equal(torch.cat([each for each, _ in rows]), torch.from_numpy(x[order]))


def test_what_cannot_stay_on_disk_is_refused(tmp_path, file):
    np.save(tmp_path / "double.npy", np.zeros((1000, 6)))
    with pytest.raises(pyrovae.InputError, match=r"float32 rows .* in C order .* convert it once"):
        pyrovae.load_data(tmp_path / "double.npy", memory=SMALL)
    with pytest.raises(pyrovae.InputError, match="which stays on disk: give a larger memory"):
        pyrovae.load_data(file, memory=SMALL, binarize="dynamic")
    x = np.load(file)
    x[390, 0] = np.nan
    np.save(file, x)
    with pytest.raises(pyrovae.InputError, match="NaN or infinite"):
        pyrovae.load_data(file, memory=SMALL)
    with pytest.raises(pyrovae.InputError, match="memory > 0"):
        Disk(np.load(file, mmap_mode="r"), 0)


def test_a_failed_read_ends_the_reading():
    seen = []

    def read(number):
        seen.append(number)
        if number == 2:
            raise OSError("gone")
        return number

    found = ahead(read, range(100))
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(OSError, match="gone"):
        next(found)
    assert len(seen) < 100


def test_numbers_of_rows_are_joined_a_part_at_a_time(file):
    """All at once they would be as large as the order of an epoch, beside which memory= stands."""
    taken = []

    class Batches(list):
        def __getitem__(self, i):
            taken.extend([i] if isinstance(i, slice) else [])
            return super().__getitem__(i)

    parts = Disk(np.load(file, mmap_mode="r"), SMALL).parts(Batches(torch.arange(400).split(5)), ())
    next(parts)
    assert len(taken) <= 3
    assert len([*parts]) > 3


def test_rows_are_read_from_a_range_of_the_file_at_a_time(file, monkeypatch):
    """However much the system maps around each row, it is no more than that range."""
    x, spans = torch.from_numpy(np.load(file)), []

    class Source:
        def index_select(self, dim, part):
            spans.append(int(part.max() - part.min() + 1) * 24)
            return x.index_select(dim, part)

    monkeypatch.setattr("pyrovae.data.disk.mapped", lambda array: Source())
    disk, index = Disk(np.load(file, mmap_mode="r"), SMALL), torch.randint(400, (300,))
    assert torch.equal(disk.read(index), x[index])
    assert max(spans) <= disk.memory // 4
    assert len(spans) == 5
