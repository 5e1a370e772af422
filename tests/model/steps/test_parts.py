"""Steps whose batch is taken in parts, one for each core, and the optimizer that makes them."""

import subprocess
import sys

import keras
import numpy as np
import pytest

from vaeflow.config.model import VAEConfig
from vaeflow.data.batches import Batches
from vaeflow.model import device, objective
from vaeflow.model.device import share_cores
from vaeflow.model.steps.optimizer import Adam
from vaeflow.model.vae import VAE, load_vae

FREE_BITS = 0.3
OBJECTIVES = {
    "elbo": {"binarize": "dynamic", "free_bits": FREE_BITS, "samples": 2},
    "importance_weighted": {"objective": "importance_weighted", "samples": 3, "beta": 0.5},
    "a flow": {"prior": "flow", "samples": 2},
}


def untrained(**settings):
    """A small model whose posteriors cost some images more than `FREE_BITS`, and others less."""
    keras.utils.set_random_seed(0)
    vae = VAE(VAEConfig((8, 8, 1), latent_dim=3, filters=(4, 6), hidden_units=16, **settings))
    mean = vae.encoder.get_layer("mean")
    mean.kernel.assign(30 * mean.kernel)
    return vae


def trained(images, parts=1, optimizer=None, **settings):
    """A small model after an epoch of batches of 8, and what Keras has to say of it."""
    vae = untrained(**settings)
    vae.parts = parts
    vae.compile(optimizer=optimizer or keras.optimizers.SGD(1e-3))
    logs = vae.fit(Batches(images, 8).feed(), shuffle=False, verbose=0).history
    evaluated = vae.evaluate(Batches(images, 8).feed(), verbose=0)
    return vae, [*[values[-1] for values in logs.values()], *evaluated]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_in_parts_steps_are_those_of_the_whole_batch(digits, objective):
    """Of three parts, those of 8 images are uneven, and of the last one two are empty."""
    whole, expected = trained(digits[:17], **OBJECTIVES[objective])
    vae, logs = trained(digits[:17], 3, **OBJECTIVES[objective])
    np.testing.assert_allclose(logs, expected, rtol=1e-4)
    for ours, theirs in zip(vae.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_floor_of_free_bits_is_within_what_the_images_cost(digits):
    """Were it above or below all of it, the test of the parts could not see the floor."""
    posterior = untrained().encoder(digits[:17].astype("float32") / 255)
    above = np.asarray(objective.kl_per_dimension(**posterior)) > FREE_BITS
    for dimension in above.T:
        assert dimension.any()
        assert not dimension.all()


def test_a_step_that_is_left_out_is_left_out_in_parts(digits):
    vae, _ = trained(digits[:16], 2, gradient_limit=1e-9)
    assert float(vae.skipped_in_a_row) == 2


def test_adam_makes_the_steps_of_kerass(digits):
    def everything(kind):
        optimizer = kind(0.01)
        vae, _ = trained(digits[:24], optimizer=optimizer)
        return [*vae.get_weights(), *[variable.numpy() for variable in optimizer.variables]]

    for ours, theirs in zip(everything(Adam), everything(keras.optimizers.Adam), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_adam_is_what_keras_calls(digits, monkeypatch):
    """Keras might come to call what is overridden by other names: then steps would be slower."""
    from vaeflow.model.steps import tensorflow

    calls, in_one_pass = [], tensorflow.in_one_pass
    monkeypatch.setattr(
        tensorflow, "in_one_pass", lambda change: calls.append(1) or in_one_pass(change)
    )
    trained(digits[:8], optimizer=Adam(0.01))
    of_weights = len(calls)
    assert of_weights >= 2  # two halves of them
    trained(digits[:8], optimizer=Adam(0.01, use_ema=True))
    assert len(calls) - of_weights == 2 * of_weights  # and as many of their averages


def test_keras_still_asks_a_model_to_build_itself(digits, monkeypatch):
    """On several devices it would take a batch for that, unless the method is overridden."""
    calls = []
    monkeypatch.setattr(VAE, "_maybe_symbolic_build", lambda *_, **__: calls.append(1))
    trained(digits[:8])
    assert calls


def test_a_saved_model_keeps_its_optimizer(digits, tmp_path):
    vae, _ = trained(digits[:16], optimizer=Adam(0.01))
    vae.save(tmp_path / "model.keras")
    loaded = load_vae(tmp_path / "model.keras")
    assert type(loaded.optimizer) is Adam
    assert int(loaded.optimizer.iterations) == 2


def test_few_cores_share_batches_that_are_large_enough(monkeypatch):
    for cores, batch_size, parts in (
        (1, 512, 1),
        (2, 32, 2),
        (2, 31, 1),
        (4, 64, 4),
        (16, 4096, 1),
    ):
        monkeypatch.setattr(device, "cores", lambda cores=cores: cores)
        assert share_cores(batch_size, jit=False) == parts
        assert share_cores(batch_size, jit=True) == 1


def test_a_core_that_has_a_part_shares_no_operation():
    code = (
        "import vaeflow.model.device as device, tensorflow as tf; device.cores = lambda: 2;"
        "assert device.share_cores(64, jit=False) == 2;"
        "assert tf.config.threading.get_intra_op_parallelism_threads() == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
