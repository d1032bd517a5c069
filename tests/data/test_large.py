"""Parquet and Zarr give the rows that arrays and frames give, in memory and larger than it."""

import gc
import sys
import warnings

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from commands import refusal, run
from scipy import sparse
from test_disk import SMALL, same, trained

import pyrovae
from pyrovae.data import load_data
from pyrovae.data.files import open_npz
from pyrovae.data.given import as_tensors

pyarrow = pytest.importorskip("pyarrow")
zarr = pytest.importorskip("zarr")
N, D = 400, 6


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)


def parquet(folder, x, **more):
    columns = {f"c{j}": x[:, j] for j in range(x.shape[1])} | more
    path = folder / "x.parquet"
    pd.DataFrame(columns).to_parquet(path, row_group_size=70)
    return path


def parts(folder, x, **more):
    """A folder of files, as Spark writes it."""
    path = folder / "parts.parquet"
    path.mkdir()
    for i in range(4):
        rows = slice(i * N // 4, (i + 1) * N // 4)
        columns = {f"c{j}": x[rows, j] for j in range(x.shape[1])}
        frame = pd.DataFrame(columns | {name: values[rows] for name, values in more.items()})
        frame.to_parquet(path / f"part-{i}.parquet")
    return path


def zarred(folder, x, **more):
    path = folder / "x.zarr"
    root = zarr.open_group(path, mode="w")
    for name, values in ({"x": x} | more).items():
        root.create_array(name, data=np.asarray(values), chunks=(30, *np.shape(values)[1:]))
    return path


def zipped(folder, x, **more):
    np.savez_compressed(folder / "x.npz", x=x, **more)
    return folder / "x.npz"


def cells(folder, x, **more):
    """An AnnData whose X is sparse, with all of the numbers, and a layer that is not."""
    obs = {name: values.astype(np.int64) for name, values in more.items()}
    obs = pd.DataFrame(obs, index=[f"cell {i}" for i in range(len(x))])
    found = anndata.AnnData(sparse.csr_matrix(x), obs=obs, layers={"dense": x})
    found.write_h5ad(folder / "x.h5ad")
    return folder / "x.h5ad"


def layer(folder, x, **more):
    return f"{cells(folder, x, **more)}:dense"


def backed(folder, x, **more):
    return anndata.read_h5ad(cells(folder, x, **more), backed="r")


def annotated(folder, x, **more):
    return anndata.read_h5ad(cells(folder, x, **more))


WRITERS = [parquet, parts, zarred, zipped, cells, layer, backed, annotated]


@pytest.mark.parametrize("write", WRITERS)
def test_the_same_rows_and_weights_as_of_a_npy_on_disk(write, x, tmp_path):
    path = write(tmp_path, x, y=np.arange(N) % 3, site=np.arange(N))
    np.save(tmp_path / "x.npy", x)
    data = load_data(path, memory=SMALL, context="labels,site", labelled=9)
    reference = load_data(tmp_path / "x.npy", memory=SMALL)
    assert data.disk is not None
    for split in ("train", "valid", "test"):
        assert torch.equal(data.split(split)[0], reference.split(split)[0]), split
    assert data.provenance["sha256"] == reference.provenance["sha256"]
    assert torch.equal(torch.cat(data.labels), torch.arange(N) % 3)
    assert torch.equal(torch.cat([each[1] for each in data.context]), torch.arange(N))
    assert int((data.context.train[0] >= 0).sum()) == 9


@pytest.mark.parametrize("write", [parquet, zipped, cells])
def test_a_run_goes_on_to_the_last_bit_when_the_file_is_unpacked_again(write, x, tmp_path):
    path = write(tmp_path, x)
    data, again = load_data(path, memory=SMALL), load_data(path, memory=SMALL)
    held = pyrovae.Dataset("x", data.shape, data.train.clone(), data.valid)
    first, _ = trained(data, epochs=1)
    _, resumed = trained(again, epochs=2, state=first.state_dict())
    assert same(resumed, trained(held, epochs=2)[1])


def test_parquet_in_memory_is_the_table_that_its_frame_is(tmp_path, x):
    frame = pd.DataFrame(x[:60, :2], columns=["a", "b"])
    frame["word"] = pd.Categorical(np.array(["u", "v", "w"])[np.arange(60) % 3])
    frame["grade"] = pd.Categorical(
        np.array(["low", "high"])[np.arange(60) % 2], ["low", "mid", "high"], ordered=True
    )
    frame["label"] = np.array(["no", "yes"])[np.arange(60) % 2]
    frame.loc[5, ["a", "word"]] = None
    frame.to_parquet(tmp_path / "a.parquet")
    found = load_data(tmp_path / "a.parquet", missing="mask", columns={"b": "real"})
    expected = load_data(frame, missing="mask", columns={"b": "real"})
    assert found.columns == expected.columns
    assert [each.kind for each in found.columns] == ["real", "real", "categorical", "ordinal"]
    for one, two in zip(found.split("train"), expected.split("train"), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(found.labels.test, expected.labels.test)
    assert found.provenance["class_names"] == ["no", "yes"]


def test_a_table_on_disk_is_the_table_that_it_is_in_memory(tmp_path, x):
    """Kinds, codes and units of its columns, gaps and context, and what is trained on them."""
    frame = pd.DataFrame({"id": np.arange(N) / 1, "a": x[:, 0], "pay": np.exp(x[:, 1])})
    frame["many"] = np.arange(N) % 90
    frame["word"] = np.array(["u", "v", "w"])[np.arange(N) % 3]
    frame["site"] = np.array(["north", "south"])[np.arange(N) % 2]
    frame["age"], frame["label"] = x[:, 2], np.array(["no", "yes"])[np.arange(N) % 2]
    frame.loc[5::7, ["a", "word"]] = None
    frame.loc[3::11, "pay"] = None
    frame["time"] = 1_700_000_000.0 + np.arange(N)
    frame.to_parquet(tmp_path / "a.parquet", row_group_size=70)
    with pytest.warns(UserWarning, match="no room for the values of column 'time' of .*parquet: "):
        load_data(tmp_path / "a.parquet", memory=SMALL / 2, missing="mask")
    frame.drop(columns="time").to_parquet(tmp_path / "a.parquet", row_group_size=70)
    options = {"missing": "mask", "columns": {"pay": "positive"}, "context": "labels,age,site"}
    one = load_data(tmp_path / "a.parquet", memory=SMALL / 2, **options)
    two = load_data(tmp_path / "a.parquet", **options)
    assert one.disk is not None
    kinds = [each[:3] for each in one.columns]
    assert kinds == [each[:3] for each in two.columns]
    assert [kind for _, kind, _ in kinds] == ["real", "real", "positive", "count", "categorical"]
    logs = torch.from_numpy(np.log(frame["pay"][:280].dropna().to_numpy(np.float32).astype(float)))
    assert one.columns[2].loc == pytest.approx(logs.mean().item(), rel=1e-12)
    assert one.columns[2].scale == pytest.approx(logs.std(correction=0).item(), rel=1e-12)
    splits = ("train", "valid", "test")
    rows, others = ([torch.cat(each) for each in zip(*map(data.split, splits), strict=True)]
                    for data in (one, two))  # fmt: skip
    order = others[0][:, 0].argsort()
    for row, other in zip(rows, others, strict=True):
        assert torch.equal(row, other[order])


def test_zarr_in_memory_is_the_array_that_it_is(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (40, 5, 4, 3)).astype(np.uint8)
    path = zarred(tmp_path, x, y=np.arange(40) % 2)
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(40) % 2)
    found, expected = load_data(path), load_data(tmp_path / "x.npz")
    assert found.shape == (3, 5, 4)
    assert torch.equal(found.train, expected.train)
    assert torch.equal(found.labels.train, expected.labels.train)
    assert found.provenance["scaling"] == "uint8 / 255"
    larger = load_data(path, memory=SMALL)
    assert torch.equal(larger.train, torch.from_numpy(x[:28]).movedim(-1, 1) / 255)
    assert larger.provenance["scaling"] == "uint8 / 255"
    larger = load_data(path, memory=SMALL, shape=(5, 4, 3))
    assert torch.equal(larger.train, torch.from_numpy(x[:28]) / 255)
    zarr.save_array(tmp_path / "only.zarr", x.astype(np.float32))
    assert load_data(tmp_path / "only.zarr", shape=(5, 4, 3)).shape == (5, 4, 3)


def test_sequences_on_disk_end_where_their_lengths_say(tmp_path, x):
    x, lengths = x.reshape(N, 3, 2), np.arange(N) % 3 + 1
    padded = np.where((np.arange(3) < lengths[:, None])[..., None], x, np.nan)
    np.save(tmp_path / "x.npy", padded)
    one = load_data(zarred(tmp_path, x, lengths=lengths), memory=SMALL)
    two = load_data(tmp_path / "x.npy", memory=SMALL, missing="mask", shape="3,2")
    assert one.disk is not None
    assert one.shape == (3, 2)
    for split in ("train", "valid", "test"):
        assert [*map(torch.equal, one.split(split), two.split(split))] == [True, True]


def test_what_gives_rows_by_slices_goes_to_the_disk(tmp_path, x):
    np.save(tmp_path / "x.npy", x)
    expected = load_data(tmp_path / "x.npy", memory=SMALL)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", data=x, chunks=(30, 2))
        array = zarr.open(zarred(tmp_path, x), mode="r")["x"]
        for given in (array, file["x"], sparse.csc_matrix(x), sparse.coo_array(x)):
            data = load_data(given, memory=SMALL)
            assert data.disk is not None
            assert torch.equal(data.train, expected.train)
            assert torch.equal(data.test, expected.test)
            with pytest.raises(pyrovae.InputError, match=r"for context='age'"):
                load_data(given, memory=SMALL, context="age")
    for given in (sparse.csr_matrix(x), backed(tmp_path, x)):
        assert load_data(given).disk is None
        assert torch.equal(as_tensors(given)[0], torch.from_numpy(x))


def test_members_of_a_npz_that_stay_on_disk(tmp_path, x):
    """Stored or compressed; of Fortran's order, whose rows are nowhere together, in memory."""
    for save, rows in ((np.savez, x), (np.savez_compressed, np.asfortranarray(x))):
        save(tmp_path / "x.npz", x=rows, lengths=np.full(N, 2))
        with pytest.raises(pyrovae.InputError, match=r"x \[N, T, D\] in 'lengths'"):
            load_data(tmp_path / "x.npz", memory=SMALL)
        save(tmp_path / "x.npz", rows)
        data = load_data(tmp_path / "x.npz", memory=SMALL)
        assert (data.disk is None) == (rows is not x)
        rows = torch.cat([*data.split("train"), *data.split("valid"), *data.split("test")])
        assert torch.equal(rows.sort(0).values, torch.from_numpy(x).sort(0).values)
    np.savez_compressed(tmp_path / "x.npz", x)
    damaged = bytearray((tmp_path / "x.npz").read_bytes())
    damaged[900:960] = bytes(60)
    (tmp_path / "x.npz").write_bytes(damaged)
    with pytest.raises(pyrovae.InputError, match=r"readable .npz file"):
        load_data(tmp_path / "x.npz", memory=SMALL)


@pytest.mark.parametrize("refused", [False, True])
def test_a_npz_is_closed_when_nobody_reads_it(tmp_path, refused, x):
    np.savez(tmp_path / "x.npz", a=x, b=np.asfortranarray(x) if refused else x)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        held = []
        try:
            held.append(open_npz(tmp_path / "x.npz"))
        except ValueError as error:
            held.append(error)
        assert refused == isinstance(held[0], ValueError)
        held.append(held)  # a cycle, whose parts are freed in any order
        del held
        gc.collect()
    assert not [each for each in found if issubclass(each.category, ResourceWarning)]


def test_arrays_of_other_packages_and_arrow_tables(tmp_path, x):
    array = zarr.open(zarred(tmp_path, x), mode="r")["x"]
    table = pyarrow.Table.from_pandas(pd.DataFrame(x))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = x
        for given in (array, table, file["x"]):
            (found,) = as_tensors(given)
            assert torch.equal(found, torch.from_numpy(x))

    class Rows:
        """What torch's loader asks of a data set, and nothing else."""

        def __len__(self):
            return N

        def __getitem__(self, i):
            return torch.from_numpy(x)[i], i

    found, numbers = as_tensors(Rows())
    assert torch.equal(found, torch.from_numpy(x))
    assert numbers.tolist() == list(range(N))


def test_what_is_on_disk_is_gone_with_its_arrays(tmp_path, x, monkeypatch):
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("pyrovae.data.disk._folder", lambda: str(folder))
    data = load_data(parquet(tmp_path, x), memory=SMALL)
    assert not [*folder.iterdir()]
    assert torch.equal(data.train[:3], torch.from_numpy(x[:3]))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 9}))
    with pytest.raises(pyrovae.InputError, match=r"Expected room for .* in TMPDIR"):
        load_data(tmp_path / "x.parquet", memory=SMALL)


def test_commands_take_them(tmp_path, x, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    x[::9, 2] = np.nan
    parquet(tmp_path, x[:250], word=np.array(["u", "v"])[np.arange(250) % 2])
    zarred(tmp_path, x)
    pair = ("--model", "table", "--guide", "table", "--set", "latent=2", "--epochs", "1")
    asked = ("--data", "x.parquet", "--memory", str(SMALL / 2), "--missing", "mask", "--out", "run")
    assert run("train", *pair, *asked) == 0
    assert run("evaluate", "run", "--samples", "10", "--no-diagnostics") == 0
    data = pyrovae.load("run").data
    assert [each.kind for each in data.columns] == ["real"] * 6 + ["binary"]
    assert data.disk is not None
    capsys.readouterr()
    said = refusal(capsys, "train", *pair, "--data", "x.zarr", "--memory", "1e-7", "--out", "c")
    assert "chunks" in said
    assert "larger memory" in said


def times(path, x):
    return parquet(path, x, day=pd.date_range("2020", periods=N))


def damaged(path, x):
    (path / "x.parquet").write_bytes(b"PAR1 and no more")
    return path / "x.parquet"


def two(path, x):
    root = zarr.open_group(path / "x.zarr", mode="w")
    for name in ("x_train", "x_test"):
        root.create_array(name, data=x)
    return path / "x.zarr"


def text(path, x):
    pd.DataFrame(x).to_csv(path / "x.csv", index=False)
    return path / "x.csv"


def by_columns(path, x):
    anndata.AnnData(sparse.csc_matrix(x)).write_h5ad(path / "x.h5ad")
    return path / "x.h5ad"


def viewed(path, x):
    return backed(path, x)[::2]


def splits(path, x):
    np.savez(path / "x.npz", x_train=x, x_test=x)
    return path / "x.npz"


def strange(path, x):
    (path / "x.zarr").mkdir()
    return path / "x.zarr"


@pytest.mark.parametrize(
    ("write", "memory", "sentence"),
    [
        (times, SMALL, "column 'day' .* got times"),
        (times, None, "column 'day' .* got times"),
        (damaged, None, "readable .parquet file"),
        (damaged, SMALL, "readable .parquet file"),
        (two, SMALL, "one array x .* got x_train, x_test"),
        (strange, None, "readable .zarr file"),
        (
            text,
            SMALL,
            r"a .csv file that fits into memory, of 7.63e-06 GiB .* write it as .parquet",
        ),
        (by_columns, SMALL, r"csr_matrix in .* got a csc_matrix: write it as X.tocsr"),
        (viewed, SMALL / 2, r"\[200, 6\] of them as a view of one on disk: .*copy"),
        (splits, SMALL, "one array x .* got x_train, x_test"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_sentence(write, memory, sentence, x, tmp_path):
    with pytest.raises(pyrovae.InputError, match=sentence):
        load_data(write(tmp_path, x), memory=memory)


def test_context_that_a_file_lacks_is_refused(x, tmp_path):
    for write in (parquet, zarred):
        with pytest.raises(pyrovae.InputError, match=r"agee.*did you mean 'age'"):
            load_data(write(tmp_path, x, age=np.arange(N)), memory=SMALL, context="agee")


def test_a_package_that_is_missing_is_named(monkeypatch, x, tmp_path):
    path = parquet(tmp_path, x)
    monkeypatch.delattr("pyarrow.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(pyrovae.InputError, match=r"pip install 'pyrovae\[parquet\]'"):
        load_data(path)
