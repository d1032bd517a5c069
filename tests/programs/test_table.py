"""The table pair: likelihoods in the data's units, gaps unseen, from a file to a report."""

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from commands import run
from zoo import table

import pyrovae
from pyrovae.data.tables import Column, measured
from pyrovae.guides.table import Table as TableGuide
from pyrovae.models.table import LIKELIHOODS, Table
from pyrovae.nn import Units


def test_log_p_is_in_the_units_of_the_data():
    """Ten times the unit is a density of a tenth, and a whole number stays as probable."""
    torch.manual_seed(0)
    x = torch.rand(8, 3).add(0.5) * torch.tensor([1.0, 1.0, 0.0])
    x[:, 2] = torch.arange(8.0)
    columns = [Column("a", "real", (), 1.0, 0.3), Column("b", "positive", (), 0.0, 0.4)]
    columns += [Column("c", "count", (), 1.5, 0.5)]
    wide = [columns[0]._replace(loc=10.0, scale=3.0), columns[1]._replace(loc=np.log(10.0))]
    found = []
    for schema, unit in ((columns, 1.0), ([*wide, columns[2]], 10.0)):
        torch.manual_seed(1)
        pair = Table((3,), schema, latent=2), TableGuide((3,), schema, latent=2)
        rows = x * torch.tensor([unit, unit, 1.0])
        found.append(pyrovae.log_likelihood(*pair, rows, num_samples=20, seed=0).log_prob)
    assert torch.allclose(
        (found[0] - found[1]).double(), torch.tensor(2 * np.log(10.0)).double(), atol=1e-3
    )


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_probabilities_add_up_to_one(kind):
    torch.manual_seed(0)
    categories = {"binary": 2, "categorical": 5, "ordinal": 5}.get(kind, 0)
    width = {"binary": 1, "categorical": 5, "ordinal": 4}.get(kind, 2)
    fn = LIKELIHOODS[kind](torch.randn(width), 0.7, 0.5)
    if fn.support.is_discrete:
        total = fn.log_prob(torch.arange(float(categories or 3000))).exp().sum()
    else:
        x = torch.linspace(1e-4 if kind == "positive" else -60, 200, 400_001)
        total = torch.trapezoid(fn.log_prob(x).exp(), x)
    assert total == pytest.approx(1, abs=2e-3)


def test_an_ordinal_column_of_two_categories_is_a_binary_one():
    h = torch.randn(7, 1)
    ordinal = LIKELIHOODS["ordinal"](h, 0.0, 1.0).probs[:, 0]
    assert torch.allclose(ordinal, LIKELIHOODS["binary"](h, 0.0, 1.0).probs, atol=1e-5)


@pytest.mark.parametrize(
    "columns", [None, [("a", "real", (), 0, 1)], [("a", "reel", (), 0, 1)] * 2]
)
def test_columns_that_do_not_fit_are_refused(columns):
    shape = (1, 2, 2) if columns is None else (2,)
    with pytest.raises(ValueError, match=r"columns=data\.columns"):
        Table(shape, columns)


def test_imputation_fills_every_kind_with_what_it_can_be():
    model, guide, (x, mask) = table()
    found = pyrovae.impute(model, guide, torch.where(mask, x, torch.nan), num_samples=50, seed=0)
    assert set(found.probabilities) == {"x.categorical", "x.ordinal"}
    assert found.probabilities["x.ordinal"].shape == (12, 4)
    assert torch.equal(found.filled[:, 4:], found.filled[:, 4:].round())
    assert torch.equal(found.draws[..., 2:], found.draws[..., 2:].round())
    assert (found.draws[..., 1] > 0).all()


def test_the_check_says_whether_missing_entries_are_seen():
    model, guide, (x, mask) = table()
    row = pyrovae.check(model, guide, x, mask)["data in support"]
    assert row.status == "passed"
    assert "neither program sees them" in row.message
    blind = pyrovae.check(model, lambda x, mask: guide(x), x, mask)["data in support"]
    assert blind.status == "warned"
    assert "'z' changes with what stands there" in blind.message
    wrong = pyrovae.check(lambda x, mask: model(x), guide, x, mask)["data in support"]
    assert wrong.status == "failed"
    assert "depends on what stands where x is missing" in wrong.message


def test_a_table_with_gaps_goes_from_a_file_to_a_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"age": rng.normal(50, 9, 40), "size": rng.lognormal(0, 1, 40)})
    frame["sex"] = rng.choice(["F", "M"], 40)
    frame["years"], frame["site"] = rng.normal(50, 9, 40), rng.choice(["a", "b", "c"], 40)
    frame.iloc[::5, 1] = None
    frame.iloc[::7, 2] = None
    frame.to_csv("x.csv", index=False)
    pair = ("--model", "table", "--guide", "table", "--set", "latent=2", "--epochs", "1")
    kinds = ("--columns", "sex=binary", "--columns", "size=positive", "--missing", "mask")
    kinds += ("--context", "years,site")
    assert run("train", *pair, "--data", "x.csv", *kinds, "--out", "run") == 0
    assert run("train", "--out", "run", "--resume", "--epochs", "2") == 0
    assert run("evaluate", "run", "--samples", "20") == 0
    assert run("report", "run") == 0
    assert run("sample", "run", "-n", "4") == 0
    opened = pyrovae.load("run")
    assert [column.name for column in opened.model.context.columns] == ["years", "site"]
    shown = dict(opened.data._told().rows)
    assert (shown["columns"], shown["context"]) == ("age, size, sex", "years, site, mask")


def test_covariates_are_given_to_both_programs_and_explained_by_none():
    """Standardized, or one number for each category; the mask comes after them."""
    rng = np.random.default_rng(0)
    columns = {"h": rng.normal(0, 1, 40), "k": rng.poisson(3, 40), "age": rng.normal(50, 9, 40)}
    frame = pd.DataFrame(columns | {"site": rng.choice(["a", "b", "c"], 40)})
    frame.loc[::5, "h"] = None
    data = pyrovae.load_data(frame, context="age,site", missing="mask")
    age, site = data.context_columns
    assert (age.name, age.kind, site) == (
        "age",
        "real",
        ("site", "categorical", tuple("abc"), 0, 1),
    )
    assert (age.loc, age.scale) == pytest.approx(
        (data.context.train[0].mean().item(), data.context.train[0].std(correction=0).item())
    )
    options = {"columns": data.columns, "context_columns": data.context_columns, "latent": 2}
    model, guide = Table(data.shape, **options), TableGuide(data.shape, **options)
    x, years, place, mask = data.split("train")
    z = torch.randn(28, 2)
    joined = torch.cat([z, (years[:, None] - age.loc) / age.scale, torch.eye(3)[place]], -1)
    with pyro.poutine.trace() as traced, pyro.condition(data={"z": z}):
        model(x, years, place, mask)
    loc = model.decoder(joined)[:, 0]
    h = traced.trace.nodes["x.h"]["fn"].base_dist
    torch.testing.assert_close(h.loc, data.columns[0].loc + data.columns[0].scale * loc)
    for program in (model, guide):
        one, two = (
            pyro.poutine.trace(pyro.poutine.condition(program, data={"z": z})).get_trace(*rows, **k)
            for rows, k in (((x, years, place, mask), {}), ((x, years, place), {"mask": mask}))
        )
        assert torch.equal(one.log_prob_sum(), two.log_prob_sum())
        unseen = pyro.poutine.trace(pyro.poutine.condition(program, data={"z": z}))
        assert not torch.equal(one.log_prob_sum(), unseen.get_trace(x, years, place).log_prob_sum())
    codes = pyrovae.encode(guide, x, years, place, mask)["z"]
    for other in ((years + 9, place), (years, (place + 1) % 3)):
        assert not torch.allclose(pyrovae.encode(guide, x, *other, mask)["z"], codes)
    found = pyrovae.impute(model, guide, x, years, place, mask, num_samples=9, seed=0)
    assert torch.equal(found.filled[mask], x[mask])
    with pytest.raises(ValueError, match=r"context \['age', 'site'\] .* got 1 columns"):
        pyrovae.elbo(model, guide, x, years, mask)
    # The advice to a program without them calls them by their names.
    plain = Plain(data.shape, data.columns), lambda x, mask: None
    with pytest.raises(ValueError, match=r"write forward\(self, x, age, site, mask=True\)"):
        pyrovae.fit(*plain, data)


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_units_are_standardized_and_gaps_are_zero(scale):
    """Each kind of column has mean 0 and standard deviation 1 in the units of its data."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 3, generator=generator).exp() * scale
    x[:, 2] = x[:, 2].round()
    schema = tuple(Column(kind, kind) for kind in ("real", "positive", "count"))
    columns = [*measured(schema, x, None), Column("site", "categorical", tuple("abc"))]
    codes = torch.arange(500.0)[:, None] % 3
    units = Units(columns)(torch.cat([x, codes], 1))
    torch.testing.assert_close(units[:, :3].mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(units[:, :3].std(0, correction=0), torch.ones(3))
    assert torch.equal(units[:, 3:], torch.eye(3)[codes[:, 0].long()])
    mask = torch.rand(500, 4, generator=generator) > 0.5
    gaps = Units(columns)(torch.cat([x, codes], 1).where(mask, torch.nan), mask)
    assert torch.equal(gaps, units * mask[:, [0, 1, 2, 3, 3, 3]])


class Plain(Table):
    def forward(self, x, mask=True):
        super().forward(x, mask)
