"""Results show the few numbers that matter, in ten lines at most, and as a table in a notebook."""

import math
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyro
import pytest
import torch

import pyrovae
from pyrovae._tools import progress_bar
from pyrovae._tools.shown import counted, number, plus_minus
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.bernoulli import Bernoulli


@pytest.fixture(scope="module")
def results():
    with pyro.settings.context(module_local_params=False):
        pyro.set_rng_seed(0)
        data = pyrovae.load_data("digits", binarize="dynamic")
        small = {"latent": 4, "hidden": (32,)}
        model, guide = Bernoulli(data.shape, **small), MeanField(data.shape, **small)
        fit = pyrovae.fit(model, guide, data, epochs=2, seed=0)
        args = model, guide, data.test[:50]
        ll = pyrovae.log_likelihood(*args, num_samples=200, seed=0)
        other = pyrovae.log_likelihood(*args, num_samples=100, seed=1)
        mask = torch.rand(data.test[:50].shape) > 0.5
        filled = (data.test[:50], torch.zeros(50, 1, 8, 8), torch.zeros(50, 1, 8, 8))
        parts = torch.rand(2, 50, 1, 8, 8), (0.1, 0.9), torch.rand(3, 50, 1, 8, 8), {}
        images = pyrovae.Imputation(*filled, *parts, mask, ll)
        flat = {n: getattr(images, n).flatten(-3) for n in ("filled", "quantiles", "draws", "mask")}
        ranks = {"z": torch.arange(100)[:, None], "norm of z": torch.randint(5, (100, 1))}
        return {
            "Imputation": images,
            "Imputation of columns": replace(images, **flat),
            "Bidirectional": pyrovae.Bidirectional(ll, ll.log_prob + 0.5, data.test[:50]),
            "Comparison": pyrovae.compare_log_likelihood(ll, other),
            "PosteriorCalibration": pyrovae.PosteriorCalibration(99, ranks, ranks, ll.khat, {}, 0),
            "Dataset": data,
            "Fit": fit,
            "LogLikelihood": ll,
            "one datum": pyrovae.log_likelihood(model, guide, data.test[:1], num_samples=5, seed=0),
            "ElboResult": pyrovae.elbo(*args, seed=0),
            "Diagnosis": pyrovae.diagnose(*args, seed=0),
            "Report": pyrovae.check(*args, particles=8),
        }


def test_texts_have_at_most_ten_lines_and_no_tensors(results):
    for name, result in results.items():
        shown = repr(result)
        assert 1 <= len(shown.splitlines()) <= 10, name
        assert max(map(len, shown.splitlines())) <= 110, name
        assert "tensor(" not in shown, name


def test_pages_are_tables_with_the_same_numbers(results):
    for name, result in results.items():
        page = result._repr_html_()
        assert page.startswith("<div><strong>"), name
        assert page.count("<tr>") == page.count("</tr>") > 0, name
        assert "tensor(" not in page, name
        numbers = re.findall(r"\d+\.\d{3}", repr(result))
        assert all(number in page for number in numbers), name


def test_the_numbers_are_those_of_the_results(results):
    ll, bound, fit = results["LogLikelihood"], results["ElboResult"], results["Fit"]
    told = f"{ll.mean:.3f} ± {ll.mean_standard_error:.3f} (Monte Carlo) ± "
    told += f"{ll.data_standard_error:.3f} (over data) nats per datum"
    assert f"log p(x)           {'≥ ' * (ll.verdict.kind == 'doubtful')}{told}" in repr(ll)
    assert "nats per datum" in repr(ll)
    assert f"{ll.verdict.kind}: {ll.verdict}"[:60] in repr(ll)
    assert f"{bound.mean:.3f} ± {bound.standard_error:.3f} nats per datum" in repr(bound)
    assert f"{fit.elbo:.3f} nats per datum" in repr(fit)
    assert f"epoch {fit.best_epoch} of 2" in repr(fit)
    assert " ± " not in repr(results["one datum"]).splitlines()[1].partition("(Monte Carlo)")[2]


def test_the_four_others_say_what_they_found(results):
    told = {name: repr(result) for name, result in results.items()}
    assert f"of {int((~results['Imputation'].mask).sum())} of 3200 values" in told["Imputation"]
    assert "gap          0.500" in told["Bidirectional"]
    found = results["Comparison"]
    assert f"difference       {number(found.difference)} ± " in told["Comparison"]
    error = plus_minus(found.monte_carlo_standard_error, "Monte Carlo")
    assert f"{error} nats per datum" in told["Comparison"]
    assert f"{found.verdict.kind}: {found.verdict}"[:60] in told["Comparison"]
    assert "outside bands         1 of 2 statistics" in told["PosteriorCalibration"]


def test_pictures_show_the_numbers_of_the_results(results):
    found = {name: each.plot() for name, each in results.items() if hasattr(each, "plot")}
    assert found.keys() == results.keys() - {"Dataset", "ElboResult", "Report"}
    panels = {name: figure.axes for name, figure in found.items()}
    fit, ll = results["Fit"], results["LogLikelihood"]
    expected = [[row["epoch"], row["train_elbo"]] for row in fit.history]
    np.testing.assert_allclose(panels["Fit"][0].lines[0].get_xydata(), expected)
    curve, khat = panels["LogLikelihood"]
    np.testing.assert_allclose(curve.lines[0].get_ydata(), [*ll.curve.mean.values()])
    np.testing.assert_allclose(khat.lines[-1].get_ydata(), ll.khat.sort().values)
    assert len(panels["one datum"]) == 1
    bars = [bar.get_height() for bar in panels["Diagnosis"][0].patches]
    kl = results["Diagnosis"].sites["z"].kl
    np.testing.assert_allclose(bars, kl.sort(descending=True).values, rtol=1e-6)
    assert sum(bar.get_height() for bar in panels["Comparison"][0].patches[:-1]) == 50
    upper, lower = (line.get_ydata() for line in panels["Bidirectional"][0].lines)
    np.testing.assert_allclose(upper - lower, 0.5, atol=1e-5)
    (axes,) = panels["Imputation"]
    assert [t.get_text() for t in axes.get_yticklabels()][:3] == ["observed", "filled in", "draw 1"]
    hidden = ~results["Imputation of columns"].mask
    most = int(hidden.sum(0).argmax())
    first, *_ = panels["Imputation of columns"]
    assert first.get_title("left") == f"x[{most}], {int(hidden[:, most].sum())} missing"
    shown = first.lines[-1].get_ydata()
    np.testing.assert_allclose(
        shown, results["Imputation of columns"].filled[hidden[:, most], most][:20]
    )
    whole = replace(results["Imputation"], mask=torch.ones(50, 1, 8, 8, dtype=torch.bool))
    with pytest.raises(pyrovae.InputError, match="Expected missing entries to draw"):
        whole.plot()


def test_a_report_shows_what_failed_first(results):
    data = results["Dataset"]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro.distributions.Normal(x.new_zeros(2), 1).to_event(1))
            pyro.sample("x", pyro.distributions.Normal(z.sum(-1), 1), obs=x.sum((1, 2, 3)))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("w", pyro.distributions.Normal(x.new_zeros(2), 1).to_event(1))

    found = pyrovae.check(model, guide, data.train[:8], particles=4)
    title, first, *_ = repr(found).splitlines()
    assert re.match(r"Report: \d+ failed, ", title)
    assert "failed: " in first


def test_what_a_page_shows_is_escaped():
    data = pyrovae.Dataset.of(pyrovae.load_data("digits").train)
    object.__setattr__(data, "name", "<script>")
    assert "<script>" not in data._repr_html_()


def test_a_bar_is_shown_in_a_notebook(monkeypatch):
    assert progress_bar(range(2)).disable
    kernel = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    bar = progress_bar(range(2))
    assert not bar.disable
    bar.close()


def test_numbers_hide_nothing_and_rounding_is_no_error():
    assert [number(v) for v in (6.908, 1.2e-4, 0, -1e-17, None, math.nan)] == [
        "6.908", "0.00012", "0.000", "0.000", "unknown", "unknown",
    ]  # fmt: skip
    assert plus_minus(0.0123, "over data") == " ± 0.012 (over data)"
    assert plus_minus(1.2e-4) == " ± 0.00012"
    assert not any(map(plus_minus, (2.5e-16, 0.0, None, math.nan)))
    assert [counted(n, "epoch") for n in (1, 2, 1000)] == ["1 epoch", "2 epochs", "1,000 epochs"]
