"""The two convolutional networks, for images of any height, width and channels."""

import keras
from keras import layers, ops

LOG_VARIANCE_BOUNDS = (-12.0, 12.0)


def level_sizes(size: int, levels: int) -> list[int]:
    """Edge lengths from the image to the deepest feature map: each level halves, rounding up.

    Example: `level_sizes(28, 2) == [28, 14, 7]` and `level_sizes(9, 2) == [9, 5, 3]`.
    """
    sizes = [size]
    for _ in range(levels):
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def soft_bound(values, low, high):
    """Squeeze values smoothly into (low, high); around the middle they stay nearly as they are."""
    middle, reach = (low + high) / 2, (high - low) / 2
    return middle + reach * ops.tanh((values - middle) / reach)


class PerChannel(layers.Layer):
    """One learned number a channel, whatever the input: `(batch, 1, 1, channels)`."""

    def __init__(self, channels, start, **kwargs):
        super().__init__(**kwargs)
        self.values = self.add_weight(
            name="values", shape=(channels,), initializer=keras.initializers.Constant(start)
        )

    def call(self, inputs):
        """Repeat the numbers for each row of `inputs`, `(batch, height, width, features)`."""
        return ops.zeros_like(inputs[:, :1, :1, :1]) + self.values


def build_encoder(image_shape, latent_dim, filters, hidden_units):
    """Encoder φ: image to the mean and log variance of q(t|x).

    Args:
        image_shape: `(height, width, channels)`.
        latent_dim: size of t.
        filters: channels of each stride-2 convolution, first to last.
        hidden_units: width of the dense layer after the convolutions.

    Returns:
        A functional model, images `(batch, height, width, channels)` in [0, 1] to a dict of
        `mean` and `log_variance`, each `(batch, latent_dim)`. The log variance is bounded smoothly:
        no step can make a posterior whose density overflows.
    """
    images = keras.Input(image_shape, name="images")
    x = images
    for level, channels in enumerate(filters):
        x = layers.Conv2D(
            channels, 3, strides=2, padding="same", activation="silu", name=f"down_{level}"
        )(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(hidden_units, activation="silu", name="hidden")(x)
    mean = layers.Dense(latent_dim, dtype="float32", name="mean")(x)
    log_variance = layers.Dense(latent_dim, dtype="float32", name="log_variance")(x)
    outputs = {"mean": mean, "log_variance": soft_bound(log_variance, *LOG_VARIANCE_BOUNDS)}
    return keras.Model(images, outputs, name="encoder")


def build_decoder(image_shape, latent_dim, filters, hidden_units, parameters):
    """Decoder w: latent to the parameters of p(x|t), mirroring the encoder.

    A transposed convolution doubles exactly, the encoder halves rounding up; cropping one row or
    column where the encoder rounded makes every size come back exactly.

    Args:
        image_shape: `(height, width, channels)`.
        latent_dim: size of t.
        filters: as given to the encoder; used in reverse.
        hidden_units: width of the dense layer before the convolutions.
        parameters: what the likelihood needs, by name; see `vaeflow.model.likelihoods`.

    Returns:
        A functional model, latents `(batch, latent_dim)` to a dict of those parameters,
        `(batch, height, width, channels)`, or `(batch, 1, 1, channels)` for one number a channel.
    """
    height, width, channels = image_shape
    heights = level_sizes(height, len(filters))
    widths = level_sizes(width, len(filters))
    latents = keras.Input((latent_dim,), name="latents")
    x = layers.Dense(hidden_units, activation="silu", name="hidden")(latents)
    x = layers.Dense(heights[-1] * widths[-1] * filters[-1], activation="silu", name="unflatten")(x)
    x = layers.Reshape((heights[-1], widths[-1], filters[-1]), name="feature_map")(x)
    for level in reversed(range(len(filters))):
        x = layers.Conv2DTranspose(
            filters[level], 3, strides=2, padding="same", activation="silu", name=f"up_{level}"
        )(x)
        crop = (2 * heights[level + 1] - heights[level], 2 * widths[level + 1] - widths[level])
        if any(crop):
            x = layers.Cropping2D(((0, crop[0]), (0, crop[1])), name=f"crop_{level}")(x)
    outputs = {name: _head(name, need, channels)(x) for name, need in parameters.items()}
    for name, need in parameters.items():
        if need.bounds:
            outputs[name] = soft_bound(outputs[name], *need.bounds)
    return keras.Model(latents, outputs, name="decoder")


def _head(name, need, channels):
    """The layer that gives one parameter of the likelihood from the last feature map."""
    if need.per == "channel":
        return PerChannel(channels, need.start, dtype="float32", name=name)
    start = keras.initializers.Constant(need.start)
    return layers.Conv2D(
        channels, 3, padding="same", bias_initializer=start, dtype="float32", name=name
    )
