"""Calibrate the anomaly measure, and try what it notices: spoilt test images, in many ways."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from vaeflow.bundle.anomaly import Calibration, Measure, fit
from vaeflow.bundle.manifest import MEASURE, Alarm
from vaeflow.bundle.statistics import Look
from vaeflow.common.files import write_json
from vaeflow.common.progress import Progress
from vaeflow.config.schema import Evaluate
from vaeflow.data.images import Images
from vaeflow.data.splits import (
    ANOMALY,
    CALIBRATION,
    evenly,
    load_split,
    read_labels,
    read_pictures,
)
from vaeflow.evaluation.bounds import (
    draws_at_once,
    scaled_blocks,
    score_noise,
)
from vaeflow.evaluation.spoiling import SPOILINGS, spoil
from vaeflow.model.steps import backend
from vaeflow.model.vae import VAE

Looking = Callable[[Images], Look]

FEWEST_IMAGES = 20  # to calibrate a measure by
FEWEST_PICTURES = 200  # of these all tiles are taken, where there are more pictures
IMAGES_AT_ONCE = 1_000  # that a model looks at, and what it makes of them is kept
MOST_FITTED, MOST_CALIBRATING, MOST_SPOILT = 2_000, 10_000, 500
OF_LABELLED = ("auroc", "average_precision", "recall")  # that are metrics of the model
ALARM, SPOILT, LABELLED = "alarm.json", "spoilt.json", "anomalies.json"


@dataclass(frozen=True)
class Examined:
    """What became of the anomaly measure.

    Attributes:
        calibrated: the measure.
        noticed: what it notices of spoilt test images.
        labelled: what it notices of images that were added as anomalies; see `notice_labelled`.
    """

    calibrated: Calibrated
    noticed: Noticed
    labelled: dict[str, Any]

    def metrics(self) -> dict[str, float]:
        """Return what belongs among the metrics of the model."""
        labelled = {f"anomaly_{key}": self.labelled[key] for key in OF_LABELLED if self.labelled}
        return {
            "false_alarms": self.noticed.false_alarms,
            "spoilt_auroc": float(np.mean([kind.auroc for kind in self.noticed.kinds])),
            **labelled,
        }

    def write(self, folder: Path) -> None:
        """Write the measure, its alarm, and what it notices."""
        self.calibrated.measure.save(folder / MEASURE)
        write_json(folder / ALARM, self.calibrated.alarm.model_dump())
        spoilt = asdict(self.noticed)
        spoilt["kinds"] = {
            kind["name"]: {k: v for k, v in kind.items() if k not in ("name", "example")}
            for kind in spoilt["kinds"]
        }
        write_json(folder / SPOILT, spoilt)
        if self.labelled:
            write_json(folder / LABELLED, self.labelled)


def examine(vae: VAE, prepared: Path, parameters: Evaluate) -> Examined | None:
    """Calibrate the measure and try it; None of too few images, see `calibrate`.

    Args:
        vae: the model.
        prepared: the folder that `prepare` wrote.
        parameters: of the stage.
    """
    names = ("train", "validation", CALIBRATION, "test", ANOMALY)
    train, validation, calibration, test, odd = (load_split(prepared, name) for name in names)
    look = looking_with(vae)
    held_back = Group(calibration, read_pictures(prepared, CALIBRATION))
    calibrated = calibrate(look, train, validation, held_back, parameters)
    if calibrated is None:
        return None
    labelled = {}
    if len(odd):
        labelled = notice_labelled(
            look,
            calibrated,
            Group(test, read_pictures(prepared, "test")),
            Group(odd, read_pictures(prepared, ANOMALY)),
            read_labels(prepared, ANOMALY),
        )
    noticed = notice_spoilt(look, calibrated, test, parameters.seed)
    return Examined(calibrated, noticed, labelled)


class Group(NamedTuple):
    """Images, and which are tiles of one picture.

    Attributes:
        images: uint8, `(images, height, width, channels)`.
        pictures: a number a picture, `(images,)`; None where none was cut.
    """

    images: Images
    pictures: np.ndarray | None = None

    def some(self, most: int) -> Group:
        """Return about as many, of whole pictures, spread over all; pictures to calibrate by."""
        if self.pictures is None:
            return Group(self.images[evenly(len(self.images), most)])
        numbers = np.unique(self.pictures)
        enough = max(FEWEST_PICTURES, most * len(numbers) // len(self.images))
        rows = np.isin(self.pictures, numbers[evenly(len(numbers), enough)])
        return Group(self.images[np.flatnonzero(rows)], self.pictures[rows])


class Calibrated(NamedTuple):
    """A measure, and when it raises an alarm."""

    measure: Measure
    alarm: Alarm

    def judge(self, look: Looking, group: Group) -> np.ndarray:
        """Return the anomaly of each image, or of each picture that was cut: its oddest tile's."""
        anomalies = _anomalies(look, self.measure, group.images)
        return anomalies if group.pictures is None else _oddest(anomalies, group.pictures)


def looking_with(vae: VAE) -> Looking:
    """Return what looks at uint8 images as a service does; see `vaeflow.bundle.runtime`."""
    noise = score_noise(vae)
    at_once = max(1, draws_at_once(vae) // len(noise))

    def see(pixels: object) -> tuple[object, ...]:
        terms = vae.terms(pixels, noise)
        places = vae.log_likelihood_of_places(pixels, terms.latents)
        surprise = -ops.mean(places, axis=0)
        return terms.mean, terms.log_variance, terms.kl, surprise, vae.decode(terms.mean)

    compiled = backend().compiled(vae, see, [(None, *vae.config.image_shape)])

    def look(images: Images) -> Look:
        blocks = scaled_blocks(images, at_once)
        seen = [tuple(map(ops.convert_to_numpy, compiled(pixels))) for pixels in blocks]
        return Look(*(np.concatenate(values) for values in zip(*seen, strict=True)))

    return look


def calibrate(
    look: Looking, train: Images, validation: Images, held_back: Group, parameters: Evaluate
) -> Calibrated | None:
    """Fit a measure, and calibrate it with images that played no part in training.

    Returns None, and says so, where these are too few.

    Args:
        look: from `looking_with`.
        train, validation: uint8; the measure is fitted to some of both.
        held_back: the calibration images.
        parameters: the rate of false alarms, and the seed.
    """
    if len(held_back.images) < FEWEST_IMAGES:
        print(
            f"warning: {len(held_back.images)} images are left to calibrate an anomaly measure "
            f"by, and {FEWEST_IMAGES} are needed: the bundle will have none. Add images, or raise "
            "prepare.validation_fraction.",
            flush=True,
        )
        return None
    some = (np.asarray(part[evenly(len(part), MOST_FITTED)]) for part in (train, validation))
    parts = [(_scaled(pixels), look(pixels)) for pixels in some]
    measure = fit(*parts[0], *parts[1], parameters.seed)
    images, pictures = held_back.some(MOST_CALIBRATING)
    anomalies = _anomalies(look, measure, images)
    measure = measure._replace(calibration=Calibration.by(anomalies))
    rate = parameters.false_alarm_rate
    if pictures is None:
        return Calibrated(measure, _alarm(measure.calibration, rate, "images"))
    of_pictures = Calibration.by(_oddest(anomalies, pictures))
    alarm = _alarm(measure.calibration, rate, "tiles").model_copy(
        update={"of_pictures": _alarm(of_pictures, rate, "pictures")}
    )
    return Calibrated(measure._replace(pictures=of_pictures), alarm)


def _alarm(calibration: Calibration, asked: float, of: str) -> Alarm:
    """Return the alarm at the rate that is asked for, or at the smallest that can be kept."""
    count = len(calibration.anomalies)
    rate = max(asked, calibration.smallest_rate())
    if rate > asked:
        print(
            f"warning: {count} {of} to calibrate by can vouch for a false alarm rate of {rate:.2g} "
            f"at the least, and evaluate.false_alarm_rate is {asked:g}: the bundle takes "
            f"{rate:.2g}. Add images, or raise prepare.validation_fraction.",
            flush=True,
        )
    return Alarm(false_alarm_rate=rate, threshold=calibration.threshold(rate), images=count)


def _anomalies(look: Looking, measure: Measure, images: Images) -> np.ndarray:
    """Return the anomaly of images, some at a time: what a model makes of them is large."""
    blocks = (
        np.asarray(images[start : start + IMAGES_AT_ONCE])
        for start in range(0, len(images), IMAGES_AT_ONCE)
    )
    found = [measure.anomaly(_scaled(pixels), look(pixels)) for pixels in blocks]
    return np.concatenate(found)


def _oddest(anomalies: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """Return the largest anomaly of each picture, in the order of their numbers."""
    _, numbers = np.unique(pictures, return_inverse=True)
    largest = np.full(numbers.max() + 1, -np.inf, anomalies.dtype)
    np.maximum.at(largest, numbers, anomalies)
    return largest


def _scaled(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32) / np.float32(255)


# === What is noticed ===


@dataclass(frozen=True)
class Kind:
    """How well one way to spoil an image is noticed.

    Attributes:
        name, severity: see `vaeflow.evaluation.spoiling.SPOILINGS`.
        auroc, standard_error: of the anomaly, against the same images as they were.
        score_auroc: of minus the ELBO.
        alarms: share of the spoilt images with an alarm.
        pixel_auroc: of the maps, spoilt pixels against the others of the same images; None where
            the whole image is spoilt.
        example: one of them, uint8 `(height, width, channels)`.
    """

    name: str
    severity: str
    auroc: float
    standard_error: float
    score_auroc: float
    alarms: float
    pixel_auroc: float | None
    example: np.ndarray


@dataclass(frozen=True)
class Noticed:
    """What was noticed of all ways.

    Attributes:
        images: as many were spoilt in each way.
        false_alarms: share of them with an alarm, as they were.
        kinds: by way.
    """

    images: int
    false_alarms: float
    kinds: tuple[Kind, ...]


def notice_spoilt(look: Looking, calibrated: Calibrated, images: Images, seed: int) -> Noticed:
    """Spoil test images in all ways, and compare their anomalies with those of the images.

    Args:
        look: from `looking_with`.
        calibrated: the measure.
        images: uint8, `(images, height, width, channels)`; 500 of them at most are spoilt.
        seed: of places and noise.
    """
    pixels = np.asarray(images[evenly(len(images), MOST_SPOILT)])
    measure, threshold = calibrated.measure, calibrated.alarm.threshold
    seen = look(pixels)
    usual = measure.anomaly(_scaled(pixels), seen)
    kinds = []
    with Progress("spoilt images", len(SPOILINGS)) as progress:
        for name, spoiling in SPOILINGS.items():
            spoilt, where = spoil(name, pixels, seed)
            seen_spoilt = look(spoilt)
            anomaly = measure.anomaly(_scaled(spoilt), seen_spoilt)
            area, error = auroc(usual, anomaly)
            of_pixels = None
            if spoiling.local:
                maps = measure.map(_scaled(spoilt), seen_spoilt)
                of_pixels, _ = auroc(maps[~where], maps[where])
            kinds.append(
                Kind(
                    name,
                    spoiling.severity,
                    auroc=area,
                    standard_error=error,
                    score_auroc=auroc(seen.score, seen_spoilt.score)[0],
                    alarms=float((anomaly > threshold).mean()),
                    pixel_auroc=of_pixels,
                    example=spoilt[0],
                )
            )
            progress.advance(1)
    return Noticed(len(pixels), float((usual > threshold).mean()), tuple(kinds))


def notice_labelled(
    look: Looking, calibrated: Calibrated, test: Group, odd: Group, labels: np.ndarray | None
) -> dict[str, Any]:
    """Tell images that are known to be odd from test images; or pictures, where these were cut.

    Args:
        look: from `looking_with`.
        calibrated: the measure.
        test: the test images.
        odd: the known ones.
        labels: of these images, text `(images,)`, or None.

    Returns:
        `images` and `usual_images`, how many there are; `auroc` with its `standard_error`;
        `average_precision`; `recall` at the rate of false alarms; the `best_threshold`, whose
        `best_f1` is the largest; and `by_label`: `images`, `auroc` and `recall`.
    """
    from sklearn.metrics import average_precision_score, precision_recall_curve

    usual, unusual = calibrated.judge(look, test), calibrated.judge(look, odd)
    threshold = (calibrated.alarm.of_pictures or calibrated.alarm).threshold
    if labels is not None and odd.pictures is not None:
        labels = labels[np.unique(odd.pictures, return_index=True)[1]]
    truth = np.repeat([0, 1], [len(usual), len(unusual)])
    together = np.concatenate([usual, unusual])
    precision, recall, thresholds = precision_recall_curve(truth, together)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(np.argmax(f1[:-1]))
    area, error = auroc(usual, unusual)
    names = np.unique(labels).tolist() if labels is not None else []
    return {
        "images": len(unusual),
        "usual_images": len(usual),
        "auroc": area,
        "standard_error": error,
        "average_precision": float(average_precision_score(truth, together)),
        "recall": float((unusual > threshold).mean()),
        "best_threshold": float(thresholds[best]),
        "best_f1": float(f1[best]),
        "by_label": {
            name: {
                "images": int(np.count_nonzero(labels == name)),
                "auroc": auroc(usual, unusual[labels == name])[0],
                "recall": float((unusual[labels == name] > threshold).mean()),
            }
            for name in names
        },
    }


def auroc(usual: np.ndarray, odd: np.ndarray) -> tuple[float, float]:
    """Return the chance that an odd image has the larger number, and its standard error.

    The area under the ROC curve, ties counted half; the error is that of DeLong, DeLong and
    Clarke-Pearson (1988).

    Args:
        usual, odd: numbers of images that are and of images that are not as they should be.
    """
    below = _mid_ranks(odd, usual) / len(usual)  # of each odd one: the share of usual ones below
    above = 1 - _mid_ranks(usual, odd) / len(odd)
    variance = sum(values.var(ddof=1) / len(values) for values in (below, above) if len(values) > 1)
    return float(below.mean()), math.sqrt(variance)


def _mid_ranks(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Return how many of `among` are less than each value, and half of those that equal it."""
    ordered = np.sort(among)
    sides = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
    return 0.5 * np.add(*sides)
