"""What a version must show before it becomes champion.

Three checks: it is better than the champion on the same test images; whoever pulls it can use it;
and it is sane. Every verdict stays on the version as tags, `gate.CHECK`.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vaeflow.bundle.manifest import Manifest
from vaeflow.bundle.runtime import Bundle
from vaeflow.config import Parameters, Registry, load_parameters
from vaeflow.data.prepare import load_split
from vaeflow.errors import BundleError, RegistryError
from vaeflow.model.binarize import binarized
from vaeflow.registry.aliases import CHAMPION, holder
from vaeflow.registry.comparison import Comparison, compare
from vaeflow.registry.probe import Probe
from vaeflow.registry.pull import pull
from vaeflow.registry.versions import Version
from vaeflow.training.tracking import clear_errors, connect
from vaeflow.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

BOUND = "importance_weighted_bound"


class Check(NamedTuple):
    """One thing a version must show: whether it did, and in words."""

    passed: bool
    reason: str

    def __str__(self) -> str:
        return f"{'passed' if self.passed else 'refused'}: {self.reason}"


class Verdict(NamedTuple):
    """Of the gate.

    Attributes:
        against: the champion it was compared with, or None where there was none.
        checks: by name: quality, servability, sanity.
        comparison: the numbers of the first, where there were any.
    """

    against: str | None
    checks: dict[str, Check]
    comparison: Comparison | None

    @property
    def passed(self) -> bool:
        """Whether all checks were passed."""
        return all(check.passed for check in self.checks.values())

    @property
    def reason(self) -> str:
        """What decided: all that was refused, or what the quality is."""
        refused = [
            f"{name}: {check.reason}" for name, check in self.checks.items() if not check.passed
        ]
        return "; ".join(refused) or self.checks["quality"].reason

    def tags(self) -> dict[str, str]:
        """What is kept of it on the version."""
        tags = {f"gate.{name}": str(check) for name, check in self.checks.items()}
        tags["gate.against"] = self.against or ""
        if self.comparison:
            tags |= {f"gate.{k}": f"{v:.6g}" for k, v in self.comparison._asdict().items()}
        return tags


def judge(workspace: Workspace, version: Version, probe: Probe | None = None) -> Verdict:
    """Compare a version with the present champion, probe it, and keep the verdict as tags.

    Args:
        workspace: with the test images.
        version: registered.
        probe: one that stands ready, where there is one.

    Raises:
        RegistryError: the registry cannot be reached, or has no such version.
        WorkspaceError: the test images are missing.
    """
    parameters = load_parameters(workspace.parameters)
    client = connect(workspace)
    with clear_errors(client.tracking_uri):
        champion = holder(client, version.name, CHAMPION)
        champion = None if champion == version.number else champion
        with ThreadPoolExecutor(1) as beside:
            looked = beside.submit(_look_inside, workspace, parameters, version, champion)
            servable = check_servability(client, version, probe)
        # Of one that nobody can use, there is nothing else to say.
        checks, comparison = looked.result() if servable.passed else ({}, None)
        verdict = Verdict(champion, {**checks, "servability": servable}, comparison)
        for key, text in verdict.tags().items():
            client.set_model_version_tag(version.name, version.number, key, text[:5000])
    return verdict


def check_servability(client: MlflowClient, version: Version, probe: Probe | None = None) -> Check:
    """Whether whoever pulls a version can use it."""
    wrong = (probe or Probe(client.tracking_uri)).ask(version.uri)
    return Check(wrong is None, wrong or "pulled, verified and answering in a fresh process")


def _look_inside(
    workspace: Workspace, parameters: Parameters, version: Version, champion: str | None
) -> tuple[dict[str, Check], Comparison | None]:
    challenger = _load(workspace, version)
    against = Version(version.name, champion) if champion else None
    quality, comparison = _check_quality(workspace, parameters, challenger, against)
    sanity = _check_sanity(challenger.manifest, parameters.registry)
    return {"quality": quality, "sanity": sanity}, comparison


def _load(workspace: Workspace, version: Version) -> Bundle:
    return Bundle(pull(version.uri, workspace=workspace))


def _check_sanity(manifest: Manifest, wanted: Registry) -> Check:
    metrics = manifest.metrics
    if wrong := [name for name, value in metrics.items() if not math.isfinite(value)]:
        return Check(False, f"not finite: {', '.join(wrong)}")
    active = metrics.get("active_units", 0)
    found = f"{active:.0f} of {manifest.latent_dim} latent dimensions carry information"
    if active < (least := wanted.min_active_units):
        return Check(False, f"posterior collapse: {found} (registry.min_active_units: {least})")
    return Check(True, found)


def _check_quality(
    workspace: Workspace, parameters: Parameters, challenger: Bundle, champion: Version | None
) -> tuple[Check, Comparison | None]:
    if champion is None:
        bound = challenger.manifest.metrics[BOUND]
        return Check(True, f"there was no champion; its bound is {bound:.3f} nats"), None
    named = f"version {champion.number}"
    try:
        theirs = _load(workspace, champion)
    except (BundleError, RegistryError) as error:
        return Check(False, f"the champion, {named}, cannot be had: {error}"), None
    if (ours_of := _measure(challenger)) != (theirs_of := _measure(theirs)):
        reason = f"its bound, of {ours_of}, does not compare with {named}'s"
        return Check(False, f"{reason}, of {theirs_of}"), None
    images = _test_images(workspace, parameters, challenger.manifest)
    comparison = compare(challenger, theirs, images, parameters.registry.samples)
    least = parameters.registry.min_improvement
    better = comparison.is_better(least)
    wanted = f" (wanted: {least:g} nats, and two standard errors)" * (not better)
    verdict = "better" if better else "not better"
    return Check(better, f"{verdict} than {named}{wanted}: {comparison}"), comparison


def _test_images(workspace: Workspace, parameters: Parameters, manifest: Manifest) -> np.ndarray:
    """The test images as both models saw theirs, drawn black and white once where they are."""
    prepared = workspace.require(workspace.prepared / "dataset.json", "Make it: dvc repro prepare")
    images = binarized(load_split(prepared, "test"), manifest.binarize, parameters.evaluate.seed)
    return images[: parameters.registry.images]


def _measure(model: Bundle) -> str:
    """What a model's bound is of, in words: only bounds of the same can be compared."""
    manifest = model.manifest
    # Static or dynamic, the test images are drawn alike.
    images = "images as they are" if manifest.binarize == "none" else "binarised images"
    size = " x ".join(map(str, model.image_shape))
    return f"{images} of {size} under likelihood {manifest.likelihood}"
