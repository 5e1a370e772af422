"""Keep a small workspace of this version, for the next one's tests of upgrading from it.

    python tests/upgrade/keep.py

Run it just before a release. It makes `previous.tar.xz` anew: a workspace with images, a champion
in its registry, a bundle, and the checkpoint of a training that was stopped; and what the champion
says of its test images.
"""

import json
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import SMALL, change_parameters, make_workspace, run

import vaeflow

KEPT = Path(__file__).parent / "previous.tar.xz"
TINY = {**SMALL, "epochs": 40, "latent_dim": 2, "filters": [4, 8], "hidden_units": 16}
LONG = {"epochs": 400, "checkpoint_minutes": 0.0}
IMAGES = 400
# What is of no use elsewhere, and what is large and only looked at.
FOLDERS = (".git", ".dvc/tmp", ".dvc/cache", ".dvc/sample-remote", "outputs/logs", "outputs/report")
LOOKED_AT = (".png", ".html", ".gz")


def main() -> None:
    """Make the workspace, and pack it."""
    with tempfile.TemporaryDirectory() as folder:
        root = make_workspace(Path(folder) / "previous", **TINY)
        images = np.load(root / "data" / "digits" / "images.npy")[:IMAGES]
        np.save(root.parent / "digits.npy", images)
        run(root, "vaeflow", "data", "add", str(root.parent / "digits.npy"))
        run(root, "git", "commit", "--quiet", "--all", "--message", "images")
        assert "is @champion" in run(root, "vaeflow", "retrain").stdout
        run(root, "git", "add", "dvc.lock")
        run(root, "git", "commit", "--quiet", "--message", "a champion")
        stop_a_training(root)
        model = vaeflow.load(root / "outputs" / "bundle")
        scores = model.score(np.load(root / "outputs" / "prepared" / "test.npy"))
        (root / "expected.json").write_text(
            json.dumps({"version": vaeflow.__version__, "scores": scores.tolist()})
        )
        for name in FOLDERS:
            shutil.rmtree(root / name)
        (root / "src" / "vaeflow").unlink(missing_ok=True)  # a link to where it is installed here
        run(root, "git", "init", "--quiet")
        run(root, "dvc", "commit", "--force", "data.dvc")  # of the cache the images are enough
        for name in (".git", ".dvc/tmp"):
            shutil.rmtree(root / name)
        with tarfile.open(KEPT, "w:xz") as archive:
            archive.add(root, "previous", filter=keep)
    print(f"{KEPT}: {KEPT.stat().st_size / 1e6:.2f} MB, of vaeflow {vaeflow.__version__}")


def keep(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Leave out what is only looked at; nothing tells of whom it was made by."""
    if entry.name.endswith(LOOKED_AT):
        return None
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def stop_a_training(root: Path) -> None:
    """Leave a checkpoint behind."""
    change_parameters(root, train=LONG)
    training = subprocess.Popen(["vaeflow", "train"], cwd=root, stdout=subprocess.DEVNULL)
    while not list(root.glob("outputs/checkpoints/*/*.checkpoint")):
        assert training.poll() is None
        time.sleep(0.1)
    training.send_signal(signal.SIGTERM)
    training.wait()
    run(root, "git", "checkout", "params.yaml")
    run(root, "dvc", "checkout", "--force", "outputs/model")


if __name__ == "__main__":
    main()
