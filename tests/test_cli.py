import csv
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import change_parameters, run
from PIL import Image

HEAVY = """
import sys
sys.argv = ["vaeflow", "--help"]
from vaeflow import cli
try:
    cli.main()
except SystemExit:
    pass
names = ("tensorflow", "keras", "mlflow", "dvc", "prefect", "numpy", "onnxruntime")
print([name for name in names if name in sys.modules], file=sys.stderr)
"""


def vaeflow(folder, *arguments, status=0):
    return run(folder, "vaeflow", *map(str, arguments), status=status)


def fails(folder, *arguments):
    """The one paragraph of a user's mistake: exit 2, nothing on stdout, no traceback."""
    done = vaeflow(folder, *arguments, status=2)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


def test_help_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", HEAVY], capture_output=True, text=True, check=True)
    assert "retrain" in done.stdout
    assert done.stderr.strip() == "[]"


def test_outside_a_workspace_a_stage_says_so(tmp_path):
    assert "dvc.yaml" in fails(tmp_path, "prepare")


def test_a_wrong_parameter_is_one_paragraph(workspace):
    change_parameters(workspace, train={"latent_dims": 3})
    assert "did you mean train.latent_dim?" in fails(workspace, "prepare")


def test_a_stage_before_its_turn_names_what_is_missing(workspace):
    assert "dvc repro prepare" in fails(workspace, "train")
    assert "dvc repro" in fails(workspace, "evaluate")


def test_missing_data_say_dvc_pull(workspace):
    run(workspace, "rm", "-r", "data")
    assert "dvc pull" in fails(workspace, "prepare")


def test_a_wrong_cron_expression_is_refused(workspace):
    assert "five fields" in fails(workspace, "schedule", "--cron", "every night")


@pytest.mark.slow
def test_inference_commands_write_what_their_endings_say(finished, tmp_path, digits):
    bundle = finished / "outputs" / "bundle"
    model = ("--model", bundle)
    Image.fromarray(digits[0, ..., 0]).save(tmp_path / "one.png")
    np.save(tmp_path / "many.npy", digits[:20])
    sources = (tmp_path / "one.png", tmp_path / "many.npy")

    vaeflow(tmp_path, "sample", *model, "--count", 9, "--seed", 1, "--out", "s.png")
    vaeflow(tmp_path, "sample", *model, "--count", 9, "--seed", 1, "--out", "s.npy")
    assert np.load(tmp_path / "s.npy").shape == (9, 8, 8, 1)
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.size == (3 * 50 + 2, 3 * 50 + 2)

    vaeflow(tmp_path, "reconstruct", *sources, *model, "--out", "r.png")
    vaeflow(tmp_path, "reconstruct", *sources, *model, "--out", "r.npy")
    assert np.load(tmp_path / "r.npy").shape == (21, 8, 8, 1)

    vaeflow(tmp_path, "encode", *sources, *model, "--out", "e.npy")
    vaeflow(tmp_path, "encode", *sources, *model, "--out", "e.parquet")
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(tmp_path / "e.parquet").to_pydict()
    assert len(table) == 1 + 2 * 8
    np.testing.assert_array_equal(table["mean_3"], np.load(tmp_path / "e.npy")[:, 3])

    vaeflow(tmp_path, "score", *sources, *model, "--out", "out/c.csv")
    vaeflow(tmp_path, "score", *sources, *model, "--out", "c.npy")
    with (tmp_path / "out" / "c.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["id"].endswith("one.png")
    assert rows[1]["id"].endswith("many.npy#0")
    assert rows[0]["score"] == rows[1]["score"]  # the same image twice
    scores = np.load(tmp_path / "c.npy")
    np.testing.assert_allclose([float(row["score"]) for row in rows], scores, rtol=1e-6)


@pytest.mark.slow
def test_wrong_inputs_of_inference_are_one_paragraph(finished, tmp_path, digits):
    model = ("--model", finished / "outputs" / "bundle")
    wide = np.zeros((2, 8, 9), np.uint8)
    np.save(tmp_path / "wide.npy", wide)
    np.save(tmp_path / "good.npy", digits[:2])
    nan = np.full((2, 8, 8), np.nan, np.float32)
    np.save(tmp_path / "nan.npy", nan)
    out = ("--out", "x.csv")
    assert "(8, 8, 1)" in fails(tmp_path, "score", "wide.npy", *model, *out)
    assert "two shapes" in fails(tmp_path, "score", "good.npy", "wide.npy", *model, *out)
    assert "nan.npy#0: NaN" in fails(tmp_path, "score", "nan.npy", *model, *out)
    assert "absent.npy does not exist" in fails(tmp_path, "score", "absent.npy", *model, *out)
    assert "is no bundle" in fails(tmp_path, "score", "good.npy", "--model", "absent", *out)
    assert "models:/NAME" in fails(tmp_path, "score", "good.npy", "--model", "models:/x", *out)
    no_registry = fails(tmp_path, "score", "good.npy", "--model", "models:/x@champion", *out)
    assert "MLFLOW_TRACKING_URI" in no_registry
    assert ".csv, .parquet" in fails(tmp_path, "score", "good.npy", *model, "--out", "x.txt")
    assert ".png, .npy" in fails(tmp_path, "sample", *model, "--out", "x.gif")
    below_a_file = fails(tmp_path, "sample", *model, "--out", "good.npy/x.png")
    assert "cannot be written" in below_a_file
    assert not list(tmp_path.glob("x.*"))


@pytest.mark.parametrize("backend", ["torch", "nonsense"])
@pytest.mark.parametrize("command", ["train", "retrain"])
def test_a_backend_that_cannot_train_is_named(workspace, command, backend):
    environment = {**os.environ, "KERAS_BACKEND": backend}
    done = run(workspace, "vaeflow", command, status=2, env=environment)
    assert done.stderr == (
        f"vaeflow: KERAS_BACKEND is {backend}; vaeflow trains with tensorflow or jax. Name one.\n"
    )


def test_a_cache_that_cannot_be_written_is_named(workspace, tmp_path):
    (tmp_path / "file").write_text("no folder")
    for cache in (tmp_path / "file", "/proc/nothing"):
        environment = {**os.environ, "VAEFLOW_CACHE": str(cache)}
        done = run(workspace, "vaeflow", "pull", "models:/a/1", "b", status=2, env=environment)
        assert done.stderr.startswith(f"vaeflow: {cache}: ")
        assert "Name a folder that can be written in VAEFLOW_CACHE." in done.stderr
    environment = {**os.environ, "HOME": "/proc/nothing"}
    del environment["VAEFLOW_CACHE"]
    done = run(workspace, "vaeflow", "pull", "models:/a/1", "b", status=2, env=environment)
    assert "VAEFLOW_CACHE" in done.stderr


def test_a_mistake_in_set_is_found_before_anything_starts(workspace):
    done = run(workspace, "vaeflow", "retrain", "--set", "train.epcohs=3", status=2)
    assert done.stderr == (
        "vaeflow: overrides (--set) that are not allowed:\n"
        "  train.epcohs: no such key; did you mean train.epochs?\n"
    )
    assert done.stdout == ""
    assert not (workspace / "outputs").exists()


def test_a_folder_without_git_is_refused_before_anything_starts(workspace):
    shutil.rmtree(workspace / ".git")
    done = run(workspace, "vaeflow", "retrain", status=2)
    assert f"{workspace} is in no git repository" in done.stderr
    assert done.stdout == ""


def test_a_bad_image_names_the_option_that_goes_on(finished, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    command = ("vaeflow", "score", str(tmp_path), "--model", "outputs/bundle")
    done = run(finished, *command, "--out", str(tmp_path / "s.csv"), status=2)
    assert "bad.png" in done.stderr
    assert "--skip-bad" in done.stderr


def test_a_table_that_is_not_there_is_called_that(finished, tmp_path):
    command = ("vaeflow", "drift", "nosuch.parquet", "--model", "outputs/bundle")
    done = run(finished, *command, "--out", str(tmp_path / "d.json"), status=2)
    assert "nosuch.parquet: no such file" in done.stderr


def test_the_version_and_short_help_are_there():
    vaeflow = [sys.executable, "-m", "vaeflow"]
    said = subprocess.run([*vaeflow, "--version"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"vaeflow \d+\.\d+\S*\n", said.stdout)
    short = subprocess.run([*vaeflow, "data", "add", "-h"], capture_output=True, text=True)
    assert "--skip-bad" in short.stdout
    assert short.returncode == 0
