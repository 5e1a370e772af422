"""The `evaluate` stage: the bound on images never trained on, what is usual, and figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vaeflow.bundle.reference import REFERENCE
from vaeflow.config import Evaluate
from vaeflow.data.prepare import load_split
from vaeflow.device import use_full_precision, use_gpu_if_any
from vaeflow.errors import RegistryError, TrainingError
from vaeflow.evaluation import figures
from vaeflow.evaluation.bounds import Bounds, compute_bounds
from vaeflow.evaluation.labels import read_labels
from vaeflow.evaluation.scores import compute_scores, keep_reference, quantiles
from vaeflow.evaluation.summary import summarise, why_collapsed, write_dimensions
from vaeflow.files import atomic_directory, write_json
from vaeflow.model.binarize import binarized
from vaeflow.model.vae import VAE, load_vae
from vaeflow.training.tracking import find_run
from vaeflow.workspace import Workspace


def evaluate(workspace: Workspace, parameters: Evaluate) -> Mapping[str, float]:
    """Evaluate `outputs/model` on the test split and write `outputs/evaluation`.

    Writes `metrics.json`, `latent_dimensions.csv`, `score_quantiles.json` and `reference.npz` (both
    of the validation split) and figures; adds metrics and figures to the model's MLflow run where
    the tracking store has it.

    Returns:
        The metrics: see `vaeflow.evaluation.summary.summarise`.
    """
    prepared = workspace.require(workspace.prepared / "dataset.json", "Make it: dvc repro prepare")
    model = workspace.require(workspace.model / "model.keras", "Make it: dvc repro train")
    use_gpu_if_any()
    use_full_precision()
    vae = load_vae(model / "model.keras")
    images = binarized(load_split(prepared, "test"), vae.binarize, parameters.seed)
    bounds = compute_bounds(vae, images, parameters.importance_samples, parameters.seed)
    metrics = summarise(bounds, vae, images)
    scores = {
        split: compute_scores(vae, load_split(prepared, split)) for split in ("validation", "test")
    }
    usual = quantiles(scores["validation"])
    if wrong := [k for k, value in {**metrics, **usual}.items() if not np.isfinite(value)]:
        raise TrainingError(
            f"on the test images, {', '.join(wrong)} came out infinite or as no number: the model "
            "is of no use. Train it again, with a lower train.learning_rate."
        )
    if reason := why_collapsed(metrics["active_units"], vae.latent_dim):
        print(f"warning: {reason}", flush=True)

    with atomic_directory(workspace.evaluation) as folder:
        write_json(folder / "metrics.json", metrics)
        write_json(folder / "score_quantiles.json", usual)
        keep_reference(
            folder / REFERENCE,
            vae,
            load_split(prepared, "validation"),
            scores["validation"],
            parameters.seed,
        )
        write_dimensions(folder / "latent_dimensions.csv", bounds)
        figures.draw_training_curves(folder / "training_curves.png", model / "history.csv")
        figures.draw_scores(folder / "scores.png", scores, usual)
        _draw(folder, vae, images, bounds, read_labels(prepared, "test"), parameters.seed)
    _track(workspace, model)
    return metrics


def _draw(
    folder: Path, vae: VAE, images, bounds: Bounds, labels: np.ndarray | None, seed: int
) -> None:
    """The pictures of what the model does."""
    kl = bounds.kl_per_dimension.mean(axis=0)
    figures.draw_reconstructions(folder / "reconstructions.png", vae, images)
    figures.draw_samples(folder / "samples.png", vae, seed)
    figures.draw_traversals(folder / "traversals.png", vae, bounds.means[0], kl)
    figures.draw_latent_map(folder / "latent_map.png", bounds.means, labels)
    figures.draw_latent_dimensions(folder / "latent_dimensions.png", kl)


def _track(workspace: Workspace, model: Path) -> None:
    """Add metrics and figures to the run that trained the model, where it can be reached."""
    run_id = json.loads((model / "run.json").read_text())["run_id"]
    try:
        if run := find_run(workspace, run_id):
            run.log_evaluation(workspace.evaluation)
            return
        why = f"run {run_id} is not in this tracking store"
    except RegistryError as error:
        why = str(error)
    print(f"metrics and figures are kept in the outputs only: {why}", flush=True)
