"""Say how unusual an image is, and whether to raise an alarm.

An image is described by many numbers (see `vaeflow.bundle.statistics`). Of the training images it
is known how these go together; the anomaly is the distance from that (Morningstar et al. 2021), in
whatever direction. Images that were never trained on say how often a distance comes by chance
(conformal prediction; Vovk, Gammerman and Shafer 2005).

All of it is NumPy: `evaluate` fits a measure, and a bundle computes with it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np

from vaeflow.bundle.statistics import (
    Latents,
    Look,
    Places,
    integral,
    statistics,
    whitening,
    window_means,
)

SMALLEST_SCALE = 0.02  # of a statistic that is nearly the same in all images
LARGEST = 30.0  # scales that a statistic may be away: more says nothing more
# The first statistics are the score and the latent's surprise. From a scale above what is usual on,
# each counts for as much as so many: this is what the model was made to know.
OF_THE_MODEL, WEIGHT_OF_THE_MODEL, USUAL_TO_THE_MODEL = slice(0, 2), 100, 1
# What lies outside of all that was seen counts for as much as so many: a black frame does, in many
# statistics by a little.
WEIGHT_OUTSIDE = 30
VALUES_AT_ONCE = 1_000_000  # pixel values whose statistics are computed together: bounds memory


class Calibration(NamedTuple):
    """How unusual things are that played no part in training: images, or pictures cut into tiles.

    Attributes:
        anomalies: of each, ascending, `(count,)`.
    """

    anomalies: np.ndarray

    @classmethod
    def by(cls, anomalies: np.ndarray) -> Self:
        """Calibrate by anomalies in whatever order."""
        return cls(np.sort(anomalies))

    def p_value(self, anomalies: np.ndarray) -> np.ndarray:
        """Return how often what was calibrated with is at least as unusual.

        Of those that come as it did, a share of at most a has p-values up to a, for every a.

        Args:
            anomalies: `(count,)`.

        Returns:
            From 1 / (calibrated with + 1) to 1, float64 `(count,)`.
        """
        less = np.searchsorted(self.anomalies, anomalies, side="left")
        return (len(self.anomalies) - less + 1) / (len(self.anomalies) + 1)

    def smallest_rate(self) -> float:
        """Return the smallest rate of false alarms that so many can vouch for."""
        return 1 / (len(self.anomalies) + 1)

    def threshold(self, false_alarm_rate: float) -> float:
        """Return what an anomaly must be above so that its p-value is at most the rate.

        Raises:
            ValueError: the rate is too small for so few.
        """
        # The small number is for a rate such as 0.07 of 99 images: seven, not a bit fewer.
        above = math.floor(false_alarm_rate * (len(self.anomalies) + 1) + 1e-9)
        if above < 1:
            raise ValueError(
                f"{len(self.anomalies)} images cannot vouch for a false alarm rate of "
                f"{false_alarm_rate:g}; the smallest that they can is {self.smallest_rate():.2g}"
            )
        return float(self.anomalies[max(0, len(self.anomalies) - above)])


class Measure(NamedTuple):
    """What is usual, and how often images that were not trained on are how unusual.

    Attributes:
        places: of parts of images.
        latents: of latents.
        centre, scale: median and spread of each statistic, `(statistics,)`.
        mean, lowest, highest: of the statistics in these units, `(statistics,)`.
        whitening: makes them uncorrelated, of variance 1, `(statistics, statistics)`.
        calibration: of images.
        pictures: of pictures that were cut into images, by the oddest of each; None where they were
            not.
    """

    places: Places
    latents: Latents
    centre: np.ndarray
    scale: np.ndarray
    mean: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    whitening: np.ndarray
    calibration: Calibration
    pictures: Calibration | None = None

    def anomaly(self, images: np.ndarray, look: Look) -> np.ndarray:
        """Return how unusual images are: about 1 is usual, and more is less so.

        It is the root of the sum of squares of the statistics, made uncorrelated and of variance
        1, over their number; the score and the latent's surprise, where they are well above what is
        usual, count for more, and so does whatever is outside of what was ever seen.

        Args:
            images: float32 in [0, 1], `(count, height, width, channels)`.
            look: what the model makes of them.

        Returns:
            float32, `(count,)`.
        """
        return self.distance(statistics(images, look, self.places, self.latents))

    def distance(self, described: np.ndarray) -> np.ndarray:
        """Return the anomaly of images that `statistics` describes, `(count, statistics)`."""
        away = np.clip((described - self.centre) / self.scale, -LARGEST, LARGEST)
        squares = np.square((away - self.mean) @ self.whitening).sum(axis=1)
        above = np.maximum(away[:, OF_THE_MODEL] - USUAL_TO_THE_MODEL, 0)
        squares += WEIGHT_OF_THE_MODEL * np.square(above).sum(axis=1)
        outside = np.maximum(np.maximum(away - self.highest, self.lowest - away), 0)
        squares += WEIGHT_OUTSIDE * np.square(outside).sum(axis=1)
        return np.sqrt(squares / len(self.centre)).astype(np.float32)

    def map(self, images: np.ndarray, look: Look) -> np.ndarray:
        """Say where images are unusual: standard deviations above what is usual there.

        By surprise or by residual, whichever is more; averaged over 3x3 pixels.

        Returns:
            float32, `(count, height, width)`.
        """
        maps = self.places.maps(images, look)
        padded = np.pad(maps, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
        return window_means(integral(padded), 3).max(axis=0).astype(np.float32)

    def save(self, path: Path) -> None:
        """Write all arrays into an `.npz` file."""
        arrays = {**self.places._asdict(), **self.latents._asdict(), **self._asdict()}
        del arrays["places"], arrays["latents"], arrays["pictures"]
        arrays["calibration"] = self.calibration.anomalies
        if self.pictures is not None:
            arrays["pictures"] = self.pictures.anomalies
        np.savez(path, **{name: values.astype(np.float32) for name, values in arrays.items()})

    @classmethod
    def load(cls, file: BinaryIO, image_shape: tuple[int, int, int], latent_dim: int) -> Self:
        """Read what `save` has written.

        Raises:
            ValueError: it is not that, or for images or latents of another size.
        """
        with np.load(file, allow_pickle=False) as arrays:
            sizes = {"height": image_shape[0], "width": image_shape[1], "latents": latent_dim}
            read = {}
            for name, axes in AXES.items():
                if name not in arrays:
                    if name == "pictures":
                        continue
                    raise ValueError(f"it has no {name}")
                read[name] = arrays[name]
                shape = tuple(
                    sizes.setdefault(axis, length)
                    for axis, length in zip(axes, read[name].shape, strict=False)
                )
                if read[name].shape != shape or len(shape) != len(axes) or 0 in shape:
                    raise ValueError(f"its {name} has the shape {read[name].shape}")
        parts: dict[str, Any] = {
            **{name: read[name] for name in cls._fields if name in read},
            "places": Places(*(read[name] for name in Places._fields)),
            "latents": Latents(*(read[name] for name in Latents._fields)),
            "calibration": Calibration(read["calibration"]),
        }
        if "pictures" in read:
            parts["pictures"] = Calibration(read["pictures"])
        return cls(**parts)


# Of the arrays of a measure.
AXES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(Places._fields, ("height", "width")),
    "constants": ("components",),
    "centres": ("components", "latents"),
    "whitenings": ("components", "latents", "latents"),
    **dict.fromkeys(("centre", "scale", "mean", "lowest", "highest"), ("statistics",)),
    "whitening": ("statistics", "statistics"),
    "calibration": ("images",),
    "pictures": ("pictures",),
}


def fit(
    images: np.ndarray, look: Look, others: np.ndarray, look_at_others: Look, seed: int
) -> Measure:
    """Fit a measure to images that were trained on, and to others; it has to be calibrated yet.

    Those that were trained on are more, and tell how the statistics go together. But they are more
    usual to the model than new ones: of few, it has learned the very colours. So others, which did
    no more than end the training, count for as much.

    Args:
        images: that were trained on, float32 in [0, 1], `(count, height, width, channels)`; 4 or
            more.
        look: what the model makes of them.
        others: that were not, alike.
        look_at_others: what the model makes of these.
        seed: of the mixture of latents.
    """
    latents = Latents.of(look.means, seed)
    places = Places.of(images, look)
    of_others = statistics(others, look_at_others, places, latents)
    as_many = np.repeat(of_others, max(1, len(images) // len(others)), axis=0)
    described = np.concatenate([_described_apart(images, look, latents), as_many])
    low, centre, high = np.quantile(described, (0.16, 0.5, 0.84), axis=0)
    scale = np.maximum((high - low) / 2, SMALLEST_SCALE)
    away = np.clip((described - centre) / scale, -LARGEST, LARGEST)
    # In the precision that it is kept in, or what is calibrated by it would not be what is served.
    return _rounded(
        Measure(
            places,
            latents,
            centre,
            scale,
            mean=away.mean(axis=0),
            lowest=away.min(axis=0),
            highest=away.max(axis=0),
            whitening=whitening(away),
            calibration=Calibration(np.empty(0)),
        )
    )


def _rounded(parts: Any) -> Any:
    """Round the arrays of nested tuples to single precision."""
    if parts is None:
        return None
    if isinstance(parts, np.ndarray):
        return parts.astype(np.float32)
    return type(parts)(*(_rounded(part) for part in parts))


def _described_apart(images: np.ndarray, look: Look, latents: Latents) -> np.ndarray:
    """Describe each half of some images by what is usual in the other half.

    By what is usual among themselves they would look more usual than others do.
    """
    halves = np.arange(0, len(images), 2), np.arange(1, len(images), 2)
    described = [
        statistics(
            images[half],
            _some(look, half),
            Places.of(images[other], _some(look, other)),
            latents,
        )
        for half, other in (halves, halves[::-1])
    ]
    return np.concatenate(described)


def _some(look: Look, rows: np.ndarray) -> Look:
    return Look(*(values[rows] for values in look))
