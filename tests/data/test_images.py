"""Laws of the image sets: pixels and labels arrive as the files hold them, without a network."""

import os
import pickle
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch

from pyrovae.data import Splits, load_data
from pyrovae.data.sources import IMAGES

needs_mnist = pytest.mark.skipif(
    not os.environ.get("PYROVAE_DATA"), reason="PYROVAE_DATA names no folder with MNIST"
)


def splits(data):
    return Splits(data.train, data.valid, data.test)


def keys(x):
    """One hashable key a row."""
    return [row.tobytes() for row in x.numpy()]


def idx(array):
    """An array in the format of the MNIST files."""
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture
def fashion(tmp_path):
    """A folder in torchvision's layout with 12 training and 5 test images."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    arrays = {}
    for part, n in (("train", 12), ("t10k", 5)):
        rng = np.random.default_rng(n)
        x, y = rng.integers(0, 256, (n, 28, 28)), np.arange(n) % 10
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(x))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(y))
        arrays[part] = x, y
    return tmp_path, arrays


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        print("Downloading")
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def test_fashion_mnist_is_read_from_its_folder(fashion, offline, capsys):
    root, arrays = fashion
    data = load_data("fashion_mnist", root=root)
    assert [len(x) for x in splits(data)] == [10, 2, 5]
    test = torch.from_numpy(arrays["t10k"][0]).float()[:, None] / 255
    assert torch.equal(data.test, test)
    assert torch.equal(data.labels.test, torch.from_numpy(arrays["t10k"][1]))
    train = torch.from_numpy(arrays["train"][0]).float() / 255
    expected = sorted(zip(keys(train), arrays["train"][1].tolist(), strict=True))
    got = torch.cat([data.train, data.valid]), torch.cat([data.labels.train, data.labels.valid])
    assert sorted(zip(keys(got[0]), got[1].tolist(), strict=True)) == expected
    assert data.provenance["source"].startswith("torchvision ")
    assert capsys.readouterr().out == ""


def test_the_folder_is_root_or_pyrovae_data_or_the_cache(fashion, offline, monkeypatch):
    root, _ = fashion
    monkeypatch.setenv("PYROVAE_DATA", str(root))
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "xdg"))
    assert len(load_data("fashion_mnist").test) == 5
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        load_data("fashion_mnist", root=root / "elsewhere")
    monkeypatch.delenv("PYROVAE_DATA")
    with pytest.raises(FileNotFoundError, match=r"xdg.pyrovae.data"):
        load_data("fashion_mnist")


def test_cifar10_is_channels_first(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    files = [[f"data_batch_{i}", None] for i in range(1, 6)]
    monkeypatch.setattr(CIFAR10, "train_list", files)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": None})
    x = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
    for name, _ in [*files, ["test_batch", None]]:
        (folder / name).write_bytes(pickle.dumps({"data": x, "labels": [4, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    data = load_data("cifar10", root=tmp_path)
    assert [len(x) for x in splits(data)] == [9, 1, 2]
    assert torch.equal(data.test, torch.from_numpy(x.reshape(2, 3, 32, 32)).float() / 255)
    assert data.labels.test.tolist() == [4, 9]


def test_svhn_is_channels_first(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    x = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    for part in ("train", "test"):
        file = f"{part}_32x32.mat"
        savemat(tmp_path / file, {"X": x, "y": np.array([[1], [10], [3], [7]], np.uint8)})
        monkeypatch.setitem(SVHN.split_list, part, ["", file, None])
    data = load_data("svhn", root=tmp_path)
    expected = torch.from_numpy(x.transpose(3, 2, 0, 1).copy()).float() / 255
    assert torch.equal(data.test, expected)
    assert data.labels.test.tolist() == [1, 0, 3, 7]


@pytest.mark.parametrize("name", IMAGES)
def test_without_network_the_error_names_folder_files_and_option(tmp_path, offline, capsys, name):
    folder = tmp_path / "nothing"
    with pytest.raises(FileNotFoundError) as caught:
        load_data(name, root=folder)
    message = str(caught.value)
    wanted = ["t10k-images-idx3-ubyte", "test_batch", "test_32x32.mat"]
    assert any(file in message for file in wanted)
    for part in (str(folder), "no network here", "--data-root", "root=", "PYROVAE_DATA"):
        assert part in message
    assert "\n" not in message
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:100],
        lambda data: b"",
        lambda data: b"\0" * len(data),
        lambda data: idx(np.zeros((11, 28, 28))),
    ],
)
def test_damaged_images_are_refused_without_a_download(fashion, offline, damage):
    root, _ = fashion
    path = root / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"truncated or damaged .*; delete FashionMNIST/raw"):
        load_data("fashion_mnist", root=root)


@needs_mnist
def test_mnist():
    data = load_data("mnist")
    assert [len(x) for x in splits(data)] == [50_000, 10_000, 10_000]
    assert data.shape == (1, 28, 28)
    assert data.test.mean().item() == pytest.approx(0.1325, abs=5e-5)
    assert torch.cat([data.train, data.valid]).mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert data.labels.test[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    counts = torch.cat([data.labels.train, data.labels.valid]).bincount()
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert torch.bincount(data.labels.valid).min() > 800
