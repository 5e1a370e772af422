"""Export a trained model (the `export` stage): one folder that a service needs nothing beside.

TensorFlow Serving runs warm-up requests before it takes any other: a TFRecord of `PredictionLog`
messages in `assets.extra`.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from vaeflow.bundle.card import CARD, model_card
from vaeflow.bundle.manifest import (
    MEASURE,
    REFERENCE,
    Alarm,
    ImageSpec,
    Manifest,
    describe_files,
    write_manifest,
)
from vaeflow.common.files import atomic_directory
from vaeflow.common.workspace import Workspace
from vaeflow.config.model import VAEConfig
from vaeflow.config.schema import Export
from vaeflow.data.io.rules import Rules
from vaeflow.data.splits import evenly, load_split
from vaeflow.errors import BundleError
from vaeflow.model.device import use_cpu
from vaeflow.model.vae import VAE, load_vae

LARGEST_DIFFERENCE = 1e-4
COMPARED_IMAGES = 64
WARMUP = Path("assets.extra", "tf_serving_warmup_requests")


def export(workspace: Workspace, parameters: Export) -> Manifest:
    """Write `outputs/bundle` from the trained model and its evaluation.

    Every exported form is opened again and compared with the Keras model on test images.

    Raises:
        BundleError: an exported form differs by more than 1e-4.
    """
    model = workspace.require(workspace.model / "model.keras", "Make it: dvc repro train")
    prepared = workspace.require(workspace.prepared / "dataset.json", "Make it: dvc repro prepare")
    evaluation = workspace.require(
        workspace.evaluation / REFERENCE, "Make it: dvc repro --single-item --force evaluate"
    )
    use_cpu()
    vae = load_vae(model / "model.keras")
    test = load_split(prepared, "test")
    images = test[evenly(len(test), COMPARED_IMAGES)].astype(np.float32) / 255
    run = json.loads((model / "run.json").read_text())

    with atomic_directory(workspace.bundle) as folder:
        shutil.copyfile(model / "model.keras", folder / "model.keras")
        shutil.copyfile(evaluation / REFERENCE, folder / REFERENCE)
        alarm = None
        if (evaluation / MEASURE).exists():
            shutil.copyfile(evaluation / MEASURE, folder / MEASURE)
            alarm = Alarm.model_validate_json((evaluation / "alarm.json").read_bytes())
        export_onnx(folder, vae)
        export_saved_model(folder / "saved_model" / "1", vae)
        differences = compare_exports(folder, vae, images)
        manifest = Manifest(
            **describe_model(vae.config, reading_rules(prepared)),
            name=parameters.name,
            chosen=run.get("chosen", {}),
            run_id=run["run_id"],
            lineage=run["lineage"],
            metrics=json.loads((evaluation / "metrics.json").read_text()),
            anomaly=alarm,
            score_quantiles=json.loads((evaluation / "score_quantiles.json").read_text()),
            export_differences=differences,
            files=describe_files(folder),
        )
        (folder / CARD).write_text(model_card(manifest), encoding="utf-8")
        manifest = manifest.model_copy(update={"files": describe_files(folder)})
        write_manifest(folder, manifest)
    return manifest


def describe_model(config: VAEConfig, reading: Rules | None = None) -> dict[str, Any]:
    """Return what a manifest says of the model itself.

    Args:
        config: of the model.
        reading: the rules by which the images of its data were read.
    """
    height, width, channels = config.image_shape
    names = ("latent_dim", "likelihood", "levels", "mixtures", "binarize", "prior")
    image = ImageSpec(height=height, width=width, channels=channels, reading=reading)
    return {"image": image, **{name: getattr(config, name) for name in names}}


def reading_rules(prepared: Path) -> Rules | None:
    """Return the rules by which the files of the images were read; None where nobody knows."""
    about = json.loads((prepared / "dataset.json").read_text())
    return Rules.model_validate(about["reading"]) if "reading" in about else None


def export_onnx(folder: Path, vae: VAE) -> None:
    """Write `encoder.onnx` and `decoder.onnx`, and `prior.onnx` where the prior is learned.

    All are deterministic: the exporter writes an invalid file, without an error, for a graph that
    draws random numbers. Noise is the caller's.
    """
    for network in (vae.encoder, vae.decoder):
        network.export(folder / f"{network.name}.onnx", format="onnx", verbose=False)
    if vae.config.prior == "flow":
        specs = {
            name: keras.InputSpec(shape=(None, vae.config.latent_dim), dtype="float32", name=name)
            for name in ("latents", "noise")
        }
        vae.prior.export(
            folder / "prior.onnx", format="onnx", verbose=False, input_signature=[specs]
        )


def export_saved_model(folder: Path, vae: VAE) -> None:
    """Write a SavedModel with a warm-up; its signatures are those of `_signatures`.

    Inputs are named `images`, `latents` and `noise`; `noise`, draws of N(0, I) of shape
    `(batch, latent_dim)`, is an input because a random generator inside would repeat the same
    numbers after every load. So is `uniform`, draws from (0, 1) of shape `(batch, height, width,
    1 + channels)`.
    """
    shapes = {
        "images": vae.config.image_shape,
        "latents": (vae.config.latent_dim,),
        "noise": (vae.config.latent_dim,),
        "uniform": _uniform_shape(vae),
    }
    specs = {
        name: keras.InputSpec(shape=(None, *shape), dtype="float32", name=name)
        for name, shape in shapes.items()
    }
    archive = keras.export.ExportArchive()
    archive.track(vae)
    for name, function in _signatures(vae).items():
        archive.add_endpoint(name, function, list(_arguments(function, specs).values()))
    archive.write_out(folder, verbose=False)
    blank = {name: np.full((1, *shape), 0.5, np.float32) for name, shape in shapes.items()}
    requests = {name: _arguments(function, blank) for name, function in _signatures(vae).items()}
    write_warmup(folder, requests)
    # DVC keeps no empty folders: it would find the bundle changed by this one for ever.
    (folder / "assets").rmdir()


def _uniform_shape(vae: VAE) -> tuple[int, int, int]:
    height, width, channels = vae.config.image_shape
    return height, width, 1 + channels


def _signatures(vae: VAE) -> dict[str, Callable[..., Any]]:
    """Return what a service can ask, as functions of batches that return dicts of named outputs."""

    def encode(images: Any) -> dict[str, Any]:
        return vae.encoder(images)

    def decode(latents: Any) -> dict[str, Any]:
        return {"reconstruction": vae.decode(latents)}

    def sample(noise: Any) -> dict[str, Any]:
        latents = vae.prior.sample(noise)
        return {"latents": latents, "reconstruction": vae.decode(latents)}

    def draw(latents: Any, uniform: Any) -> dict[str, Any]:
        return {"images": vae.draw_pixels(latents, uniform)}

    def reconstruct(images: Any) -> dict[str, Any]:
        return {"reconstruction": vae(images)["reconstruction"]}

    def score(images: Any, noise: Any) -> dict[str, Any]:
        return {"score": -vae.terms(images, noise[None]).elbo}

    functions = (encode, decode, draw, sample, reconstruct, score)
    return {function.__name__: function for function in functions}


def _arguments(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Select the values that a signature takes, by the names of its parameters."""
    return {name: values[name] for name in inspect.signature(function).parameters}


def compare_exports(folder: Path, vae: VAE, images: np.ndarray) -> dict[str, float]:
    """Return the largest difference between each exported form, opened again, and the Keras model.

    Args:
        folder: the bundle in the making.
        vae: the model in memory.
        images: float32 in [0, 1], `(count, height, width, channels)`.

    Returns:
        By form, the largest |exported - Keras| / max(1, |Keras|): absolute for pixels, relative
        for a score, which is a sum over all pixels.

    Raises:
        BundleError: one is larger than 1e-4 or not a number.
    """
    expected = vae(images)
    latents = ops.convert_to_numpy(expected["mean"])
    decoded = vae.decoder(latents)
    noise = _noise_like(latents)
    uniform = np.random.default_rng(1).random((len(latents), *_uniform_shape(vae)), np.float32)
    inputs = {"images": images, "latents": latents, "noise": noise, "uniform": uniform}
    differences = {
        "encoder.onnx": _difference(_run_onnx(folder / "encoder.onnx", images=images), expected),
        "decoder.onnx": _difference(_run_onnx(folder / "decoder.onnx", latents=latents), decoded),
        **_prior_difference(folder / "prior.onnx", vae, latents, noise),
        "saved_model": _saved_model_difference(folder / "saved_model" / "1", vae, inputs),
        "model.keras": _difference(load_vae(folder / "model.keras")(images), expected),
    }
    for form, difference in differences.items():
        # Not `>`: a difference that is NaN must stop the export as well.
        if not difference <= LARGEST_DIFFERENCE:
            raise BundleError(
                f"{form} differs from the Keras model by {difference:g}, more than "
                f"{LARGEST_DIFFERENCE:g}; the bundle was not written."
            )
    return differences


def _noise_like(latents: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(latents.shape, dtype=np.float32)


def _prior_difference(
    path: Path, vae: VAE, latents: np.ndarray, noise: np.ndarray
) -> dict[str, float]:
    if vae.config.prior == "standard":
        return {}
    inputs = {"latents": latents, "noise": noise}
    # Batches of two sizes, as those who sample and those who score have them.
    fewer = {"latents": latents[:1], "noise": noise}
    found = [(_run_onnx(path, **some), vae.prior(some)) for some in (inputs, fewer)]
    return {path.name: float(np.max([_difference(*pair) for pair in found]))}


def _run_onnx(path: Path, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def _saved_model_difference(path: Path, vae: VAE, inputs: Mapping[str, np.ndarray]) -> float:
    import tensorflow as tf

    # Kept in a variable: signatures do not keep the model's variables alive.
    loaded = tf.saved_model.load(str(path))
    tensors = {name: tf.constant(values) for name, values in inputs.items()}
    differences = []
    for name, function in _signatures(vae).items():
        arguments = _arguments(function, tensors)
        # Of what is drawn a number at the edge of a level may round to either side: few do.
        over = np.mean if name == "draw" else np.max
        pair = loaded.signatures[name](**arguments), function(**arguments)
        differences.append(_difference(*pair, over))
    return float(np.max(differences))


def _difference(
    exported: Mapping[str, Any],
    expected: Mapping[str, Any],
    over: Callable[[np.ndarray], Any] = np.max,
) -> float:
    """Return the largest difference over the exported outputs; Keras must have each of them."""
    largest = []
    for name, values in exported.items():
        reference = ops.convert_to_numpy(expected[name])
        distance = np.abs(ops.convert_to_numpy(values) - reference)
        largest.append(float(over(distance / np.maximum(1, np.abs(reference)))))
    # NumPy's maximum, unlike Python's, keeps a NaN.
    return float(np.max(largest))


def write_warmup(saved_model: Path, requests: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write a request for each signature into a SavedModel.

    Args:
        saved_model: its folder.
        requests: by signature, the input arrays by name.
    """
    import tensorflow as tf
    from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

    path = saved_model / WARMUP
    path.parent.mkdir()
    with tf.io.TFRecordWriter(str(path)) as writer:
        for signature, inputs in requests.items():
            log = PredictionLog()
            request = log.predict_log.request
            request.model_spec.signature_name = signature
            for name, array in inputs.items():
                request.inputs[name].CopyFrom(tf.make_tensor_proto(array))
            writer.write(log.SerializeToString())
