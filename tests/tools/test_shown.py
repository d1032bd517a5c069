"""Results show the few numbers that matter, in ten lines at most, and as a table in a notebook."""

import math
import re
import sys
from types import SimpleNamespace

import pyro
import pytest

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
        return {
            "Dataset": data,
            "Fit": fit,
            "LogLikelihood": pyrovae.log_likelihood(*args, num_samples=200, seed=0),
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
