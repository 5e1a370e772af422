"""The latent explorer in a real browser, from disk: what it decodes is what the bundle decodes."""

import io
import re
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
from model_bundles import make_model, write_bundle
from PIL import Image

import vaeflow
from vaeflow.bundle.runtime import Bundle
from vaeflow.common.workspace import Workspace
from vaeflow.report.explorer import BINARY, MODULE, RUNTIME
from vaeflow.report.page import write_report

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium"),
]
DRAWS = 2_000
# Canvases hold bytes; the decoder's sums are taken in another order in the browser.
CLOSE = 0.6 / 255
OF_THIS_TEST = "Canvas2D: Multiple readback operations"  # a warning to those who read canvases
CONTRAST = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: the extra dev")
    with api.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def written(finished):
    """The page that the stage has made."""
    return finished / "outputs" / "report" / "index.html"


@pytest.fixture
def opened(browser, written):
    with of(browser, written) as page:
        yield page


@contextmanager
def of(browser, address, **options):
    """A page opened from disk, whose decoder has answered, and that asked for nothing else."""
    page, wrong = browser.new_page(**{"viewport": {"width": 1100, "height": 900}, **options}), []

    def hear(said):
        if said.type in ("error", "warning") and not said.text.startswith(OF_THIS_TEST):
            wrong.append(said.text)

    def asked(request):
        if not request.url.startswith(("data:", "blob:", address.as_uri())):
            wrong.append(request.url)

    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", hear)
    page.on("request", asked)
    try:
        page.goto(address.as_uri())
        page.wait_for_selector("#decoded[data-done]")
        yield page
    finally:
        page.close()
    assert wrong == []


def drawn(page, canvas="decoded"):
    """The pixels of a canvas, in [0, 1], `(height, width, 3)`."""
    found = page.evaluate(
        """id => {
          const canvas = document.getElementById(id), context = canvas.getContext('2d');
          const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
          return [canvas.height, canvas.width, Array.from(data)];
        }""",
        canvas,
    )
    return np.array(found[2]).reshape(found[0], found[1], 4)[..., :3] / 255


def point(page):
    """Where it is in the latent space, once the decoder has followed."""
    page.wait_for_function("() => !vaeflow.waiting()")
    return np.array([page.evaluate("vaeflow.point()")], np.float32)


def check_decoded(page, bundle):
    latents = point(page)
    expected = bundle.decode(latents)[0]
    assert drawn(page) == pytest.approx(
        np.broadcast_to(expected, (*expected.shape[:2], 3)), abs=CLOSE
    )
    return latents[0]


def test_the_runtime_is_the_one_whose_digests_are_written_down():
    import gzip
    import hashlib

    text = (RUNTIME / "README.md").read_text(encoding="utf-8")
    digests = dict(map(reversed, re.findall(r"^ +([0-9a-f]{64}) (\S+)$", text, re.MULTILINE)))
    files = {name: (RUNTIME / name).read_bytes() for name in ("ort.wasm.min.js", MODULE)} | {
        BINARY.removesuffix(".gz"): gzip.decompress((RUNTIME / BINARY).read_bytes())
    }
    assert digests == {name: hashlib.sha256(code).hexdigest() for name, code in files.items()}


def test_sliders_map_and_keys_move_the_point_and_the_picture_follows(opened, finished):
    bundle = vaeflow.load(str(finished / "outputs" / "bundle"))
    images = np.load(finished / "outputs" / "prepared" / "test.npy")
    latents = bundle.encode(images).mean
    start = check_decoded(opened, bundle)
    np.testing.assert_allclose(start, latents.mean(axis=0), atol=1e-5)

    slider = opened.locator("#sliders input").first
    slider.focus()
    for _ in range(20):
        slider.press("ArrowRight")
    slid = check_decoded(opened, bundle)
    assert np.flatnonzero(slid != start).size == 1
    assert slid.max() - start.max() > -1e-6

    box = opened.locator("#map").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    opened.mouse.move(*middle)
    opened.mouse.down()
    opened.mouse.move(middle[0] + 60, middle[1] - 30, steps=5)
    dragged = check_decoded(opened, bundle)
    opened.mouse.up()
    # Along the plane of two principal components, and in no other direction.
    directions = np.linalg.svd(latents - latents.mean(axis=0))[2]
    away = directions @ (dragged - slid)
    assert np.abs(away[:2]).max() > 0.1
    np.testing.assert_allclose(away[2:], 0, atol=1e-5)

    canvas = opened.locator("#map")
    canvas.focus()
    canvas.press("ArrowLeft")
    keyed = check_decoded(opened, bundle)
    assert np.linalg.norm(keyed - dragged) > 0.01
    canvas.press("Enter")
    chosen = check_decoded(opened, bundle)
    nearest = np.abs(latents - chosen).max(axis=1).argmin()
    np.testing.assert_allclose(chosen, latents[nearest], atol=1e-5)
    sources = opened.locator("#chosen-caption").inner_text()
    assert "anomaly" in sources
    assert sources.split(", ")[0] in opened.locator("#status").inner_text()
    assert np.abs(drawn(opened, "chosen")[..., :1] - images[nearest] / 255).max() < 0.1  # as WebP


def test_a_walk_between_two_points_is_a_line(opened, finished):
    bundle = vaeflow.load(str(finished / "outputs" / "bundle"))
    ends = []
    for end, key in (("from", "ArrowLeft"), ("to", "ArrowUp")):
        opened.locator("#map").focus()
        for _ in range(9):
            opened.locator("#map").press(key)
        ends.append(point(opened)[0])
        opened.locator(f"#{end}").click()
    opened.locator("#walk").evaluate(
        "walk => { walk.value = 0.25; walk.dispatchEvent(new Event('input')); }"
    )
    between = check_decoded(opened, bundle)
    np.testing.assert_allclose(between, 0.75 * ends[0] + 0.25 * ends[1], atol=1e-5)


def test_axes_zoom_colour_and_new_images(opened, finished):
    bundle = vaeflow.load(str(finished / "outputs" / "bundle"))
    before = drawn(opened, "map")
    for change in (
        lambda: opened.locator("#nearer").click(),
        lambda: opened.locator("#thumbnails").click(),
        lambda: opened.locator("#colour").select_option("score"),
        lambda: opened.locator("#axes").select_option("dimensions"),
        lambda: opened.locator("#down").select_option(index=2),
    ):
        change()
        after = drawn(opened, "map")
        assert (after != before).any()
        before = after
    point_before = point(opened)[0]
    box = opened.locator("#map").bounding_box()
    opened.mouse.move(box["x"] + 100, box["y"] + 100)
    opened.mouse.down()
    opened.mouse.move(box["x"] + 150, box["y"] + 150, steps=3)
    opened.mouse.up()
    assert np.flatnonzero(check_decoded(opened, bundle) != point_before).size <= 2
    opened.locator("#more").click()
    opened.wait_for_selector("#more-samples canvas")
    some = opened.locator("#more-samples canvas").count()
    assert some == 24


@pytest.mark.parametrize("way", ["file", "drop"])
def test_a_picture_of_ones_own_is_encoded_scored_and_placed(opened, finished, way, tmp_path):
    bundle = vaeflow.load(str(finished / "outputs" / "bundle"))
    image = np.load(finished / "outputs" / "prepared" / "test.npy")[:1]
    file = io.BytesIO()
    Image.fromarray(image[0, ..., 0]).save(file, "PNG")
    opened.evaluate("draws => { vaeflow.facts.draws = draws; }", DRAWS)
    give(opened, way, "mine.png", file.getvalue())
    opened.wait_for_selector("#own[data-score]")
    check_score(opened, bundle, image)
    placed = check_decoded(opened, bundle)
    np.testing.assert_allclose(placed, bundle.encode(image).mean[0], atol=1e-4)
    assert drawn(opened, "own")[..., :1] == pytest.approx(image[0] / 255, abs=1e-6)
    give(opened, way, "no.png", b"this is none")
    opened.wait_for_function(
        "() => document.getElementById('status').textContent.includes('no.png')"
    )


def give(page, way, name, content):
    """Choose a file, or drop it."""
    if way == "file":
        page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": content})
        return
    moved = page.evaluate_handle(
        """([name, content]) => {
          const moved = new DataTransfer();
          moved.items.add(new File([new Uint8Array(content)], name, {type: 'image/png'}));
          return moved;
        }""",
        [name, list(content)],
    )
    page.dispatch_event("#explorer-area", "drop", {"dataTransfer": moved})


def check_score(page, bundle, image):
    """Compare the score with the bundle's, to four standard errors of their draws."""
    found = float(page.locator("#own").get_attribute("data-score"))
    several = np.array([bundle.score(image, DRAWS // 10, seed)[0] for seed in range(10)])
    error = several.std(ddof=1) / np.sqrt(10)
    assert found == pytest.approx(several.mean(), abs=max(4 * 2**0.5 * error, 1e-3))


@pytest.mark.parametrize(
    ("likelihood", "channels", "prior"),
    [
        ("bernoulli", 1, "flow"),
        ("gaussian", 1, "standard"),
        ("gaussian", 3, "standard"),
        ("discretized_logistic", 3, "standard"),
        ("mixture_logistic", 1, "flow"),
        ("mixture_logistic", 3, "standard"),
    ],
)
def test_every_likelihood_is_that_of_the_bundle(browser, tmp_path, likelihood, channels, prior):
    vae = make_model((8, 8, channels), likelihood=likelihood, prior=prior)
    bundle = Bundle(write_bundle(tmp_path / "bundle", vae))
    page = write_report(tmp_path / "page", bundle)
    image = np.random.default_rng(0).integers(0, 256, (1, 8, 8, channels), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(image[0] if channels == 3 else image[0, ..., 0]).save(file, "PNG")
    with of(browser, page) as opened:
        check_decoded(opened, bundle)
        opened.wait_for_function(
            "() => vaeflow.tiles() > 50"
        )  # decoded at as many places of the map
        opened.evaluate("draws => { vaeflow.facts.draws = draws; }", DRAWS)
        give(opened, "file", "mine.png", file.getvalue())
        opened.wait_for_selector("#own[data-score]")
        check_score(opened, bundle, image)
        check_decoded(opened, bundle)
        opened.locator("#random").click()
        opened.wait_for_function(
            "() => document.getElementById('status').textContent.includes('prior')"
        )
        check_decoded(opened, bundle)


@pytest.mark.parametrize("width", [390, 1100])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_hard_to_read_or_to_reach(browser, written, width, scheme):
    """By the rules of axe: contrast of 4.5 to 1, names, roles. And it fits a phone."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    with of(
        browser,
        written,
        viewport={"width": width, "height": 800},
        color_scheme=scheme,
        bypass_csp=True,  # for axe itself
    ) as page:
        page.locator("#map").press("Enter")
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        found = axe.run(page, options=CONTRAST).response
        assert [
            (one["id"], node["target"], node["failureSummary"])
            for one in found["violations"]
            for node in one["nodes"][:2]
        ] == []
        assert len(found["passes"]) > 10
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_model_too_large_for_a_page_has_none(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("vaeflow.report.explorer.MOST_BYTES", 1_000)
    bundle = vaeflow.load(str(finished / "outputs" / "bundle"))
    text = write_report(tmp_path / "page", bundle, Workspace(finished)).read_text()
    assert "<script" not in text
    assert 'id="explorer"' not in text
