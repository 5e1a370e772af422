"""The commands of the README, run one after the other as they stand there."""

import os
import re

import pytest
from helpers import REPOSITORY, SMALL, make_workspace, run
from pictures import photographs

pytestmark = pytest.mark.servers
# What sets up, stays, or has tests of its own.
LEFT_OUT = ("make ", "source ", "vaeflow serve ", "vaeflow schedule ")


def test_the_commands_run(tmp_path, prefect_api):
    root = make_workspace(tmp_path / "workspace", **SMALL)
    home = tmp_path / "home"
    photographs(home / "photos", 300, seed=0)  # 30 of them to calibrate the anomaly measure by
    photographs(home / "new", 30, seed=1)
    environment = {**os.environ, "HOME": str(home), "PREFECT_API_URL": prefect_api}
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = text.split("## What you can do with it\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    done = []
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith(("#", *LEFT_OUT)):
            run(root, "bash", "-c", line, env=environment)
            done.append(line.split()[0])
    assert done.count("vaeflow") >= 3
