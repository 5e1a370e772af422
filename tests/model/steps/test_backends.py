"""One objective, two backends: a step on each, from the same weights and the same noise."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.backends
pytest.importorskip("jax", reason="JAX is not installed: pip install 'vaeflow[jax]'")

CASES = {
    "elbo": {"beta": 0.5, "kl_warmup_steps": 10, "free_bits": 0.1, "gradient_clip": 1e-3},
    "importance weighted": {"objective": "importance_weighted", "samples": 4},
    "residual and logistic": {"likelihood": "discretized_logistic", "network": "residual"},
    "mixture": {"likelihood": "mixture_logistic", "levels": 17, "mixtures": 2},
    "flow": {"prior": "flow", "prior_couplings": 3, "kl_warmup_steps": 10, "free_bits": 0.1},
    "flow and importance weighted": {
        "prior": "flow",
        "objective": "importance_weighted",
        "samples": 4,
        "beta": 0.5,
    },
    "left out": {"gradient_limit": 1e-9},
}
STEPS = """
import json, sys
import vaeflow
import keras, numpy as np
from vaeflow.data.batches import Batches
from vaeflow.model.steps.optimizer import Adam
from vaeflow.config.model import VAEConfig
from vaeflow.model.vae import VAE, load_vae

cases, role = json.loads(sys.argv[1]), sys.argv[2]
images = np.load("images.npy")
for name, settings in cases.items():
    noise = np.load(f"{name}.noise.npy")
    VAE._draw_noise = lambda self, images, seed: keras.ops.convert_to_tensor(noise)
    if role == "tensorflow":
        keras.utils.set_random_seed(0)
        vae = VAE(VAEConfig((9, 8, 1), latent_dim=2, filters=(4, 6), hidden_units=8, **settings))
        # By itself, Adam makes as long a step of a gradient near 0 as of any other: rounding then
        # decides where to.
        vae.compile(optimizer=Adam(0.01, epsilon=1e-3, use_ema=True, ema_momentum=0.5))
        vae.save(f"{name}.keras")
    vae = load_vae(f"{name}.keras")
    before = [variable.numpy() for variable in vae.trainable_variables]
    for _ in range(2):
        logs = vae.fit(Batches(images, len(images)), verbose=0).history
    logs = {key: values[-1] for key, values in logs.items()}
    evaluated = vae.evaluate(Batches(images, len(images)), verbose=0, return_dict=True)
    logs |= {f"validation_{key}": value for key, value in evaluated.items()}
    with open(f"{name}.{role}.json", "w") as file:
        json.dump({key: float(value) for key, value in logs.items()}, file)
    after = [variable.numpy() for variable in vae.trainable_variables]
    np.savez(f"{name}.{role}.npz", *[new - old for new, old in zip(after, before)])
assert keras.backend.backend() == role
others = {"tensorflow", "mlflow", "dvc", "prefect", "pydantic"} - {role}
assert not others & set(sys.modules), others & set(sys.modules)
"""


@pytest.fixture(scope="module")
def stepped(digits, tmp_path_factory):
    """A folder with what both backends have made of each case."""
    folder = tmp_path_factory.mktemp("steps")
    taller = np.concatenate([digits[:32], digits[:32, :1]], axis=1)  # 9 x 8: is cropped
    np.save(folder / "images.npy", taller)
    for name, settings in CASES.items():
        noise = np.random.default_rng(0).normal(size=(settings.get("samples", 1), 32, 2))
        np.save(folder / f"{name}.noise.npy", noise.astype("float32"))
    for backend in ("tensorflow", "jax"):
        done = subprocess.run(
            [sys.executable, "-c", STEPS, json.dumps(CASES), backend],
            cwd=folder,
            env={**os.environ, "KERAS_BACKEND": backend},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.xdist_group("stepped")  # which takes a minute to make
@pytest.mark.parametrize("case", CASES)
def test_a_step_on_jax_is_the_step_on_tensorflow(stepped, case):
    first, second = (
        json.loads((stepped / f"{case}.{backend}.json").read_text())
        for backend in ("tensorflow", "jax")
    )
    assert second == pytest.approx(first, rel=1e-4, abs=1e-5)
    assert first["skipped_steps"] == (case == "left out")
    first, second = (np.load(stepped / f"{case}.{name}.npz") for name in ("tensorflow", "jax"))
    for name in first.files:
        longest = np.abs(first[name]).max()
        # A weight below 1 is itself rounded by that much, once in a step and once in its average.
        rounding = 2 * np.finfo(np.float32).epsneg
        allowed = 1e-3 * longest + rounding
        np.testing.assert_allclose(first[name], second[name], rtol=0, atol=allowed)


RESUMED = (
    "test_ended_and_begun_again_it_ends_with_the_same_weights"
    "[averaged, binarised, with a flow and a finish]"
)


@pytest.mark.parametrize(
    ("tests", "passed"),
    [
        (f"tests/training/test_resume.py::{RESUMED}", 1),
        ("tests/model/steps/test_jax.py", 7),
        ("tests/model/test_precision.py", 2),
    ],
    ids=["a training goes on", "programs for a GPU", "half precision"],
)
def test_what_holds_on_jax(tests, passed):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", tests],
        env={**os.environ, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    assert f"{passed} passed" in done.stdout
