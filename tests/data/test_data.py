"""Laws of the data: what is split, kept, scaled and drawn, and what is refused."""

import hashlib
import json

import numpy as np
import pytest
import torch

from pyrovae.data import BINARIZE, Dataset, Splits, load_data


def splits(data):
    return Splits(data.train, data.valid, data.test)


def keys(x):
    """One hashable key a row."""
    return [row.tobytes() for row in x.numpy()]


@pytest.fixture
def save(tmp_path):
    def save(suffix, *args, **kwargs):
        path = tmp_path / f"mine{suffix}"
        {".npy": np.save, ".npz": np.savez}[suffix](path, *args, **kwargs)
        return path

    return save


def test_digits_are_split_without_loss_and_labels_stay_with_their_rows():
    from sklearn.datasets import load_digits

    data = load_data("digits")
    assert [len(x) for x in splits(data)] == [1258, 180, 359]
    assert data.shape == (1, 8, 8)
    assert all(x.shape[1:] == data.shape and x.dtype == torch.float32 for x in splits(data))
    found = load_digits()
    images = torch.from_numpy(found.images / 16).float()
    expected = sorted(zip(keys(images), found.target.tolist(), strict=True))
    got = zip(keys(torch.cat(splits(data))), torch.cat(data.labels).tolist(), strict=True)
    assert sorted(got) == expected
    assert data.labels.train.dtype == torch.int64


def test_splits_are_disjoint_cover_and_do_not_move(save):
    path = save(".npy", np.arange(200.0).reshape(100, 2))
    data = load_data(path)
    numbers = [x[:, 0].long() // 2 for x in splits(data)]
    assert [len(x) for x in numbers] == [70, 10, 20]
    assert torch.cat(numbers).sort().values.tolist() == list(range(100))
    assert numbers[0][:5].tolist() == [26, 86, 2, 55, 75]
    again = load_data(path, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(splits(data), splits(again), strict=True))


@pytest.mark.parametrize(("n", "sizes"), [(3, [1, 1, 1]), (4, [2, 1, 1]), (13, [9, 1, 3])])
def test_every_split_of_a_tiny_file_has_a_datum(save, n, sizes):
    data = load_data(save(".npy", np.arange(2.0 * n).reshape(n, 2)))
    assert [len(x) for x in splits(data)] == sizes


@pytest.mark.parametrize("binarize", BINARIZE)
def test_provenance_says_where_the_numbers_come_from(save, binarize):
    path = save(".npy", np.arange(30, dtype=np.uint8).reshape(10, 3))
    data = load_data(path, binarize=binarize, seed=5)
    assert json.loads(json.dumps(data.provenance)) == {
        "name": "mine",
        "source": "mine.npy",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "shape": [3],
        "sizes": {"train": 7, "valid": 1, "test": 2},
        "split": "70/10/20, permuted",
        "split_seed": 0,
        "scaling": "uint8 / 255",
        "binarize": binarize,
        "binarize_seed": 5 if binarize in ("static", "dynamic") else None,
    }
    assert data.binarize == binarize


def test_provenance_of_digits():
    provenance = load_data("digits").provenance
    assert provenance["source"].startswith("scikit-learn ")
    assert provenance["scaling"] == "/ 16"
    assert provenance["classes"] == 10


def test_threshold_is_a_comparison_with_one_half():
    grey, black = load_data("digits"), load_data("digits", binarize="threshold")
    assert (grey.train == 0.5).any()
    for g, b in zip(splits(grey), splits(black), strict=True):
        assert torch.equal(b, (g > 0.5).float())
    assert torch.equal(black.batch(torch.tensor([3, 1])), black.train[[3, 1]])


@pytest.mark.parametrize("split", Splits._fields)
@pytest.mark.parametrize("binarize", ["static", "dynamic"])
def test_fixed_draws_are_bernoulli_with_the_intensity_as_mean(binarize, split):
    p = getattr(load_data("digits"), split)
    x = getattr(load_data("digits", binarize=binarize), split)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(x[p == 0], p[p == 0])
    assert torch.equal(x[p == 1], p[p == 1])
    error = (p * (1 - p)).sum().sqrt()
    assert (x - p).sum().abs() < 4 * error
    weight = p - p.mean()
    assert (weight * (x - p)).sum().abs() < 4 * (weight.square() * p * (1 - p)).sum().sqrt()


@pytest.mark.parametrize("binarize", ["static", "dynamic"])
def test_fixed_draws_depend_on_seed_and_split_alone(save, binarize):
    half = np.full((30, 500), 0.5, dtype=np.float32)
    one, two, other = (load_data(save(".npy", half), binarize=binarize, seed=s) for s in (1, 1, 2))
    torch.manual_seed(0)
    two.batch(torch.arange(5))
    for a, b, c in zip(splits(one), splits(two), splits(other), strict=True):
        assert torch.equal(a, b)
        assert 0.4 < (a != c).float().mean() < 0.6
    assert 0.4 < (one.train[:3] != one.valid).float().mean() < 0.6
    given = save(".npz", x_train=half[:4], x_valid=half[:3], x_test=half[:6])
    assert torch.equal(load_data(given, binarize=binarize, seed=1).test, one.test)


def test_fixed_draws_leave_the_global_stream_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_data("digits", binarize="dynamic")
    assert torch.equal(torch.rand(3), expected)


def test_dynamic_batches_are_drawn_anew_around_their_intensities():
    p, data = load_data("digits").train, load_data("digits", binarize="dynamic")
    index = torch.tensor([5, 0, 5, 1257])
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([data.batch(index, generator) for _ in range(400)])
    assert draws.shape == (400, 4, 1, 8, 8)
    assert draws.dtype == torch.float32
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[:, 0], draws[:, 2])
    q = p[index]
    error = (q * (1 - q) / 400).sqrt()
    assert ((draws.mean(0) - q).abs() <= 5 * error).all()
    generator.manual_seed(0)
    assert torch.equal(data.batch(index, generator), draws[0])


def test_dynamic_batches_follow_the_global_stream_without_a_generator():
    data, index = load_data("digits", binarize="dynamic"), torch.arange(20)
    torch.manual_seed(3)
    first, second = data.batch(index), data.batch(index)
    torch.manual_seed(3)
    assert torch.equal(data.batch(index), first)
    assert not torch.equal(first, second)


def test_intensities_are_kept_compact_for_dynamic_alone():
    assert load_data("digits", binarize="dynamic").intensities.dtype == torch.uint8
    assert load_data("digits", binarize="static").intensities is None


@pytest.mark.parametrize("binarize", BINARIZE)
def test_data_are_float32_whatever_the_default(binarize):
    torch.set_default_dtype(torch.float64)
    try:
        data = load_data("digits", binarize=binarize)
        tensors = [*splits(data), data.batch(torch.arange(3))]
    finally:
        torch.set_default_dtype(torch.float32)
    assert {x.dtype for x in tensors} == {torch.float32}


@pytest.mark.parametrize("binarize", ["none", "static"])
def test_other_batches_are_rows_of_train(binarize):
    data = load_data("digits", binarize=binarize)
    index = torch.tensor([7, 7, 0])
    assert torch.equal(data.batch(index), data.train[index])


def test_to_moves_everything():
    data = load_data("digits", binarize="dynamic")
    there = data.to("meta")
    tensors = [*splits(there), *there.labels, there.intensities]
    assert {t.device.type for t in tensors} == {"meta"}
    assert (there.name, there.shape, there.scale) == (data.name, data.shape, data.scale)
    assert {x.device.type for x in splits(load_data("digits", device="meta"))} == {"meta"}
    assert there.provenance == data.provenance
    assert data.to(None) is data


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("mnst", "digits, mnist, .*'mnst' .did you mean 'mnist'"),
        ("Fashion-MNIST", "did you mean 'fashion_mnist'"),
        (
            "zzz",
            "ends in .npy, .npz, .zarr, .h5ad, .csv, .arff or .parquet, got 'zzz'[.]$",
        ),
        ("pictures.zip", "got 'pictures.zip'"),
    ],
)
def test_unknown_data_sets_are_refused(name, match):
    with pytest.raises(ValueError, match=match):
        load_data(name)


def test_unknown_binarize_is_refused():
    with pytest.raises(ValueError, match=r"none, threshold, static, dynamic, .*mean 'dynamic'"):
        load_data("digits", binarize="dynamik")


def test_a_number_is_no_name():
    with pytest.raises(TypeError, match="an array or a torch data set, got int"):
        load_data(3)


@pytest.mark.parametrize(("low", "high"), [(-0.5, 1), (0, 3)])
@pytest.mark.parametrize("binarize", ["threshold", "static", "dynamic"])
def test_binarize_refuses_what_is_no_intensity(save, binarize, low, high):
    path = save(".npy", np.linspace(low, high, 12).reshape(6, 2))
    with pytest.raises(ValueError, match=rf"'{binarize}', got numbers from {low} to {high};"):
        load_data(path, binarize=binarize)


def test_a_dataset_can_be_made_of_tensors():
    x = torch.rand(6, 2)
    data = Dataset("mine", x.shape[1:], x[:2], x[2:4], x[4:])
    assert torch.equal(data.batch(torch.tensor([1])), x[1:2])
    assert repr(data) == "Dataset('mine', [2], train=2, valid=2, test=2, binarize='none')"


def test_a_dataset_may_have_training_data_alone():
    data = Dataset("mine", torch.Size([2]), torch.rand(6, 2))
    assert (data.split("valid"), data.split("test")) == ((), ())
    assert repr(data) == "Dataset('mine', [2], train=6, valid=0, test=0, binarize='none')"
    assert data.to("meta").train.device.type == "meta"
    assert data.to("meta").valid is None
