"""Events have the shape that is asked for, and sequences end where their lengths say."""

import numpy as np
import pandas as pd
import pytest
import torch
from commands import refusal, run

import pyrovae
from pyrovae.data import load_data
from pyrovae.guides.sequence import Sequence as Guide
from pyrovae.models.sequence import Sequence as Model

N, T, D = 30, 5, 3


@pytest.fixture
def sequences():
    """Binary sequences with what lies behind their ends as NaN, and their lengths."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, T + 1, N)
    x = (rng.random((N, T, D)) > 0.5).astype(np.float32)
    x[np.arange(T) >= lengths[:, None]] = np.nan
    return x, lengths


def test_lengths_and_nan_padding_are_the_same(sequences, tmp_path):
    x, lengths = sequences
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", x=x, lengths=lengths)
    padded = load_data(tmp_path / "x.npy", shape=(T, D), missing="mask")
    told = load_data(tmp_path / "x.npz")
    assert padded.shape == told.shape == (T, D)
    for split in ("train", "valid", "test"):
        (x1, mask1), (x2, mask2) = padded.split(split), told.split(split)
        assert torch.equal(x1, x2)
        assert torch.equal(mask1, mask2)
        assert not x1[~mask1].any()
    ends = torch.cat([mask.all(-1).sum(-1) for (mask,) in told.context])
    assert sorted(ends.tolist()) == sorted(lengths.tolist())
    pair = Model((T, D), latent=2), Guide((T, D), latent=2, hidden=4)
    fit = pyrovae.fit(*pair, told, epochs=1, batch_size=10, seed=0, compile=False)
    assert np.isfinite(fit.history[0]["valid_elbo"])


def test_lengths_by_split_and_a_gap_within(sequences, tmp_path):
    x, lengths = sequences
    x = np.where(np.isnan(x), 7, x)
    lengths[25], x[25, 0, 1] = T, np.nan
    parts = {"train": slice(0, 20), "test": slice(20, N)}
    arrays = {f"x_{name}": x[rows] for name, rows in parts.items()}
    arrays |= {f"lengths_{name}": lengths[rows] for name, rows in parts.items()}
    np.savez(tmp_path / "x.npz", **arrays)
    data = load_data(tmp_path / "x.npz", missing="mask")
    found, mask = data.split("test")
    assert mask[:, :, 0].sum(1).tolist() == lengths[20:].tolist()
    assert not mask[5, 0, 1]
    assert mask[5].sum() == T * D - 1
    assert found.max() == 1


def test_a_shape_says_what_an_array_is(tmp_path):
    x = np.arange(20 * 4 * 3, dtype=np.float32).reshape(20, 4, 3)
    np.save(tmp_path / "x.npy", x)
    found = {
        shape: load_data(tmp_path / "x.npy", shape=shape).train
        for shape in ("4,3", "12", "1,4,3", "2,6", None)
    }
    assert found[None].shape[1:] == found["1,4,3"].shape[1:] == (1, 4, 3)
    for shape in ("4,3", "12", "2,6"):
        assert found[shape].shape[1:] == tuple(map(int, shape.split(",")))
        assert torch.equal(found[shape].flatten(1), found[None].flatten(1))
    np.save(tmp_path / "jsb.npy", x)  # a name that a shipped set of sequences has
    assert load_data(tmp_path / "jsb.npy").shape == (1, 4, 3)
    frame = pd.DataFrame(x.reshape(20, 12) + 0.5)
    table = load_data(frame, shape="4,3")
    assert table.columns is None
    assert table.shape == (4, 3)
    assert load_data(frame, shape="12").columns is not None
    photographs = np.zeros((9, 8, 8, 3), np.float32)
    photographs[..., 2] = 1
    np.save(tmp_path / "p.npy", photographs)
    for shape in (None, (3, 8, 8)):
        assert load_data(tmp_path / "p.npy", shape=shape).train[:, 2].all()
    assert load_data(tmp_path / "p.npy", shape=(8, 8, 3)).train[..., 2].all()
    on_disk = load_data(tmp_path / "p.npy", memory=2**-30)
    assert on_disk.shape == (3, 8, 8)
    assert on_disk.batch(torch.arange(2))[:, 2].all()
    assert load_data(tmp_path / "x.npy", memory=2**-30, shape="4,3").shape == (4, 3)


def test_commands_train_on_sequences(sequences, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", sequences[0])
    pair = ("--model", "sequence", "--guide", "sequence", "--set", "latent=2", "--epochs", "1")
    said = refusal(capsys, "train", *pair, "--data", "x.npy", "--missing", "mask", "--out", "a")
    assert "say --shape T,D" in said
    asked = ("--data", "x.npy", "--shape", f"{T},{D}", "--missing", "mask")
    assert run("train", *pair, *asked, "--out", "b") == 0
    assert run("evaluate", "b", "--samples", "10", "--no-diagnostics") == 0
    assert run("report", "b") == 0
    assert [each.name for each in (tmp_path / "b" / "figures").glob("seq*")] == ["sequences.png"]
    page = (tmp_path / "b" / "report.html").read_text(encoding="utf-8")
    assert "sequences that the model generates" in page.replace("\n", " ")


@pytest.mark.parametrize(
    ("arrays", "options", "sentence"),
    [
        ({"lengths": np.full(N, T + 1)}, {}, f"lengths from 1 to the {T} steps .* {T + 1}"),
        ({"lengths": np.full(N, 2.0)}, {}, "a whole number for each sequence"),
        ({"lengths": np.full(3, 2)}, {}, "a whole number for each sequence"),
        ({"lengths_train": np.full(N, 2)}, {}, r"lengths of all sequences .* \['lengths'\]"),
        ({}, {"shape": "4,4"}, "a shape of 15 numbers .* got 4,4"),
        ({}, {"shape": "5x3"}, "a shape like '129,88'"),
        ({}, {"shape": "-5,-3"}, "a shape of 15 numbers"),
    ],
)
def test_what_does_not_fit_is_refused(arrays, options, sentence, sequences, tmp_path):
    x = np.nan_to_num(sequences[0])
    np.savez(tmp_path / "x.npz", x=x, **arrays)
    with pytest.raises(pyrovae.InputError, match=sentence):
        load_data(tmp_path / "x.npz", **options)
