"""Networks of one's own: trained, kept and exported as ours are, or refused with a reason."""

import importlib
import sys

import keras
import numpy as np
import pytest
from helpers import REPOSITORY

from vaeflow.bundle.export import compare_exports, export_onnx, export_saved_model
from vaeflow.common import code
from vaeflow.config.model import VAEConfig
from vaeflow.config.schema import Train, validate
from vaeflow.errors import ConfigError
from vaeflow.model.likelihoods import LIKELIHOODS
from vaeflow.model.vae import VAE, load_vae
from vaeflow.training.checkpoint import training_key

SHAPE = (9, 7, 3)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A workspace with a folder of networks, the one that is shipped among them."""
    (tmp_path / "dvc.yaml").touch()
    folder = tmp_path / code.OWN_NETWORKS
    folder.mkdir(parents=True)
    shipped = REPOSITORY / code.OWN_NETWORKS / "__init__.py"
    (folder / "__init__.py").write_text(shipped.read_text())
    monkeypatch.chdir(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "networks"]:
        del sys.modules[name]


def make(address="networks:dense", **options):
    keras.utils.set_random_seed(0)
    return VAE(VAEConfig(SHAPE, latent_dim=3, network=address, **options))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_shipped_one_trains_comes_back_and_is_exported(own, tmp_path, likelihood):
    vae = make(likelihood=likelihood)
    vae.compile(optimizer="adam")
    images = np.random.default_rng(0).random((20, *SHAPE), dtype=np.float32)
    history = vae.fit(images, epochs=8, batch_size=5, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    vae.save(tmp_path / "model.keras")
    copy = load_vae(tmp_path / "model.keras")
    for name, values in vae(images).items():
        np.testing.assert_array_equal(copy(images)[name], values)
    if likelihood == "mixture_logistic":
        export_onnx(tmp_path, vae)
        export_saved_model(tmp_path / "saved_model" / "1", vae)
        assert max(compare_exports(tmp_path, vae, images).values()) <= 1e-4


@pytest.mark.parametrize(
    ("text", "address", "expected"),
    [
        ("", "networks:dense", "has no function dense"),
        ("dense = 3", "networks:dense", "has no function dense"),
        ("", "networks.mine:dense", "cannot be imported as networks.mine"),
        ("1 / 0", "networks:dense", "ZeroDivisionError"),
        ("def dense(x): ...", "networks:dense", "failed: TypeError"),
        ("def dense(x, outputs): raise OSError('no')", "networks:dense", "failed: OSError: no"),
        ("def dense(x, outputs): return x", "networks:dense", "must return tensors by name"),
        (
            "def dense(x, outputs): return {name: x for name in outputs}",
            "networks:dense",
            r"of shapes \{'mean': \(None, 3\).*it returned \{'mean': \(None, 9, 7, 3\)",
        ),
        ("def dense(x, outputs): return {'mean': x}", "networks:dense", "'log_variance'"),
    ],
)
def test_what_is_no_network_is_refused_with_what_would_be(own, text, address, expected):
    (own / "__init__.py").write_text(text)
    with pytest.raises(ConfigError, match=expected):
        make(address)


def test_a_module_of_that_name_from_elsewhere_is_not_taken(own, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "networks").mkdir(parents=True)
    (elsewhere / "networks" / "__init__.py").write_text("def dense(x, outputs): ...")
    monkeypatch.syspath_prepend(str(elsewhere))
    importlib.import_module("networks")
    with pytest.raises(ConfigError, match=r"not in .*src/networks"):
        make()


def test_outside_of_a_workspace_there_are_none(own, tmp_path, monkeypatch):
    (tmp_path / "dvc.yaml").unlink()
    with pytest.raises(ConfigError, match="no workspace"):
        make()


@pytest.mark.parametrize("address", ["mlp", "os:system", "networks", "networks:", "networks.a:1b"])
def test_an_address_elsewhere_is_refused_by_the_parameters(address):
    with pytest.raises(ConfigError, match=r"of conv, residual, or networks\.module:function"):
        validate({"train": {"network": address}}, "params.yaml")
    validate({"train": {"network": "networks.deep.er:net"}}, "params.yaml")


def test_a_change_of_its_code_is_another_training(own, tmp_path):
    (tmp_path / "index.parquet").write_bytes(b"stands for the images' digests")
    ours, theirs = Train(), Train(network="networks:dense")
    before = [training_key(tmp_path, settings) for settings in (ours, theirs)]
    (own / "__init__.py").write_text("def dense(x, outputs): ...")
    code.digest.cache_clear()
    after = [training_key(tmp_path, settings) for settings in (ours, theirs)]
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_the_documented_example_is_the_shipped_one():
    shipped = (REPOSITORY / code.OWN_NETWORKS / "__init__.py").read_text()
    example = shipped[shipped.index("import math") :]
    assert f"```python\n{example}```" in (REPOSITORY / "docs/how-to/train.md").read_text()
