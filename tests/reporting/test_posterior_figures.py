"""Figures of evaluations show the numbers that they were given, and the lines to read them by."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.contour import ContourSet
from test_figures import dots, text

from pyrovae.evidence.result import Curve, LogLikelihood
from pyrovae.reporting.figures import BLUE, GREY
from pyrovae.reporting.posterior_figures import (
    FINDING_PICTURES,
    bound_curves,
    calibration_curves,
    draw_findings,
    guide_calibration,
    khat_curves,
    kl_by_dimension,
    rate_distortion,
)
from pyrovae.runs.results import Finding, Results

SITE = {
    "kl": [0.5, 2.0, 0.1, None],
    "posterior_mean_variance": [0.0, 0.9, 0.02, 0.0],
    "active_units": 2,
    "units": 4,
    "factorized": True,
}
COVERED = {"levels": [0.5, 0.9], "coverage": [0.55, 0.8], "standard_error": [0.01, 0.02]}


def estimate(shift=0.0, n=40):
    bounds = torch.tensor([-30.0, -26.0, -25.0])[:, None] + shift + torch.zeros(3, n)
    khat = torch.linspace(0.1, 0.9, n)
    return LogLikelihood(
        bounds[-1], torch.full((n,), 0.2), torch.ones(n), khat, 100,
        curve=Curve((1, 10, 100), bounds),
    )  # fmt: skip


def results(rate=4.0, lost=20.0, **more):
    return Results.read({"kl": rate, "reconstruction": -lost, "log_likelihood": {}, **more})


def finding(found, ll, annealed=None, history=()):
    return Finding(found, history, ll, annealed, torch.zeros(40))


def estimated(ll, annealed=None):
    """What was found of one run's log p(x)."""
    return {"a": finding(Results.read({}), ll, annealed)}


def point(rate, distortion, *errors, history=()):
    """What was found of a run that ended at a rate and a distortion, with their errors."""
    means = zip((rate, distortion), errors or (None, None), strict=True)
    ends = [{"mean": mean, "standard_error": error} for mean, error in means]
    seen = dict(zip(("rate", "distortion"), ends, strict=True))
    return finding(Results.read({"diagnostics": seen}), estimate(), None, history)


def posterior(**seen):
    """What was found of one run's posterior."""
    return {"": finding(Results.read({"diagnostics": seen}), estimate())}


def test_the_curve_is_the_bound_and_says_what_each_tenfold_adds():
    figure = bound_curves(estimated(estimate()))
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1, -30], [10, -26], [100, -25]])
    assert "+4" in text(figure)
    assert "+1" in text(figure)
    (bars,) = [c for c in axes.containers if hasattr(c, "has_yerr")]
    low, high = bars[2][0].get_segments()[0][:, 1]
    assert high - low == pytest.approx(4 * 0.2 / 40**0.5)
    assert axes.get_xscale() == "log"
    level = bound_curves(estimated(estimate(), estimate(shift=0.5))).axes[0].lines[-1].get_ydata()
    np.testing.assert_allclose(level, -24.5)
    both = bound_curves(estimated(estimate()) | {"b": finding(Results.read({}), estimate(-2.0))})
    curves = [line.get_ydata() for line in both.axes[0].lines if len(line.get_ydata()) == 3]
    np.testing.assert_allclose(curves, [[-30, -26, -25], [-32, -28, -27]])
    assert [t.get_text() for t in both.legends[0].get_texts()] == ["a", "b"]


def test_khat_is_sorted_with_its_two_thresholds_and_the_share_above():
    shuffled = estimate()
    order = torch.randperm(40)
    shuffled = LogLikelihood(*(t[order] for t in (shuffled.log_prob,) * 3), shuffled.khat[order], 9)
    axes = khat_curves(estimated(shuffled)).axes[0]
    levels = {line.get_ydata()[0] for line in axes.lines if len(set(line.get_ydata())) == 1}
    assert levels == {0.5, 0.7}
    curve = max(axes.lines, key=lambda line: len(line.get_ydata()))
    np.testing.assert_allclose(curve.get_ydata(), estimate().khat, rtol=1e-6)
    assert f"{(estimate().khat > 0.7).double().mean().item():.1%} above 0.7" in text(axes.figure)


def test_constant_elbo_is_a_line_of_slope_minus_one_and_the_end_has_its_errors():
    path = [{"epoch": e, "valid_kl": 5.0 - e, "valid_reconstruction": -20.0 - e} for e in (2, 1)]
    figure = rate_distortion({"a": point(4.0, 21.0, 0.1, 0.3, history=path)})
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[3, 22], [4, 21]])
    spans = [np.ptp(s, 0) for c in axes.collections for s in getattr(c, "get_segments", list)()]
    assert any(np.allclose(span, [0.4, 0]) for span in spans)
    assert any(np.allclose(span, [0, 1.2]) for span in spans)
    (contour,) = [each for each in axes.collections if isinstance(each, ContourSet)]
    levels = [path.vertices.sum(1) for path in contour.get_paths() if len(path.vertices)]
    assert len(levels) >= 3
    assert max(np.ptp(level) for level in levels) < 1e-9
    named = {float(t.get_text().split()[1].replace("−", "-")) for t in axes.texts}
    assert named <= {round(-level[0], 6) for level in levels}
    assert len(named) >= 2


def test_runs_over_beta_are_joined_in_the_order_of_their_rates():
    points = {"a": point(5.0, 20.0), "b": point(1.0, 26.0), "c": point(3.0, 22.0)}
    figure = rate_distortion(points, joined=True)
    joined = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    np.testing.assert_allclose(joined[0].get_xydata(), [[1, 26], [3, 22], [5, 20]])
    plain = rate_distortion(points).axes[0].lines
    assert not [line for line in plain if line.get_linestyle() == "--"]


def test_bars_are_sorted_and_active_dimensions_are_blue():
    other = {"kl": [1.5], "posterior_mean_variance": [0.0]}
    figure = kl_by_dimension(posterior(sites={"z": SITE, "u": other}))
    bars = [[(b.get_height(), to_hex(b.get_facecolor())) for b in a.patches] for a in figure.axes]
    assert bars[0] == [(2.0, BLUE), (0.5, GREY), (0.1, BLUE), (0.0, GREY)]
    assert bars[1] == [(1.5, GREY)]
    assert "z: 2 of 4 dimensions active" in text(figure)
    whole = {"kl": [3.0], "posterior_mean_variance": [0.5, 0.0], "active_units": 1, "units": 2}
    figure = kl_by_dimension(posterior(sites={"z": whole}))
    assert "z: 1 of 2 dimensions active; its KL has no parts" in text(figure)


def test_coverage_lies_beside_the_diagonal():
    axes = calibration_curves(posterior(calibration=COVERED)).axes[0]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[0, 0], [1, 1]])
    np.testing.assert_allclose(axes.lines[1].get_xydata(), [[0.5, 0.55], [0.9, 0.8]])


def test_what_is_known_is_drawn_and_nothing_else():
    unknown = replace(estimate(), khat=torch.full((40,), torch.nan), curve=None)
    seen = {"sites": {"z": SITE}, "calibration": COVERED}
    seen |= {key: {"mean": 3.0, "standard_error": 0.1} for key in ("rate", "distortion")}
    ranked = {"num_data": 60, "num_samples": 2, "curves": {"guide": {"z": [0.3, 0.7]}}}
    whole = finding(results(diagnostics=seen, calibration=ranked), estimate(), estimate())
    assert set(draw_findings({"": whole})) == set(FINDING_PICTURES)
    bare = finding(results(), unknown)
    assert set(draw_findings({"": bare})) == {"rate_distortion"}
    assert set(draw_findings({"a": whole, "b": bare})) == set(FINDING_PICTURES) - {
        "kl_by_dimension",
        "guide_calibration",
    }
    assert draw_findings({"": finding(Results(), unknown)}) == {}
    assert results(4.0, 20.0).distortion.mean == 20.0
    assert whole.results.rate.mean == 3.0


def test_names_of_lines_stand_beside_the_window_where_nothing_runs_through_them():
    path = [{"epoch": e, "valid_kl": e / 9, "valid_reconstruction": -30.0 + e} for e in range(9)]
    for figure in (
        khat_curves({"a": point(4.0, 20.0)}),
        rate_distortion({"a": point(0.2, 21.0, 0.1, 0.3, history=path)}),
    ):
        figure.draw_without_rendering()
        (axes,) = figure.axes
        assert len(axes.texts) >= 2
        boxes = [text.get_window_extent() for text in axes.texts]
        titles = (axes.title, axes._left_title)  # matplotlib 3.10 has no other way to it
        others = [axes.get_window_extent(), *(t.get_window_extent() for t in titles if t._text)]
        assert not any(box.overlaps(other) for box in boxes for other in others)
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_a_rate_is_not_below_zero_and_a_legend_names_what_is_there():
    assert rate_distortion({"a": point(0.2, 21.0)}).axes[0].get_xlim()[0] == 0
    one = {"kl": [1.5], "posterior_mean_variance": [0.5], "active_units": 1, "units": 1}
    (axes,) = kl_by_dimension(posterior(sites={"z": one})).axes
    assert len(axes.get_legend().get_texts()) == 1


def test_every_text_lies_inside_the_figure():
    figures = [
        bound_curves({"a": point(4.0, 20.0), "a rather long name": point(4.0, 20.0)}),
        khat_curves({"a": point(4.0, 20.0)}),
        rate_distortion({"a": point(4.0, 20.0)}),
        kl_by_dimension(posterior(sites={"z": SITE})),
        calibration_curves(posterior(calibration=COVERED)),
    ]
    for figure in figures:
        printed = dots(figure)
        assert printed.shape[1] <= 1000
        edges = np.concatenate([printed[[0, -1]].ravel(), printed[:, [0, -1]].ravel()])
        assert edges.min() == 255


@pytest.mark.parametrize(
    "draw",
    [
        bound_curves,
        khat_curves,
        rate_distortion,
        kl_by_dimension,
        calibration_curves,
        guide_calibration,
    ],
)
def test_nothing_to_draw_is_not_drawn(draw):
    unknown = replace(estimate(), khat=torch.full((40,), torch.nan), curve=None)
    assert draw({}) is None
    assert draw(estimated(unknown)) is None
    empty = Results.read({"diagnostics": {"sites": {"z": {}}}})
    assert draw({"a": finding(empty, unknown)}) is None
