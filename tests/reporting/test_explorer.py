"""The latent explorer shows what the pair decodes, and its page runs no script but its own."""

import hashlib
import json
import re
from base64 import b64decode, b64encode
from io import BytesIO

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from PIL import Image
from pyro.nn import PyroModule

import pyrovae
from pyrovae.data import Dataset, Splits
from pyrovae.data.tables import Column
from pyrovae.evidence.result import LogLikelihood
from pyrovae.reporting import explorer, render_report
from pyrovae.reporting.explorer import PARTS, SIDE, Explorer, explore, view
from pyrovae.reporting.figures import responses
from pyrovae.runs import Run

N = 12
SCALES = torch.tensor([0.3, 2.0, 1.0])


class Ramp(PyroModule):
    """A model whose images [1, 2, 3] are linear in z, and whose mean is therefore known."""

    def __init__(self, latent, shape, noise=0.1):
        super().__init__()
        self.latent, self.noise = latent, noise
        weight = torch.randn(latent, *shape, generator=torch.Generator().manual_seed(0))
        self.register_buffer("weight", 0.05 * weight)

    def decode(self, z):
        return 0.5 + torch.tensordot(z, self.weight, 1)

    def forward(self, x, mask=True):
        event = x.dim() - 1
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latent), 1.0).to_event(1))
            likelihood = dist.Normal(self.decode(z), self.noise)
            pyro.sample("x", likelihood.mask(mask).to_event(event), obs=x)


class Known(PyroModule):
    """A guide whose means are pixels of x, each on a scale of its own."""

    def __init__(self, latent):
        super().__init__()
        self.latent = latent

    def mean(self, x):
        return SCALES[: self.latent] * (x.flatten(1)[:, : self.latent] - 0.5)

    def forward(self, x, mask=True):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.mean(x), 0.01).to_event(1))


def dataset(shape, n=N, **more):
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(1))
    return Dataset("some", torch.Size(shape), x, x, x, **more)


def explored(latent=2, shape=(1, 2, 3), n=N, **more):
    model, guide, data = Ramp(latent, shape), Known(latent), dataset(shape, n, **more)
    return model, guide, data, explore(model, guide, data, seed=0)


def levels(x):
    return (255 * x).round().clamp(0, 255)


def test_the_sheet_of_a_plane_is_what_the_model_decodes_there():
    model, guide, data, found = explored()
    for i, j in ((0, 0), (3, 11), (16, 8)):
        share = torch.tensor([j, i]) / (SIDE - 1)
        z = found.ends[:, 0] + share * (found.ends[:, 1] - found.ends[:, 0])
        torch.testing.assert_close(
            found.sheet[i, j].float(), levels(model.decode(z)), atol=1, rtol=0
        )
    assert found.share.isnan().all()
    torch.testing.assert_close(found.means, guide.mean(data.test))
    data_shown, reconstructed, *drawn = found.events.float().unbind(1)
    torch.testing.assert_close(data_shown, levels(data.test))
    expected = levels(model.decode(guide.mean(data.test)))
    for each in (reconstructed, *drawn):  # the posterior is a hundredth wide
        torch.testing.assert_close(each, expected, atol=3, rtol=0)
    assert any(not torch.equal(reconstructed, each) for each in drawn)


def test_more_latents_are_seen_along_the_principal_axes_of_the_aggregate_posterior():
    model, guide, data, found = explored(latent=3, shape=(6,), n=4000)
    z = guide.mean(data.test)
    centred = z - z.mean(0)
    _, singular, axes = torch.linalg.svd(centred, full_matrices=False)
    spread = singular**2
    torch.testing.assert_close(found.share, (spread / spread.sum())[:2], atol=0.01, rtol=0)
    assert found.means.shape == (explorer.MOST, 2)
    along = centred[: explorer.MOST] @ axes[:2].T
    torch.testing.assert_close(found.means.abs(), along.abs(), atol=0.03, rtol=0)
    middle = found.sheet[SIDE // 2, SIDE // 2]
    torch.testing.assert_close(middle, model.decode(z.mean(0)), atol=1e-3, rtol=0)


def test_the_kl_of_each_datum_is_the_closed_form():
    _, guide, data, found = explored()
    loc = guide.mean(data.test)
    expected = 0.5 * (loc**2 + 0.01**2 - 1 - 2 * np.log(0.01)).sum(-1)
    torch.testing.assert_close(found.kl, expected, rtol=1e-4, atol=0)


def test_columns_of_a_linear_model_respond_by_its_weights():
    model, guide, data = Ramp(2, (6,)), Known(2), dataset((6,))
    values, curves, site = explorer.respond(model, guide, data)
    assert site == "z"
    z = guide.mean(data.test)
    torch.testing.assert_close(values[:, [0, -1]].mean(1), z.mean(0))
    torch.testing.assert_close((values[:, -1] - values[:, 0]), 4 * z.std(0))
    rise = (curves[:, -1] - curves[:, 0]) / (values[:, -1] - values[:, 0])[:, None]
    torch.testing.assert_close(rise, model.weight / data.test.std(0, correction=0))
    middle = (model.decode(z.mean(0)) - data.test.mean(0)) / data.test.std(0, correction=0)
    torch.testing.assert_close(curves[:, SIDE // 2], middle.expand(2, 6))
    drawn = responses(values, curves, [f"c{i}" for i in range(6)])
    named = {text.get_text() for text in drawn.legends[0].get_texts()}
    assert named == {f"c{i}" for i in range(6)}
    for panel, expected in zip(drawn.axes, curves, strict=True):
        shown = {line.get_label(): line.get_ydata() for line in panel.lines}
        for i, column in enumerate(expected.T):
            torch.testing.assert_close(torch.tensor(shown[f"c{i}"]).float(), column)
    assert explorer.respond(model, guide, dataset((1, 2, 3))) is None


def test_missing_numbers_are_left_out_and_not_shown_as_zero():
    mask = torch.rand(N, 6, generator=torch.Generator().manual_seed(2)) > 0.3
    columns = tuple(Column(f"c{i}", "real") for i in range(6))
    context = Splits((mask,), (mask,), (mask,))
    *_, found = explored(shape=(6,), context=context, columns=columns)
    assert torch.equal(found.events[:, 0].isnan(), ~mask)
    assert not found.events[:, 1:].isnan().any()
    given = view(found)["given"]
    assert given["columns"] == tuple(f"c{i}" for i in range(6))
    assert [value is None for value in given["events"][0]] == (~mask[0]).tolist()
    assert None not in given["spread"][0]


@pytest.mark.parametrize(
    ("latent", "shape", "more"),
    [
        (1, (1, 2, 3), {}),
        (2, (2, 2, 3), {}),
        (2, (65,), {}),
        (2, (1, 2, 3), {"context": Splits(*3 * [(torch.zeros(N, dtype=torch.int64),)])}),
    ],
    ids=["a number", "channels", "long", "labels"],
)
def test_what_has_no_plane_to_look_at_has_no_explorer(latent, shape, more):
    assert explored(latent, shape, **more)[-1] is None


def test_discrete_latents_are_no_plane_and_no_columns_respond_to_them():
    def switches(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(x.flatten(1)[:, :2].sigmoid()).to_event(1))

    for shape in ((1, 2, 3), (6,)):
        assert explore(Ramp(2, shape), switches, dataset(shape), seed=0) is None
        assert explorer.respond(Ramp(2, shape), switches, dataset(shape)) is None


def sprite(encoded, columns, tile):
    pixels = np.asarray(Image.open(BytesIO(b64decode(encoded))))
    height, width = tile
    rows = pixels.shape[0] // height
    return pixels.reshape(rows, height, columns, width, *pixels.shape[2:]).swapaxes(1, 2)


@pytest.mark.parametrize("channels", [1, 3])
def test_tiles_of_the_sprites_are_the_events(channels):
    *_, found = explored(shape=(channels, 4, 5))
    given = view(found)["given"]
    for name, columns, expected in (
        ("sheet", SIDE, found.sheet),
        ("events", PARTS, found.events),
    ):
        tiles = torch.from_numpy(sprite(given[name], columns, given["tile"]).copy())
        tiles = tiles[:, :, None] if channels == 1 else tiles.movedim(-1, 2)
        assert torch.equal(tiles, expected)


def noise(size, n):
    generator = torch.Generator().manual_seed(0)

    def bits(*shape):
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    shape = (3, size, size)
    return Explorer(
        sheet=bits(SIDE, SIDE, *shape),
        events=bits(n, PARTS, *shape),
        means=torch.randn(n, 2),
        ends=torch.tensor([[-4.0, 4.0]] * 2),
        share=torch.tensor([0.5, 0.25]),
        kl=torch.rand(n),
        labels=torch.arange(n) % 3,
    )


@pytest.mark.parametrize(("size", "n"), [(8, 200), (32, 60), (48, 12)])
def test_a_page_stays_below_two_megabytes_even_for_noise(size, n):
    found = view(noise(size, n))
    assert len(json.dumps(found["given"])) <= 2_000_000
    assert found["side"] % 2 == 1
    assert len(found["dots"]) == len(found["given"]["said"]) >= 12


def test_large_images_are_shown_smaller_by_means():
    model, guide, data = Ramp(2, (1, 96, 64)), Known(2), dataset((1, 96, 64))
    found = explore(model, guide, data, seed=0)
    assert found.events.shape[2:] == (1, 48, 32)
    small = torch.nn.functional.avg_pool2d(data.test, 2)
    torch.testing.assert_close(found.events[:, 0].float(), levels(small), atol=1, rtol=0)


def test_what_is_said_of_a_datum_is_what_was_found():
    found = noise(4, 3)
    ll = LogLikelihood(
        log_prob=torch.tensor([-1.25, -2.5]),
        standard_error=torch.zeros(2),
        ess=torch.ones(2),
        khat=torch.tensor([0.3, 0.9]),
        num_samples=10,
    )
    first, second, third = view(found, ll, ["ant", "bird"])["given"]["said"]
    assert first.startswith("Test datum 0, label ant; log p(x) = -1.250 nats; k-hat 0.30; KL")
    assert second.startswith("Test datum 1, label bird; log p(x) ≥ -2.500 nats; k-hat 0.90; KL")
    assert third == f"Test datum 2, label 2; KL(q(z|x) ‖ p(z)) = {found.kl[2].item():.3f} nats."


def test_it_is_kept_in_the_run_and_forged_ones_are_refused(tmp_path):
    run, (*_, found) = Run(tmp_path), explored()
    assert explorer.load(run) is None
    explorer.save(run, found)
    read = explorer.load(run)
    torch.testing.assert_close(read.tensors, found.tensors, equal_nan=True)
    assert read.columns == found.columns
    for name, forged in (
        ("events", found.events[:, :2]),
        ("sheet", found.sheet.float()),
        ("means", found.means + torch.inf),
        ("ends", found.ends.flip(1)),
        ("columns", ("a", "b")),
    ):
        explorer.save(run, found._replace(**{name: forged}))
        with pytest.raises(pyrovae.InputError, match=explorer.EXPLORER):
            explorer.load(run)
    explorer.save(run, None)
    assert explorer.load(run) is None


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"


def page(names=()):
    config = {"model": {"name": "m"}, "guide": {"name": "g"}, "data": {"name": "d"}}
    return render_report(config, {}, [], {}, explored=view(noise(4, 6), names=names))


def test_the_policy_of_the_page_lets_its_own_script_run_alone():
    html = page()
    exact = re.search(r"<script>(.*?)</script>", html, re.S)[1]
    digest = b64encode(hashlib.sha256(exact.encode()).digest()).decode()
    policy = re.search(r'content="(default-src[^"]*)"', html)[1]
    assert policy == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )
    assert "script-src" not in render_report({}, {}, [], {})
    assert not re.search(r"\bon\w+=|innerHTML|eval\(|Function\(|fetch\(", exact + html)


def test_names_of_strangers_are_text():
    html = page([EVIL] * 3)
    assert html.count("<script") == 2
    assert "<img" not in html
    data = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', html, re.S)[1]
    assert not set(data) & set("<>&'")
    assert EVIL in json.loads(data)["said"][0]
