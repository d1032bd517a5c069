"""Exported programs run without this package and give what the pair gives, or are refused."""

import json
import math
import re
import shlex
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from commands import TRAIN, run
from pyro.nn import PyroModule
from structures import MAKE
from torch import nn

import one_layer
import pyrovae
from pyrovae._tools import InputError
from pyrovae.exporting import formats
from pyrovae.guides.linear_gaussian import LinearGaussian as ExactGuide
from pyrovae.guides.mean_field import MeanField
from pyrovae.guides.sequence import Sequence as SequenceGuide
from pyrovae.guides.table import Table as TableGuide
from pyrovae.models.linear_gaussian import LinearGaussian
from pyrovae.models.sequence import Sequence
from pyrovae.models.table import Table

ENTRY = "pyrovae.json"


def opened(path):
    """A file's program and its metadata, read with torch alone."""
    extra = {ENTRY: ""}
    program = torch.export.load(path, extra_files=extra).module()
    return program, json.loads(extra[ENTRY])


@pytest.fixture
def linear():
    """A pair whose posterior and log p(x) are known, and data of another size than was traced."""
    model, guide = LinearGaussian((4,), 2), ExactGuide((4,), 2)
    return model, guide, torch.randn(7, 4)


def test_an_encoder_and_a_decoder_give_the_moments_of_the_pair(linear, tmp_path):
    model, guide, x = linear
    encoder, told = opened(pyrovae.export(*linear, what="encoder", out=tmp_path / "e.pt2"))
    z = pyrovae.encode(guide, x)["z"]
    found = encoder(x)
    torch.testing.assert_close(found["z_mean"], z)
    assert found["z_sd"].shape == z.shape
    assert [each["name"] for each in told["inputs"]] == ["x"]
    assert told["event_shape"] == [4]
    assert told["latents"] == {"z": [2]}
    decoder, told = opened(pyrovae.export(*linear, what="decoder", out=tmp_path / "d.pt2"))
    torch.testing.assert_close(decoder(z)["x_mean"], pyrovae.decode(model, {"z": z}, like=x))
    assert [each["shape"] for each in told["outputs"]] == [["batch", 4], ["batch", 4]]
    assert told["programs"] == {"model": "LinearGaussian", "guide": "LinearGaussian"}
    assert torch.__version__.startswith(told["versions"]["torch"])


def test_log_p_in_onnxruntime_agrees_within_its_error_with_the_exact_value(tmp_path):
    import onnxruntime

    model, guide = LinearGaussian((4,), 2), one_layer.build("guides", "mean_field", (4,), latent=2)
    x, n, k = torch.randn(7, 4), 100, 50
    path = pyrovae.export(
        model, guide, x, what="log_likelihood", format="onnx", samples=k, out=tmp_path / "l.onnx"
    )
    session = onnxruntime.InferenceSession(path.read_bytes())
    told = json.loads(session.get_modelmeta().custom_metadata_map[ENTRY])
    assert [each.name for each in session.get_inputs()] == ["x", "noise"]
    assert [each["shape"] for each in told["inputs"]] == [["batch", 4], ["batch", k, 2]]
    assert "nats per datum" in told["outputs"][0]["meaning"]
    given = {"x": x.repeat(n, 1).numpy(), "noise": torch.randn(7 * n, k, 2).numpy()}
    logs, stated = (torch.from_numpy(each).reshape(n, 7) for each in session.run(None, given))
    # The mean weight of many batches is that of as many more draws.
    weights = (logs - logs.amax(0)).exp()
    error = weights.std(0) / weights.mean(0) / n**0.5
    found = logs.amax(0) + weights.mean(0).log()
    assert bool(((found - model.log_prob(x)).abs() < 4 * error).all())
    # The stated errors are those by which the batches differ.
    ratio = stated.square().mean(0).sqrt() / weights.std(0) * weights.mean(0)
    assert bool(((ratio > 0.5) & (ratio < 2)).all())


PLACES, NOISE = torch.tensor([-2.0, 1.0, 3.0]), 0.5


def clusters(x):
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(x.new_ones(3)), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(PLACES[c], 1.0))
        pyro.sample("x", dist.Normal(z[..., None], NOISE).to_event(1), obs=x)


def near(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.8 * x[:, 0], 0.6))


def chosen(x):
    with pyro.plate("data", len(x)):
        pyro.sample("c", dist.Categorical(logits=-((x - PLACES) ** 2) / 3))
        pyro.sample("z", dist.Normal(0.8 * x[:, 0], 0.6))


@pytest.mark.parametrize(("kind", "guide"), [("pt2", near), ("onnx", near), ("onnx", chosen)])
def test_log_p_with_a_discrete_latent_is_exact_of_one_datum_and_of_many(tmp_path, kind, guide):
    x = torch.tensor([[-1.5], [0.4], [2.0], [0.0], [1.0], [3.3]])
    how = {"what": "log_likelihood", "format": kind, "samples": 400}
    path = pyrovae.export(clusters, guide, x, out=tmp_path / f"l.{kind}", **how)
    if kind == "pt2":
        program, _ = opened(path)
    else:
        names = types.SimpleNamespace(inputs=["x", "noise"], outputs=["log_prob", "standard_error"])
        program = formats.run_onnx(path.read_bytes(), names)
    exact = dist.Normal(PLACES, (1 + NOISE**2) ** 0.5).log_prob(x).logsumexp(1) - math.log(3)
    noise = torch.randn(6, 400, 1 if guide is near else 2)
    for size in (1, 6):
        found = program(x[:size], noise[:size])
        off = (found["log_prob"] - exact[:size]).abs()
        assert bool((off < 4 * found["standard_error"]).all())


def test_a_latent_below_others_is_conditioned_on_draws_from_the_noise(tmp_path):
    model, guide, (x,) = MAKE["two_layer"]()
    program, told = opened(pyrovae.export(model, guide, x, what="encoder", out=tmp_path / "e.pt2"))
    assert [each["name"] for each in told["inputs"]] == ["x", "noise"]
    found = program(x, torch.zeros(len(x), *told["inputs"][1]["shape"][1:]))
    loc, log_scale = guide.encoder_top(found["z1_mean"]).unbind(-2)
    torch.testing.assert_close(found["z2_mean"], loc)
    torch.testing.assert_close(found["z2_sd"], log_scale.exp())


def test_what_onnx_lacks_is_spelled_out_exactly():
    aten = torch.ops.aten
    x = torch.cat([torch.logspace(-4, 4, 500), torch.arange(1, 40.0)])
    exact = torch.lgamma(x.double())
    off = (formats.SPELLED[aten.lgamma.default](x) - exact).abs() / exact.abs().clamp(min=1)
    assert off.max() < 5e-6  # float32, against a tolerance of 1e-4
    a, b = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    whole = a @ a.mT + torch.eye(4)
    for upper in (False, True):
        factor = torch.linalg.cholesky(whole, upper=upper)
        found, _ = formats.SPELLED[aten.linalg_cholesky_ex.default](whole, upper=upper)
        torch.testing.assert_close(found, factor)
        for how in ({}, {"left": False}, {"unitriangular": True}):
            expected = torch.linalg.solve_triangular(factor, b, upper=upper, **how)
            solve = formats.SPELLED[aten.linalg_solve_triangular.default]
            torch.testing.assert_close(solve(factor, b, upper=upper, **how), expected)


class Lonely(PyroModule):
    """A guide that encodes a single datum otherwise."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 2)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            loc = self.net(x) if len(x) > 1 else 2 * self.net(x)
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))


class Positive(PyroModule):
    """A guide that draws from gamma distributions."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 2)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(self.net(x).exp(), 1.0).to_event(1))


def gamma_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(torch.ones(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), torch.ones(4)).to_event(1), obs=x)


def reading(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        before = torch.nn.functional.pad(x, (1, -1))
        pyro.sample("x", dist.Normal(before + z[..., :1], 1.0).to_event(1), obs=x)


def looking(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        scale = 1.0 + z.abs().sum().item()
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), scale * torch.ones(4)).to_event(1),
                    obs=x)  # fmt: skip


def guide_of(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[..., :2], 1.0).to_event(1))


def subsampling(x):
    with pyro.plate("data", 1000, subsample_size=len(x)):
        pyro.sample("z", dist.Normal(x[..., :2], 1.0).to_event(1))


REFUSED = {
    "plate": (gamma_model, subsampling, "encoder", "a plate of it draws a subsample: export it wi"),
    "other": (LinearGaussian, Lonely, "encoder", "'z_mean' differs from the pair's own for 1 data"),
    "gamma": (gamma_model, Positive, "log_likelihood", "_standard_gamma, which is no function"),
    "reads": (reading, guide_of, "decoder", "its likelihood reads the x that it observes"),
    "item": (looking, guide_of, "decoder", "reads a value back"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_is_refused_with_the_reason(name, tmp_path):
    model, guide, what, reason = REFUSED[name]
    model = model((4,), 2) if isinstance(model, type) else model
    guide = guide() if isinstance(guide, type) else guide
    with pytest.raises(
        InputError, match=f"^The {what} of this pair cannot be exported: .*{reason}"
    ):
        pyrovae.export(model, guide, torch.randn(6, 4), what=what, out=tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())


def test_attention_without_dropout_draws_nothing(tmp_path):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.last = nn.Linear(12, 3)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(12), 1.0).to_event(1))
                h = z.reshape(-1, 3, 4)
                loc = self.last(self.attention(h, h, h, need_weights=False)[0].flatten(1))
                loc = loc.reshape(*z.shape[:-1], 3)
                pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)

    model, x = Attending().eval(), torch.randn(6, 3)
    guide = MeanField((3,), latent=12, hidden=(4,))
    path = pyrovae.export(model, guide, x, what="decoder", out=tmp_path / "decoder.pt2")
    z = torch.randn(6, 12)
    found = torch.export.load(path).module()(z)["x_mean"]
    expected = pyrovae.decode(model, {"z": z}, like=x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_missing_package_is_named_with_the_extra(linear, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"needs onnxruntime: pip install 'pyrovae\[export\]'"):
        pyrovae.export(*linear, what="encoder", format="onnx", out=tmp_path / "x.onnx")


def test_a_run_is_exported_as_its_page_says(repository, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})
    page = (repository / "docs" / "export.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"```sh\n(.*?)\n```", page)
    assert run(*TRAIN, "--out", "runs/digits") == 0
    assert run(*shlex.split(command)[1:]) == 0
    assert "The encoder is runs/digits/exports/encoder.pt2" in capsys.readouterr().out
    program, told = opened(Path("runs/digits/exports/encoder.pt2"))
    opened_run = pyrovae.load("runs/digits")
    x = opened_run.data.test[:9]
    torch.testing.assert_close(program(x)["z_mean"], pyrovae.encode(opened_run.guide, x)["z"])
    assert told["preprocessing"] == {"scaling": "/ 16", "binarize": "dynamic"}
    assert told["run"]["identity"] == opened_run.config.identity
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "docs/export.md", "exec"), names)
    assert names["x"].shape == (8, 1, 8, 8)


def test_a_table_beside_covariates_and_with_gaps_is_exported(tmp_path):
    r = np.random.default_rng(0)
    frame = pd.DataFrame({
        "visits": r.poisson(2.0, 60).astype(float), "kind": r.choice(["a", "b"], 60),
        "age": r.normal(size=60), "site": r.integers(0, 3, 60),
    })  # fmt: skip
    frame.loc[::7, "visits"] = np.nan
    data = pyrovae.load_data(
        frame, missing="mask", columns={"visits": "count"}, context="age,site"
    )  # fmt: skip
    make = {"latent": 2, "hidden": (), "context_columns": data.context_columns}
    model = Table(data.shape, data.columns, **make)
    guide = TableGuide(data.shape, data.columns, **make)
    rows = data.split("test")
    for what in ("encoder", "decoder", "log_likelihood"):
        path = pyrovae.export(model, guide, data, what=what, out=tmp_path / f"{what}.pt2")
        program, told = opened(path)
        names = [each["name"] for each in told["inputs"]]
        given = ["x", "context_0", "context_1", "mask"]
        if what == "decoder":
            z = {name: torch.randn(len(rows[0]), 2) for name in names[-1:]}
            found = program(*rows[1:3], *z.values())
            expected = pyrovae.decode(model, z, *rows[1:], like=rows[0])
            assert names == ["context_0", "context_1", "z"]
            means = {n: v for n, v in found.items() if n.endswith("_mean")}
            assert means
            for name, value in means.items():
                torch.testing.assert_close(value, expected[name.removesuffix("_mean")])
        else:
            assert names == given + ["noise"] * (what == "log_likelihood")


def test_sequences_of_several_lengths_are_exported(tmp_path):
    lengths = torch.tensor([1, 2, 3, 3, 1, 3, 2, 3, 3])
    x = torch.randint(0, 2, (9, 3, 4)).float()
    mask = (torch.arange(3) < lengths[:, None])[..., None].expand_as(x)
    model, guide = Sequence((3, 4), latent=2), SequenceGuide((3, 4), latent=2)
    made = {
        what: opened(pyrovae.export(model, guide, x, mask, what=what, out=tmp_path / f"{what}.pt2"))
        for what in ("encoder", "decoder")
    }
    encoder, told = made["encoder"]
    noise = torch.randn(9, *told["inputs"][-1]["shape"][1:])
    z = encoder(x, mask, noise)["z_draw"]
    assert z.shape == (9, 3, 2)
    found = made["decoder"][0](z)["x_mean"]
    expected = pyrovae.decode(model, {"z": z}, mask, like=x)
    torch.testing.assert_close(found[mask], expected[mask])
