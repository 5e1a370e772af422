"""What only a GPU can show: `make gpu`. Elsewhere these tests are skipped."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import REPOSITORY

pytestmark = pytest.mark.gpu

# Where a GPU is asked for and none is seen, it trains on the CPU without a word: `GPU` in the
# first line of its answer tells.
TRAIN = """
import json, os, signal, sys
from pathlib import Path
import vaeflow
import keras, numpy as np
from vaeflow.model.device import use_gpu_if_any, use_full_precision
device = use_gpu_if_any()
use_full_precision()
from vaeflow.config.schema import Parameters
from vaeflow.evaluation.bounds import compute_bounds
from vaeflow.training.checkpoint import Checkpoints
from vaeflow.training.loop import fit

class Stop(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1 and "stop" in sys.argv:
            os.kill(os.getpid(), signal.SIGTERM)

prepared = Path("prepared")
train = {"epochs": 2, "batch_size": 32, "filters": [8, 16], "hidden_units": 32, "latent_dim": 4,
         "learning_rate": 1e-4, "precision": "float32", **json.loads(sys.argv[1])}
kept = Checkpoints(Path(sys.argv[2]))
vae = fit(prepared, Parameters.model_validate({"train": train}), checkpoints=kept,
          callbacks=[Stop()])
images = np.load(prepared / "validation.npy")
bounds = compute_bounds(vae, images, samples=20, seed=0)
np.savez(sys.argv[2] + ".npz", *vae.get_weights(), bound=bounds.importance_weighted_bound)
print(device)
"""


def gpus() -> int:
    """How many this machine has."""
    if not shutil.which("nvidia-smi"):
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    return listed.stdout.count("GPU ")


needs_a_gpu = pytest.mark.skipif(not gpus(), reason="no GPU: nvidia-smi shows none")
BACKENDS = pytest.mark.parametrize("backend", ["tensorflow", "jax"])


@pytest.fixture
def prepared(digits, tmp_path):
    """A folder of images to train on."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    np.save(folder / "train.npy", digits[:512])
    np.save(folder / "validation.npy", digits[512:576])
    (folder / "dataset.json").write_text(json.dumps({"image_shape": [8, 8, 1]}))
    return tmp_path


def train(folder, name, backend, *, gpu=True, stop=False, env=(), **settings):
    """Arrays that a training has left, and which device it was on."""
    hidden = {} if gpu else {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", TRAIN, json.dumps(settings), name, *["stop"] * stop]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "KERAS_BACKEND": backend, **hidden, **dict(env)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == (143 if stop else 0), done.stderr
    if stop:
        return None
    assert ("GPU: " in done.stdout) == gpu, done.stdout
    return np.load(folder / f"{name}.npz")


@needs_a_gpu
@BACKENDS
def test_a_training_on_a_gpu_is_the_one_on_a_cpu(prepared, backend):
    """As long as no draw decides: the noise of TensorFlow's XLA is another one."""
    settings = {"jit": backend == "jax"}
    ours, theirs = (
        train(prepared, f"gpu-{gpu}", backend, gpu=gpu, **settings) for gpu in (True, False)
    )
    for name in theirs.files:
        norm = np.linalg.norm(theirs[name])
        assert np.linalg.norm(ours[name] - theirs[name]) <= 1e-3 * norm + 1e-6, name


@needs_a_gpu
@BACKENDS
def test_a_training_goes_on_to_the_same_weights_bit_for_bit(prepared, backend):
    whole = train(prepared, "whole", backend)
    train(prepared, "kept", backend, stop=True)
    again = train(prepared, "kept", backend)
    for name in whole.files:
        np.testing.assert_array_equal(again[name], whole[name])


@pytest.mark.skipif(gpus() < 2, reason="fewer than two GPUs: nvidia-smi shows no more")
@BACKENDS
def test_several_gpus_make_the_steps_of_one(prepared, backend):
    one = {"CUDA_VISIBLE_DEVICES": "0"}
    settings = {"batch_size": 32 * gpus(), "jit": True}
    alone = train(prepared, "one", backend, env=one, **{**settings, "jit": backend == "jax"})
    together = train(prepared, "all", backend, **settings)
    for name in alone.files:
        np.testing.assert_allclose(together[name], alone[name], rtol=1e-3, atol=1e-4)


@needs_a_gpu
def test_the_kit_runs_on_it(tmp_path):
    """Its smallest sizes; the full ones are `make gpu`."""
    done = subprocess.run(
        [REPOSITORY / "benchmarks" / "gpu.sh", "--tiny", "--work", tmp_path],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    entries = json.loads((tmp_path / "results.json").read_text())
    assert {entry["device"][:5] for entry in entries} == {"GPU: "}
    assert not [entry for entry in entries if "failed" in (entry["name"], *entry)]
