import shutil

import pytest
from helpers import change_manifest, mlflow_server, run

import vaeflow
from vaeflow.bundle.manifest import MANIFEST, bundle_sha256
from vaeflow.errors import BundleError, RegistryError
from vaeflow.registry.champion import apply_verdict
from vaeflow.registry.pull import pull, pull_to, pull_version
from vaeflow.registry.register import register
from vaeflow.tracking.runs import connect

pytestmark = pytest.mark.slow  # a real bundle has to be made first

NAME = "digits-vae"


@pytest.mark.parametrize("address", ["@champion", "/1"])
def test_a_registered_model_is_pulled_and_answers(bundled, digits, address):
    apply_verdict(bundled, register(bundled))
    shutil.rmtree(bundled.bundle)
    model = vaeflow.load(f"models:/{NAME}{address}")
    assert model.score(digits[:5]).shape == (5,)


def test_a_pulled_model_is_cached_by_content(bundled):
    uri = register(bundled).uri
    folder = pull(uri)
    assert folder.name == bundle_sha256(bundled.bundle)
    shutil.rmtree(bundled.root / "mlartifacts")
    assert pull(uri) == folder


def test_it_becomes_a_folder_whole(bundled, tmp_path):
    uri = register(bundled).uri
    target = tmp_path / "deep" / "model"
    assert pull_to(uri, target).version == "1"
    assert bundle_sha256(target) == bundle_sha256(bundled.bundle)
    (target / "decoder.onnx").write_bytes(b"x")
    printed = run(bundled.root, "vaeflow", "pull", uri, str(target)).stdout
    assert printed == f"{target}: version 1\n"
    assert vaeflow.load(target)
    (tmp_path / "precious").mkdir()
    with pytest.raises(BundleError, match="is there and is no bundle"):
        pull_to(uri, tmp_path / "precious")


def test_artifacts_changed_in_the_store_are_refused_and_not_kept(bundled, tmp_path):
    uri = register(bundled).uri
    (stored,) = (bundled.root / "mlartifacts").rglob("encoder.onnx")
    stored.write_bytes(stored.read_bytes() + b"x")
    with pytest.raises(BundleError, match=r"encoder\.onnx"):
        pull(uri)
    assert not [path for path in (tmp_path / "cache" / "bundles").iterdir() if path.is_dir()]


def test_a_bundle_exchanged_whole_in_the_store_is_refused(bundled):
    uri = register(bundled).uri
    (stored,) = (bundled.root / "mlartifacts").rglob(MANIFEST)
    stored.write_text(stored.read_text().replace("digits-vae", "others-vae"))
    with pytest.raises(BundleError, match=f"{uri}: the downloaded bundle is not the one"):
        pull(uri)


def test_a_cached_bundle_that_was_damaged_is_downloaded_again(bundled, digits):
    uri = register(bundled).uri
    folder = pull(uri)
    (folder / "decoder.onnx").write_bytes(b"x")
    assert vaeflow.load(uri).score(digits[:2]).shape == (2,)
    (folder / "model.keras").unlink()
    assert pull(uri) == folder
    assert (folder / "model.keras").is_file()


@pytest.mark.parametrize("digest", ["../../outside", "/etc", "", "A" * 64])
def test_a_tag_of_the_registry_cannot_lead_outside_the_cache(bundled, digest):
    uri = register(bundled).uri
    connect(bundled).set_model_version_tag(NAME, "1", "bundle_sha256", digest)
    with pytest.raises(RegistryError, match="not registered by vaeflow"):
        pull(uri)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("models:/absent@champion", "absent"),
        (f"models:/{NAME}@absent", "absent"),
        (f"models:/{NAME}/9", "9"),
        (f"models:/{NAME}", "expected models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/a/b/c", "expected models:/NAME@ALIAS or models:/NAME/VERSION"),
    ],
)
def test_an_address_that_leads_nowhere_is_one_clear_error(bundled, uri, expected):
    register(bundled)
    for offline_ok in (False, True):
        with pytest.raises(RegistryError, match=expected):
            pull(uri, offline_ok)


def test_missing_artifacts_are_one_clear_error(bundled):
    uri = register(bundled).uri
    shutil.rmtree(bundled.root / "mlartifacts")
    with pytest.raises(RegistryError, match="cannot be fetched"):
        pull(uri)


def test_without_its_registry_the_last_copy_is_taken_only_when_that_is_wanted(
    bundled, tmp_path, monkeypatch, digits
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    champion = f"models:/{NAME}@champion"
    with mlflow_server(tmp_path / "server") as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        client = connect(bundled)
        first = register(bundled)
        client.set_registered_model_alias(NAME, "champion", first.number)
        pull(champion)
        change_manifest(bundled.bundle, created="2020-01-01T00:00:00Z")
        second = register(bundled)
        client.set_registered_model_alias(NAME, "champion", second.number)
        assert pull_version(champion).version == "2"
    with pytest.raises(RegistryError, match="cannot be reached"):
        vaeflow.load(champion)
    with pytest.warns(UserWarning, match="Version 2, pulled earlier, is taken"):
        model = vaeflow.load(champion, offline_ok=True)
    assert model.score(digits[:2]).shape == (2,)
    with pytest.raises(RegistryError, match="cannot be reached"):
        pull(f"models:/{NAME}/1", offline_ok=True)  # never pulled under this address
    damaged = tmp_path / "cache" / "bundles" / bundle_sha256(bundled.bundle) / "encoder.onnx"
    damaged.write_bytes(b"x")
    with pytest.raises(RegistryError, match="cannot be reached"):
        pull(champion, offline_ok=True)
