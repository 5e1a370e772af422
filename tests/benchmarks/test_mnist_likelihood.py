"""The benchmark as a command, on a training of seconds."""

import json
import math
import sys

import numpy as np
import pytest
from helpers import MNIST, REPOSITORY, run

NAME = "pytorch-examples-vae"
OTHER = {"name": "another", "nll": 1.0}


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.exists(), reason=f"no copy of MNIST in {MNIST}")
def test_trains_evaluates_goes_on_and_leaves_other_results(tmp_path):
    results, work = tmp_path / "results.json", tmp_path / "work"
    results.write_text(json.dumps([OTHER, {"name": NAME, "nll": math.inf}]))
    command = [
        *(sys.executable, REPOSITORY / "benchmarks" / "mnist_likelihood.py", NAME),
        *("--minutes", "0.05", "--samples", "20", "--results", results, "--work", work),
    ]
    run(tmp_path, *command, "--images", "110")
    other, own = json.loads(results.read_text())
    assert other == OTHER
    assert {"standard_error", "train_seconds", "device", "seed", "command"} <= set(own)
    assert (own["importance_samples"], own["images"]) == (20, 110)
    assert own["nll"] < 28 * 28 * math.log(2)  # better than a coin for every pixel
    assert own["nll"] <= -own["elbo"]

    # What has been evaluated is not evaluated again, and what is left gets the same model.
    [kept] = (work / NAME).glob("bounds-20-*.npz")
    before = dict(np.load(kept))
    (model,) = (work / NAME).glob("model.keras")
    modified = model.stat().st_mtime_ns
    run(tmp_path, *command, "--images", "210", "--evaluate-only")
    after = dict(np.load(kept))
    for key, values in before.items():
        np.testing.assert_array_equal(after[key][:110], values)
        assert len(after[key]) == 210
    assert model.stat().st_mtime_ns == modified
    assert json.loads(results.read_text())[1]["images"] == 210

    # What a share of the draws says is kept beside what all of them said.
    run(tmp_path, *command, "--images", "210", "--evaluate-only", "--share", "2")
    both = json.loads(results.read_text())[1]
    assert both["estimated_images"] == 210
    assert abs(both["estimated_nll"] - both["nll"]) < 5
    assert both["estimated_command"].endswith(" --share 2")
    assert not both["command"].endswith(" --share 2")


def test_without_a_trained_model_there_is_nothing_to_evaluate(tmp_path):
    script = REPOSITORY / "benchmarks" / "mnist_likelihood.py"
    done = run(
        tmp_path, sys.executable, script, NAME, "--evaluate-only", "--work", tmp_path, status=1
    )
    assert f"train {NAME} first" in done.stderr


@pytest.mark.skipif(not MNIST.exists(), reason=f"no copy of MNIST in {MNIST}")
def test_training_images_that_are_drawn_once_are_black_and_white_and_remain(monkeypatch):
    """So that nothing is drawn in the steps: the settings say so, and the number of epochs."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    from mnist_likelihood import make_entries

    settings, _, images, minutes = make_entries()["vaeflow-flow-fixed"]
    once, again = images(MNIST, "train"), images(MNIST, "train")
    np.testing.assert_array_equal(once, again)
    assert once.shape == (60_000, 28, 28, 1)
    assert set(np.unique(once)) == {0, 255}
    assert (settings.binarize, settings.epochs, settings.finish_epochs) == ("none", 20, 2)
    assert minutes is None
    others = make_entries()["vaeflow-flow"].images
    np.testing.assert_array_equal(images(MNIST, "test"), others(MNIST, "test"))
    assert len(np.unique(others(MNIST, "train"))) > 2  # drawn anew in every step
