"""The `evaluate` stage: the bound on images never trained on, and figures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import numpy as np

from vaeflow.config import Evaluate
from vaeflow.data.prepare import load_split
from vaeflow.device import use_full_precision, use_gpu_if_any
from vaeflow.errors import TrainingError
from vaeflow.evaluation.bounds import active_units, compute_bounds
from vaeflow.evaluation.figures import draw_reconstructions, draw_samples, draw_training_curves
from vaeflow.files import atomic_directory, write_json
from vaeflow.model.binarize import binarized
from vaeflow.model.likelihoods import is_proper
from vaeflow.model.vae import load_vae
from vaeflow.training.tracking import find_run
from vaeflow.workspace import Workspace


def evaluate(workspace: Workspace, parameters: Evaluate) -> Mapping[str, float]:
    """Evaluate `outputs/model` on the test split and write `outputs/evaluation`.

    Writes `metrics.json` and the figures `reconstructions.png`, `samples.png` and
    `training_curves.png`; adds both to the model's MLflow run where the tracking store has it.

    Returns:
        The metrics: means over the test images, in nats per image, and two counts.
    """
    prepared = workspace.require(workspace.prepared / "dataset.json", "Make it: dvc repro prepare")
    model = workspace.require(workspace.model / "model.keras", "Make it: dvc repro train")
    use_gpu_if_any()
    use_full_precision()
    vae = load_vae(model / "model.keras")
    images = binarized(load_split(prepared, "test"), vae.binarize, parameters.seed)
    bounds = compute_bounds(vae, images, parameters.importance_samples, parameters.seed)
    metrics = {
        "elbo": float(bounds.elbo.mean()),
        "log_likelihood": float(bounds.log_likelihood.mean()),
        "kl": float(bounds.kl.mean()),
        "importance_weighted_bound": float(bounds.importance_weighted_bound.mean()),
        "active_units": active_units(bounds.means),
        "images": len(images),
        "proper_likelihood": int(is_proper(vae.likelihood, images)),
    }
    if vae.likelihood == "discretized_logistic":
        dimensions = math.prod(vae.image_shape)
        bits = -metrics["importance_weighted_bound"] / math.log(2)
        metrics["bits_per_dimension"] = bits / dimensions
    if wrong := [name for name, value in metrics.items() if not np.isfinite(value)]:
        raise TrainingError(
            f"on the test images, {', '.join(wrong)} came out infinite or as no number: the model "
            "is of no use. Train it again, with a lower train.learning_rate."
        )
    with atomic_directory(workspace.evaluation) as folder:
        write_json(folder / "metrics.json", metrics)
        draw_reconstructions(folder / "reconstructions.png", vae, images)
        draw_samples(folder / "samples.png", vae, parameters.seed)
        draw_training_curves(folder / "training_curves.png", model / "history.csv")

    run_id = json.loads((model / "run.json").read_text())["run_id"]
    if run := find_run(workspace, run_id):
        run.log_metrics({f"test_{name}": value for name, value in metrics.items()})
        for figure in sorted(workspace.evaluation.glob("*.png")):
            run.log_file(figure, "figures")
    else:
        print(f"run {run_id} is not in this tracking store: metrics are kept in the outputs only")
    return metrics
