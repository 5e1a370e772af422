"""Networks of your own; `train.network: networks:dense` in `params.yaml` takes the one below.

A function is called twice: with the images and the names and shapes of what the encoder is to give,
`mean` and `log_variance`, and with latents and what the likelihood needs of the decoder. It returns
a tensor of that shape for each name, any numbers: bounds are put on them afterwards.
"""

import math

from keras import layers


def dense(inputs, outputs):
    """Put one dense layer between what comes in and each of what goes out."""
    x = layers.Flatten()(inputs)
    x = layers.Dense(256, activation="silu")(x)
    return {
        name: layers.Reshape(shape)(layers.Dense(math.prod(shape))(x))
        for name, shape in outputs.items()
    }
