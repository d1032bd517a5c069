"""Data sets of a few rows are trained on, measured and drawn, or the sentence says what they need.

Drawing once took the first fifteen test data for granted, which 75 rows have.
"""

import numpy as np
import pytest
import torch
from commands import refusal, run

PAIR = ("--model", "bernoulli", "--guide", "mean_field", "--set", "latent=2", "--epochs", "1")


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def rows(n):
        x = torch.rand(n, 6, generator=torch.Generator().manual_seed(0)) > 0.5
        np.save("x.npy", x.numpy().astype(np.float32))

    return rows


@pytest.mark.parametrize("n", [3, 8, 70])
def test_few_rows_go_all_the_way_to_a_report(rows, n, capsys):
    """Diagnostics of one test datum are refused, with the option that leaves them out."""
    rows(n)
    assert run("train", *PAIR, "--data", "x.npy", "--out", "run") == 0
    only = ()
    if n == 3:  # One test datum has no aggregate posterior.
        assert "--no-diagnostics" in refusal(capsys, "evaluate", "run")
        only = ("--no-diagnostics",)
    assert run("evaluate", "run", "--samples", "20", *only) == 0
    assert run("report", "run") == 0


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_rows_than_splits_are_refused(rows, capsys, n):
    rows(n)
    said = refusal(capsys, "train", *PAIR, "--data", "x.npy", "--out", "run")
    assert f"at least 3 rows in x, one for each split, got {n}" in said
