"""Pages as a browser shows them: no wider than the window, and every picture drawn.

They need Chromium, so that they run by ``make browser`` and not by ``make test``.
"""

import json
import re
import shutil
import subprocess
from html import escape

import numpy as np
import pytest
from commands import TRAIN, run

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]
WRAPPER = """<body style="margin: 0"><iframe srcdoc="{page}" style="border: 0"
width="{width}" height="30000"></iframe><script>addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument;
  const box = i => {{ const r = i.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; }};
  const wide = [...page.querySelectorAll("body *")].filter(e => !e.closest(".scroll"));
  const found = {{
    page: page.documentElement.scrollWidth,
    right: Math.max(...wide.map(e => e.getBoundingClientRect().right)),
    bottom: page.body.getBoundingClientRect().bottom,
    drawn: [...page.images].map(i => i.complete && i.naturalWidth > 0),
    boxes: [...page.images].map(box)}};
  document.body.innerHTML = "<pre id=found>" + JSON.stringify(found) + "</pre>";
}});</script>"""

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def chromium():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found, f"install one of {', '.join(BROWSERS)} to run these tests"
    return found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    assert run(*TRAIN, "--out", folder / "one") == 0
    assert run("evaluate", folder / "one", "--samples", "100") == 0
    assert run("report", folder / "one") == 0
    shutil.copytree(folder / "one", folder / "a_run_of_a_long_name_without_any_space_in_it")
    comparison = folder / "comparison.html"
    assert run("compare", *sorted(folder.iterdir()), "--out", comparison) == 0
    return {"report": folder / "one" / "report.html", "comparison": comparison}


def browse(chromium, page, width, height, folder, *options):
    command = [chromium, *FLAGS, f"--user-data-dir={folder / 'profile'}", *options]
    command += [f"--window-size={width},{height}", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def measured(chromium, page, width, folder):
    """What a browser finds of a page in a frame of a width."""
    frame = folder / "frame.html"
    frame.write_text(WRAPPER.format(page=escape(page.read_text()), width=width))
    shown = browse(chromium, frame, 1400, 900, folder, "--dump-dom")
    return json.loads(re.search('<pre id="found">(.*?)</pre>', shown)[1])


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_pages_fit_their_window_and_all_pictures_are_drawn(chromium, pages, tmp_path, name, width):
    from matplotlib.image import imread

    found = measured(chromium, pages[name], width, tmp_path)
    assert found["page"] <= width
    assert found["right"] <= width
    assert len(found["drawn"]) >= 10
    assert all(found["drawn"])
    shot = tmp_path / "shot.png"
    browse(chromium, pages[name], width, round(found["bottom"]), tmp_path, f"--screenshot={shot}")
    pixels = imread(shot)[..., :3]
    assert pixels.shape[1] == width
    for x, y, wide, high in found["boxes"]:
        part = pixels[round(y) : round(y + high), round(x) : round(x + wide)]
        assert np.ptp(part) > 0.5
        assert min(wide, high) > 40
