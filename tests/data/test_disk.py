"""Data on disk train a pair as the same data in memory do, to the last bit."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import pyrovae
from pyrovae.data import Dataset
from pyrovae.data.disk import Disk, ahead, written
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
    if compile:
        x = np.load(file)
        x[::3, 1] = np.nan
        np.save(file, x)
    options = {"missing": "mask"} if compile else {}
    on_disk = pyrovae.load_data(file, memory=SMALL, **options)
    assert on_disk.disk is not None
    assert len(list(on_disk.parts(torch.arange(280).split(20))[1])) > 1
    held = in_memory(file, np.load(file), **options)
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
    split = pyrovae.load_data(x, memory=SMALL, context="5")
    assert split.disk is not None
    assert torch.equal(split.train, torch.from_numpy(x[:280, :5]))


def in_memory(path, x, **more):
    """The splits of a file on disk, as one that is read at once."""
    parts = dict(zip(("train", "valid", "test"), np.split(x, [280, 320]), strict=True))
    arrays = {f"x_{name}": rows for name, rows in parts.items()}
    np.savez(path.with_suffix(".npz"), **arrays)
    return pyrovae.load_data(path.with_suffix(".npz"), **more)


@pytest.mark.parametrize("binarize", ["none", "threshold", "static", "dynamic"])
def test_masked_and_binarized_as_in_memory(tmp_path, binarize):
    rng = np.random.default_rng(1)
    x = rng.random((400, 6)).astype(np.float32)
    x[rng.random(x.shape) < 0.2] = np.nan
    path, options = tmp_path / "x.npy", {"missing": "mask", "binarize": binarize, "seed": 3}
    np.save(path, x)
    one = pyrovae.load_data(path, memory=SMALL, **options)
    two = in_memory(path, x, **options)
    assert one.disk is not None
    assert one.provenance["missing_share"] == pytest.approx(two.provenance["missing_share"])
    for split in ("train", "valid", "test"):
        for tensor, other in zip(one.split(split), two.split(split), strict=True):
            assert torch.equal(tensor, other), split
    assert len(list(one.parts(torch.arange(280).split(20))[1])) > 1
    fits = [trained(data, epochs=2, compile=False) for data in (one, two)]
    assert same(fits[0][1], fits[1][1])
    first, _ = trained(one, epochs=1, compile=False)
    assert same(trained(one, epochs=2, compile=False, state=first.state_dict())[1], fits[0][1])
    assert fits[0][0].history[-1]["train_loss"] == fits[1][0].history[-1]["train_loss"]
    if binarize == "none":
        pair = fits[0][0].model, fits[0][0].guide
        for call in (
            lambda rows: pyrovae.log_likelihood(*pair, *rows, num_samples=3, seed=0).log_prob,
            lambda rows: pyrovae.encode(pair[1], *rows, seed=0)["z"],
            lambda rows: pyrovae.diagnose(*pair, *rows, intervals=False, seed=0).rate,
            lambda rows: pyrovae.impute(*pair, *rows, num_samples=3, seed=0).mean,
        ):
            assert torch.equal(call(one.split("train")), call(two.split("train")))


def test_columns_of_an_array_are_context_by_their_numbers(tmp_path, file):
    x = np.load(file)
    held = pyrovae.load_data(file, context="1,-1")
    on_disk = pyrovae.load_data(file, memory=SMALL, context="1,-1")
    for data in (held, on_disk):
        assert data.shape == (4,)
        rows = torch.cat([torch.cat([x, c[0][:, None], c[1][:, None]], 1) for x, *c in map(
            data.split, ("train", "valid", "test"))])  # fmt: skip
        expected = torch.from_numpy(x[:, [0, 2, 3, 4, 1, 5]])
        assert torch.equal(rows[rows[:, 0].argsort()], expected[expected[:, 0].argsort()])
    assert torch.equal(on_disk.train, torch.from_numpy(x[:280, [0, 2, 3, 4]]))
    for name in ("age", "6", "1,-5"):
        with pytest.raises(pyrovae.InputError, match=r"numbers of columns .* have names"):
            pyrovae.load_data(file, context=name)


def test_what_cannot_stay_on_disk_is_refused(tmp_path, file):
    x = np.load(file)
    for name, other in (("double", x.astype(float)), ("fortran", np.asfortranarray(x))):
        np.save(tmp_path / f"{name}.npy", other)
        data = pyrovae.load_data(tmp_path / f"{name}.npy", memory=SMALL)
        assert data.disk is not None
        assert torch.equal(data.train, torch.from_numpy(x[:280]))
    with pytest.raises(pyrovae.InputError, match=r"table for columns=.* got .*x.npy"):
        pyrovae.load_data(file, memory=SMALL, columns={"a": "real"})
    with pytest.raises(pyrovae.InputError, match=r"intensities in \[0, 1\] for binarize='static'"):
        pyrovae.load_data(file, memory=SMALL, binarize="static")
    for value, options, sentence in (
        (np.nan, {}, r"1 or more NaN or infinite, the first in row 390 .* missing='mask'"),
        (np.inf, {"missing": "mask"}, r"1 or more infinite, the first in row 390"),
    ):
        x[390, 0] = value
        np.save(file, x)
        with pytest.raises(pyrovae.InputError, match=sentence):
            pyrovae.load_data(file, memory=SMALL, **options)
    with pytest.raises(pyrovae.InputError, match="memory > 0"):
        Disk(np.load(file, mmap_mode="r"), 0)


class Items(torch.utils.data.Dataset):
    """Rows that are made one by one, with a number and a mask of their own."""

    def __init__(self, x, seen):
        self.x, self.seen, self.count = torch.from_numpy(x), seen, 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        self.count += 1
        return self.x[i], self.seen[i]


def test_a_torch_data_set_larger_than_memory(file, monkeypatch):
    x = np.load(file)
    seen = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) > 0.3
    items = Items(x, seen)
    data = Dataset.of(items, memory=SMALL)
    assert items.count == 400
    assert data.disk is not None
    weights = trained(data, epochs=2, compile=False)[1]
    assert same(weights, trained((torch.from_numpy(x), seen), epochs=2, compile=False)[1])
    # Whatever is given a data set of more than half of the machine's memory reads it likewise.
    monkeypatch.setattr("pyrovae.data.given.physical_memory", lambda: 2000)
    pair = Gaussian((6,), latent=2, hidden=4), MeanField((6,), latent=2, hidden=4)
    loader = torch.utils.data.DataLoader(items, batch_size=7, shuffle=True)
    files = []
    monkeypatch.setattr(
        "pyrovae.data.given.written", lambda *args: files.append(0) or written(*args)
    )
    for call in (
        lambda *rows: pyrovae.log_likelihood(*pair, *rows, num_samples=3, seed=0).log_prob,
        lambda *rows: pyrovae.encode(pair[1], *rows, seed=0)["z"],
        lambda *rows: pyrovae.diagnose(*pair, *rows, intervals=False, seed=0).rate,
    ):
        assert torch.equal(call(loader), call(torch.from_numpy(x), seen))
    assert same(trained(loader, epochs=2, compile=False)[1], weights)
    assert len(files) == 4
    one = Dataset.of(Items(x[:1], seen), memory=1e-9)
    assert one.disk is not None
    assert torch.equal(one.head(9)[0], torch.from_numpy(x[:1]))


def test_load_data_of_a_torch_data_set_on_disk(file):
    x = np.load(file)
    items = Items(x, torch.arange(400) % 3)
    data = pyrovae.load_data(items, memory=SMALL, context="labels")
    reference = pyrovae.load_data(file, memory=SMALL)
    for split in ("train", "valid", "test"):
        assert torch.equal(data.split(split)[0], reference.split(split)[0])
    assert torch.equal(torch.cat([each[0] for each in data.context]), items.seen)
    assert data.provenance["sha256"] == reference.provenance["sha256"]
    grey = Items((x > 0).astype(np.uint8) * 51, items.seen)
    assert pyrovae.load_data(grey, memory=SMALL / 4).train.unique().tolist() == [
        0,
        pytest.approx(0.2),
    ]
    with pytest.raises(pyrovae.InputError, match=r"no names in context for the Items"):
        pyrovae.load_data(items, memory=SMALL, context="age")


def test_loaders_that_fit_cannot_follow_are_refused(file):
    data = torch.utils.data.TensorDataset(torch.from_numpy(np.load(file)))
    groups = torch.utils.data.BatchSampler(range(9), 3, False)

    class Own(torch.utils.data.BatchSampler):
        pass

    def cut(rows):
        return torch.stack([row[0] for row in rows])[:, : len(rows) // 100]

    loader = torch.utils.data.DataLoader
    for given, sentence in (
        (loader(data, batch_size=None), "each datum once, got batch_size=None"),
        (loader(data, batch_sampler=Own(range(400), 3, False)), "each datum once, got Own"),
        (loader(data, batch_sampler=groups), "each datum once, got range"),
        (loader(data, collate_fn=cut), r"one shape and type .* \[2\], and then .* \[1\]: pad"),
    ):
        with pytest.raises(pyrovae.InputError, match=sentence):
            Dataset.of(given)
    flipped = loader(data, collate_fn=lambda rows: torch.stack([row[0] for row in rows]).flip(1))
    assert torch.equal(Dataset.of(flipped).train, data.tensors[0].flip(1))


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


def test_batches_are_read_together_as_memory_allows(file):
    """By hundreds, as steps are taken, or fewer; never more than there are."""
    array = np.load(file, mmap_mode="r")
    sizes = {gib: Disk(array, gib).batches_at_once(1) for gib in (2**-30, SMALL, 2**-14, 1)}
    assert [*sizes.values()] == [1, 14, 100, 400]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted by Linux")
def test_the_thread_that_reads_has_no_team_of_threads(tmp_path):
    """One of OpenMP's beside that of the thread that trains would slow down both."""
    x = np.random.default_rng(0).normal(size=(200_000, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    disk, label = Disk(np.load(tmp_path / "x.npy", mmap_mode="r"), 0.05), torch.arange(len(x))
    threads, counts = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        torch.ones(10**6).exp().sum()  # this thread has its team from now on
        before = len(os.listdir("/proc/self/task"))
        for batches in disk.parts(torch.randperm(len(x)).split(1000), [label]):
            counts.append(len(os.listdir("/proc/self/task")))
            rows, labels = (each[batches[0]] for each in disk.held(0, [label]))
            assert torch.equal(rows, torch.from_numpy(x)[labels])
    finally:
        torch.set_num_threads(threads)
    assert max(counts) <= before + 1


def test_rows_are_read_from_a_range_of_the_file_at_a_time(file, monkeypatch):
    """However much the system maps around each row, it is no more than that range."""
    x, spans = torch.from_numpy(np.load(file)), []

    def take(source, part, axis, out, mode):
        spans.append(int(part.max() - part.min() + 1) * 24)
        out[:] = source[part]

    monkeypatch.setattr("numpy.take", take)
    disk, index = Disk(np.load(file, mmap_mode="r"), SMALL), torch.randperm(400)[:300]
    places, (rows,) = disk.read(index)
    assert torch.equal(rows[places], x[index])
    assert torch.equal(rows, x[index.sort()[0]])
    assert max(spans) <= disk.memory // 4
    assert len(spans) == 5
