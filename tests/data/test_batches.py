import keras
import numpy as np
import tensorflow as tf

from vaeflow.config.model import VAEConfig
from vaeflow.data.batches import Batches
from vaeflow.model.device import put_on_device
from vaeflow.model.vae import VAE


def epochs(digits, seed):
    data = Batches(digits, 256, shuffle_seed=seed)
    return [np.concatenate(list(data.at(epoch))) for epoch in range(2)]


def test_fit_goes_through_the_epochs(digits):
    class Keep(keras.Model):
        def train_step(self, data):
            tf.py_function(lambda batch: seen.append(batch.numpy()), [data], [])
            return {"loss": 0.0}

    seen = []
    model = Keep()
    model.compile()
    data = Batches(digits, 256, shuffle_seed=1)
    model.fit(data.feed(), epochs=2, shuffle=False, verbose=0)
    np.testing.assert_array_equal(np.concatenate(seen), np.concatenate(epochs(digits, 1)))


def test_an_epoch_is_a_permutation_of_its_own_decided_by_the_seed(digits):
    first, second = epochs(digits, 1)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(np.sort(first, axis=0), np.sort(digits, axis=0))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(epochs(digits, 1), [first, second])
    assert not np.array_equal(epochs(digits, 2)[0], first)


def test_an_epoch_can_be_gone_on_with_in_the_middle(digits):
    data = Batches(digits, 256, shuffle_seed=1)
    whole = list(data.at(3))
    assert [len(batch) for batch in whole] == [256] * 7 + [5]
    rest = data.at(3, first=2)
    assert len(rest) == 6
    np.testing.assert_array_equal(np.concatenate(list(rest)), np.concatenate(whole[2:]))


def test_without_a_seed_the_order_is_kept(digits):
    np.testing.assert_array_equal(np.concatenate(list(Batches(digits, 100).at(7))), digits)


def test_images_that_a_device_keeps_are_trained_on_like_others(digits):
    weights = []
    for images in (digits, put_on_device(digits)):
        keras.utils.set_random_seed(0)
        vae = VAE(VAEConfig((8, 8, 1), latent_dim=2, filters=(4,), hidden_units=8))
        vae.compile(optimizer="adam", steps_per_execution=3)
        vae.kept_images = images
        vae.fit(Batches(images, 256, shuffle_seed=1).feed(), epochs=2, shuffle=False, verbose=0)
        weights.append(np.concatenate([np.ravel(value) for value in vae.get_weights()]))
    np.testing.assert_array_equal(*weights)
