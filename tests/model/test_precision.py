"""Half precision; on JAX too, run so by `test_backends`."""

import keras
import numpy as np
import pytest

from vaeflow.config.model import VAEConfig
from vaeflow.data.batches import Batches
from vaeflow.model.device import layers_in
from vaeflow.model.vae import VAE

SHAPE = (28, 28, 1)


def gradients(images, network, precision):
    """Of each variable, by name: a step of length 1 against the gradient."""
    keras.utils.set_random_seed(0)
    with layers_in(precision):
        config = VAEConfig(
            SHAPE, latent_dim=4, filters=(8, 8), hidden_units=16, network=network, seed=0
        )
        vae = VAE(config)
    generator = np.random.default_rng(1)
    for variable in vae.trainable_variables:  # no block is the identity, no bias is 0
        scale = 0.01 if len(variable.shape) == 1 else np.prod(variable.shape[:-1]) ** -0.5
        variable.assign(scale * generator.normal(size=variable.shape))
    before = [variable.numpy() for variable in vae.trainable_variables]
    vae.compile(optimizer=keras.optimizers.SGD(1.0))
    vae.fit(Batches(images, len(images)), shuffle=False, verbose=0)
    assert float(vae.skipped_in_a_row) == 0
    return {
        variable.path: old - variable.numpy()
        for variable, old in zip(vae.trainable_variables, before, strict=True)
    }


@pytest.mark.parametrize("network", ["conv", "residual"])
def test_gradients_in_bfloat16_are_those_in_float32_but_for_rounding(network):
    """Sums over a batch and its pixels come out at a tenth, where they are in bfloat16 too."""
    images = np.random.default_rng(0).integers(200, 256, (128, *SHAPE), dtype=np.uint8)
    exact = gradients(images, network, "float32")
    rounded = gradients(images, network, "mixed_bfloat16")
    errors = {
        name: np.linalg.norm(rounded[name] - values) / np.linalg.norm(values)
        for name, values in exact.items()
    }
    assert max(errors.values()) < 0.1, errors
