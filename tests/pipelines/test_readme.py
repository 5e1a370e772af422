"""The commands of the README and the tutorial, run one after the other as they stand there."""

import os
import re
import sys

import numpy as np
import pytest
from helpers import REPOSITORY, SMALL, make_workspace, run
from PIL import Image

pytestmark = pytest.mark.servers
# What sets up, stays, or has tests of its own.
LEFT_OUT = ("make ", "source ", "vaeflow serve ", "vaeflow schedule ")


def blocks(page: str, kind: str, section: str = "") -> list[str]:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    if section:
        text = text.split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def photographs(folder, count, seed):
    """Pictures of 40 x 36, a bright square in each, and a file that is none."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for index in range(count):
        pixels = random.integers(0, 60, (36, 40, 3), dtype=np.uint8)
        row, column = random.integers(0, 24, 2)
        pixels[row : row + 12, column : column + 12] = random.integers(160, 255, 3)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes(b"no picture")


@pytest.mark.parametrize(
    ("page", "section"), [("README.md", "What you can do with it"), ("docs/tutorial.md", "")]
)
def test_the_commands_run(tmp_path, prefect_api, page, section):
    root = make_workspace(tmp_path / "workspace", **SMALL)
    home = tmp_path / "home"
    photographs(home / "photos", 300, seed=0)  # 30 of them to calibrate the anomaly measure by
    photographs(home / "new", 30, seed=1)
    photographs(home / "new-photos", 40, seed=2)
    environment = {**os.environ, "HOME": str(home), "PREFECT_API_URL": prefect_api}
    done = []
    for block in blocks(page, "sh", section):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith(("#", *LEFT_OUT)):
                run(root, "bash", "-c", line, env=environment)
                done.append(line.split()[0])
    assert done.count("vaeflow") >= 3
    if page == "docs/tutorial.md":
        (code,) = blocks(page, "python")
        said = run(root, sys.executable, "-c", code, env=environment).stdout
        assert len(re.findall(r"[01]\.\d*", said)) == 10  # ten images, each with its rank
