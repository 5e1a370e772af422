"""Mini-batches for training, from memory-mapped arrays."""

from __future__ import annotations

import numpy as np


def batches(images: np.ndarray, batch_size: int, *, shuffle_seed: int | None = None):
    """A `tf.data.Dataset` of float32 batches in [0, 1], read from `images` as they are needed.

    Args:
        images: uint8, `(count, height, width, channels)`, typically memory-mapped.
        batch_size: images per batch; the last batch of an epoch may be smaller.
        shuffle_seed: when given, each epoch is a fresh permutation, the same in every run.
    """
    import tensorflow as tf

    def gather(indices):
        return images[indices]

    def scale(indices):
        pixels = tf.numpy_function(gather, [indices], tf.uint8, stateful=False)
        pixels = tf.ensure_shape(pixels, (None, *images.shape[1:]))
        return tf.cast(pixels, tf.float32) / 255.0

    dataset = tf.data.Dataset.range(len(images))
    if shuffle_seed is not None:
        dataset = dataset.shuffle(len(images), seed=shuffle_seed)
    return dataset.batch(batch_size).map(scale).prefetch(tf.data.AUTOTUNE)
