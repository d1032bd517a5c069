"""Laws of data files: rows keep their labels and values, and what is no data is refused."""

import os
import pickle

import numpy as np
import pytest
import torch

from pyrovae.data import Splits, load_data


def splits(data):
    return Splits(data.train, data.valid, data.test)


def keys(x):
    """One hashable key a row."""
    return [row.tobytes() for row in x.numpy()]


@pytest.fixture
def rows():
    """100 rows that tell their own number: x = [i, i + 0.5], y = i mod 7."""
    i = np.arange(100)
    return np.stack([i, i + 0.5], 1).astype(np.float32), i % 7


@pytest.fixture
def save(tmp_path):
    def save(suffix, *args, **kwargs):
        path = tmp_path / f"mine{suffix}"
        if suffix == ".csv":
            path.write_text(args[0])
        else:
            {".npy": np.save, ".npz": np.savez}[suffix](path, *args, **kwargs)
        return path

    return save


def test_npz_splits_are_kept_as_given(save, rows):
    x, y = rows
    path = save(
        ".npz",
        x_train=x[:50],
        y_train=y[:50],
        x_valid=x[50:60],
        y_valid=y[50:60],
        x_test=x[60:],
        y_test=y[60:],
    )
    data = load_data(path)
    assert torch.equal(torch.cat(splits(data)), torch.from_numpy(x))
    assert torch.equal(torch.cat(data.labels), torch.from_numpy(y))
    assert [len(x) for x in splits(data)] == [50, 10, 40]
    assert (data.provenance["split"], data.provenance["split_seed"]) == ("as given", None)


def test_npz_without_valid_takes_one_in_six_of_train(save, rows):
    data = load_data(save(".npz", x_train=rows[0][:60], x_test=rows[0][60:]))
    assert [len(x) for x in splits(data)] == [50, 10, 40]
    assert sorted(torch.cat([data.train, data.valid])[:, 0].tolist()) == list(range(60))
    assert torch.equal(data.test, torch.from_numpy(rows[0][60:]))
    assert data.labels is None


def test_npz_with_two_training_rows_has_one_for_valid(save, rows):
    data = load_data(save(".npz", x_train=rows[0][:2], x_test=rows[0][2:3]))
    assert [len(x) for x in splits(data)] == [1, 1, 1]


@pytest.mark.parametrize("name", ["y", "labels"])
def test_npz_labels_stay_with_their_rows(save, rows, name):
    data = load_data(save(".npz", x=rows[0], **{name: rows[1][:, None]}))
    for x, y in zip(splits(data), data.labels, strict=True):
        assert torch.equal(x[:, 0].long() % 7, y)
    assert data.provenance["classes"] == 7


def test_labels_that_are_no_integers_stay_numbers(save, rows):
    data = load_data(save(".npz", x=rows[0], y=rows[0][:, 1].astype(np.float64)))
    assert torch.equal(data.labels.test, data.test[:, 1])
    assert "classes" not in data.provenance


def test_npz_with_one_array_of_any_name(save, rows):
    data = load_data(save(".npz", whatever=rows[0]))
    assert sorted(torch.cat(splits(data))[:, 0].tolist()) == list(range(100))


@pytest.mark.parametrize(
    "header", ["", "a,b,label\n", "a,b,Target\n", "0,1,class\n", "a b, c , y \n"]
)
def test_csv_with_and_without_header(save, rows, header):
    x, y = rows
    text = header + "".join(f"{a},{b},{c}\n" for (a, b), c in zip(x, y, strict=True))
    data = load_data(save(".csv", text))
    assert sum(len(x) for x in splits(data)) == 100
    labels = data.labels.train if header else data.train[:, 2]
    assert data.shape == ((2,) if header else (3,))
    assert torch.equal(data.train[:, 0] % 7, labels.float())
    assert torch.equal(data.train[:, 1], data.train[:, 0] + 0.5)


def test_csv_of_pandas_numbers_its_columns(save):
    import pandas as pd

    frame = pd.DataFrame(np.full((5, 3), 0.5))
    assert sum(len(x) for x in splits(load_data(save(".csv", frame.to_csv(index=False))))) == 5


def test_csv_labels_may_be_words(save):
    words = ["cat", "ant", "bee"] * 4
    text = "x,class\n" + "".join(f"{'abc'.index(w[0])},{w}\n" for w in words)
    data = load_data(save(".csv", text))
    assert data.provenance["class_names"] == ["ant", "bee", "cat"]
    assert torch.equal(torch.cat(data.labels), torch.cat(splits(data))[:, 0].long())


@pytest.mark.parametrize(
    ("array", "shape"),
    [
        (np.zeros((4, 5, 6)), (1, 5, 6)),
        (np.zeros((4, 5, 6, 3)), (3, 5, 6)),
        (np.zeros((4, 5, 6, 1)), (1, 5, 6)),
        (np.zeros((4, 3, 6, 3)), (3, 6, 3)),
        (np.zeros((4, 2, 6, 7)), (2, 6, 7)),
        (np.zeros((4, 5)), (5,)),
    ],
)
def test_events_are_vectors_or_channels_first(save, array, shape):
    assert load_data(save(".npy", array)).shape == shape


def test_channels_move_with_their_pixels(save):
    x = np.random.default_rng(0).random((9, 4, 5, 3), dtype=np.float32)
    expected = keys(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    assert sorted(keys(torch.cat(splits(load_data(save(".npy", x)))))) == sorted(expected)


@pytest.mark.parametrize(
    ("array", "scale", "scaling"),
    [
        (np.arange(0, 200, 20, dtype=np.uint8)[:, None], 255, "uint8 / 255"),
        (np.arange(10, dtype=np.uint8)[:, None] % 2, 1, "none"),
        (np.arange(10)[:, None] % 2 == 0, 1, "none"),
        (np.arange(-3, 300, 33, dtype=np.int64)[:, None], 1, "none"),
        (np.linspace(-3, 8, 10, dtype=">f8")[:, None], 1, "none"),
        (np.asfortranarray(np.arange(20, dtype=np.float16).reshape(10, 2)), 1, "none"),
    ],
)
def test_bytes_are_grey_levels_and_other_numbers_stay(save, array, scale, scaling):
    data = load_data(save(".npy", array))
    expected = torch.from_numpy(array.astype(np.float32)) / scale
    assert torch.equal(torch.cat(splits(data)).sort(0).values, expected.sort(0).values)
    assert data.train.dtype == torch.float32
    assert data.provenance["scaling"] == scaling


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data file at .*gone.npy, found nothing"):
        load_data(tmp_path / "gone.npy")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(FileNotFoundError, match="found a folder"):
        load_data(tmp_path / "folder.npz")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv"])
def test_empty_files_are_refused(tmp_path, suffix):
    path = tmp_path / f"empty{suffix}"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="got an empty file"):
        load_data(path)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("keep", [5, 90, 600, -1])
def test_truncated_files_are_refused(save, suffix, keep):
    path = save(suffix, np.arange(300.0).reshape(100, 3))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated, damaged or of another kind"):
        load_data(path)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv"])
def test_foreign_bytes_are_refused(tmp_path, suffix):
    path = tmp_path / f"noise{suffix}"
    path.write_bytes(bytes(np.random.default_rng(0).integers(128, 256, 500, dtype=np.uint8)))
    with pytest.raises(ValueError, match="truncated, damaged or of another kind"):
        load_data(path)


def test_pickles_are_never_executed(tmp_path, save):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    array = np.array([[Bomb()], [Bomb()], [Bomb()]], dtype=object)
    bare = tmp_path / "bare.npy"
    bare.write_bytes(pickle.dumps(Bomb()))
    for path in (save(".npy", array), save(".npz", x=array)):
        with pytest.raises(ValueError, match=r"got Python objects.*save np.asarray"):
            load_data(path)
    with pytest.raises(ValueError, match="another kind"):
        load_data(bare)
    assert not (tmp_path / "executed").exists()


def test_a_damaged_archive_is_not_taken_for_python_objects(save, rows):
    path = save(".npz", **{"Object arrays": rows[0]})
    content = path.read_bytes()
    # The name stands before the array and once more in the list of contents.
    path.write_bytes(content.replace(b"Object arrays", b"Another array", 1))
    with pytest.raises(ValueError, match="truncated, damaged or of another kind"):
        load_data(path)


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((0, 3)), r"no rows: shape \[0, 3\]"),
        (np.zeros((3, 0)), r"no columns: shape \[3, 0\]"),
        (np.zeros(5), r"got \[5\]; reshape it to \[N, 1\]"),
        (np.float32(1.0), r"got \[\]"),
        (np.zeros((3, 1, 1, 1, 1)), r"got \[3, 1, 1, 1, 1\]"),
        (np.zeros((3, 2), dtype=complex), "real numbers in .*, got dtype complex128"),
        (np.array([["a"], ["b"], ["c"]]), "real numbers in .*, got dtype <U1"),
        (np.zeros((2, 3)), "at least 3 rows in mine, one for each split, got 2"),
        (
            np.array([[0.0, 1], [2, np.nan], [np.inf, np.nan]]),
            r"got 3 NaN or infinite, the first in row 1 \(counting from 0\)",
        ),
        (np.array([[0.0], [1e60], [0]]), "got 1 NaN or infinite, the first in row 1"),
    ],
)
def test_arrays_that_are_no_data_are_refused(save, array, match):
    with pytest.raises(ValueError, match=match):
        load_data(save(".npy", array))


X = np.arange(12.0).reshape(6, 2)
Y = np.arange(6)


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"x": X, "y": Y[:5]}, r"6 labels in 'y' of .*, one a row, got \[5\]"),
        ({"x": X, "y": X}, r"6 labels .*, got \[6, 2\]"),
        ({"x": X, "y": Y * np.nan}, "'y' of .*, got 6 NaN or infinite, the first in row 0"),
        ({"x": X, "y": Y * 1j}, "numbers or words in 'y' .*, got dtype complex128"),
        ({"a": X, "b": X}, r"Expected x .*, got \['a', 'b'\]; name them"),
        ({}, "got no array"),
        ({"x_train": X, "y_train": Y}, r"x_train and x_test, .*got \['x_train', 'y_train'\]"),
        ({"x_train": X, "x_test": X, "y_test": Y}, r"\['y_test', 'y_train'\] .*got \['y_test'\]"),
        ({"x_train": X, "x_test": X[:, :1]}, r"one event shape .*\[6, 2\], float32 \[6, 1\]"),
        ({"x_train": X, "x_test": X.astype(np.uint8)}, r"one type .*float32 .*uint8"),
        ({"x_train": X, "x_test": X + np.inf}, "'x_test' of .* NaN or infinite"),
        ({"x_train": X, "x_test": X[:0]}, "'x_test' of .*, got no rows"),
        ({"x_train": X[:1], "x_test": X}, "at least 2 training rows in mine, .*got 1"),
        (
            {"x_train": X, "x_test": X, "y_train": Y, "y_test": Y.astype(str)},
            "labels of one type",
        ),
    ],
)
def test_npz_that_do_not_fit_together_are_refused(save, arrays, match):
    with pytest.raises(ValueError, match=match):
        load_data(save(".npz", **arrays))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a,b\n1,2\n3,oops\n5,6\n", "column 'b' of .*, got 'oops'; call the column 'label'"),
        ("1.5,?\n2,3\n4,5\n", "column '1' of .*, got '[?]'"),
        ("a,b\n1,2\n3,\n5,6\n", "got 1 NaN or infinite, the first in row 1"),
        ("a,b\n", r"no rows: shape \[0, 2\]"),
        ("label\n1\n2\n3\n", r"no columns: shape \[3, 0\]"),
        ("\n\n", "truncated, damaged or of another kind"),
        ("a,b\n1,2,3\n4,5,6\n7,8,9\n", "truncated, damaged or of another kind"),
        ("a,b\n1,2\n4,5,6\n7,8,9\n", "truncated, damaged or of another kind"),
        ("a,label,y\n1,2,3\n4,5,6\n7,8,9\n", r"one column of labels .*, got \['label', 'y'\]"),
        (",a\n0,1\n1,2\n2,3\n", r"a name for every column .*to_csv\(index=False\)"),
        ("a,label\n1,x\n2,\n3,y\n", "a label in every row of .*, got none in row 1"),
        ("a,label\n1,1\n2,\n3,3\n", "'y' of .*, got 1 NaN or infinite, the first in row 1"),
        ("a;b\n1;2\n3;4\n5;6\n", "separate columns by commas"),
        ("a,site\n1,u\n2,v\n3,u\n", r"{'site': 'categorical'} \(--columns site=categorical\)"),
    ],
)
def test_csv_that_are_no_table_of_numbers_are_refused(save, text, match):
    with pytest.raises(ValueError, match=match):
        load_data(save(".csv", text))


@pytest.mark.parametrize("first", ["0,1,2", "1,2,3,4"])
def test_a_csv_whose_first_row_may_be_a_header_or_a_datum_is_refused(save, first):
    """Neither is a datum lost as a header, nor a header read as one."""
    width = len(first.split(","))
    whole = "\n".join([first, *[",".join("7" * width)] * 5])
    with pytest.raises(ValueError, match="may be either"):
        load_data(save(".csv", whole))
    fractions = "\n".join([first, *[",".join(["7.5"] * width)] * 5])
    assert sum(len(x) for x in splits(load_data(save(".csv", fractions)))) == 5
    partly = fractions.replace("7.5\n", "7\n")
    with pytest.raises(ValueError, match="may be either"):
        load_data(save(".csv", partly))


def test_an_unsigned_label_stays_what_it_is_or_is_refused(save):
    """2⁶⁴ − 1 as int64 is −1, which stands for a hidden label."""
    x = np.zeros((5, 2), np.float32)
    for last, fits in ((2**63 - 1, True), (2**63, False), (2**64 - 1, False)):
        path = save(".npz", x=x, y=np.array([0, 1, 2, 3, last], np.uint64))
        if fits:
            assert sorted(torch.cat(load_data(path).labels).tolist()) == [0, 1, 2, 3, last]
        else:
            with pytest.raises(ValueError, match="labels below 2"):
                load_data(path)


def test_arrays_that_do_not_fit_are_refused_before_they_are_read(save, monkeypatch):
    np.savez_compressed(path := save(".npz", x=[0]), x=np.zeros((1000, 1000)), y=np.zeros(1000))
    assert path.stat().st_size < 20_000
    assert load_data(path).train.shape == (700, 1000)
    monkeypatch.setattr("pyrovae.data.files.physical_memory", lambda: 7_999_999)
    monkeypatch.setattr(np.lib.format, "read_array", None)
    with pytest.raises(ValueError, match=r"fit into the 0\.00745 GB of memory here"):
        load_data(path)


def test_an_array_that_no_memory_holds_is_named(save):
    path = save(".npy", np.zeros((2, 2)))
    header = {"descr": "<f8", "fortran_order": False, "shape": (2_000_000_000, 2_000_000)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(ValueError, match=r"with arrays of 2.98e\+07 GB"):
        load_data(path)
