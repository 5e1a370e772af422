"""The two convolutional networks, for images of any height, width and channels."""

import keras
from keras import layers


def level_sizes(size: int, levels: int) -> list[int]:
    """Edge lengths from the image to the deepest feature map: each level halves, rounding up.

    Example: `level_sizes(28, 2) == [28, 14, 7]` and `level_sizes(9, 2) == [9, 5, 3]`.
    """
    sizes = [size]
    for _ in range(levels):
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def build_encoder(image_shape, latent_dim, filters, hidden_units):
    """Encoder φ: image to the mean and log variance of q(t|x).

    Args:
        image_shape: `(height, width, channels)`.
        latent_dim: size of t.
        filters: channels of each stride-2 convolution, first to last.
        hidden_units: width of the dense layer after the convolutions.

    Returns:
        A functional model, images `(batch, height, width, channels)` in [0, 1] to a dict of
        `mean` and `log_variance`, each `(batch, latent_dim)`.
    """
    images = keras.Input(image_shape, name="images")
    x = images
    for level, channels in enumerate(filters):
        x = layers.Conv2D(
            channels, 3, strides=2, padding="same", activation="silu", name=f"down_{level}"
        )(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(hidden_units, activation="silu", name="hidden")(x)
    outputs = {
        name: layers.Dense(latent_dim, dtype="float32", name=name)(x)
        for name in ("mean", "log_variance")
    }
    return keras.Model(images, outputs, name="encoder")


def build_decoder(image_shape, latent_dim, filters, hidden_units):
    """Decoder w: latent to the Bernoulli logits of p(x|t), mirroring the encoder.

    A transposed convolution doubles exactly, the encoder halves rounding up; cropping one row or
    column where the encoder rounded makes every size come back exactly.

    Args:
        image_shape: `(height, width, channels)`.
        latent_dim: size of t.
        filters: as given to the encoder; used in reverse.
        hidden_units: width of the dense layer before the convolutions.

    Returns:
        A functional model, latents `(batch, latent_dim)` to a dict of `logits`,
        `(batch, height, width, channels)`.
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
    logits = layers.Conv2D(channels, 3, padding="same", dtype="float32", name="logits")(x)
    return keras.Model(latents, {"logits": logits}, name="decoder")
