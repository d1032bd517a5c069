"""Pages as a browser shows them: no wider than the window, and every picture drawn.

They need Chromium, so that they run by ``make browser`` and not by ``make test``.
"""

import json
import re
import shutil
import subprocess
from html import escape, unescape

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

# The pointer is moved and clicked over the map, and sliders moved by their events, as a key does;
# the page's own policy holds in the frame, so that the script runs only if its hash is right.
EXPLORED = """<body style="margin: 0"><iframe srcdoc="{page}" style="border: 0"
width="{width}" height="30000"></iframe><script>addEventListener("load", async () => {{
  const page = document.querySelector("iframe").contentDocument;
  const at = name => page.getElementById("explorer-" + name);
  for (let i = 0; i < 200 && at("controls").hidden; i++) await new Promise(r => setTimeout(r, 50));
  const seen = [];
  const look = () => seen.push({{
    place: at("place").textContent, said: at("said").textContent,
    decoded: at("decoded").toDataURL(),
    datum: page.querySelector("canvas[data-part]").toDataURL()}});
  const point = (kind, u, v) => {{
    const box = at("map").getBoundingClientRect();
    const [clientX, clientY] = [box.x + u * box.width, box.y + v * box.height];
    at("map").dispatchEvent(new PointerEvent(kind, {{clientX, clientY, bubbles: true}}));
  }};
  look();
  point("pointermove", 0.2, 0.2);
  look();
  point("click", 0.9, 0.9);
  look();
  at("axis0").value = 0;
  at("axis0").dispatchEvent(new Event("input"));
  at("datum").value = 1;
  at("datum").dispatchEvent(new Event("input"));
  look();
  const script = page.createElement("script");
  script.textContent = "document.title = 'injected'";
  page.body.append(script);
  const found = {{hidden: at("controls").hidden, title: page.title, seen}};
  document.body.innerHTML = "<pre id=found></pre>";
  document.getElementById("found").textContent = JSON.stringify(found);
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


def measured(chromium, page, width, folder, wrapper=WRAPPER):
    """What a browser finds of a page in a frame of a width."""
    frame = folder / "frame.html"
    frame.write_text(wrapper.format(page=escape(page.read_text()), width=width))
    wait = "--virtual-time-budget=10000"
    shown = browse(chromium, frame, 1400, 900, folder, "--dump-dom", wait)
    return json.loads(unescape(re.search('<pre id="found">(.*?)</pre>', shown)[1]))


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


@pytest.mark.parametrize("width", [390, 1280])
def test_the_explorer_follows_pointer_and_keys_and_no_other_script_runs(
    chromium, pages, tmp_path, width
):
    found = measured(chromium, pages["report"], width, tmp_path, EXPLORED)
    assert not found["hidden"]
    assert found["title"] != "injected"
    first, moved, clicked, keyed = found["seen"]
    for name in ("place", "decoded"):
        assert first[name] != moved[name] == clicked[name] != keyed[name]
    for name in ("said", "datum"):
        assert first[name] == moved[name] != clicked[name] != keyed[name]
    assert re.fullmatch(r"(.*) = -?\d+\.\d\d, (.*) = -?\d+\.\d\d", moved["place"])
    assert keyed["said"].startswith("Test datum 1, label")
    for part in ("log p(x)", "k-hat", "KL(q(z|x) ‖ p(z)) ="):
        assert part in keyed["said"]
