"""Check that a folder is exactly the bundle that its manifest lists, and read its reference.

A bundle is read only after every file in it was found in the manifest with its size and SHA-256,
and every file of the manifest was found in it. The bundle's own digest is its manifest's SHA-256.

The reference is what drift is measured against: latent means and scores of images never trained on.
"""

from __future__ import annotations

import io
import os
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vaeflow.common.files import sha256_of
from vaeflow.config.model import Binarize, Likelihood, Prior
from vaeflow.data.io.rules import Rules
from vaeflow.errors import BundleError

MANIFEST = "manifest.json"
# 1 knew one prior, N(0, I).
FORMAT_VERSION: Final = 2
REQUIRED = {"encoder.onnx", "decoder.onnx"}
REFERENCE = "reference.npz"
MEASURE = "anomaly.npz"
OF_ALARMS = ("anomaly", "p_value", "anomalous")  # what answers and tables say of each image


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class File(_Part):
    """Size in bytes and SHA-256 of one file."""

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ImageSpec(_Part):
    """What the model takes: pixels as float32 in [0, 1], or as uint8 in 0..255.

    `reading` says how the files of its data were read, where that is known.
    """

    height: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    channels: Annotated[int, Field(ge=1)]
    reading: Rules | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(height, width, channels)`."""
        return self.height, self.width, self.channels


class Alarm(_Part):
    """When an image counts as anomalous.

    Attributes:
        false_alarm_rate: the share of usual images of which there may be an alarm.
        threshold: the anomaly above which there is one.
        images: that it was calibrated with.
        of_pictures: the same of pictures that are cut into images, by the oddest of each; None
            where the model's data were not.
    """

    false_alarm_rate: Annotated[float, Field(gt=0, lt=1)]
    threshold: float
    images: Annotated[int, Field(ge=1)]
    of_pictures: Alarm | None = None


class Manifest(_Part):
    """What a bundle is, where it came from, and every file in it."""

    format_version: Literal[1, 2] = FORMAT_VERSION
    name: str
    created: datetime = Field(default_factory=lambda: datetime.now(UTC))
    image: ImageSpec
    latent_dim: Annotated[int, Field(ge=1)]
    likelihood: Likelihood = "bernoulli"
    levels: Annotated[int, Field(ge=2, le=256)] = 256
    mixtures: Annotated[int, Field(ge=1)] = 5
    # How the training images were made black and white; a service takes images as they come.
    binarize: Binarize = "none"
    prior: Prior = "standard"
    # What `auto` stood for in its parameters.
    chosen: dict[str, Any] = {}
    run_id: str
    lineage: dict[str, str]
    # On the test split, as in metrics.json: nats per image, and counts.
    metrics: dict[str, float]
    # Share of the validation images that score lower, "0" to "1", to score in nats.
    score_quantiles: dict[str, float] = {}
    # Of the measure in anomaly.npz; there is none where too few images were left to calibrate it.
    anomaly: Alarm | None = None
    # Largest difference between each exported form and the Keras model, on test images.
    export_differences: dict[str, float]
    files: dict[str, File]

    @field_validator("score_quantiles")
    @classmethod
    def _rise(cls, quantiles: dict[str, float]) -> dict[str, float]:
        shares = [float(share) for share in quantiles]
        if shares != sorted(shares) or not all(0 <= share <= 1 for share in shares):
            raise ValueError("the shares must rise from 0 to 1")
        if list(quantiles.values()) != sorted(quantiles.values()):
            raise ValueError("the scores must rise with their shares")
        return quantiles

    @field_validator("files")
    @classmethod
    def _stay_inside_and_suffice(cls, files: dict[str, File]) -> dict[str, File]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or str(path) != name or "\\" in name:
                raise ValueError(f"the path {name!r} does not stay inside the bundle")
        if missing := sorted(REQUIRED - set(files)):
            raise ValueError(f"{' and '.join(missing)} must be among them")
        return files

    @model_validator(mode="after")
    def _have_a_prior(self) -> Manifest:
        if self.prior == "flow" and "prior.onnx" not in self.files:
            raise ValueError("a prior that was learned needs prior.onnx among the files")
        return self

    @model_validator(mode="after")
    def _have_a_measure(self) -> Manifest:
        if (self.anomaly is None) != (MEASURE not in self.files):
            raise ValueError(f"{MEASURE} and a threshold for it belong together")
        return self


def describe_files(folder: Path) -> dict[str, File]:
    """Return size and SHA-256 of every file of a folder, by its path with forward slashes."""
    described = {}
    for name in _list(folder):
        content = (folder / name).read_bytes()
        described[name] = File(size=len(content), sha256=sha256_of(content))
    return described


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into its bundle, last of all files."""
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def bundle_sha256(folder: Path) -> str:
    """Return the bundle's digest: the SHA-256 of its manifest, which holds that of every file."""
    return sha256_of((folder / MANIFEST).read_bytes())


def read_verified(folder: Path) -> Manifest:
    """Read a bundle's manifest and compare every file with it.

    Raises:
        BundleError: the manifest is missing or malformed, or a file is missing, unknown, changed or
            a link. Nothing but the manifest has been parsed by then.
    """
    manifest = _read(folder)
    found = set(_list(folder)) - {MANIFEST}
    expected = set(manifest.files)
    if missing := sorted(expected - found):
        raise BundleError(f"{folder}: missing from the bundle: {_few(missing)}. Fetch it again.")
    if unknown := sorted(found - expected):
        raise BundleError(f"{folder}: not in the bundle's manifest: {_few(unknown)}.")
    for name in sorted(expected):
        read_file(folder, manifest, name)
    return manifest


def read_file(folder: Path, manifest: Manifest, name: str) -> bytes:
    """Read one file and check it: what is returned is what was verified.

    Raises:
        BundleError: size or SHA-256 differ from the manifest.
    """
    expected = manifest.files[name]
    path = folder / name
    if path.stat().st_size == expected.size:
        content = path.read_bytes()
        if sha256_of(content) == expected.sha256:
            return content
    raise BundleError(
        f"{path}: size or SHA-256 differ from the bundle's manifest; the file was changed or "
        "damaged. Fetch the bundle again, or export it again."
    )


def _read(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if path.is_symlink():
        raise BundleError(f"{path} is a link; a bundle holds plain files only.")
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError:
        raise BundleError(
            f"{folder} is no bundle: it has no {MANIFEST}. Make one: dvc repro"
        ) from None
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"]) or "content"
        raise BundleError(f"{path}: {key}: {fault['msg']}.") from None


def _list(folder: Path) -> list[str]:
    """List every file below a folder; refuse a link or anything that is not a plain file."""
    names = []
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise BundleError(f"{path} is a link or special; a bundle holds plain files only.")
        names += [Path(parent, name).relative_to(folder).as_posix() for name in files]
    return sorted(names)


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class Reference(NamedTuple):
    """A sample of the validation images, as they come: posterior means and anomaly scores."""

    means: np.ndarray  # float32, (images, latent_dim)
    scores: np.ndarray  # nats, float32 (images,)


def write_reference(path: Path, means: np.ndarray, scores: np.ndarray) -> None:
    """Write a reference; see `Reference`."""
    np.savez(path, means=means.astype(np.float32), scores=scores.astype(np.float32))


def read_reference(folder: Path, manifest: Manifest) -> Reference:
    """Read the reference of a bundle whose manifest was verified.

    Raises:
        BundleError: the bundle was exported without one, or it is damaged.
    """
    if REFERENCE not in manifest.files:
        raise BundleError(
            f"{folder}: this bundle has no {REFERENCE}, which drift is measured against. Export it "
            "again: dvc repro --single-item --force evaluate export"
        )
    content = io.BytesIO(read_file(folder, manifest, REFERENCE))
    try:
        with np.load(content, allow_pickle=False) as arrays:
            reference = Reference(arrays["means"], arrays["scores"])
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise BundleError(f"{folder / REFERENCE}: not a readable reference ({error}).") from None
    if reference.means.shape != (len(reference.scores), manifest.latent_dim):
        raise BundleError(
            f"{folder / REFERENCE}: latent means of shape {reference.means.shape}; expected "
            f"({len(reference.scores)}, {manifest.latent_dim})."
        )
    return reference
