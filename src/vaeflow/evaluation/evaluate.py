"""Evaluate a model (the `evaluate` stage): bounds on images unseen in training, scores, figures."""

from __future__ import annotations

import csv
import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vaeflow.bundle.manifest import REFERENCE
from vaeflow.common.files import atomic_directory, sha256_of, write_json
from vaeflow.common.workspace import Workspace
from vaeflow.config.schema import Evaluate
from vaeflow.data.images import Images, binarized
from vaeflow.data.splits import load_split, read_labels
from vaeflow.errors import RegistryError, TrainingError
from vaeflow.evaluation import figures
from vaeflow.evaluation.anomalies import examine
from vaeflow.evaluation.bounds import (
    Bounds,
    active_units,
    compute_bounds,
    compute_scores,
    estimate_bound,
    keep_reference,
    latent_spread,
    quantiles,
)
from vaeflow.model.device import use_full_precision, use_gpu_if_any
from vaeflow.model.hosts import Hosts
from vaeflow.model.likelihoods import DISCRETE, is_proper
from vaeflow.model.vae import VAE, load_vae
from vaeflow.tracking.runs import find_run

MEANS = ("elbo", "log_likelihood", "kl", "importance_weighted_bound")
ESTIMATE = "importance_weighted_bound_estimate"
COLLAPSED_SHARE = 0.1


def evaluate(
    workspace: Workspace, parameters: Evaluate, hosts: Hosts | None = None
) -> Mapping[str, float]:
    """Evaluate `outputs/model` on the test split and write `outputs/evaluation`.

    Writes `metrics.json`, `latent_dimensions.csv`, `score_quantiles.json` and `reference.npz` (both
    of the validation split), `anomaly.npz`, `alarm.json` and `spoilt.json` (unless too few images
    are left to calibrate an anomaly measure), `anomalies.json` (where images were added as such)
    and figures; adds metrics and figures to the model's MLflow run where the tracking store has it.

    Args:
        workspace: whose model.
        parameters: of the evaluation; of several processes the leader's count.
        hosts: the processes that compute the bounds together. Only the leader, whose model is
            taken, does the rest and writes.

    Returns:
        The metrics: see `vaeflow.evaluation.evaluate.summarise`; empty but in the leader.
    """
    hosts = hosts or Hosts()
    prepared = workspace.require(workspace.prepared / "dataset.json", "Make it: dvc repro prepare")
    if hosts.leads:
        workspace.require(workspace.model / "model.keras", "Make it: dvc repro train")
    use_gpu_if_any()
    use_full_precision()
    text = hosts.from_leader(parameters.model_dump_json().encode())
    parameters = Evaluate.model_validate_json(text)
    hosts.check_same("images", sha256_of((prepared / "index.parquet").read_bytes()))
    vae = _leaders_model(workspace.model / "model.keras", hosts)
    images = binarized(load_split(prepared, "test"), vae.config.binarize, parameters.seed)
    samples, many = parameters.importance_samples, parameters.estimated_samples
    seed = parameters.seed
    bounds = compute_bounds(vae, images, samples, seed, hosts)
    estimate = estimate_bound(vae, images, many, seed, hosts=hosts) if many else None
    hosts.leave()
    if not hosts.leads:
        return {}
    metrics = summarise(bounds, vae, images)
    if estimate:
        metrics[ESTIMATE] = estimate.mean
        if len(images) > 1:
            metrics[f"{ESTIMATE}_standard_error"] = estimate.standard_error
    metrics = _write(workspace, parameters, vae, images, bounds, metrics)
    _track(workspace)
    return metrics


def _write(
    workspace: Workspace,
    parameters: Evaluate,
    vae: VAE,
    images: Images,
    bounds: Bounds,
    metrics: dict[str, float],
) -> dict[str, float]:
    """Compute the scores, write `outputs/evaluation`, and return the metrics with those of scores.

    Raises:
        TrainingError: a number is none.
    """
    prepared, seed = workspace.prepared, parameters.seed
    scores = {
        split: compute_scores(vae, load_split(prepared, split)) for split in ("validation", "test")
    }
    usual = quantiles(scores["validation"])
    examined = examine(vae, prepared, parameters)
    if examined:
        metrics = metrics | examined.metrics()
    if wrong := [k for k, value in {**metrics, **usual}.items() if not np.isfinite(value)]:
        raise TrainingError(
            f"on the test images, {', '.join(wrong)} came out infinite or as no number: the model "
            "is of no use. Train it again, with a lower train.learning_rate."
        )
    if reason := collapse_warning(int(metrics["active_units"]), vae.config.latent_dim):
        print(f"warning: {reason}", flush=True)

    with atomic_directory(workspace.evaluation) as folder:
        write_json(folder / "metrics.json", metrics)
        write_json(folder / "score_quantiles.json", usual)
        validation = load_split(prepared, "validation")
        keep_reference(folder / REFERENCE, vae, validation, scores["validation"], seed)
        write_dimensions(folder / "latent_dimensions.csv", bounds, latent_spread(vae, bounds))
        history = workspace.model / "history.csv"
        figures.draw_training_curves(folder / "training_curves.png", history)
        figures.draw_scores(folder / "scores.png", scores, usual)
        if examined:
            examined.write(folder)
            figures.draw_noticed(folder / "spoilt.png", examined.noticed)
        _draw(folder, vae, images, bounds, read_labels(prepared, "test"), seed)
    return metrics


def _leaders_model(path: Path, hosts: Hosts) -> VAE:
    """Load the model that the leader has at a path."""
    if hosts.count == 1:
        return load_vae(path)
    content = hosts.from_leader(path.read_bytes() if hosts.leads else b"")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(content)
        return load_vae(copy)


def _draw(
    folder: Path, vae: VAE, images: Images, bounds: Bounds, labels: np.ndarray | None, seed: int
) -> None:
    """Draw the pictures of what the model does."""
    kl = bounds.kl_per_dimension.mean(axis=0)
    figures.draw_reconstructions(folder / "reconstructions.png", vae, images)
    figures.draw_samples(folder / "samples.png", vae, seed)
    spread = latent_spread(vae, bounds)
    figures.draw_traversals(folder / "traversals.png", vae, bounds.means[0], kl, spread)
    figures.draw_latent_map(folder / "latent_map.png", bounds.means, labels)
    figures.draw_latent_dimensions(folder / "latent_dimensions.png", kl)


def _track(workspace: Workspace) -> None:
    """Add metrics and figures to the run that trained the model, where it can be reached."""
    run_id = json.loads((workspace.model / "run.json").read_text())["run_id"]
    try:
        if run := find_run(workspace, run_id):
            run.log_evaluation(workspace.evaluation)
            return
        why = f"run {run_id} is not in this tracking store"
    except RegistryError as error:
        why = str(error)
    print(f"metrics and figures are kept in the outputs only: {why}", flush=True)


def summarise(bounds: Bounds, vae: VAE, images: Images) -> dict[str, float]:
    """Average over the images, with standard errors, in nats per image, and counts.

    `rate` and `distortion` are the model's point in the plane of Alemi et al. 2018: the KL term and
    minus the log likelihood. The standard error tells how far the mean over other images of the
    same kind may be; with one image there is none.

    Args:
        bounds: of the images.
        vae: the model.
        images: uint8, as the model saw them.
    """
    metrics = {}
    for name in MEANS:
        values = getattr(bounds, name)
        metrics[name] = float(values.mean())
        if len(values) > 1:
            error = values.std(ddof=1) / math.sqrt(len(values))
            metrics[f"{name}_standard_error"] = float(error)
    metrics |= {
        "rate": metrics["kl"],
        "distortion": -metrics["log_likelihood"],
        "active_units": int(active_units(bounds.means, latent_spread(vae, bounds)).sum()),
        "images": len(images),
        "proper_likelihood": int(is_proper(vae.config.likelihood, images)),
    }
    if vae.config.likelihood in DISCRETE:
        nats = -metrics["importance_weighted_bound"]
        metrics["bits_per_dimension"] = nats / math.log(2) / math.prod(vae.config.image_shape)
    return metrics


def collapse_warning(active: int, latent_dim: int) -> str | None:
    """Return a warning where the posterior ignores the image, or nearly; else None.

    Args:
        active: how many latent dimensions carry information.
        latent_dim: how many there are.
    """
    if active == 0:
        return (
            "posterior collapse: no latent dimension carries information, the decoder does without "
            "them. Set train.kl_warmup_epochs or train.free_bits, or lower train.beta."
        )
    if active < COLLAPSED_SHARE * latent_dim:
        return (
            f"posterior collapse: only {active} of {latent_dim} latent dimensions carry "
            "information. A smaller train.latent_dim would do as well; train.kl_warmup_epochs or "
            "train.free_bits may bring more of them into use."
        )
    return None


def write_dimensions(path: Path, bounds: Bounds, spread: np.ndarray) -> None:
    """Write a row a latent dimension: mean KL from N(0, 1), variance of the means, active or not.

    Args:
        path: the CSV to write.
        bounds: of the images.
        spread: from `latent_spread`.
    """
    columns = (
        bounds.kl_per_dimension.mean(axis=0),
        bounds.means.var(axis=0),
        active_units(bounds.means, spread).astype(int),
    )
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("dimension", "kl", "mean_variance", "active"))
        for index, row in enumerate(zip(*columns, strict=True)):
            writer.writerow((index, *(value.item() for value in row)))
