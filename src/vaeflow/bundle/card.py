"""Write a model's card: what it is, how it was made and how good it is, for whoever meets it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

from vaeflow.bundle.manifest import Alarm, Manifest

CARD = "MODEL_CARD.md"
LIKELIHOODS = {
    "bernoulli": "black and white pixels, each drawn by itself",
    "gaussian": "pixels with Gaussian noise",
    "discretized_logistic": "pixels of a few levels, each drawn by itself",
    "mixture_logistic": "pixels of a few levels from mixtures, channels that depend on each other",
}
PRIORS = {"standard": "N(0, I)", "flow": "a RealNVP that was trained along"}
MEANINGS = {
    "importance_weighted_bound": "a bound of log p(x) from several draws, nats per image",
    "elbo": "the evidence lower bound, nats per image",
    "bits_per_dimension": "minus the former bound, bits per pixel and channel",
    "kl": "nats that an image's latent carries",
    "active_units": "latent dimensions in use",
    "false_alarms": "share of usual test images with an alarm",
    "spoilt_auroc": "how well spoilt images are told from usual ones, mean AUROC",
    "anomaly_auroc": "the same of images that were added as anomalies",
}
SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~])")


def model_card(manifest: Manifest) -> str:
    """Write a card in the layout of the model hubs: facts as YAML, then the text in Markdown.

    All of it comes from the manifest.
    """
    image = manifest.image
    colours = {1: "grey", 3: "colour"}.get(image.channels, f"{image.channels} channels")
    what = f"{image.height} x {image.width} pixels, {colours}"
    sections = [
        _front_matter(manifest),
        f"# {_plain(manifest.name)}",
        f"A variational autoencoder of images of {what}: it gives their density, embeddings and "
        f"new images{', and says which are anomalous' if manifest.anomaly else ''}.",
        "## How to use it",
        "From Python, with this folder and `pip install vaeflow`:",
        "```python\nimport vaeflow\n\nmodel = vaeflow.load('FOLDER')\nmodel.score(images)  # and "
        "detect, encode, reconstruct, sample, importance_weighted_bound\n```",
        "From the shell: `vaeflow score IMAGES --model FOLDER --out scores.csv`; as a service: "
        "`vaeflow serve --model FOLDER`. Without vaeflow: `encoder.onnx` and `decoder.onnx`, or "
        "`saved_model/` with TensorFlow Serving.",
        "## What it is not for",
        "What it knows is how its training images look. Other images, cameras or times of the year "
        "are unusual to it, which is what it is there to say; that something is unusual is no "
        "judgement on it. Its samples look like its training images, and may repeat them.",
        "## The model",
        _list(_model(manifest)),
        "## Training data",
        _list(_data(manifest)),
        "## How good it is",
        "On test images, which it was never trained on. A margin is the standard error of the mean "
        "over other images of the kind.",
        _table(manifest.metrics),
        *_proper(manifest),
        "## When it raises an alarm",
        _alarms(manifest.anomaly),
        "## How to make it again",
        _again(manifest),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(manifest: Manifest) -> str:
    """Write the facts as YAML, of which JSON is a part."""
    metrics = [
        {"type": name, "name": MEANINGS[name], "value": manifest.metrics[name]}
        for name in MEANINGS
        if name in manifest.metrics
    ]
    data = manifest.lineage.get("data_md5", "unknown")
    facts = {
        "library_name": "vaeflow",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["vae", "density-estimation", "anomaly-detection", "keras", "onnx"],
        "model-index": [
            {
                "name": manifest.name,
                "results": [
                    {
                        "task": {"type": "density-estimation"},
                        "dataset": {"type": "images", "name": f"data.dvc, MD5 {data}"},
                        "metrics": metrics,
                    }
                ],
            }
        ],
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in facts.items()]
    return "\n".join(["---", *lines, "---"])


def _model(manifest: Manifest) -> Iterable[str]:
    yield f"latent dimensions: {manifest.latent_dim}"
    yield f"likelihood: `{manifest.likelihood}`, {LIKELIHOODS[manifest.likelihood]}"
    yield f"prior: `{manifest.prior}`, {PRIORS[manifest.prior]}"
    if manifest.binarize != "none":
        yield f"training images were made black and white: `{manifest.binarize}`"
    if manifest.chosen:
        chosen = ", ".join(f"`{key}: {value}`" for key, value in manifest.chosen.items())
        yield f"chosen by the images (`auto`): {chosen}"
    yield f"made: {manifest.created:%Y-%m-%d %H:%M} UTC, MLflow run `{manifest.run_id}`"


def _data(manifest: Manifest) -> Iterable[str]:
    lineage = manifest.lineage
    yield f"MD5 in `data.dvc`: `{lineage.get('data_md5', 'unknown')}`"
    yield f"how it was split: {_plain(lineage.get('split', 'unknown'))}"
    if reading := manifest.image.reading:
        rules = reading.model_dump(exclude_defaults=True)
        said = ", ".join(f"`{key}: {value}`" for key, value in rules.items())
        yield f"how its files were read: {said or 'as they are'}"


def _table(metrics: Mapping[str, float]) -> str:
    rows = ["| metric | value | meaning |", "|---|---|---|"]
    for name, meaning in MEANINGS.items():
        if name not in metrics:
            continue
        value = f"{metrics[name]:.4g}" if abs(metrics[name]) < 1 else f"{metrics[name]:,.2f}"
        if error := metrics.get(f"{name}_standard_error"):
            value += f" ± {error:.2g}"
        rows.append(f"| `{name}` | {value} | {meaning} |")
    return "\n".join(rows)


def _proper(manifest: Manifest) -> Iterable[str]:
    if manifest.metrics.get("proper_likelihood") == 0:
        yield (
            "The likelihood is not one of such images: the bounds compare models with each other "
            "and are no bounds of log p(x)."
        )


def _alarms(alarm: Alarm | None) -> str:
    if alarm is None:
        return "Too few images were left to calibrate an anomaly measure by: it has none."
    said = (
        f"Where `anomaly` is above {alarm.threshold:.4g}: of images like those of its data "
        f"{alarm.false_alarm_rate:.2g} do so by chance, by {alarm.images:,} that it was never "
        "trained on."
    )
    if of := alarm.of_pictures:
        said += (
            f" Pictures are cut into tiles; where the oddest is above {of.threshold:.4g}, of usual "
            f"pictures {of.false_alarm_rate:.2g}, by {of.images:,} pictures."
        )
    return said


def _again(manifest: Manifest) -> str:
    lineage = manifest.lineage
    commit = lineage.get("git_commit", "unknown")
    changed = " (the files were changed since)" if lineage.get("git_dirty") == "true" else ""
    versions = ", ".join(
        f"{key.removeprefix('version_')} {value}"
        for key, value in sorted(lineage.items())
        if key.startswith("version_")
    )
    return (
        f"```sh\ngit checkout {commit}\ndvc pull\ndvc repro\n```\n\n"
        f"That is the commit it was made at{changed}; with {_plain(versions)}. "
        "`vaeflow lineage FOLDER` says what of this is there."
    )


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _plain(text: str) -> str:
    """Let text be text, whatever Markdown or HTML it looks like."""
    return SPECIAL.sub(r"\\\1", text).replace("\\<", "&lt;").replace("\\>", "&gt;")
