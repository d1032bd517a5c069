"""The report holds the numbers and the pictures it was given, and nothing from elsewhere."""

import json
import re
from base64 import b64decode
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch

from pyrovae import reporting
from pyrovae.evidence.result import LogLikelihood, compare_log_likelihood
from pyrovae.reporting import CAPTIONS, render_comparison, render_report
from pyrovae.reporting.figures import image_grid, png
from pyrovae.reporting.text import summarize
from pyrovae.runs.compare import Compared, RunComparison
from pyrovae.runs.config import Config
from pyrovae.runs.results import Finding, Results

CONFIG = {
    "command": "pyrovae train --model bernoulli --out runs/one",
    "model": {"name": "bernoulli", "settings": {"latent": 20, "hidden": [400]}},
    "guide": {"name": "mean_field", "settings": {"latent": 20}},
    "data": {"name": "digits", "binarize": "dynamic", "sizes": {"train": 1257}, "root": None},
    "lr": 0.00123,
    "device": "cpu",
    "versions": {"torch": "2.15.0"},
}
RESULTS = {
    "test": {
        "num_data": 360,
        "elbo": {
            "trace_elbo": {"mean": -17.123456, "standard_error": 0.2123},
            "trace_mean_field_elbo": {"mean": -17.098765, "standard_error": 0.2034},
        },
        "log_likelihood": {
            "mean": -15.987654,
            "standard_error": 0.0123,
            "data_standard_error": 0.1876,
            "num_samples": 1000,
            "ess_median": 210.25,
            "khat_over_0.7": 0.02,
        },
    }
}
HISTORY = [
    {"epoch": 1, "train_elbo": -30.0, "valid_elbo": -28.5, "seconds": 1.5},
    {"epoch": 2, "train_elbo": -25.0, "valid_elbo": -24.25, "seconds": 1.25},
    {"epoch": 3, "train_elbo": -24.0, "valid_elbo": -26.0, "seconds": None},
]
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """The elements of a page, the rows of its tables and what it shows to a reader."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.rows, self.text = [], [], [], ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open += [] if tag in VOID else [tag]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    def row(self, name):
        (found,) = [row for row in self.rows if row[0] == name]
        return found[1:]


@pytest.fixture(scope="module")
def picture():
    return png(image_grid(torch.rand(4, 1, 3, 3), title="Samples"))


def render(config=CONFIG, results=RESULTS, history=HISTORY, figures=None):
    return Page(render_report(config, read(results), history, figures or {}))


def read(results):
    return {split: Results.read(found) for split, found in results.items()}


def test_every_result_stands_in_its_row_and_exactly_in_the_markup():
    page = render()
    assert page.row("ELBO, estimator A (Trace_ELBO)") == ["-17.123", "", "0.212"]
    assert page.row("ELBO, estimator B (TraceMeanField_ELBO)") == ["-17.099", "", "0.203"]
    assert page.row("log p(x)") == ["-15.988", "0.012", "0.188"]
    assert page.row("nats per datum, higher is better") == ["mean", "± Monte Carlo", "± over data"]
    assert page.row("samples per datum for log p(x), K") == ["1000"]
    assert page.row("effective sample size of those K, median") == ["210.250"]
    assert page.row("data with Pareto k-hat above 0.7") == ["2.0%"]
    exact = {float(attrs["value"]) for attrs in page.all("data")}
    for bound in RESULTS["test"]["elbo"].values():
        assert set(bound.values()) <= exact
    ll = RESULTS["test"]["log_likelihood"]
    assert {ll["mean"], ll["standard_error"], ll["data_standard_error"], ll["ess_median"]} <= exact


def test_the_gap_is_log_p_minus_the_bound_with_the_analytic_kl():
    headline = "-15.988 ± 0.012 (Monte Carlo) ± 0.188 (over data) nats per datum."
    assert f"log p(x) = {headline}" in render().text
    (verdict,) = [line for line in render().text.splitlines() if "looseness" in line]
    assert f"{-15.987654 + 17.098765:.3f} nats" in verdict
    assert "sampling error" not in verdict
    results = deepcopy(RESULTS)
    results["test"]["elbo"] = {"trace_elbo": {"mean": -15.5}}
    (verdict,) = [line for line in render(results=results).text.splitlines() if "loose" in line]
    assert f"{-15.987654 + 15.5:.3f} nats" in verdict
    assert "sampling error" in verdict


@pytest.mark.parametrize(
    ("won", "says"), [(1.5, "won 1.500 ± 0.100"), (-9.0, "amortization costs is unknown")]
)
def test_a_guide_that_is_richer_than_the_refined_one_has_no_amortization_gap(won, says):
    results = deepcopy(RESULTS)
    results["test"]["amortization_gap"] = {"mean": won, "standard_error": 0.1}
    assert says in render(results=results).text


@pytest.mark.parametrize(("share", "warned"), [(0.0, False), (0.03, False), (0.12, True)])
def test_heavy_tailed_weights_are_warned_of(share, warned):
    results = deepcopy(RESULTS)
    results["test"]["log_likelihood"]["khat_over_0.7"] = share
    text = render(results=results).text
    assert ("is a lower bound in expectation; raise --samples" in text) is warned
    assert (f"For {share:.1%} of the data" in text) is warned


@pytest.mark.parametrize(
    "doubt",
    [
        {"khat_over_0.7": 0.12},
        {"khat_over_0.7": None},
        {"ess_median": 3.0},
        {"curve": {"10": -17.0, "100": -16.5, "1000": -15.988}},
    ],
)
def test_a_doubted_estimate_is_headed_as_the_bound_that_it_is(doubt):
    results = deepcopy(RESULTS)
    results["test"]["log_likelihood"] |= doubt
    page, (found,) = render(results=results), read(results).values()
    headline = "≥ -15.988 ± 0.012 (Monte Carlo) ± 0.188 (over data) nats per datum"
    assert f"log p(x) {headline}." in page.text
    assert page.row("log p(x), a lower bound") == ["-15.988", "0.012", "0.188"]
    line = "≥ -15.988 ± 0.012 Monte Carlo, ± 0.188 over data"
    assert line in summarize(found, "test")
    assert line[2:] in summarize(read(RESULTS)["test"], "test")
    assert "≥" not in summarize(read(RESULTS)["test"], "test")


@pytest.mark.parametrize("kind", ["verdict", "annealing"])
def test_a_verdict_or_annealing_that_doubts_heads_a_bound_and_ticks_nothing(kind):
    annealed = {"num_data": 60, "num_chains": 8, "mean": -15.5, "standard_error": 0.02}
    over = {"over_importance_sampling": {"mean": 0.4, "standard_error": 0.02}}
    more = {"verdict_kind": "doubtful"} if kind == "verdict" else {"annealed": annealed | over}
    results = evaluated(**more)
    results["test"]["log_likelihood"]["curve"] = {"1": -17.0, "10": -16.5, "1000": -16.45}
    page = render(results=results)
    assert "log p(x) ≥ -15.988" in page.text
    assert marked(page, "hardly change log p(x), unless by weights that have not come") == "·"


DIAGNOSTICS = {
    "num_data": 360,
    "rate": {"mean": 4.25, "standard_error": 0.05},
    "distortion": {"mean": 19.5, "standard_error": 0.2},
    "sites": {"z": {"kl": [4.0, 0.25], "kl_total": 4.25, "active_units": 1, "units": 2}},
    "mutual_information": {"mean": 3.5, "standard_error": 0.0625},
    "marginal_kl": 0.75,
    "remainder": 0.0,
    "calibration": {"levels": [0.5], "coverage": [0.55], "standard_error": [0.01]},
    "probe": {"z": {"linear": 0.76, "knn": 0.74, "chance": 0.1, "classes": 10, "num_test": 180}},
    "bits_per_dimension": None,
    "verdict": "1 of 2 units is active.",
    "verdict_kind": "good",
}


def evaluated(**more):
    results = deepcopy(RESULTS)
    results["test"] |= more
    return results


def marked(page, sentence):
    """How the verdict's line with a sentence in it is marked."""
    lines = page.text.split("\n")
    (line,) = [each for each in lines if sentence in each]
    return line[0]


def test_the_posterior_is_told_in_words_and_numbers():
    page = render(results=evaluated(diagnostics=DIAGNOSTICS))
    assert page.row("rate, KL(q(z|x) ‖ p(z))") == ["4.250", "", "0.050"]
    assert page.row("distortion, −E_q[ln p(x|z)]") == ["19.500", "", "0.200"]
    assert page.row("KL(q(z) ‖ p(z)) of the aggregate posterior") == ["0.750", "", ""]
    assert page.row("what these two leave of the rate, by Monte Carlo error") == ["0.000", "", ""]
    assert page.row("z") == ["4.250", "1", "2"]
    assert page.row("accuracy of labels from z, linear probe") == ["76.0%"]
    assert marked(page, "1 of 2 units is active.") == "✓"
    dead = deepcopy(DIAGNOSTICS)
    dead |= {"verdict": "The posterior has collapsed.", "verdict_kind": "doubtful"}
    assert marked(render(results=evaluated(diagnostics=dead)), "has collapsed.") == "!"


def test_annealing_that_finds_more_is_a_doubt_and_stands_first():
    annealed = {"num_data": 60, "num_chains": 8, "mean": -15.5, "standard_error": 0.02}
    for more, mark in ((0.01, "✓"), (0.4, "!")):
        over = {"over_importance_sampling": {"mean": more, "standard_error": 0.02}}
        page = render(results=evaluated(annealed=annealed | over))
        assert marked(page, f"of the same: {more:.3f} ± 0.020 nats") == mark
        row = page.row("annealed less importance sampling, same data")
        assert row == [f"{more:.3f}", "0.020", ""]
    doubt, gap = page.text.index("too low there"), page.text.index("looseness")
    assert doubt < gap


def test_a_bound_that_still_rises_is_a_doubt():
    for last, mark in ((-15.95, "✓"), (-15.5, "!")):
        results = evaluated()
        curve = {"1": -17.0, "10": -16.5, "100": -16.0, "1000": last}
        results["test"]["log_likelihood"]["curve"] = curve
        page = render(results=results)
        assert page.row("bound with 1 sample, nats per datum") == ["-17.000"]
        assert marked(page, f"From 100 to 1,000 samples the bound rises by {last + 16:.3f}") == mark
        assert page.row("bound with 10 samples, nats per datum") == ["-16.500"]


def test_numbers_of_earlier_weights_and_of_a_part_of_the_data_are_told():
    results = evaluated(weights="old", num_data_of_split=720)
    text = render_report(CONFIG, read(results), HISTORY, {}, weights="new")
    assert "numbers are of earlier weights" in text
    assert "Test data, N = 360 of 720" in text
    assert "earlier weights" not in render_report(CONFIG, read(results), HISTORY, {}, weights="old")


def test_what_is_missing_is_left_out_and_what_is_unknown_is_listed():
    page = render(results={"test": {"elbo": {"iwae": {"mean": -16.5}}, "kl": 3.25}})
    assert page.row("ELBO, iwae") == ["-16.500", "", ""]
    assert page.row("KL(q(z|x) ‖ p(z)), nats per datum") == ["3.250"]
    above, _, glossary = page.text.partition("What the words mean")
    assert "log p(x)" not in above
    assert "k-hat" not in above
    assert "k-hat" in glossary
    empty = render({}, {}, [])
    assert "Not evaluated yet" in empty.text
    assert "None" not in empty.text


def test_splits_come_with_the_test_data_first():
    results = {"train": {"num_data": 1257}, "other": {}, "valid": {}, "test": {"num_data": 360}}
    text = render(results=results).text
    names = ["Test data, N = 360", "Validation data", "Training data, N = 1,257", "Other data"]
    places = [text.index(name) for name in names]
    assert places == sorted(places)


def test_the_verdict_comes_first_then_numbers_pictures_and_settings(picture):
    kinds = ["learning_curves", "bound_curve", "khat", "rate_distortion", "kl_by_dimension"]
    kinds += ["calibration", "latent_space", "samples", "reconstructions", "own"]
    page = render(figures=dict.fromkeys(reversed(kinds), picture))
    order = ["trained on digits", "Test data", "log p(x) =", "Numbers", "Training", "How far"]
    order += ["What the posterior does", "Pictures", "Further pictures", "Behind the numbers"]
    places = [page.text.index(part) for part in [*order, "Settings", "Versions", "command that"]]
    assert places == sorted(places)
    drawn = [image["alt"] for image in page.all("img")]
    assert drawn == [CAPTIONS.get(kind, kind) for kind in kinds]


def test_all_of_the_configuration_is_there():
    page = render()
    assert page.row("lr") == ["0.00123"]
    assert page.row("sizes.train") == ["1257"]
    assert page.row("settings.hidden") == ["[400]"]
    assert page.row("torch") == ["2.15.0"]
    assert CONFIG["command"] in page.text
    assert "root" not in {row[0] for row in page.rows}
    assert "bernoulli with guide mean_field, trained on digits" in page.text


def test_the_training_is_summed_up():
    text = render().text
    assert "3 epochs in 2.8 s on cpu; best validation ELBO -24.250 nats per datum." in text
    assert "1 epoch." in render({}, RESULTS, [{"epoch": 1, "train_elbo": -3.0}]).text


def test_pictures_are_embedded_byte_for_byte_with_words_for_them(picture):
    other = png(image_grid(torch.rand(9, 1, 5, 5), title="Others"))
    figures = {"<b>": other, "latent_space_u": other, "samples": picture}
    page = render(figures=figures)
    images = page.all("img")
    sources = [b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in images]
    assert sources == [other, picture, other]
    words = [image["alt"] for image in images]
    assert words[0].endswith("posterior means. u")
    assert words[1] == "Samples: z drawn from the prior, then decoded."
    assert words[2] == "<b>"
    assert all(alt in page.text for alt in words)


def test_the_page_refers_to_nothing_and_runs_nothing(picture):
    config = {**CONFIG, "data": {"name": "mnist", "source": "https://example.org/mnist"}}
    page = render(config, figures={"samples": picture})
    assert "https://example.org/mnist" in page.text
    assert not page.all("script") + page.all("link") + page.all("a") + page.all("iframe")
    for _, attrs in page.elements:
        assert not attrs.get("href")
        assert attrs.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
        assert not any(name.startswith("on") for name in attrs)
    html = render_report(config, read(RESULTS), HISTORY, {})
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_hostile_text_stays_text(picture):
    evil = "<script>alert('&\"')</script>{title}"
    config = json.loads(json.dumps(CONFIG).replace("bernoulli", "@").replace("dynamic", "@"))
    config = json.loads(json.dumps(config).replace("@", json.dumps(evil)[1:-1]))
    config |= {evil: {evil: [evil]}, "device": evil}
    numbers = {"mean": -1.0}
    told = {"verdict": evil, "data": evil, "binarize": evil, "weights": evil}
    seen = {"verdict": evil, "sites": {evil: {"kl_total": 1.0}}, "probe": {evil: {"linear": 0.5}}}
    tight = {"verdict": evil, "num_data": 3}
    ll = {"method": evil, **numbers}
    results = {evil: {"elbo": {evil: numbers}, "log_likelihood": ll, **told}}
    results[evil] |= {"diagnostics": seen, "bidirectional": tight, "annealed": {"verdict": evil}}
    page = render(config, results, HISTORY, {evil: picture})
    assert not page.all("script")
    assert page.text.count("<script>") + page.text.count("<Script>") >= 12
    assert page.all("img")[0]["alt"] == evil
    assert page.row("binarize") == [evil]
    assert page.row("ELBO, " + evil) == ["-1.000", "", ""]


def test_hostile_text_stays_text_in_a_comparison(picture):
    evil = "<img src=x onerror=alert('&\"')>"
    ll = LogLikelihood(*torch.rand(4, 30), num_samples=10)
    results = deepcopy(RESULTS["test"]) | {"kl": 3.0, "verdict": evil, "verdict_kind": "doubtful"}
    results["log_likelihood"]["khat_over_0.7"] = 0.5
    program = {"name": evil, "file": None, "settings": {}}
    runs = [
        Compared(
            name=f"{evil}{i}",
            run=SimpleNamespace(figures=lambda: {"samples": picture}),
            config=msgspec.convert(
                {
                    "command": evil, "objective": evil, "objective_settings": {evil: f"{evil}{i}"},
                    "model": program, "guide": program,
                    "data": {"load": evil, "root": None, "binarize": evil},
                    "device": evil, "seed": 0, "epochs": 1, "schedule": "none",
                },
                Config,
            ),
            finding=Finding(Results.read(results), [], ll, None, torch.zeros(30)),
        )
        for i in range(2)
    ]  # fmt: skip
    found = RunComparison(evil, tuple(runs), (compare_log_likelihood(ll, ll),), ((0.0, 0.0),))
    page = Page(render_comparison(found))
    images = page.all("img")
    assert all(image["src"].startswith("data:image/png;base64,") for image in images)
    assert not any("onerror" in attrs for _, attrs in page.elements)
    assert page.row("model") == [evil, evil]
    assert page.row(f"objective_settings.{evil}") == [f"{evil}0", f"{evil}1"]
    assert [image["alt"][: len(evil) + 1] for image in images[-2:]] == [f"{evil}0", f"{evil}1"]
    assert page.text.count(evil) >= 16


def test_no_template_switches_escaping_off():
    templates = sorted((Path(reporting.__file__).parent / "templates").iterdir())
    assert [path.suffix for path in templates] == [".j2", ".j2", ".js", ".j2", ".j2", ".j2"]
    for path in templates:
        assert not re.search(r"\|\s*safe|autoescape", path.read_text(encoding="utf-8"))


def test_a_figure_that_is_no_png_is_refused():
    with pytest.raises(ValueError, match="Expected the figure 'samples' to be a PNG"):
        render(figures={"samples": b"<svg onload=x>"})
