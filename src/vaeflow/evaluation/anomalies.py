"""Calibrate the anomaly measure, and try what it notices: spoilt test images, in many ways."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from vaeflow.bundle.anomaly import Look, Measure, fit
from vaeflow.bundle.manifest import MEASURE, Alarm
from vaeflow.common.files import write_json
from vaeflow.common.progress import Progress
from vaeflow.config.schema import Evaluate
from vaeflow.data.images import Images
from vaeflow.data.splits import ANOMALY, CALIBRATION, evenly, load_split, read_labels
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
    names = ("train", "test", CALIBRATION, ANOMALY)
    train, test, calibration, odd = (load_split(prepared, name) for name in names)
    look = looking_with(vae)
    calibrated = calibrate(look, calibration, train, parameters)
    if calibrated is None:
        return None
    labelled = {}
    if len(odd):
        labelled = notice_labelled(look, calibrated, test, odd, read_labels(prepared, ANOMALY))
    noticed = notice_spoilt(look, calibrated, test, parameters.seed)
    return Examined(calibrated, noticed, labelled)


class Calibrated(NamedTuple):
    """A measure, and when it raises an alarm."""

    measure: Measure
    alarm: Alarm


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
    look: Looking, images: Images, train: Images, parameters: Evaluate
) -> Calibrated | None:
    """Fit a measure, and calibrate it with images that played no part in training.

    Returns None, and says so, where these are too few.

    Args:
        look: from `looking_with`.
        images: the calibration images, uint8.
        train: the training images, uint8, to which the measure is fitted.
        parameters: the rate of false alarms, and the seed.
    """
    if len(images) < FEWEST_IMAGES:
        print(
            f"warning: {len(images)} images are left to calibrate an anomaly measure by, and "
            f"{FEWEST_IMAGES} are needed: the bundle will have none. Add images, or raise "
            "prepare.validation_fraction.",
            flush=True,
        )
        return None
    fitted, calibrating = (
        np.asarray(of[evenly(len(of), most)])
        for of, most in ((train, MOST_FITTED), (images, MOST_CALIBRATING))
    )
    measure = fit(
        _scaled(fitted), look(fitted), _scaled(calibrating), look(calibrating), parameters.seed
    )
    rate = max(parameters.false_alarm_rate, measure.smallest_rate())
    if rate > parameters.false_alarm_rate:
        print(
            f"warning: {len(measure.calibration)} images to calibrate by can vouch for a false "
            f"alarm rate of {rate:.2g} at the least, and evaluate.false_alarm_rate is "
            f"{parameters.false_alarm_rate:g}: the bundle takes {rate:.2g}. Add images, or raise "
            "prepare.validation_fraction.",
            flush=True,
        )
    alarm = Alarm(
        false_alarm_rate=rate,
        threshold=measure.threshold(rate),
        images=len(measure.calibration),
    )
    return Calibrated(measure, alarm)


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
    look: Looking, calibrated: Calibrated, images: Images, odd: Images, labels: np.ndarray | None
) -> dict[str, Any]:
    """Tell images that are known to be odd from test images.

    Args:
        look: from `looking_with`.
        calibrated: the measure.
        images: test images, uint8 `(images, height, width, channels)`.
        odd: the known ones, uint8 alike.
        labels: of these, text `(images,)`, or None.

    Returns:
        `images` and `usual_images`, how many there are; `auroc` with its `standard_error`;
        `average_precision`; `recall` at the rate of false alarms; the `best_threshold`, whose
        `best_f1` is the largest; and `by_label`: `images`, `auroc` and `recall`.
    """
    from sklearn.metrics import average_precision_score, precision_recall_curve

    def judge(images: Images) -> np.ndarray:
        pixels = np.asarray(images)
        return calibrated.measure.anomaly(_scaled(pixels), look(pixels))

    usual, unusual = judge(images), judge(odd)
    threshold = calibrated.alarm.threshold
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
