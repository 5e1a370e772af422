"""What TensorFlow computes on CPUs, computed faster: the same values, to rounding.

Outside training nothing here is used: what is exported has TensorFlow's own operations.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from vaeflow.model.objective import Tensor


@tf.custom_gradient
def silu(x: Tensor) -> Tensor:
    """Compute `x * sigmoid(x)`, and its gradient in one pass where TensorFlow makes six."""
    return tf.nn.silu(x), lambda upstream: _silu_gradient(x, upstream)


@tf.function(jit_compile=True)
def _silu_gradient(x: Tensor, upstream: Tensor) -> Tensor:
    sigmoid = tf.sigmoid(x)
    return upstream * (sigmoid + x * sigmoid * (1 - sigmoid))


def narrow_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    """Compute `tf.nn.conv2d(x, kernel, 1, "SAME")` with few output channels, in half of the time.

    oneDNN's convolutions find 16 channels at once, wanted or not. Here a product of matrices finds
    what every place gives to each of its neighbours, and the gradient in the kernel is that of a
    convolution whose input is narrow, which oneDNN is good at.

    Args:
        x: `(batch, height, width, inputs)`.
        kernel: `(rows, columns, inputs, outputs)`, rows and columns odd.
    """
    return _narrow_convolution(x, tf.convert_to_tensor(kernel))


@tf.custom_gradient
def _narrow_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    rows, columns, inputs, outputs = kernel.shape
    taps = tf.reshape(tf.transpose(kernel, (2, 0, 1, 3)), (inputs, -1))
    given = tf.reshape(tf.reshape(x, (-1, inputs)) @ taps, (-1, *x.shape[1:3], taps.shape[1]))

    def gradient(upstream: Tensor) -> tuple[Tensor, Tensor]:
        same = {"strides": (1, 1, 1, 1), "padding": "SAME"}
        in_x = tf.raw_ops.Conv2DBackpropInput(
            input_sizes=tf.shape(x), filter=kernel, out_backprop=upstream, **same
        )
        swapped = tf.raw_ops.Conv2DBackpropFilter(
            input=upstream, filter_sizes=(rows, columns, outputs, inputs), out_backprop=x, **same
        )
        return in_x, tf.transpose(tf.reverse(swapped, (0, 1)), (0, 1, 3, 2))

    return _collect(given, rows, columns), gradient


@tf.function(jit_compile=True)
def _collect(given: Tensor, rows: int, columns: int) -> Tensor:
    """Sum, at every place, what its neighbours give to it: a slice of the channels each."""
    height, width, channels = given.shape[1:]
    outputs = channels // (rows * columns)
    found = []
    for tap, (row, column) in enumerate(np.ndindex(rows, columns)):
        down, right = row - rows // 2, column - columns // 2
        places = given[
            :,
            max(0, down) : height + min(0, down),
            max(0, right) : width + min(0, right),
            tap * outputs : (tap + 1) * outputs,
        ]
        # Each filled up with zeros by itself: XLA has that, and the sum, in one pass.
        edges = [(max(0, -shift), max(0, shift)) for shift in (down, right)]
        found.append(tf.pad(places, [(0, 0), *edges, (0, 0)]))
    return tf.add_n(found)
