import keras
import numpy as np
import tensorflow as tf

from vaeflow.config.model import VAEConfig
from vaeflow.data import batches
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


def test_whole_batches_come_stacked_the_last_images_by_themselves(digits):
    single, stacked = (Batches(digits, 256, shuffle_seed=1, at_once=size) for size in (1, 4))
    assert [item.shape[:2] for item in stacked] == [(4, 256), (3, 256), (5, 8)]
    joined = [image for item in stacked for image in item.reshape(-1, 8, 8, 1)]
    np.testing.assert_array_equal(joined, np.concatenate(list(single)))
    assert [stacked.steps_done(items) for items in range(4)] == [0, 4, 7, 8]


def test_stacks_end_where_they_would_have_wherever_they_begin(digits):
    """So one that goes on in the middle of an epoch is made by the same compiled programs."""
    data = Batches(digits, 64, shuffle_seed=1, at_once=8)
    assert data.at_once == 7  # a divisor of 28: no shorter stack is left over
    for first, lengths in (
        (0, [7, 7, 7, 7, 1]),
        (14, [7, 7, 1]),
        (16, [5, 7, 1]),
        (27, [1, 1]),
        (28, [1]),
    ):
        data.at(3, first)
        assert [len(data.span(index)) for index in range(len(data))] == lengths
        done = [data.steps_done(items) for items in range(len(data) + 1)]
        assert done == list(np.cumsum([first, *lengths]))
    assert len(Batches(digits[:256], 64, at_once=8)) == 1  # no image is left over


def test_stacks_of_large_images_are_smaller(digits, monkeypatch):
    monkeypatch.setattr(batches, "STACK_BYTES", 3 * 256 * 64)
    assert Batches(digits, 256, at_once=8).at_once == 3
    assert Batches(put_on_device(digits), 256, at_once=8).at_once == 7


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
