"""The page: whatever there is about a model, in a file that needs nothing else."""

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet
import pytest
from helpers import run
from PIL import Image

import vaeflow
from vaeflow.common.workspace import Workspace
from vaeflow.report.page import write_report

pytestmark = pytest.mark.slow

EVIL = "<script>alert(1)</script>.png"
OF_A_BUNDLE = ["overview", "explorer", "samples", "lineage"]
OF_A_WORKSPACE = [
    "overview",
    "explorer",
    "training",
    "reconstructions",
    "samples",
    "dimensions",
    "spoilt",
    "calibration",
    "oddest",
    "plainest",
    "data",
    "lineage",
]
BROWSER = shutil.which("chromium")


class Page(HTMLParser):
    """The tags of a page, and the sections in it."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def written(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    printed = run(finished, "vaeflow", "report", "--out", folder / "report").stdout
    assert printed.strip() == str(folder / "report" / "index.html")
    return folder / "report" / "index.html"


def test_it_has_all_that_the_stages_wrote(written, finished):
    text = written.read_text(encoding="utf-8")
    page = Page(text)
    assert [found["id"] for found in page.all("h2")] == OF_A_WORKSPACE
    links = [found["href"] for found in page.all("a")]
    assert links == [f"#{name}" for name in OF_A_WORKSPACE]
    metrics = json.loads((finished / "outputs" / "evaluation" / "metrics.json").read_text())
    assert f"{metrics['elbo']:,.4g}" in text
    with (finished / "outputs" / "evaluation" / "latent_dimensions.csv").open() as file:
        most = max(csv.DictReader(file), key=lambda row: float(row["kl"]))
    assert re.search(rf"dimension {most['dimension']}: {float(most['kl']):.4g}<", text)
    spoilt = json.loads((finished / "outputs" / "evaluation" / "spoilt.json").read_text())
    for kind in spoilt["kinds"].values():
        assert f"{kind['severity']}: {kind['auroc']:.4g}" in text
    bundle = vaeflow.load(str(finished / "outputs" / "bundle"))
    found = bundle.detect(np.load(finished / "outputs" / "prepared" / "test.npy"))
    index = pyarrow.parquet.read_table(finished / "outputs" / "prepared" / "index.parquet")
    sources = [row["source"] for row in index.to_pylist() if row["split"] == "test"]
    oddest = int(np.argmax(found.anomaly))
    assert f"{sources[oddest]}: anomaly {found.anomaly[oddest]:.3g}" in text


def test_it_needs_nothing_beside_it_and_says_what_is_to_be_seen(written):
    page = Page(written.read_text(encoding="utf-8"))
    assert not any("src" in script for script in page.all("script"))
    assert not page.all("link")
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert all(image["alt"] or "hidden" in image for image in page.all("img"))
    assert all(drawing["aria-label"] for drawing in page.all("svg"))
    assert written.stat().st_size < 10_000_000
    assert [path.name for path in written.parent.iterdir()] == ["index.html"]


def test_the_same_model_has_the_same_page(written, finished, tmp_path):
    again = write_report(tmp_path, vaeflow.load(finished / "outputs/bundle"), Workspace(finished))
    assert again.read_bytes() == written.read_bytes()


def test_of_a_bundle_alone_it_has_what_there_is(finished, tmp_path):
    run(tmp_path, "vaeflow", "report", finished / "outputs" / "bundle", "--out", "page")
    page = Page((tmp_path / "page" / "index.html").read_text(encoding="utf-8"))
    assert [found["id"] for found in page.all("h2")] == OF_A_BUNDLE
    assert "--out FOLDER" in run(tmp_path, "vaeflow", "report", "x", status=2).stderr
    error = run(tmp_path, "vaeflow", "report", status=2).stderr
    assert "Run the command inside a project" in error


def test_names_stay_text_and_what_is_missing_is_left_out(finished, tmp_path):
    root = shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    place = Workspace(root)
    index = place.prepared / "index.parquet"
    table = pyarrow.parquet.read_table(index)
    sources = pyarrow.array([EVIL] * len(table))
    at = table.column_names.index("source")
    index.chmod(0o644)
    pyarrow.parquet.write_table(table.set_column(at, "source", sources), index)
    (place.evaluation / "spoilt.json").unlink()
    (place.model / "history.csv").unlink()
    page = write_report(tmp_path / "page", vaeflow.load(str(place.bundle)), place)
    text = page.read_text(encoding="utf-8")
    assert EVIL not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;.png: anomaly" in text
    missing = {"training", "spoilt"}
    named = [found["id"] for found in Page(text).all("h2")]
    assert named == [name for name in OF_A_WORKSPACE if name not in missing]


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_it_from_disk_at_any_width(written, tmp_path, dark):
    """Nothing is wider than a telephone's screen, and dark is dark."""
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    alone = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    look = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    picture = tmp_path / "page.png"
    subprocess.run(
        [
            BROWSER,
            *quiet,
            *alone,
            *look,
            f"--user-data-dir={tmp_path / 'browser'}",
            f"--screenshot={picture}",
            "--window-size=500,3000",
            written.as_uri(),
        ],
        check=True,
        capture_output=True,
    )
    with Image.open(picture) as drawn:
        pixels = np.asarray(drawn.convert("L")).astype(int)
    background = np.bincount(pixels[:, -4:].ravel()).argmax()
    assert background < 60 if dark else background > 240
    assert (pixels[:, -4:] == background).mean() > 0.99  # a margin that nothing reaches into
    assert (np.abs(pixels - background) > 100).any(axis=1).mean() > 0.2
