"""What is computed faster is what TensorFlow computes."""

import numpy as np
import pytest
import tensorflow as tf

from vaeflow.model.networks import NarrowConv2D
from vaeflow.model.steps.cpu import narrow_convolution, silu


def with_gradients(function, *values):
    values = [tf.convert_to_tensor(value) for value in values]
    with tf.GradientTape() as tape:
        tape.watch(values)
        outputs = function(*values)
        upstream = tf.random.stateless_normal(outputs.shape, (1, 2))
        loss = tf.reduce_sum(outputs * upstream)
    return [outputs, *tape.gradient(loss, values)]


def test_silu_and_its_gradient():
    x = np.concatenate([np.linspace(-100, 100, 401), [0.0, 1e-30]]).astype("float32")
    for ours, theirs in zip(
        with_gradients(silu, x), with_gradients(lambda x: x * tf.sigmoid(x), x), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", [(3, 3, 5, 4), (1, 5, 2, 1)])
def test_a_narrow_convolution_and_its_gradients(kernel):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(3, 6, 7, kernel[2])).astype("float32")
    kernel = generator.normal(size=kernel).astype("float32")
    for ours, theirs in zip(
        with_gradients(narrow_convolution, x, kernel),
        with_gradients(lambda x, kernel: tf.nn.conv2d(x, kernel, 1, "SAME"), x, kernel),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_narrow_layer_in_training_is_the_layer_outside_of_it():
    layer = NarrowConv2D(4, 3, padding="same", bias_initializer="ones")
    x = np.random.default_rng(0).normal(size=(2, 4, 5, 3)).astype("float32")
    np.testing.assert_allclose(layer(x, training=True), layer(x, training=False), atol=1e-5)
