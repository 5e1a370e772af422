"""What is written is read by the messages that TensorFlow Serving has, and can be run."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

from vaeflow.bundle.export import WARMUP, export_saved_model
from vaeflow.bundle.manifest import read_verified
from vaeflow.config.model import VAEConfig
from vaeflow.model.vae import VAE


def test_there_is_a_request_for_every_signature_which_can_run(tmp_path):
    vae = VAE(VAEConfig((8, 6, 3), latent_dim=2, filters=(4,), hidden_units=8))
    folder = tmp_path / "1"
    export_saved_model(folder, vae)
    loaded = tf.saved_model.load(str(folder))
    signatures = []
    for record in tf.data.TFRecordDataset(str(folder / WARMUP)):
        log = PredictionLog.FromString(record.numpy())
        request = log.predict_log.request
        signatures.append(request.model_spec.signature_name)
        inputs = {
            name: tf.constant(tf.make_ndarray(tensor)) for name, tensor in request.inputs.items()
        }
        answer = loaded.signatures[signatures[-1]](**inputs)
        assert all(np.isfinite(values).all() for values in answer.values())
    assert sorted(signatures) == ["decode", "draw", "encode", "reconstruct", "sample", "score"]


@pytest.mark.slow
def test_the_manifest_lists_it(finished):
    manifest = read_verified(finished / "outputs" / "bundle")
    assert f"saved_model/1/{WARMUP.as_posix()}" in manifest.files
