"""What a version must show before it becomes champion.

Three checks: it is better than the champion on the same test images; whoever pulls it can use it;
and it is sane. Every verdict stays on the version as tags, `gate.CHECK`.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from vaeflow.bundle.manifest import Manifest
from vaeflow.bundle.runtime import Bundle
from vaeflow.common.workspace import Workspace
from vaeflow.config.schema import Parameters, Registry, load_parameters
from vaeflow.data.images import binarized
from vaeflow.data.splits import load_split
from vaeflow.errors import BundleError, RegistryError
from vaeflow.model.likelihoods import name_measure
from vaeflow.registry.comparison import Decision, compare
from vaeflow.registry.held_out import choose_images, count_try, read_held_out, unseen_images
from vaeflow.registry.lock import hold_lock
from vaeflow.registry.probe import Probe
from vaeflow.registry.pull import pull
from vaeflow.registry.versions import CHAMPION, Version, alias_version
from vaeflow.tracking.lineage import SPLIT_TAG
from vaeflow.tracking.runs import connect, registry_errors

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
        decision: the numbers of the first, where there were any.
    """

    against: str | None
    checks: dict[str, Check]
    decision: Decision | None

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
        """Return what is kept of it on the version."""
        tags = {f"gate.{name}": str(check) for name, check in self.checks.items()}
        tags["gate.against"] = self.against or ""
        if self.decision:
            tags |= {f"gate.{name}": f"{v:.6g}" for name, v in self.decision.numbers().items()}
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
    client = connect(workspace)
    with registry_errors(client.tracking_uri):
        champion = alias_version(client, version.name, CHAMPION)
        champion = None if champion == version.number else champion
        with ThreadPoolExecutor(1) as beside:
            looked = beside.submit(_look_inside, workspace, client, version, champion)
            servable = check_servability(client, version, probe)
        # Of one that nobody can use, there is nothing else to say.
        checks, decision = looked.result() if servable.passed else ({}, None)
        verdict = Verdict(champion, {**checks, "servability": servable}, decision)
        for key, text in verdict.tags().items():
            client.set_model_version_tag(version.name, version.number, key, text[:5000])
    return verdict


def check_servability(client: MlflowClient, version: Version, probe: Probe | None = None) -> Check:
    """Check that whoever pulls a version can use it."""
    wrong = (probe or Probe(client.tracking_uri)).ask(version.uri)
    return Check(wrong is None, wrong or "pulled, verified and answering in a fresh process")


class _Model(NamedTuple):
    version: Version
    bundle: Bundle

    @property
    def name(self) -> str:
        return f"version {self.version.number}"


def _load(workspace: Workspace, version: Version) -> _Model:
    return _Model(version, Bundle(pull(version.uri, workspace=workspace)))


def _look_inside(
    workspace: Workspace, client: MlflowClient, version: Version, champion: str | None
) -> tuple[dict[str, Check], Decision | None]:
    parameters = load_parameters(workspace.parameters)
    challenger = _load(workspace, version)
    quality, decision = _check_quality(workspace, client, parameters, challenger, champion)
    sanity = _check_sanity(challenger.bundle.manifest, parameters.registry)
    return {"quality": quality, "sanity": sanity}, decision


def _check_quality(
    workspace: Workspace,
    client: MlflowClient,
    parameters: Parameters,
    challenger: _Model,
    number: str | None,
) -> tuple[Check, Decision | None]:
    if number is None:
        bound = challenger.bundle.manifest.metrics[BOUND]
        return Check(True, f"there was no champion; its bound is {bound:.3f} nats"), None
    try:
        champion = _load(workspace, Version(challenger.version.name, number))
    except (BundleError, RegistryError) as error:
        return Check(False, f"the champion, version {number}, cannot be had: {error}"), None
    try:
        decision = _decide(workspace, client, parameters, challenger, champion)
    except RegistryError as error:
        return Check(False, f"it does not compare with the champion: {error}"), None
    better = "better" if decision.better else "not better"
    return Check(decision.better, f"{better} than {champion.name}: {decision}"), decision


def _decide(
    workspace: Workspace,
    client: MlflowClient,
    parameters: Parameters,
    challenger: _Model,
    champion: _Model,
) -> Decision:
    """Decide whether the challenger is better than the champion, as one try of many.

    Raises:
        RegistryError: they do not compare, or on too few images.
    """
    models = (challenger, champion)
    ours, theirs = (measure(model.bundle) for model in models)
    if ours != theirs:
        raise RegistryError(f"its bound is of {ours}, and {champion.name}'s of {theirs}")
    prepared = workspace.require(workspace.prepared / "dataset.json", "Make it: dvc repro prepare")
    wanted, held_out = parameters.registry, read_held_out(prepared)
    rules = {model.name: model.bundle.manifest.lineage.get(SPLIT_TAG) for model in models}
    rows = choose_images(held_out, unseen_images(held_out, rules), wanted.images)
    # Drawn black and white once where they are, as both models saw theirs.
    binarize, seed = challenger.bundle.manifest.binarize, parameters.evaluate.seed
    images = binarized(load_split(prepared, "test"), binarize, seed)[rows]
    comparison = compare(challenger.bundle, champion.bundle, images, wanted.samples)
    with hold_lock(client, challenger.version.name):
        attempt = count_try(
            client, challenger.version, champion.version.number, held_out.digests[rows]
        )
    return Decision(comparison, attempt, wanted.false_promotions, wanted.min_improvement)


def _check_sanity(manifest: Manifest, wanted: Registry) -> Check:
    metrics = manifest.metrics
    if wrong := [name for name, value in metrics.items() if not math.isfinite(value)]:
        return Check(False, f"not finite: {', '.join(wrong)}")
    active = metrics.get("active_units", 0)
    found = f"{active:.0f} of {manifest.latent_dim} latent dimensions carry information"
    if active < (least := wanted.min_active_units):
        return Check(False, f"posterior collapse: {found} (registry.min_active_units: {least})")
    return Check(True, found)


def measure(model: Bundle) -> str:
    """Say what a model's bound is of: only bounds of the same can be compared."""
    manifest = model.manifest
    return name_measure(model.image_shape, manifest.likelihood, manifest.levels, manifest.binarize)
