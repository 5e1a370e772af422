"""Encoders and decoders, convolutional, for images of any height, width and channels.

`conv` is small and fast; `residual` is deeper, and pays on a GPU. Others are the user's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers, ops

from vaeflow.config.model import VAEConfig
from vaeflow.model import own
from vaeflow.model.device import has_gpu
from vaeflow.model.likelihoods import Parameter
from vaeflow.model.objective import Tensor
from vaeflow.model.steps import backend

if keras.backend.backend() == "tensorflow":
    from vaeflow.model.steps import cpu

LOG_VARIANCE_BOUNDS = (-12.0, 12.0)
NARROW = 4  # channels; from twice as many on, Conv2D is as fast


def level_sizes(size: int, levels: int) -> list[int]:
    """Return edge lengths, image to deepest feature map: each level halves, rounding up.

    Example: `level_sizes(28, 2) == [28, 14, 7]` and `level_sizes(9, 2) == [9, 5, 3]`.
    """
    sizes = [size]
    for _ in range(levels):
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def soft_bound(values: Tensor, low: float, high: float) -> Tensor:
    """Squeeze values smoothly into (low, high); around the middle they stay nearly as they are."""
    middle, reach = (low + high) / 2, (high - low) / 2
    return middle + reach * ops.tanh((values - middle) / reach)


@keras.saving.register_keras_serializable(package="vaeflow")
class PerChannel(layers.Layer):
    """One learned number a channel, whatever the input: `(batch, 1, 1, channels)`.

    Args:
        channels: how many numbers.
        start: their value before training.
    """

    def __init__(self, channels: int, start: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.channels = channels
        self.start = start
        self.values = self.add_weight(
            name="values", shape=(channels,), initializer=keras.initializers.Constant(start)
        )

    def call(self, inputs: Tensor) -> Tensor:
        """Repeat the numbers for each row of `inputs`, `(batch, height, width, features)`."""
        return ops.zeros_like(inputs[:, :1, :1, :1]) + self.values

    def get_config(self) -> dict[str, Any]:
        """Return every constructor value."""
        return {**super().get_config(), "channels": self.channels, "start": self.start}


@keras.saving.register_keras_serializable(package="vaeflow")
def silu(x: Tensor) -> Tensor:
    """Compute `x * sigmoid(x)`, with a gradient that takes one pass over the memory, not six."""
    if keras.backend.backend() == "tensorflow":
        return cpu.silu(x)
    return keras.activations.silu(x)


@keras.saving.register_keras_serializable(package="vaeflow")
class NarrowConv2D(layers.Conv2D):
    """A `Conv2D` of stride 1 to few channels, which trains faster on CPUs under TensorFlow."""

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        """Compute what `Conv2D` does, to rounding."""
        if training and keras.backend.backend() == "tensorflow" and not has_gpu():
            return cpu.narrow_convolution(inputs, self.kernel) + self.bias
        return super().call(inputs)


class BiasGradientInFloat32:
    """Sum the gradient of a Keras layer's bias in float32 where the layer computes in bfloat16.

    That is a sum over a batch and all its pixels. bfloat16 has eight significant binary digits: a
    sum in it stops growing when it is some hundred times what is added.
    """

    compute_dtype: str
    activation: Callable[..., Tensor]
    bias: Any
    without_bias: Callable[..., Tensor]

    def call(self, inputs: Tensor) -> Tensor:
        """Compute what the layer does."""
        if self.compute_dtype in ("float32", "float64"):
            return super().call(inputs)  # type: ignore[misc]
        outputs = backend().add_bias(
            self.without_bias(inputs), ops.cast(self.bias, self.compute_dtype)
        )
        return self.activation(outputs)


@keras.saving.register_keras_serializable(package="vaeflow")
class Conv2D(BiasGradientInFloat32, layers.Conv2D):
    """Keras's convolution."""

    def without_bias(self, inputs: Tensor) -> Tensor:
        """Convolve."""
        return self.convolution_op(inputs, self.kernel)


@keras.saving.register_keras_serializable(package="vaeflow")
class Conv2DTranspose(BiasGradientInFloat32, layers.Conv2DTranspose):
    """Keras's transposed convolution."""

    def without_bias(self, inputs: Tensor) -> Tensor:
        """Convolve."""
        return ops.conv_transpose(
            inputs, self.kernel, strides=list(self.strides), padding=self.padding
        )


@keras.saving.register_keras_serializable(package="vaeflow")
class Dense(BiasGradientInFloat32, layers.Dense):
    """Keras's dense layer."""

    def without_bias(self, inputs: Tensor) -> Tensor:
        """Multiply."""
        return ops.matmul(inputs, self.kernel)


def build_encoder(config: VAEConfig) -> keras.Model:
    """Build the encoder φ: image to the mean and log variance of q(t|x).

    Returns:
        A functional model, images `(batch, height, width, channels)` in [0, 1] to a dict of
        `mean` and `log_variance`, each `(batch, latent_dim)`. The log variance is bounded smoothly:
        no step can make a posterior whose density overflows.
    """
    images = keras.Input(config.image_shape, name="images")
    if ":" in config.network:
        shape = (config.latent_dim,)
        given = own.apply(config.network, images, {"mean": shape, "log_variance": shape})
        bounded = soft_bound(given["log_variance"], *LOG_VARIANCE_BOUNDS)
        outputs = {"mean": given["mean"], "log_variance": bounded}
        return keras.Model(images, outputs, name="encoder")
    x = NETWORKS[config.network].down(images, config.filters, config.depth)
    x = layers.Flatten(name="flatten")(x)
    x = Dense(config.hidden_units, activation=silu, name="hidden")(x)
    mean = layers.Dense(config.latent_dim, dtype="float32", name="mean")(x)
    log_variance = layers.Dense(config.latent_dim, dtype="float32", name="log_variance")(x)
    outputs = {"mean": mean, "log_variance": soft_bound(log_variance, *LOG_VARIANCE_BOUNDS)}
    return keras.Model(images, outputs, name="encoder")


def build_decoder(config: VAEConfig, parameters: Mapping[str, Parameter]) -> keras.Model:
    """Build the decoder w: latent to the parameters of p(x|t), mirroring the encoder.

    Args:
        config: as given to the encoder; the levels are used in reverse.
        parameters: what the likelihood needs, by name; see `vaeflow.model.likelihoods`.

    Returns:
        A functional model, latents `(batch, latent_dim)` to a dict of those parameters,
        `(batch, height, width, numbers)`, or `(batch, 1, 1, numbers)` for those a channel.
    """
    filters = config.filters
    height, width, _ = config.image_shape
    heights, widths = level_sizes(height, len(filters)), level_sizes(width, len(filters))
    deepest = (heights[-1], widths[-1], filters[-1])
    latents = keras.Input((config.latent_dim,), name="latents")
    if ":" in config.network:
        outputs = _own_outputs(latents, config, parameters)
        return keras.Model(latents, _bounded(outputs, parameters), name="decoder")
    x = Dense(config.hidden_units, activation=silu, name="hidden")(latents)
    x = Dense(math.prod(deepest), activation=silu, name="unflatten")(x)
    x = layers.Reshape(deepest, name="feature_map")(x)
    sizes = list(zip(heights, widths, strict=True))
    x = NETWORKS[config.network].up(x, sizes, filters, config.depth)
    outputs = {name: _head(x, name, need, config.image_shape) for name, need in parameters.items()}
    return keras.Model(latents, _bounded(outputs, parameters), name="decoder")


def _bounded(outputs: Mapping[str, Tensor], parameters: Mapping[str, Parameter]) -> dict[str, Any]:
    """Keep each output within what its parameter may be."""
    return {
        name: soft_bound(values, *need.bounds) if (need := parameters[name]).bounds else values
        for name, values in outputs.items()
    }


def _own_outputs(
    latents: Tensor, config: VAEConfig, parameters: Mapping[str, Parameter]
) -> dict[str, Any]:
    """Have the user's network give what depends on the latent, about where it is to begin."""
    height, width, _ = config.image_shape
    shapes = {
        name: (height, width, need.numbers)
        for name, need in parameters.items()
        if need.per == "pixel"
    }
    outputs = own.apply(config.network, latents, shapes)
    for name, need in parameters.items():
        if need.per == "channel":
            map_of_one = layers.Reshape((1, 1, -1), dtype="float32", name=f"{name}_map")(latents)
            numbers = PerChannel(need.numbers, need.start[0], dtype="float32", name=name)
            outputs[name] = numbers(map_of_one)
        else:
            outputs[name] = outputs[name] + np.array(need.start, np.float32)
    return outputs


def _head(x: Tensor, name: str, need: Parameter, image_shape: tuple[int, int, int]) -> Tensor:
    """Build one parameter of the likelihood from a feature map of the image's size or half of it.

    From half, one convolution gives each place what the four pixels need that it doubles to
    (sub-pixel convolution, Shi et al. 2016): a layer of many channels and the image's size would
    cost as much as all others together.
    """
    height, width, _ = image_shape
    if need.per == "channel":
        return PerChannel(need.numbers, need.start[0], dtype="float32", name=name)(x)
    rows, columns = x.shape[1:3]
    doubled = (rows, columns) != (height, width)
    pixels = 4 if doubled else 1
    filters = need.numbers * pixels
    convolution = NarrowConv2D if filters <= NARROW else layers.Conv2D
    start = need.start[0] if len(need.start) == 1 else list(need.start) * pixels
    outputs = convolution(
        filters,
        3,
        padding="same",
        bias_initializer=keras.initializers.Constant(start),
        dtype="float32",
        name=name,
    )(x)
    if not doubled:
        return outputs
    split, whole = (rows, columns, 2, 2, need.numbers), (2 * rows, 2 * columns, need.numbers)
    for layer in (
        layers.Reshape(split, dtype="float32", name=f"{name}_pixels"),
        layers.Permute((1, 3, 2, 4, 5), dtype="float32", name=f"{name}_interleave"),
        layers.Reshape(whole, dtype="float32", name=f"{name}_image"),
    ):
        outputs = layer(outputs)
    return _crop(outputs, (height, width), f"{name}_crop", dtype="float32")


# === conv: a strided convolution a level, and more at the same size for depth above 1. The decoder
# leaves the last doubling to its head ===


def _conv_down(x: Tensor, filters: tuple[int, ...], depth: int) -> Tensor:
    for level, channels in enumerate(filters):
        x = _conv(channels, f"down_{level}", strides=2)(x)
        for index in range(1, depth):
            x = _conv(channels, f"down_{level}_{index}")(x)
    return x


def _conv_up(
    x: Tensor, sizes: list[tuple[int, int]], filters: tuple[int, ...], depth: int
) -> Tensor:
    for level in reversed(range(len(filters))):
        for index in range(1, depth):
            x = _conv(filters[level], f"up_{level}_{index}")(x)
        if level > 0:
            x = _double(x, filters[level], sizes[level], level)
    return x


# === residual: blocks at every size, the image's own included ===


def _residual_down(x: Tensor, filters: tuple[int, ...], depth: int) -> Tensor:
    x = _conv(filters[0], "stem", activation=None)(x)
    for level, channels in enumerate(filters):
        x = _blocks(x, depth, f"down_{level}")
        x = _conv(channels, f"halve_{level}", strides=2, activation=None)(x)
    x = _blocks(x, depth, "deepest")
    return layers.Activation(silu, name="last")(x)


def _residual_up(
    x: Tensor, sizes: list[tuple[int, int]], filters: tuple[int, ...], depth: int
) -> Tensor:
    x = _blocks(x, depth, "deepest")
    for level in reversed(range(len(filters))):
        channels = filters[max(0, level - 1)]
        x = _double(x, channels, sizes[level], level, activation=None)
        x = _blocks(x, depth, f"up_{level}")
    return layers.Activation(silu, name="last")(x)


def _blocks(x: Tensor, count: int, name: str) -> Tensor:
    """Stack pre-activation residual blocks (He et al. 2016), each the identity at the start.

    Their last convolution starts at zero, which takes the place of normalisation (De & Smith 2020):
    an image's answer must not depend on the batch it is in.
    """
    channels = x.shape[-1]
    for index in range(count):
        block = f"{name}_block_{index}"
        inner = layers.Activation(silu, name=f"{block}_in")(x)
        inner = _conv(channels, f"{block}_first")(inner)
        inner = _conv(channels, f"{block}_second", activation=None, start="zeros")(inner)
        x = layers.Add(name=block)([x, inner])
    return x


# === Shared ===


def _conv(
    channels: int,
    name: str,
    *,
    strides: int = 1,
    activation: Callable[..., Tensor] | None = silu,
    start: str = "glorot_uniform",
) -> layers.Layer:
    return Conv2D(
        channels,
        3,
        strides=strides,
        padding="same",
        activation=activation,
        kernel_initializer=start,
        name=name,
    )


def _double(
    x: Tensor,
    channels: int,
    size: tuple[int, int],
    level: int,
    activation: Callable[..., Tensor] | None = silu,
) -> Tensor:
    """Double height and width, then crop to `size`, `(height, width)`."""
    x = Conv2DTranspose(
        channels, 3, strides=2, padding="same", activation=activation, name=f"up_{level}"
    )(x)
    return _crop(x, size, f"crop_{level}")


def _crop(x: Tensor, size: tuple[int, int], name: str, dtype: str | None = None) -> Tensor:
    """Crop the last row or column, where `size` is smaller by one.

    The decoder doubles exactly, the encoder halves rounding up: so every size comes back exactly.
    """
    crop = tuple(doubled - edge for doubled, edge in zip(x.shape[1:3], size, strict=True))
    if not any(crop):
        return x
    return layers.Cropping2D(((0, crop[0]), (0, crop[1])), dtype=dtype, name=name)(x)


class Network(NamedTuple):
    """From the image to the deepest feature map, and back."""

    down: Callable[..., Any]
    up: Callable[..., Any]


NETWORKS = {
    "conv": Network(_conv_down, _conv_up),
    "residual": Network(_residual_down, _residual_up),
}
