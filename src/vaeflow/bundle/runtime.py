"""Compute with a bundle, with numpy and onnxruntime alone.

The likelihoods are those of `vaeflow.model.likelihoods`, computed with NumPy.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vaeflow.bundle.anomaly import VALUES_AT_ONCE, Measure
from vaeflow.bundle.manifest import MEASURE, Manifest, read_file, read_verified
from vaeflow.bundle.onnx_graph import check_graph
from vaeflow.bundle.statistics import Look
from vaeflow.data.io.conversion import as_batch, check_range
from vaeflow.errors import BundleError, DataError
from vaeflow.model.likelihoods import LIKELIHOODS, LOG_2_PI, PixelSpec

if TYPE_CHECKING:
    import onnxruntime

ERFINV_CENTRAL = (
    *(2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087),
    *(-0.00125372503, -0.00417768164, 0.246640727, 1.50140941),
)
ERFINV_TAIL = (
    *(-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773),
    *(-0.0076224613, 0.00943887047, 1.00167406, 2.83297682),
)
# Pixel values worked on at once: bounds memory for any image size. More do not stay in the cache.
VALUES_PER_BLOCK = 200_000
SCORE_SAMPLES = 16
NO_MEASURE = (
    "this bundle has no anomaly measure. One needs images to calibrate by, and is made by: "
    "dvc repro --single-item --force evaluate export"
)


def _compare(
    path: Path,
    session: onnxruntime.InferenceSession,
    takes: Mapping[str, tuple[int, ...]],
    gives: Mapping[str, tuple[int, ...]],
) -> None:
    """Compare what a model takes and gives with the manifest: shapes without the first axis.

    Raises:
        BundleError: it is something else.
    """
    for expected, found in ((takes, session.get_inputs()), (gives, session.get_outputs())):
        shapes = {value.name: value.shape for value in found}
        for name, shape in expected.items():
            # An axis that is not known beforehand has a name, or none.
            known = shapes.get(name, [])[1:]
            fits = len(known) == len(shape) and all(
                not isinstance(there, int) or there == here
                for there, here in zip(known, shape, strict=True)
            )
            if not fits or (expected is takes and len(shapes) != len(takes)):
                described = ", ".join(f"{key} {list(axes)}" for key, axes in shapes.items())
                raise BundleError(
                    f"{path}: {described}; by its manifest {name} has the shape {list(shape)}."
                )


class NumpyOperations:
    """What `vaeflow.model.likelihoods` computes with, in NumPy, under Keras's names."""

    clip, cumsum, exp, expm1 = np.clip, np.cumsum, np.exp, np.expm1
    log, max, round, square = np.log, np.max, np.round, np.square
    stack, sum, where = np.stack, np.sum, np.where

    @staticmethod
    def softplus(values: np.ndarray) -> np.ndarray:
        """Compute log(1 + exp(values)), forty times as fast as `np.logaddexp`."""
        return np.maximum(values, 0) + np.log1p(np.exp(-np.abs(values)))

    @classmethod
    def sigmoid(cls, values: np.ndarray) -> np.ndarray:
        """Compute 1 / (1 + exp(-values)) without an overflow on either side."""
        return np.exp(-cls.softplus(-values))

    @staticmethod
    def erfinv(values: np.ndarray) -> np.ndarray:
        """Invert the error function, to single precision (Giles 2011)."""
        w = -np.log((1 - values) * (1 + values))
        central = np.polyval(ERFINV_CENTRAL, w - 2.5)
        tail = np.polyval(ERFINV_TAIL, np.sqrt(np.maximum(w, 5)) - 3)
        return np.where(w < 5, central, tail) * values


class Posterior(NamedTuple):
    """Mean and log variance of q(t|x), each float32 `(count, latent_dim)`."""

    mean: np.ndarray
    log_variance: np.ndarray


class Detection(NamedTuple):
    """How unusual images are.

    Attributes:
        score: minus the ELBO, nats, float32 `(count,)`; see `Bundle.score`.
        anomaly: how unusual, on all counts together; about 1 is usual, float32 `(count,)`.
        p_value: how often images like those of the model's data are as unusual, float64 `(count,)`.
        anomalous: whether to raise an alarm, bool `(count,)`.
        maps: how many standard deviations each place is more unusual than it usually is, float32
            `(count, height, width)`; None where they were not asked for.
    """

    score: np.ndarray
    anomaly: np.ndarray
    p_value: np.ndarray
    anomalous: np.ndarray
    maps: np.ndarray | None = None


class Bundle:
    """A verified bundle, loaded and ready to answer.

    Images are `(count, height, width, channels)`, or without the last axis when there is one
    channel; uint8 in 0..255 or floating point in [0, 1]. Large inputs are worked through in blocks.

    Args:
        folder: the bundle.
        threads: of one call; by default as many as there are cores. With one, several calls at a
            time get more out of the cores.

    Attributes:
        manifest: what the model is and where it came from.

    Raises:
        BundleError: the folder is not exactly what its manifest says.
    """

    def __init__(self, folder: Path | str, threads: int = 0) -> None:
        folder = Path(folder)
        self._folder, self._threads = folder, threads
        self.manifest: Manifest = read_verified(folder)
        self._encoder = self._session(folder, "encoder.onnx")
        self._decoder = self._session(folder, "decoder.onnx")
        self._prior = self._session(folder, "prior.onnx") if self.manifest.prior == "flow" else None
        self._measure = self._read_measure(folder)
        manifest = self.manifest
        spec = PixelSpec(manifest.image.channels, manifest.levels, manifest.mixtures)
        self._likelihood = LIKELIHOODS[manifest.likelihood](NumpyOperations, spec)
        latents = {"latents": (self.latent_dim,)}
        posterior = dict.fromkeys(("mean", "log_variance"), (self.latent_dim,))
        _compare(folder / "encoder.onnx", self._encoder, {"images": self.image_shape}, posterior)
        given = {output.name for output in self._decoder.get_outputs()}
        if given != set(self._likelihood.parameters):
            raise BundleError(
                f"{folder / 'decoder.onnx'} gives {', '.join(sorted(given))}; a likelihood "
                f"{self.manifest.likelihood} takes {', '.join(self._likelihood.parameters)}."
            )
        _compare(folder / "decoder.onnx", self._decoder, latents, {})

    def _session(self, folder: Path, name: str) -> onnxruntime.InferenceSession:
        import onnxruntime

        content = read_file(folder, self.manifest, name)
        check_graph(content, str(folder / name))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        # Threads that wait actively take the cores from whatever else the process does.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            return onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own errors share no base class
            raise BundleError(f"{folder / name}: not a readable ONNX model ({error}).") from None

    def _read_measure(self, folder: Path) -> Measure | None:
        if self.manifest.anomaly is None:
            return None
        content = io.BytesIO(read_file(folder, self.manifest, MEASURE))
        try:
            return Measure.load(content, self.manifest.image.shape, self.manifest.latent_dim)
        except (OSError, ValueError, EOFError) as error:
            raise BundleError(f"{folder / MEASURE}: not a readable measure ({error}).") from None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(height, width, channels)`."""
        return self.manifest.image.shape

    @property
    def latent_dim(self) -> int:
        """Size of the latent t."""
        return self.manifest.latent_dim

    def images_at_once(self, samples: int = 1) -> int:
        """Return how many images a block has when each is decoded from `samples` draws."""
        return max(1, VALUES_PER_BLOCK // (math.prod(self.image_shape) * samples))

    def read_file(self, name: str) -> bytes:
        """Read one of its files again, and check it.

        Raises:
            BundleError: it is not what it was.
            OSError: it is gone.
        """
        return read_file(self._folder, self.manifest, name)

    def encode(self, images: np.ndarray) -> Posterior:
        """Encode images to the posterior of each."""
        return Posterior(*self._in_blocks(self._encode, self.as_pixels(images)))

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Decode latents to pixel means of p(x|t): float32 `(count, height, width, channels)`.

        Args:
            latents: `(count, latent_dim)`.
        """
        (means,) = self._in_blocks(
            lambda t: (self._likelihood.mean(**self._decode(t)),), self.as_latents(latents)
        )
        return means

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Decode each image again from its posterior mean; as `decode`."""
        return self.decode(self.encode(images).mean)

    def sample(self, count: int, seed: int, pixels: bool = False) -> np.ndarray:
        """Decode `count` draws of the prior; as `decode`.

        The first images of a larger sample are those of a smaller one with the same seed.

        Args:
            count: how many.
            seed: of the draws.
            pixels: whether to draw the pixels, too, from p(x|t), instead of showing their means.
        """
        latents = self.draw(count, seed)
        return self.draw_pixels(latents, seed) if pixels else self.decode(latents)

    def draw_pixels(self, latents: np.ndarray, seed: int) -> np.ndarray:
        """Draw an image from p(x|t) of each latent; as `decode`.

        Args:
            latents: `(count, latent_dim)`.
            seed: of the draws.
        """
        generator = np.random.default_rng((seed, 1))
        *size, channels = self.image_shape

        def draw(t: np.ndarray) -> tuple[np.ndarray]:
            uniform = generator.random((len(t), *size, 1 + channels), dtype=np.float32)
            uniform = np.maximum(uniform, np.float32(2**-25))  # which is above 0, as it must be
            return (self._likelihood.draw(uniform, **self._decode(t)).astype(np.float32),)

        (images,) = self._in_blocks(draw, self.as_latents(latents))
        return images

    def draw(self, count: int, seed: int) -> np.ndarray:
        """Draw `count` latents from the prior: float32 `(count, latent_dim)`."""
        noise = _draw("count", (count, self.latent_dim), seed)
        if self._prior is None:
            return noise
        return self._run_prior("sample", noise=noise)

    def score(self, images: np.ndarray, samples: int = SCORE_SAMPLES, seed: int = 0) -> np.ndarray:
        """Score images by minus the ELBO, in nats per image. Larger is less like the training data.

        Every image is scored with the same noise, so its score does not depend on its neighbours.

        Args:
            images: see the class.
            samples: Monte Carlo draws per image.
            seed: of the noise.

        Returns:
            float32, `(count,)`.
        """
        noise = _draw("samples", (samples, 1, self.latent_dim), seed)
        (scores,) = self._in_blocks(
            lambda pixels: (self._negative_elbo(pixels, noise),), self.as_pixels(images), samples
        )
        return scores

    def detect(
        self, images: np.ndarray, false_alarm_rate: float | None = None, maps: bool = False
    ) -> Detection:
        """Say how unusual images are, whether to raise an alarm, and where they are so.

        The score is that of `score`, from the default draws.

        Args:
            images: see the class.
            false_alarm_rate: the share of images that come as those of the model's data did, of
                which there may be an alarm; by default that in the manifest.
            maps: whether to say where.

        Raises:
            BundleError: the bundle has no anomaly measure.
            DataError: the rate is one that the measure cannot vouch for.
        """
        measure = self.measure
        threshold = self.threshold(false_alarm_rate)
        pixels = self.as_pixels(images)
        noise = _draw("samples", (SCORE_SAMPLES, 1, self.latent_dim), 0)

        def detect(block: np.ndarray) -> tuple[np.ndarray, ...]:
            look = self._look(block, noise)
            scaled = _scale(block)
            found = look.score, measure.anomaly(scaled, look)
            return (*found, measure.map(scaled, look)) if maps else found

        together = max(1, VALUES_AT_ONCE // math.prod(self.image_shape))
        score, anomaly, *drawn = self._in_blocks(detect, pixels, block=together)
        return Detection(
            score,
            anomaly,
            measure.calibration.p_value(anomaly),
            anomaly > threshold,
            drawn[0] if drawn else None,
        )

    @property
    def detects(self) -> bool:
        """Whether the bundle has an anomaly measure, for `detect`."""
        return self._measure is not None

    @property
    def measure(self) -> Measure:
        """What says how unusual an image is.

        Raises:
            BundleError: the bundle has none.
        """
        if self._measure is None:
            raise BundleError(f"{self.manifest.name}: {NO_MEASURE}")
        return self._measure

    def threshold(self, false_alarm_rate: float | None = None, of_pictures: bool = False) -> float:
        """Return the anomaly above which there is an alarm.

        Args:
            false_alarm_rate: as for `detect`.
            of_pictures: of the oddest image of a picture that is cut into images; the bundle has
                to be calibrated with such: `measure.pictures`.

        Raises:
            BundleError: the bundle has no anomaly measure.
            DataError: the rate is one that the measure cannot vouch for.
        """
        measure = self.measure
        if false_alarm_rate is None:
            alarm = self.manifest.anomaly
            alarm = alarm and alarm.of_pictures if of_pictures else alarm
            assert alarm is not None  # or there would be no measure
            return alarm.threshold
        if not 0 < false_alarm_rate < 1:
            raise DataError(
                f"the rate of false alarms is {false_alarm_rate:g}; expected a share between 0 and "
                "1, such as 0.01."
            )
        try:
            calibration = measure.pictures if of_pictures else measure.calibration
            assert calibration is not None
            return calibration.threshold(false_alarm_rate)
        except ValueError as error:
            raise DataError(f"{self.manifest.name}: {error}.") from None

    def importance_weighted_bound(
        self, images: np.ndarray, samples: int, seed: int = 0
    ) -> np.ndarray:
        """Compute a bound of log p(x) that is tighter than the ELBO (Burda et al. 2016, eq. 8).

        Every image has draws of its own, the same for every model with as many latent dimensions.

        Args:
            images: see the class.
            samples: draws per image.
            seed: of the draws.

        Returns:
            Nats per image, float32 `(count,)`.
        """
        generator = np.random.default_rng(seed)

        def bound(pixels: np.ndarray) -> tuple[np.ndarray]:
            shape = (len(pixels), samples, self.latent_dim)
            noise = generator.standard_normal(shape, dtype=np.float32).swapaxes(0, 1)
            return (self._importance_weighted_bound(pixels, noise),)

        (bounds,) = self._in_blocks(bound, self.as_pixels(images), samples)
        return bounds

    def score_rank(self, scores: np.ndarray) -> np.ndarray:
        """Return the share of the validation images that score lower: 0 is most usual, 1 strange.

        Interpolated between the quantiles in the manifest. They are of scores from the default
        number of samples and the default seed.

        Args:
            scores: from `score`, `(count,)`.

        Returns:
            float64 in [0, 1], `(count,)`.

        Raises:
            BundleError: the bundle was exported without quantiles.
        """
        if not (quantiles := self.manifest.score_quantiles):
            raise BundleError("this bundle has no score quantiles; export it again.")
        shares = [float(share) for share in quantiles]
        return np.interp(scores, list(quantiles.values()), shares)

    # The NumPy twins of vaeflow.model.objective; tests hold them together.

    def _negative_elbo(self, pixels: np.ndarray, noise: np.ndarray) -> np.ndarray:
        _, _, latents, kl = self._draw_latents(pixels, noise)
        return kl - self._log_likelihood(pixels, latents).mean(axis=0)

    def _draw_latents(self, pixels: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the posterior's mean and log variance, draws from it, and its KL."""
        mean, log_variance = self._encode(pixels)
        latents = mean + np.exp(0.5 * log_variance) * noise
        kl = 0.5 * (np.square(mean) + np.expm1(log_variance) - log_variance).sum(axis=-1)
        if self._prior is not None:
            kl -= self._prior_correction(latents).mean(axis=0)
        return mean, log_variance, latents, kl

    def _look(self, pixels: np.ndarray, noise: np.ndarray) -> Look:
        """Look at images, block by block."""
        return Look(
            *self._in_blocks(lambda block: self._look_at_block(block, noise), pixels, len(noise))
        )

    def _look_at_block(self, pixels: np.ndarray, noise: np.ndarray) -> Look:
        mean, log_variance, latents, kl = self._draw_latents(pixels, noise)
        places = self._likelihood.log_likelihood_of_places(
            _scale(pixels), **self._decode_draws(latents)
        )
        surprise = -places.sum(axis=-1).mean(axis=0)
        return Look(mean, log_variance, kl, surprise, self._likelihood.mean(**self._decode(mean)))

    def _importance_weighted_bound(self, pixels: np.ndarray, noise: np.ndarray) -> np.ndarray:
        mean, log_variance = self._encode(pixels)
        latents = mean + np.exp(0.5 * log_variance) * noise
        # log p(t) - log q(t|x), of which the constants cancel.
        log_ratio = 0.5 * (np.square(noise) + log_variance - np.square(latents)).sum(axis=-1)
        if self._prior is not None:
            log_ratio += self._prior_correction(latents)
        log_weights = self._log_likelihood(pixels, latents) + log_ratio
        largest = log_weights.max(axis=0)
        return largest + np.log(np.exp(log_weights - largest).mean(axis=0))

    def _prior_correction(self, latents: np.ndarray) -> np.ndarray:
        """Compute log p(t) - log N(t; 0, I) of latents `(samples, count, latent_dim)`."""
        log_density = self._run_prior("log_density", latents=latents.reshape(-1, self.latent_dim))
        normal = -0.5 * (np.square(latents) + LOG_2_PI).sum(axis=-1)
        return log_density.reshape(latents.shape[:2]) - normal

    def _run_prior(self, output: str, **given: np.ndarray) -> np.ndarray:
        # ONNX Runtime wants all inputs of a graph, needed or not.
        unused = np.zeros((1, self.latent_dim), np.float32)
        inputs = {"latents": unused, "noise": unused, **given}
        assert self._prior is not None
        (values,) = self._prior.run([output], inputs)
        return values

    def _log_likelihood(self, pixels: np.ndarray, latents: np.ndarray) -> np.ndarray:
        """Compute log p(x|t) of each draw `(samples, count, latent_dim)`: `(samples, count)`."""
        return self._likelihood.log_likelihood(_scale(pixels), **self._decode_draws(latents))

    def _decode_draws(self, latents: np.ndarray) -> dict[str, np.ndarray]:
        """Decode `(samples, count, latent_dim)` to parameters `(samples, count, ...)`."""
        decoded = self._decode(latents.reshape(-1, self.latent_dim))
        return {
            name: values.reshape(*latents.shape[:2], *values.shape[1:])
            for name, values in decoded.items()
        }

    def _in_blocks(
        self,
        function: Callable[..., Any],
        inputs: np.ndarray,
        samples: int = 1,
        block: int | None = None,
    ) -> list[np.ndarray]:
        """Apply a function of the first axis block by block; it returns a tuple of arrays.

        A block has `block` rows. Without, there are as few blocks as `samples` draws of each row
        leave room for, all of about one size: a run of a single row costs as much as many.
        """
        if block is None:
            blocks = math.ceil(len(inputs) / self.images_at_once(samples))
            block = math.ceil(len(inputs) / max(1, blocks)) or 1
        parts = [function(inputs[start : start + block]) for start in range(0, len(inputs), block)]
        if len(parts) == 1:
            return list(parts[0])
        return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]

    def _encode(self, pixels: np.ndarray) -> list[np.ndarray]:
        return self._encoder.run(["mean", "log_variance"], {"images": _scale(pixels)})

    def _decode(self, latents: np.ndarray) -> dict[str, np.ndarray]:
        names = list(self._likelihood.parameters)
        return dict(zip(names, self._decoder.run(names, {"latents": latents}), strict=True))

    def as_pixels(self, images: np.ndarray) -> np.ndarray:
        """Convert images to what this model takes, `(count, height, width, channels)`.

        Raises:
            DataError: their type, shape or range is another.
        """
        images = as_batch(np.asarray(images), "images")
        if images.shape[1:] != self.image_shape:
            raise DataError(
                f"images of shape {images.shape[1:]}; this model takes {self.image_shape} "
                "(height, width, channels)."
            )
        if images.dtype != np.uint8:
            check_range(images, "images")
        return images

    def as_latents(self, latents: np.ndarray) -> np.ndarray:
        """Convert latents to what this model takes, float32 `(count, latent_dim)`.

        Raises:
            DataError: their shape is another, or they are not all finite.
        """
        latents = np.asarray(latents, dtype=np.float32)
        if latents.ndim != 2 or latents.shape[1] != self.latent_dim or not len(latents):
            raise DataError(
                f"latents of shape {latents.shape}; expected (count, {self.latent_dim})."
            )
        finite = np.isfinite(latents).all(axis=1)
        if not finite.all():
            raise DataError(f"latents: row {np.argmin(finite)} has NaN or infinite numbers.")
        return latents


def _draw(label: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Draw from N(0, I); the first axis is what `label` counts."""
    if shape[0] < 1:
        raise DataError(f"{label} is {shape[0]}; expected 1 or more.")
    if seed < 0:
        raise DataError(f"seed is {seed}; expected 0 or more.")
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def _scale(pixels: np.ndarray) -> np.ndarray:
    """Scale pixels to float32 in [0, 1], exactly as in training."""
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / np.float32(255)
    return pixels.astype(np.float32)
