"""How soon the report's latent explorer shows a picture, and how fast it follows a slider.

    python benchmarks/explorer.py [PRESET]

makes the report of the network of `presets/mnist.yaml` (or another's), untrained, with 5,000 images
of 28x28 on the map, and opens it from disk in headless Chromium, which has to be installed. Writes
`benchmarks/results/explorer.json`: seconds from opening to the first decoded picture, of five fresh
browsers; milliseconds from moving a slider to the picture, of a hundred moves; and the page's size.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from bundles import IMAGE
from machine import machine, matrix_gflops
from playwright.sync_api import sync_playwright

from vaeflow.bundle.runtime import Bundle
from vaeflow.common.workspace import Workspace
from vaeflow.report.page import write_report

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "explorer.json"
IMAGES, BROWSERS, MOVES = 5_000, 5, 100
# From the slider's event to when the decoder has drawn the last point that was asked for.
MOVE = """async moves => {
  const slider = document.querySelector('#sliders input'), took = [];
  for (let move = 0; move < moves; move++) {
    slider.value = -2 + 4 * move / moves;
    const start = performance.now();
    slider.dispatchEvent(new Event('input'));
    while (vaeflow.waiting()) await new Promise(done => setTimeout(done, 0));
    took.push(performance.now() - start);
  }
  return took;
}"""


def make_page(folder: Path, preset: str) -> Path:
    """Write the report of an untrained network, with images that are noise."""
    script = Path(__file__).with_name("bundles.py")
    subprocess.run([sys.executable, script, preset, folder / "bundle"], check=True)
    place = Workspace(folder)
    place.prepared.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, *IMAGE), dtype=np.uint8)
    np.save(place.prepared / "test.npy", images)
    columns = {
        "split": ["test"] * IMAGES,
        "source": [f"{number}.png" for number in range(IMAGES)],
        "label": [str(number % 10) for number in range(IMAGES)],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), place.prepared / "index.parquet")
    return write_report(folder / "report", Bundle(folder / "bundle"), place)


def main(preset: str) -> None:
    """Measure, print, and write the JSON."""
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("needs a browser: apt-get install chromium")
    firsts, moves = [], []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as engine:
        page = make_page(Path(folder), preset)
        for _ in range(BROWSERS):
            browser = engine.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            tab = browser.new_page()
            start = time.perf_counter()
            tab.goto(page.as_uri())
            tab.wait_for_selector("#decoded[data-done]")
            firsts.append(time.perf_counter() - start)
            moves += tab.evaluate(MOVE, MOVES // BROWSERS)
            version = browser.version
            browser.close()
        size = page.stat().st_size
    cut = statistics.quantiles(moves, n=20)
    found = {
        "preset": preset,
        "images_on_the_map": IMAGES,
        "page_megabytes": round(size / 1e6, 1),
        "first_picture_seconds": [round(seconds, 2) for seconds in firsts],
        "redraw_milliseconds": {
            "median": round(statistics.median(moves), 1),
            "95 %": round(cut[-1], 1),
            "longest": round(max(moves), 1),
        },
        "chromium": version,
        "matrix_gflops": matrix_gflops(),
        **machine(),
    }
    print(json.dumps(found, indent=2))
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "mnist")
