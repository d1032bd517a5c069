"""Laws of tables: every cell keeps its meaning, and a kind that does not fit is refused."""

import numpy as np
import pandas as pd
import pytest
import torch

from pyrovae.data import Splits, load_data


@pytest.fixture
def frame():
    """40 rows of every type, whose first column tells their number; a tenth of the cells empty."""
    rng = np.random.default_rng(0)
    n = 40
    frame = pd.DataFrame(
        {
            "row": np.arange(n) + 0.25,
            "weight": rng.lognormal(3, 1, n),
            "visits": rng.negative_binomial(2, 0.2, n),
            "year": 1990 + rng.integers(0, 5, n),
            "sick": rng.random(n) > 0.5,
            "sex": rng.choice(["F", "M"], n),
            "blood": rng.choice(["0", "A", "AB", "B"], n),
            "grade": pd.Categorical(
                rng.choice(["low", "mid", "high"], n), ["low", "mid", "high"], ordered=True
            ),
        }
    )
    for name in frame.columns[1:]:
        frame[name] = frame[name].astype(object if name == "sick" else frame[name].dtype)
        frame.loc[rng.choice(n, 4, replace=False), name] = None
    frame["sick"] = frame["sick"].astype("boolean")
    return frame


KINDS = {
    "row": "real",
    "weight": "real",
    "visits": "count",
    "year": "real",
    "sick": "binary",
    "sex": "binary",
    "blood": "categorical",
    "grade": "ordinal",
}


def check_cells(frame, data):
    """Every number of every split is the cell that it was, or is hidden."""
    for split in Splits._fields:
        x, mask = data.split(split)
        for numbers, seen in zip(x, mask, strict=True):
            row = frame.iloc[int(numbers[0])]
            for j, column in enumerate(data.columns):
                cell = row[column.name]
                assert seen[j] == (not pd.isna(cell))
                if not seen[j]:
                    assert numbers[j] == (column.kind == "positive")
                elif column.categories:
                    assert column.categories[int(numbers[j])] == str(cell)
                else:
                    assert numbers[j].item() == pytest.approx(float(cell))


def test_a_frame_keeps_every_cell(frame):
    data = load_data(frame, missing="mask")
    assert {column.name: column.kind for column in data.columns} == KINDS
    assert data.columns[7].categories == ("low", "mid", "high")
    check_cells(frame, data)


def test_words_without_an_order_are_sorted_aloud():
    grades = ["low", "high", "medium", "low"] * 10
    with pytest.warns(match="'grade' of .* sorted, high < low < medium: give ordered categories"):
        load_data(pd.DataFrame({"grade": grades}), columns={"grade": "ordinal"})
    known = pd.Categorical(grades, categories=["low", "medium", "high"])
    (column,) = load_data(pd.DataFrame({"grade": known}), columns={"grade": "ordinal"}).columns
    assert column.categories == ("low", "medium", "high")


def test_a_kind_is_as_it_is_told(frame):
    data = load_data(frame, missing="mask", columns={"weight": "positive", "year": "ordinal"})
    weight, year = data.columns[1], data.columns[3]
    assert (weight.kind, year.kind) == ("positive", "ordinal")
    x, mask = data.split("train")
    seen = x[mask[:, 1], 1].double().log()
    assert weight.loc == pytest.approx(seen.mean().item())
    assert weight.scale == pytest.approx(seen.std(correction=0).item())
    check_cells(frame, data)


def test_a_frame_a_csv_and_an_arff_file_are_one_table(frame, tmp_path):
    frame = frame.drop(columns=["sick", "visits"])
    words = {"sex": "categorical", "blood": "categorical", "grade": "categorical"}
    frame.to_csv(tmp_path / "x.csv", index=False)
    lines = ["@relation x"]
    for name in frame.columns:
        values = sorted(frame[name].dropna().astype(str).unique())
        lines.append(f"@attribute {name} {{{','.join(values)}}}" if name in words else "")
        lines[-1] = lines[-1] or f"@attribute {name} numeric"
    cells = frame.astype(object).where(frame.notna(), "?").astype(str)
    (tmp_path / "x.arff").write_text("\n".join([*lines, "@data", *map(",".join, cells.values)]))
    kinds = words | {"year": "real"}
    # Before pandas 3, astype(str) makes "nan" of a gap.
    frame["grade"] = frame["grade"].astype(str).where(frame["grade"].notna())
    found = [
        load_data(source, missing="mask", columns=kinds)
        for source in (frame, tmp_path / "x.csv", tmp_path / "x.arff")
    ]
    for data in found:
        assert torch.equal(data.train, found[0].train)
        assert data.columns[1].scale == found[0].columns[1].scale


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"wieght": "real"}, "did you mean 'weight'"),
        ({"weight": "positiv"}, "one of real, positive, count.*did you mean 'positive'"),
        ({"weight": "count"}, "whole numbers from 0 in the count column 'weight'"),
        ({"blood": "binary"}, "two values at most in the binary column 'blood'.* got 4"),
        ({"blood": "real"}, "numbers in the real column 'blood'"),
    ],
)
def test_a_kind_that_does_not_fit_is_refused(frame, columns, match):
    with pytest.raises(ValueError, match=match):
        load_data(frame, missing="mask", columns=columns)


def test_gaps_of_a_frame_are_refused_unless_they_are_asked_for(frame):
    with pytest.raises(ValueError, match=r"28 NaN or infinite.*missing='mask'"):
        load_data(frame)
    assert load_data(frame[["row"]]).context is None


def test_a_column_of_one_number_is_divided_by_nothing():
    values = (1 / 3, 0.1, 2.7, 1e-3, 19.0, 7.0)
    frame = pd.DataFrame({f"c{i}": [value] * 200 for i, value in enumerate(values)})
    kinds = dict.fromkeys(frame, "positive")
    columns = load_data(frame.assign(r=np.arange(200.0)), columns=kinds).columns
    assert [column.scale for column in columns[:-1]] == [1.0] * len(values)
    assert [c.loc for c in columns[:-1]] == pytest.approx(np.log(values).tolist())
    assert columns[-1].scale > 50


def test_values_that_float32_merges_are_warned_of():
    seconds = 1_700_000_000 + np.arange(40)
    frame = pd.DataFrame({"x": np.arange(40.0) / 7, "t": seconds, "one": [1e9 + 0.3] * 40})
    with pytest.warns(UserWarning, match=r"no room for the values of .* in columns \[1\]"):
        load_data(frame)
    load_data(frame.assign(t=seconds - seconds.mean()))
