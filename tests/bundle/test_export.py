import shutil
from itertools import cycle

import numpy as np
import pytest
import tensorflow as tf

from vaeflow.bundle.export import compare_exports, export_onnx, export_saved_model
from vaeflow.common.workspace import Workspace
from vaeflow.config.model import VAEConfig
from vaeflow.data.splits import load_split
from vaeflow.errors import BundleError, WorkspaceError
from vaeflow.model.likelihoods import LIKELIHOODS
from vaeflow.model.networks import NETWORKS
from vaeflow.model.vae import VAE, load_vae

pytestmark = pytest.mark.slow


def test_an_exported_form_that_differs_stops_the_export(finished, bundle):
    place = Workspace(finished)
    vae = load_vae(place.model / "model.keras")
    images = load_split(place.prepared, "test")[:8] / np.float32(255)
    assert max(compare_exports(bundle, vae, images).values()) <= 1e-4

    weight = vae.decoder.get_layer("logits").bias
    weight.assign_add(np.full(weight.shape, 1e-3))
    with pytest.raises(BundleError, match=r"decoder\.onnx differs from the Keras model by 0\.00"):
        compare_exports(bundle, vae, images)
    weight.assign(np.full(weight.shape, np.nan))
    with pytest.raises(BundleError, match="nan"):
        compare_exports(bundle, vae, images)


# The network knows of a likelihood only how many channels it asks for: not all pairs differ.
@pytest.mark.parametrize(
    ("network", "likelihood"), list(zip(cycle(NETWORKS), LIKELIHOODS, strict=False))
)
def test_any_image_shape_network_and_likelihood_can_be_exported(tmp_path, network, likelihood):
    # The prior has nothing to do with either: one of them has the learned one.
    prior = "flow" if likelihood == "gaussian" else "standard"
    kind = {"network": network, "likelihood": likelihood, "depth": 2, "prior": prior}
    vae = VAE(VAEConfig((9, 7, 3), latent_dim=2, filters=(4, 6), hidden_units=8, **kind))
    export_onnx(tmp_path, vae)
    export_saved_model(tmp_path / "saved_model" / "1", vae)
    vae.save(tmp_path / "model.keras")
    images = np.random.default_rng(0).random((5, 9, 7, 3), dtype=np.float32)
    assert max(compare_exports(tmp_path, vae, images).values()) <= 1e-4


def test_the_saved_model_answers_by_name_with_noise_as_an_input(finished, tmp_path):
    folder = shutil.copytree(finished / "outputs" / "bundle" / "saved_model" / "1", tmp_path / "1")
    loaded = tf.saved_model.load(str(folder))
    assert set(loaded.signatures) >= {"encode", "decode", "draw", "sample", "reconstruct", "score"}
    images = tf.zeros((3, 8, 8, 1))
    scores = [
        loaded.signatures["score"](images=images, noise=tf.fill((3, 8), value))["score"].numpy()
        for value in (0.0, 0.0, 1.0)
    ]
    assert scores[0].shape == (3,)
    np.testing.assert_array_equal(scores[0], scores[1])
    assert not np.array_equal(scores[0], scores[2])


def test_a_stage_that_has_not_run_is_named(tmp_path):
    from vaeflow.bundle.export import export
    from vaeflow.config.schema import Export

    with pytest.raises(WorkspaceError, match=r"outputs/model/model.keras is missing\. .*dvc repro"):
        export(Workspace(tmp_path), Export())
