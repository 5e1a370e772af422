"""One objective, two backends: a step on each, from the same weights and the same noise."""

import json
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("jax", reason="JAX is not installed: pip install 'vaeflow[jax]'")

CASES = {
    "elbo": {"beta": 0.5, "kl_warmup_steps": 10, "free_bits": 0.1, "gradient_clip": 1e-3},
    "importance weighted": {"objective": "importance_weighted", "samples": 4},
    "residual and logistic": {"likelihood": "discretized_logistic", "network": "residual"},
    "left out": {"gradient_limit": 1e-9},
}
STEP = """
import json, sys
import vaeflow
import keras, numpy as np
from vaeflow.model.vae import VAE, load_vae
from vaeflow.data.batches import Batches

folder, settings, role = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
images = np.load(f"{folder}/images.npy")
noise = np.load(f"{folder}/noise.npy")
VAE._draw_noise = lambda self, images, seed: keras.ops.convert_to_tensor(noise)
if role == "first":
    keras.utils.set_random_seed(0)
    vae = VAE((9, 8, 1), latent_dim=2, filters=(4, 6), hidden_units=8, **settings)
    vae.compile(optimizer=keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5))
    vae.save(f"{folder}/model.keras")
vae = load_vae(f"{folder}/model.keras")
assert keras.backend.backend() == ("tensorflow" if role == "first" else "jax")
if role == "second":
    assert "tensorflow" not in sys.modules
for _ in range(2):
    logs = vae.fit(Batches(images, len(images)), verbose=0).history
evaluated = vae.evaluate(Batches(images, len(images)), verbose=0, return_dict=True)
logs |= {f"validation_{name}": [value] for name, value in evaluated.items()}
np.savez(f"{folder}/{role}.npz", *[variable.numpy() for variable in vae.trainable_variables])
print(json.dumps({name: float(values[-1]) for name, values in logs.items()}))
"""


@pytest.mark.parametrize("case", CASES)
def test_a_step_on_jax_is_the_step_on_tensorflow(digits, tmp_path, monkeypatch, case):
    settings = CASES[case]
    taller = np.concatenate([digits[:32], digits[:32, :1]], axis=1)  # 9 x 8: is cropped
    np.save(tmp_path / "images.npy", taller)
    noise = np.random.default_rng(0).normal(size=(settings.get("samples", 1), 32, 2))
    np.save(tmp_path / "noise.npy", noise.astype("float32"))

    logs = {}
    for role, backend in (("first", "tensorflow"), ("second", "jax")):
        monkeypatch.setenv("KERAS_BACKEND", backend)
        command = [sys.executable, "-c", STEP, str(tmp_path), json.dumps(settings), role]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        logs[role] = json.loads(done.stdout.splitlines()[-1])

    assert logs["second"] == pytest.approx(logs["first"], rel=1e-5, abs=1e-5)
    assert logs["first"]["skipped_steps"] == (case == "left out")
    first, second = (np.load(tmp_path / f"{role}.npz") for role in logs)
    for name in first.files:
        np.testing.assert_allclose(first[name], second[name], rtol=0, atol=1e-5)
