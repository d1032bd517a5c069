"""Laws of missing values: what stands at a hidden entry has no effect on any number."""

import numpy as np
import pandas as pd
import pytest
import torch
from commands import refusal, run
from structures import MAKE, X

import one_layer
import pyrovae
from pyrovae.data import load_data

MASK = torch.rand(one_layer.N, *one_layer.SHAPE, generator=torch.Generator().manual_seed(3)) > 0.4


@pytest.fixture
def gaps():
    """50 rows of three numbers, a few of them missing."""
    x = np.arange(150.0).reshape(50, 3)
    x[::7, 1] = np.nan
    x[3, :2] = np.nan
    return x


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv"])
def test_gaps_are_refused_with_the_option_that_masks_them(tmp_path, gaps, suffix):
    path = tmp_path / f"x{suffix}"
    if suffix == ".csv":
        pd.DataFrame(gaps, columns=["a", "b", "c"]).to_csv(path, index=False)
    else:
        {".npy": np.save, ".npz": np.savez}[suffix](path, gaps)
    with pytest.raises(ValueError, match=r"10 NaN .* missing='mask' \(--missing mask\)"):
        load_data(path)
    data = load_data(path, missing="mask")
    rows = {row[2]: row for row in gaps}
    for split in ("train", "valid", "test"):
        x, mask = data.split(split)
        truth = torch.tensor(np.stack([rows[row[2].item()] for row in x])).float()
        assert torch.equal(mask, ~truth.isnan())
        assert torch.equal(x, truth.nan_to_num(0))
    assert data.provenance["missing_share"] == pytest.approx(10 / 150)


def test_data_without_a_gap_have_a_mask_when_it_is_asked_for():
    data = load_data("digits", binarize="dynamic", context="labels", missing="mask")
    x, y, mask = data.split("test")
    assert mask.shape == x.shape
    assert mask.all()
    assert torch.equal(y, data.labels.test)


def test_infinity_is_no_missing_value(tmp_path, gaps):
    gaps[5, 0] = np.inf
    np.save(tmp_path / "x.npy", gaps)
    with pytest.raises(ValueError, match="1 infinite, the first in row 5"):
        load_data(tmp_path / "x.npy", missing="mask")


def scores(model, guide, *rows):
    """What is said of each datum, and what is done to the parameters."""
    found = pyrovae.log_likelihood(model, guide, *rows, num_samples=8, seed=0)
    torch.manual_seed(0)
    one_layer.svi_of(model, guide).step(*rows)
    moved = torch.cat([p.detach().flatten() for m in (model, guide) for p in m.parameters()])
    return found.log_prob, moved


PAIRS = {f"{m}-{g}": (m, g) for m, g in one_layer.EACH}
PAIRS |= {"poisson-counts": ("poisson", "counts")}


@pytest.mark.parametrize("name", PAIRS)
def test_what_stands_at_a_hidden_entry_changes_nothing(name):
    found = []
    for filler in (0.0, 1.0):
        torch.manual_seed(1)
        model, guide = one_layer.pair(*PAIRS[name])
        x = torch.where(MASK, one_layer.data(PAIRS[name][0]), filler)
        found.append(scores(model, guide, x, MASK))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("name", MAKE)
def test_structures_ignore_hidden_entries_too(name):
    found = []
    mask = torch.rand(X.shape, generator=torch.Generator().manual_seed(3)) > 0.4
    for filler in (0.0, 1.0):
        torch.manual_seed(1)
        model, guide, (x, *context) = MAKE[name]()
        rows = torch.where(mask, x, filler), *context, mask
        found.append(pyrovae.log_likelihood(model, guide, *rows, num_samples=8, seed=0).log_prob)
    assert torch.equal(*found)


@pytest.mark.parametrize("model", one_layer.MODELS)
def test_a_mask_that_hides_nothing_changes_nothing(model):
    x = one_layer.data(model)
    pair = one_layer.pair(model, "mean_field")
    bare = pyrovae.log_likelihood(*pair, x, num_samples=8, seed=0).log_prob
    full = pyrovae.log_likelihood(*pair, x, torch.ones_like(x) > 0, num_samples=8, seed=0).log_prob
    assert torch.allclose(bare, full, rtol=1e-5)


def test_where_all_is_hidden_the_likelihood_is_one():
    x = one_layer.data("gaussian")
    pair = one_layer.pair("gaussian", "mean_field")
    ll = pyrovae.log_likelihood(*pair, x, torch.zeros_like(x) > 0, num_samples=20_000, seed=0)
    assert (ll.log_prob.abs() < 5 * ll.standard_error + 1e-3).all()


def test_from_the_command_line_to_a_report(tmp_path, monkeypatch, gaps, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", gaps / 150)
    pair = ("--model", "gaussian", "--guide", "mean_field", "--set", "latent=2", "--epochs", "1")
    train = ("train", *pair, "--data", "x.npy", "--out", "run")
    assert "--missing mask" in refusal(capsys, *train)
    assert run(*train, "--missing", "mask") == 0
    assert run("evaluate", "run", "--samples", "20") == 0
    assert run("report", "run") == 0
    assert run("sample", "run", "-n", "4") == 0


@pytest.mark.parametrize("which", ["model", "guide"])
def test_a_program_that_takes_no_mask_is_told_how_to_take_one(which):
    x = one_layer.data("gaussian")
    model, guide = one_layer.pair("gaussian", "mean_field")

    def alone(x):
        return {"model": model, "guide": guide}[which](x)

    pair = (alone, guide) if which == "model" else (model, alone)
    with pytest.raises(pyrovae.InputError, match=rf"{which} takes \(x\).* 2 arguments.*mask=True"):
        pyrovae.log_likelihood(*pair, x, x > 0, num_samples=2)
