"""Likelihoods p(x|t) of an image's pixels, independent given the decoder's answer.

Each says which parameters the decoder must give, the log probability of an image under them, the
image to show for them, and an image drawn from them. They compute with Keras's operations in
training, and with NumPy's in `vaeflow.bundle.runtime`: what both have is enough, or is made of it.

`draw` takes numbers that are uniform in (0, 1), `(..., height, width, 1 + channels)`, the first of
each pixel to choose a component of a mixture by, and gives an image for each.

Pixels are in [0, 1]. Parameters are `(..., batch, height, width, numbers)`, with any number of
leading sample axes; those that are one number a channel have height and width 1. Log likelihoods
are in nats: of images `(..., batch)`, of places `(..., batch, height, width, numbers)`, whose last
axis has a number a channel, or one of all channels where these depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from vaeflow.data.images import Images

LOG_2_PI = math.log(2 * math.pi)
PIXEL_AXES = (-3, -2, -1)
Array = Any


class Parameter(NamedTuple):
    """One output of the decoder.

    Attributes:
        numbers: how many a pixel, or a channel.
        per: numbers for every `pixel`, depending on t, or for each `channel`, learned but
            independent of t.
        bounds: what they stay between, smoothly; None for any value.
        start: where they begin, before training: one value for all, or one for each.
    """

    numbers: int
    per: Literal["pixel", "channel"] = "pixel"
    bounds: tuple[float, float] | None = None
    start: tuple[float, ...] = (0.0,)


class PixelSpec(NamedTuple):
    """What a likelihood is made for.

    Attributes:
        channels: of the images.
        levels: as many values, evenly spaced from 0 to 1, as a pixel may have.
        mixtures: components of a mixture.
    """

    channels: int
    levels: int = 256
    mixtures: int = 5


@dataclass(frozen=True)
class _Likelihood:
    """What each is made of.

    Args:
        ops: the operations to compute with, Keras's or NumPy's; see `NumpyOperations`.
        spec: what for.
    """

    ops: Any
    spec: PixelSpec
    # From images and the decoder's answer, what each place adds to log p(x|t).
    log_likelihood_of_places: ClassVar[Callable[..., Array]]

    def log_likelihood(self, images: Array, *parameters: Array, **named: Array) -> Array:
        """Compute log p(x|t) of whole images."""
        places = self.log_likelihood_of_places(images, *parameters, **named)
        return self.ops.sum(places, axis=PIXEL_AXES)


class Bernoulli(_Likelihood):
    """Binary pixels. For grey ones the value is a cross-entropy, no likelihood of the data."""

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """Logits."""
        return {"logits": Parameter(self.spec.channels)}

    def log_likelihood_of_places(self, images: Array, logits: Array) -> Array:
        """Compute x log sigmoid(l) + (1 - x) log sigmoid(-l), which is x l - softplus(l)."""
        return images * logits - self.ops.softplus(logits)

    def mean(self, logits: Array) -> Array:
        """Return the probability of a white pixel."""
        return self.ops.sigmoid(logits)

    def draw(self, uniform: Array, logits: Array) -> Array:
        """Draw images."""
        return self.ops.where(uniform[..., 1:] < self.mean(logits), 1.0, 0.0)


class Gaussian(_Likelihood):
    """Real-valued pixels: a mean for each, and a learned scale for each channel.

    A density, not a probability: of pixels that can be predicted exactly it grows without bound as
    the scale shrinks. The scale stays above exp(-6), about half a grey level of 8 bits. (One
    learned scale, not one a pixel: Rybkin, Daniilidis and Levine 2021.)
    """

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """Mean and logarithm of the scale."""
        channels = self.spec.channels
        return {
            "mean": Parameter(channels, bounds=(0.0, 1.0), start=(0.5,)),
            "log_scale": Parameter(channels, per="channel", bounds=(-6.0, 1.0), start=(-1.5,)),
        }

    def log_likelihood_of_places(self, images: Array, mean: Array, log_scale: Array) -> Array:
        """Compute the log density of the pixels in [0, 1]."""
        standardised = (images - mean) * self.ops.exp(-log_scale)
        return -0.5 * (LOG_2_PI + self.ops.square(standardised)) - log_scale

    def mean(self, mean: Array, log_scale: Array) -> Array:
        """Return the mean itself."""
        return mean

    def draw(self, uniform: Array, mean: Array, log_scale: Array) -> Array:
        """Draw images, and clip them to [0, 1]."""
        normal = 2**0.5 * self.ops.erfinv(2 * uniform[..., 1:] - 1)
        return self.ops.clip(mean + self.ops.exp(log_scale) * normal, 0.0, 1.0)


class DiscretizedLogistic(_Likelihood):
    """Pixels of some levels: the mass that a logistic distribution has within half a level of each.

    A probability of the levels; black and white take the tails (Kingma et al. 2016; Salimans et al.
    2017, sec. 2.1).
    """

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """Location and logarithm of the scale."""
        channels = self.spec.channels
        return {
            "location": Parameter(channels, start=(0.5,)),
            "log_scale": Parameter(channels, bounds=(-8.0, 1.0), start=(-2.0,)),
        }

    def log_likelihood_of_places(self, images: Array, location: Array, log_scale: Array) -> Array:
        """Compute the log probability of the levels."""
        return self.log_mass(self.at_levels(images), location, log_scale)

    def log_mass(self, images: Array, location: Array, log_scale: Array) -> Array:
        """Compute the log probability of each number by itself.

        With a and b the standardised upper and lower edge of a level, sigmoid(a) - sigmoid(b) =
        sigmoid(a) sigmoid(-b) (1 - exp(b - a)), whose logarithm loses no digits anywhere.
        """
        ops, half = self.ops, 0.5 / (self.spec.levels - 1)
        precision = ops.exp(-log_scale)
        below_upper = -ops.softplus(-(images + half - location) * precision)
        above_lower = -ops.softplus((images - half - location) * precision)
        between = ops.log(-ops.expm1(-2 * half * precision))
        black, white = images < half, images > 1 - half
        middle = below_upper + above_lower + between
        return ops.where(black, below_upper, ops.where(white, above_lower, middle))

    def at_levels(self, images: Array) -> Array:
        """Move pixels to the nearest level, where there are fewer than a byte's."""
        if self.spec.levels == 256:
            return images
        steps = self.spec.levels - 1
        return self.ops.round(images * steps) / steps

    def mean(self, location: Array, log_scale: Array) -> Array:
        """Return the mean of the logistic cut off at 0 and 1: that of the levels, to half a level.

        It is the integral of sigmoid((location - u) / scale) over u from 0 to 1.
        """
        ops, scale = self.ops, self.ops.exp(log_scale)
        upper, lower = location / scale, (location - 1) / scale
        return ops.clip(scale * (ops.softplus(upper) - ops.softplus(lower)), 0.0, 1.0)

    def draw(self, uniform: Array, location: Array, log_scale: Array) -> Array:
        """Draw images."""
        return self.level_at(uniform[..., 1:], location, log_scale)

    def level_at(self, uniform: Array, location: Array, log_scale: Array) -> Array:
        """Return the levels below whose upper edges a share `uniform` of the mass lies."""
        ops, steps = self.ops, self.spec.levels - 1
        value = location + ops.exp(log_scale) * (ops.log(uniform) - ops.log(1 - uniform))
        return ops.round(ops.clip(value, 0.0, 1.0) * steps) / steps


class MixtureLogistic(_Likelihood):
    """Pixels of some levels: a mixture of discretised logistics (Salimans et al. 2017, sec. 2.1).

    A component is one of the whole pixel. Within it, the location of a channel moves linearly with
    how far the channels before it are from theirs (sec. 2.2), so that it knows their correlation.
    """

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """Logits of the components; of each, its channels' parameters, one channel after another.

        A coefficient is one of a pair of channels: of 1 after 0, 2 after 0, 2 after 1, and so on.
        """
        mixtures, channels = self.spec.mixtures, self.spec.channels
        # Components that begin alike would stay so.
        spread = tuple(np.linspace(0, 1, mixtures + 2)[1:-1].tolist())
        needed = {
            "logits": Parameter(mixtures),
            "location": Parameter(channels * mixtures, start=spread * channels),
            "log_scale": Parameter(channels * mixtures, bounds=(-8.0, 1.0), start=(-2.0,)),
        }
        if pairs := channels * (channels - 1) // 2:
            needed["coefficient"] = Parameter(pairs * mixtures, bounds=(-2.0, 2.0))
        return needed

    @property
    def _single(self) -> DiscretizedLogistic:
        return DiscretizedLogistic(self.ops, self.spec)

    def log_likelihood_of_places(self, images: Array, logits: Array, **parameters: Array) -> Array:
        """Compute the log probability of the levels of all channels."""
        pixels = self._split(self._single.at_levels(images))
        masses = _log_softmax(self.ops, logits)
        for pixel, location, log_scale in self._channels(pixels, **parameters):
            masses = masses + self._single.log_mass(pixel, location, log_scale)
        return _log_sum_exp(self.ops, masses)

    def mean(self, logits: Array, **parameters: Array) -> Array:
        """Return the mean of the levels: to half a level, as `DiscretizedLogistic.mean`.

        Of a channel that depends on others, where these are at their locations and its scale is
        that of all their spreads together, as if their sum were logistic too.
        """
        ops = self.ops
        weights = ops.exp(_log_softmax(ops, logits))
        variances: list[Array] = []
        means = []
        channels = self._split_parameters(**parameters)
        for location, log_scale, coefficients in channels:
            variance = ops.exp(2 * log_scale)
            for coefficient, other in zip(coefficients, variances, strict=True):
                variance = variance + ops.square(coefficient) * other
            variances.append(variance)
            mean = self._single.mean(location, 0.5 * ops.log(variance))
            means.append(ops.sum(weights * mean, axis=-1))
        return ops.stack(means, axis=-1)

    def draw(self, uniform: Array, logits: Array, **parameters: Array) -> Array:
        """Draw images."""
        ops = self.ops
        # The first component that the mass up to it is more than the uniform number.
        shares = ops.cumsum(ops.exp(_log_softmax(ops, logits)), axis=-1)
        passed = ops.where(uniform[..., :1] > shares[..., :-1], 1.0, 0.0)
        chosen = ops.sum(passed, axis=-1)[..., None]
        one = ops.where(chosen == np.arange(self.spec.mixtures, dtype=np.float32), 1.0, 0.0)
        pixels: list[Array] = []
        moved: list[Array] = []
        for channel, (location, log_scale, coefficients) in enumerate(
            self._split_parameters(**parameters)
        ):
            place = location
            for coefficient, away in zip(coefficients, moved, strict=True):
                place = place + coefficient * away
            place, spread = (ops.sum(one * values, axis=-1) for values in (place, log_scale))
            pixels.append(self._single.level_at(uniform[..., 1 + channel], place, spread))
            moved.append(pixels[-1][..., None] - location)
        return ops.stack(pixels, axis=-1)

    def _channels(self, pixels: list[Array], **parameters: Array) -> Any:
        """Yield of each channel its pixels, and the locations and scales that they have by then."""
        moved: list[Array] = []
        for pixel, (location, log_scale, coefficients) in zip(
            pixels, self._split_parameters(**parameters), strict=True
        ):
            place = location
            for coefficient, away in zip(coefficients, moved, strict=True):
                place = place + coefficient * away
            yield pixel, place, log_scale
            moved.append(pixel - location)

    def _split_parameters(
        self, location: Array, log_scale: Array, coefficient: Array = None
    ) -> list[tuple[Array, Array, list[Array]]]:
        """Return location, scale and coefficients of each channel, `(..., mixtures)`."""
        channels = self.spec.channels
        pairs = iter(
            self._split(coefficient, channels * (channels - 1) // 2) if channels > 1 else ()
        )
        return [
            (place, scale, [next(pairs) for _ in range(index)])
            for index, (place, scale) in enumerate(
                zip(self._split(location), self._split(log_scale), strict=True)
            )
        ]

    def _split(self, values: Array, parts: int | None = None) -> list[Array]:
        """Cut the last axis into a part for each channel, or into `parts`."""
        parts = parts or self.spec.channels
        size = values.shape[-1] // parts
        return [values[..., index * size : (index + 1) * size] for index in range(parts)]


def _log_sum_exp(ops: Any, values: Array) -> Array:
    """Compute log sum exp over the last axis, which stays."""
    largest = ops.max(values, axis=-1, keepdims=True)
    return largest + ops.log(ops.sum(ops.exp(values - largest), axis=-1, keepdims=True))


def _log_softmax(ops: Any, logits: Array) -> Array:
    return logits - _log_sum_exp(ops, logits)


LIKELIHOODS: dict[str, Any] = {
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "discretized_logistic": DiscretizedLogistic,
    "mixture_logistic": MixtureLogistic,
}
# Those of which the bound is one of a probability: minus it, in bits, is the length of a code.
DISCRETE = ("discretized_logistic", "mixture_logistic")


def is_binary(images: Images, block: int = 4096) -> bool:
    """Return whether every pixel of uint8 images is 0 or 255; stop at the first other."""
    return all(
        np.isin(images[start : start + block], (0, 255)).all()
        for start in range(0, len(images), block)
    )


def is_proper(likelihood: str, images: Images) -> bool:
    """Return whether the likelihood is one of these images: not Bernoulli on grey pixels.

    Args:
        likelihood: a name of `LIKELIHOODS`.
        images: uint8, as the model sees them, binarised where it asks for that.
    """
    return likelihood != "bernoulli" or is_binary(images)


def likelihood_warning(likelihood: str, images: Images) -> str | None:
    """Return why a likelihood is a poor choice for these images, and a better one; else None.

    Args:
        likelihood: a name of `LIKELIHOODS`.
        images: uint8, as for `is_proper`.
    """
    if not is_proper(likelihood, images):
        return (
            "likelihood bernoulli on grey pixels: the bound is then a cross-entropy, good for "
            "comparing models on these images but no likelihood of them. Set train.binarize to "
            "static or dynamic, or train.likelihood to mixture_logistic."
        )
    if likelihood == "gaussian" and is_binary(images):
        return (
            "likelihood gaussian on pixels that are all black or white: their density grows "
            "without bound as the scale shrinks. Set train.likelihood to bernoulli."
        )
    if likelihood in DISCRETE and is_binary(images):
        return (
            f"likelihood {likelihood} on pixels that are all black or white: other levels never "
            "occur. Set train.likelihood to bernoulli."
        )
    return None


def name_measure(image_shape: tuple[int, ...], likelihood: str, levels: int, binarize: str) -> str:
    """Say what a model's bound is of: only bounds of the same can be compared."""
    # Static or dynamic, the test images are drawn alike.
    images = "images as they are" if binarize == "none" else "binarised images"
    size = " x ".join(map(str, image_shape))
    of_levels = likelihood in DISCRETE
    judged = f"{levels} levels" if of_levels else f"likelihood {likelihood}"
    return f"{images} of {size} under {'a probability of ' * of_levels}{judged}"
