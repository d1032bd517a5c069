"""Pictures show the numbers that they were given, where they should, under their names."""

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import AxesImage

from pyrovae.reporting import figures as plots


def picture(figure):
    """The image of a figure and the rows and columns of data pixels in it."""
    (image,) = figure.axes[0].findobj(AxesImage)
    return image, np.ma.filled(image.get_array(), np.nan)


def cell(figure, i, j, size):
    """The data pixels of the cell (i, j), one pixel of separation around each."""
    _, drawn = picture(figure)
    top, left = 1 + i * (size[0] + 1), 1 + j * (size[1] + 1)
    return drawn[top : top + size[0], left : left + size[1]]


def dots(figure):
    """What is printed, as grey levels ``[rows, columns]`` from 0 to 255."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., 0].astype(float)


def text(figure):
    return " ".join(each.get_text() for each in figure.findobj(matplotlib.text.Text))


@pytest.mark.parametrize(("n", "columns"), [(12, 4), (9, 3), (7, 3), (1, 1), (3, 2)])
def test_the_grid_holds_every_image_in_reading_order(n, columns):
    x = torch.rand(n, 1, 5, 6)
    figure = plots.image_grid(x, title="Samples")
    for k in range(n):
        np.testing.assert_allclose(cell(figure, k // columns, k % columns, (5, 6)), x[k, 0])
    drawn = picture(figure)[1]
    assert drawn.shape[1] == 1 + 7 * columns
    assert np.isfinite(drawn).sum() == x.numel()
    assert figure.axes[0].get_title(loc="left") == "Samples"


@pytest.mark.parametrize("shape", [(8, 8), (28, 28), (7, 19)])
@pytest.mark.skipif(
    tuple(map(int, matplotlib.__version__.split(".")[:2])) < (3, 11),
    reason="matplotlib before 3.11 places a picture a dot beside its axes",
)
def test_the_printed_dots_are_the_data_without_interpolation(shape):
    x = torch.rand(6, 1, *shape)
    figure = plots.image_grid(x, title="Samples")
    printed = dots(figure)
    image, data = picture(figure)
    box = image.axes.get_window_extent()
    height, width = round(box.height), round(box.width)
    assert height % data.shape[0] == 0
    assert width % data.shape[1] == 0
    top, left = printed.shape[0] - round(box.y1), round(box.x0)
    printed = printed[top : top + height, left : left + width]
    scale = height // data.shape[0]
    expected = np.nan_to_num(np.floor(data * 255.999), nan=255.0).repeat(scale, 0).repeat(scale, 1)
    assert np.abs(printed - expected).max() <= 1


def test_colour_images_keep_their_channels():
    x = torch.rand(4, 3, 5, 6)
    figure = plots.image_grid(x, title="Samples")
    np.testing.assert_allclose(cell(figure, 1, 0, (5, 6)), x[2].permute(1, 2, 0))


def test_data_in_the_unit_interval_share_black_and_white_and_other_data_get_a_bar():
    dim = plots.image_grid(0.2 * torch.rand(4, 1, 5, 5), title="Samples")
    assert picture(dim)[0].get_clim() == (0, 1)
    assert len(dim.axes) == 1
    raw = plots.image_grid(torch.arange(17.0).repeat(4, 1)[:, None, None], title="Samples")
    low, high = picture(raw)[0].get_clim()
    assert 0 <= low < 0.2
    assert 15.8 < high <= 16
    assert len(raw.axes) == 2
    outlier = torch.rand(100, 1, 5, 5) * 16
    outlier[0, 0, 0, 0] = 1e6
    assert picture(plots.image_grid(outlier, title="Samples"))[0].get_clim()[1] < 17


def test_reconstructions_lie_below_their_data_in_the_range_of_the_data():
    x, xhat = torch.rand(13, 1, 4, 4), 3 * torch.rand(13, 1, 4, 4)
    figure = plots.reconstructions(x, xhat)
    for k in range(13):
        i, j = 2 * (k // 10), k % 10
        np.testing.assert_allclose(cell(figure, i, j, (4, 4)), x[k, 0])
        np.testing.assert_allclose(cell(figure, i + 1, j, (4, 4)), xhat[k, 0])
    axes = figure.axes[0]
    names = {
        t: label.get_text()
        for t, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    }
    assert names == {0: "data", 1: "reconstruction", 2: "data", 3: "reconstruction"}
    assert picture(figure)[0].get_clim() == (0, 1)


def test_the_manifold_shows_each_event_at_its_latent():
    axis = torch.linspace(-2.0, 2.0, 9)
    z = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    for dim in (0, 1):
        decoded = z[..., dim, None, None, None].expand(9, 9, 1, 3, 3)
        image, drawn = picture(plots.manifold(decoded, (-2.0, 2.0)))
        left, right, bottom, top = image.get_extent()
        rows, columns = drawn.shape
        for point in ((-2.0, 1.5), (0.0, 0.0), (2.0, -1.0)):
            j = int((point[0] - left) / (right - left) * columns)
            i = int((top - point[1]) / (top - bottom) * rows)
            assert drawn[i, j] == pytest.approx(point[dim])
        assert image.axes.get_xlabel() == "z[0]"
        assert image.axes.get_ylabel() == "z[1]"


def test_interpolations_run_from_weight_zero_to_one():
    rows = torch.rand(3, 11, 1, 4, 4)
    figure = plots.interpolations(rows)
    image, drawn = picture(figure)
    left, right = image.get_extent()[:2]
    for j, weight in enumerate(torch.linspace(0, 1, 11).tolist()):
        centre = left + (1 + 5 * j + 2) / drawn.shape[1] * (right - left)
        assert centre == pytest.approx(weight, abs=1e-6)
    np.testing.assert_allclose(cell(figure, 2, 10, (4, 4)), rows[2, 10, 0])
    assert image.axes.get_xlabel() == "mixing weight"


def test_profiles_are_the_data_up_to_the_stated_range():
    x = torch.randn(4, 30)
    axes = plots.image_grid(x, title="Samples").axes[0]
    low, high = x.min().item(), x.max().item()
    lines = [line.get_ydata() for line in axes.lines][-4:]
    for k, line in enumerate(lines):
        panel = line * 2 - (1 - k // 2)
        np.testing.assert_allclose((panel - 0.1) / 0.8 * (high - low) + low, x[k], atol=1e-5)
    assert f"dimension 0 to 29, x from {low:.3g} to {high:.3g}" in axes.get_xlabel()


def test_two_dimensional_events_are_points_and_reconstructions_are_joined_to_them():
    x, xhat = torch.randn(5, 2), torch.randn(5, 2)
    axes = plots.image_grid(x, title="Samples").axes[0]
    np.testing.assert_allclose(axes.collections[0].get_offsets(), x)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("x[0]", "x[1]")
    axes = plots.reconstructions(x, xhat).axes[0]
    for k in range(5):
        np.testing.assert_allclose(axes.lines[k].get_xydata(), torch.stack([x[k], xhat[k]]))
    colours = axes.collections[0].get_facecolors()
    assert len({tuple(c) for c in colours[::2]}) == len({tuple(c) for c in colours[1::2]}) == 1
    assert tuple(colours[0]) != tuple(colours[1])
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["data", "reconstruction"]


SHAPES = [(1,), (2,), (3,), (2000,), (2, 4, 4), (5, 6), (1, 1, 9), (3, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_event_shape_can_be_drawn(shape):
    for n in (1, 5):
        x = torch.randn(n, *shape)
        figures = [
            plots.image_grid(x, title="Samples"),
            plots.reconstructions(x, x),
            plots.manifold(x.expand(3, n, *shape), (-1, 1)),
            plots.interpolations(x.expand(3, n, *shape)),
        ]
        for figure in figures:
            figure.set_dpi(50)
            printed, box = dots(figure), figure.axes[0].get_window_extent()
            rows = slice(len(printed) - int(box.y1), len(printed) - int(box.y0))
            assert printed[rows, int(box.x0) : int(box.x1)].min() < 200


def test_two_latent_dimensions_are_drawn_as_they_are_with_one_colour_a_class():
    z, labels = torch.randn(200, 2), torch.arange(200) % 10
    axes = plots.latent_space(z, labels, site="code").axes[0]
    drawn = axes.collections[0]
    np.testing.assert_allclose(drawn.get_offsets(), z)
    assert axes.get_xlabel() == "code[0], posterior mean"
    assert axes.get_aspect() == 1
    legend = axes.get_legend()
    assert [t.get_text() for t in legend.get_texts()] == [str(k) for k in range(10)]
    for label, colour in zip(labels.tolist(), drawn.get_facecolors(), strict=True):
        assert legend.legend_handles[label].get_color() == pytest.approx(tuple(colour[:3]))
    assert len({tuple(c) for c in drawn.get_facecolors()}) == 10


def test_more_latent_dimensions_are_projected_on_their_principal_components():
    from sklearn.decomposition import PCA

    z = (torch.randn(300, 6) @ torch.randn(6, 6) + 5).double()
    axes = plots.latent_space(z, None).axes[0]
    pca = PCA(2).fit(z.numpy())
    points, shares = axes.collections[0].get_offsets(), pca.explained_variance_ratio_
    np.testing.assert_allclose(np.abs(points), np.abs(pca.transform(z.numpy())), atol=1e-9)
    for label, share in zip((axes.get_xlabel(), axes.get_ylabel()), shares, strict=True):
        assert f"{share:.1%} of variance" in label


def test_the_shares_of_a_plane_are_all_of_its_variance():
    z = torch.randn(100, 2) @ torch.randn(2, 5)
    axes = plots.latent_space(z, None).axes[0]
    shares = [float(t.split("(")[1].split("%")[0]) for t in (axes.get_xlabel(), axes.get_ylabel())]
    assert sum(shares) == pytest.approx(100, abs=0.11)
    assert shares[0] > shares[1]


def test_one_latent_dimension_is_a_histogram_of_all_data():
    axes = plots.latent_space(torch.randn(500, 1), torch.arange(500) % 3).axes[0]
    assert sum(bar.get_height() for bars in axes.containers for bar in bars) == 500
    assert axes.get_ylabel() == "count"


@pytest.mark.parametrize("labels", [torch.rand(50), torch.rand(50).round(), torch.arange(50)])
def test_real_values_and_many_classes_get_a_colour_bar(labels):
    figure = plots.latent_space(torch.randn(50, 2), labels)
    assert figure.axes[0].get_legend() is None
    assert figure.axes[1].get_ylabel() == "label"
    np.testing.assert_allclose(figure.axes[0].collections[0].get_array(), labels)


def test_learning_curves_are_the_history():
    rows = [{"epoch": e, "train_elbo": -100.0 / e, "train_kl": 3.0 * e} for e in range(1, 21)]
    for row in rows:
        row |= {"train_reconstruction": None, "valid_elbo": -101.0 / row["epoch"]}
    for row in rows[2:]:
        row["valid_kl"] = 2.0 * row["epoch"]
    rows[6]["valid_elbo"] = -1.0
    elbo, kl = plots.learning_curves(rows).axes
    assert (elbo.get_title(loc="left"), kl.get_title(loc="left")) == ("ELBO", "KL(q(z|x) ‖ p(z))")
    train = [(row["epoch"], row["train_elbo"]) for row in rows]
    np.testing.assert_array_equal(elbo.lines[0].get_xydata(), train)
    np.testing.assert_array_equal(elbo.lines[1].get_ydata(), [row["valid_elbo"] for row in rows])
    np.testing.assert_array_equal(kl.lines[1].get_xdata(), np.arange(3, 21))
    assert elbo.lines[2].get_xydata().tolist() == [[7.0, -1.0]]
    assert "best: -1.00 at epoch 7" in text(elbo.figure)
    for axes in (elbo, kl):
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "nats per datum")


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_epochs_are_whole(epochs):
    history = [{"epoch": e, "train_elbo": -1.0 / e} for e in range(1, epochs + 1)]
    figure = plots.learning_curves(history)
    dots(figure)
    assert all(tick == round(tick) for tick in figure.axes[0].get_xticks())


def test_dollar_signs_and_underscores_of_a_name_are_text():
    figure = plots.latent_space(torch.randn(9, 2), None, site="a_$b_{$")
    dots(figure)
    assert "a_$b_{$[0], posterior mean" in text(figure)


def test_the_picture_and_the_settings_of_matplotlib_are_independent():
    x = torch.rand(4, 1, 5, 5)

    def printed():
        figures = plots.manifold(x[:, None], (-1, 1)), plots.latent_space(x[:, 0, 0, :2], None)
        return [dots(figure) for figure in figures]

    usual = printed()
    with matplotlib.rc_context({"font.size": 31, "axes.facecolor": "black", "figure.dpi": 30}):
        before = dict(matplotlib.rcParams)
        foreign = printed()
        assert dict(matplotlib.rcParams) == before
    for one, other in zip(usual, foreign, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.latent_space(torch.full((4, 2), torch.nan), None), "finite"),
        (lambda: plots.latent_space(torch.rand(4, 2), torch.arange(3)), r"labels of shape \[4\]"),
        (lambda: plots.reconstructions(torch.rand(3, 4), torch.rand(4, 4)), r"got \[4, 4\]"),
        (lambda: plots.image_grid(torch.rand(0, 4), title=""), r"got a tensor \[0, 4\]"),
        (lambda: plots.learning_curves([]), "history"),
        (lambda: plots.learning_curves([{"epoch": 1, "train_elbo": None}]), "history"),
    ],
)
def test_wrong_input_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_binary_sequences_are_a_piano_roll():
    x = (torch.rand(2, 7, 4, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    x[1, 5:] = torch.nan
    drawn = plots.sequences({"data": x, "generated": 1 - x})
    for axes, shown in zip(drawn.axes, [*x, *(1 - x)], strict=True):
        (image,) = axes.findobj(AxesImage)
        # Time to the right, and the last dimension at the top.
        assert image.origin == "lower"
        np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), shown.numpy().T)
    assert [a.get_ylabel() for a in drawn.axes] == ["data", "", "generated", ""]
    grey = [np.asarray(a.patches[0].get_extents().transformed(a.transData.inverted()))
            for a in drawn.axes[:2]]  # fmt: skip
    np.testing.assert_allclose([box[:, 0] for box in grey], [[7, 7], [5, 7]])


def test_real_sequences_are_lines_of_which_those_that_move_have_a_colour():
    x = torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(0))
    x[..., 3] *= 9
    x[..., 5] *= 0.01
    (axes,) = plots.sequences({"data": x}).axes
    lines = {line.get_color(): line.get_ydata() for line in axes.lines}
    np.testing.assert_allclose(lines[plots.BLUE], x[0, :, 3])
    greys = [line.get_ydata() for line in axes.lines if line.get_color() == plots.GREY]
    assert any(np.allclose(each, x[0, :, 5]) for each in greys)
    assert len(axes.lines) == 8
