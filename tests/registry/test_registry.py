import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import aliases

import vaeflow
from vaeflow.bundle.manifest import MANIFEST, bundle_sha256
from vaeflow.errors import BundleError, RegistryError
from vaeflow.registry.pull import pull
from vaeflow.registry.register import register
from vaeflow.training.tracking import connect, find_run

pytestmark = pytest.mark.slow  # a real bundle has to be made first

NAME = "digits-vae"


def set_bound(bundled, value, **changes):
    """Another bundle: the same model with another figure in its manifest."""
    path = bundled.bundle / MANIFEST
    content = {**json.loads(path.read_text()), **changes}
    content["metrics"]["importance_weighted_bound"] = value
    path.write_text(json.dumps(content))


def test_the_first_version_is_champion_and_carries_its_lineage(bundled):
    registered = register(bundled)
    assert (registered.version, registered.alias) == ("1", "champion")
    assert registered.uri == f"models:/{NAME}/1"
    version = connect(bundled).get_model_version_by_alias(NAME, "champion")
    manifest = json.loads((bundled.bundle / MANIFEST).read_text())
    assert version.tags["bundle_sha256"] == bundle_sha256(bundled.bundle)
    assert manifest["lineage"].items() <= version.tags.items()
    assert float(version.tags["elbo"]) == manifest["metrics"]["elbo"]


def test_registering_again_changes_nothing(bundled):
    first = register(bundled)
    again = register(bundled)
    assert again[:3] == first[:3]
    assert len(connect(bundled).search_model_versions(f"name='{NAME}'")) == 1


def test_only_a_better_bound_becomes_champion(bundled):
    set_bound(bundled, -20.0)
    register(bundled)
    set_bound(bundled, -21.0)
    worse = register(bundled)
    assert (worse.version, worse.alias) == ("2", "challenger")
    assert "not better than version 1's -20.000" in worse.reason
    assert aliases(bundled.root) == {"champion": "1", "challenger": "2"}

    set_bound(bundled, -20.0 + 1e-9)
    better = register(bundled)
    assert (better.version, better.alias) == ("3", "champion")
    assert aliases(bundled.root) == {"champion": "3", "challenger": "2"}


def test_an_equal_bound_does_not_replace_the_champion(bundled):
    set_bound(bundled, -20.0)
    register(bundled)
    set_bound(bundled, -20)
    (bundled.bundle / MANIFEST).write_text((bundled.bundle / MANIFEST).read_text() + "\n")
    assert register(bundled).alias == "challenger"


def test_a_bound_of_another_likelihood_is_no_reason_to_promote(bundled):
    set_bound(bundled, -20.0)
    register(bundled)
    for changes, named in (
        ({"likelihood": "gaussian"}, "images as they are under likelihood gaussian"),
        ({"likelihood": "bernoulli", "binarize": "dynamic"}, "binarised images under"),
    ):
        set_bound(bundled, 100.0, **changes)
        other = register(bundled)
        assert other.alias == "challenger"
        assert f"of {named}" in other.reason
        assert "version 1's, of images as they are under likelihood bernoulli" in other.reason
    assert aliases(bundled.root)["champion"] == "1"


def test_static_and_dynamic_binarisation_are_judged_by_the_same_images(bundled):
    for bound, binarize in ((-20.0, "static"), (-19.0, "dynamic")):
        set_bound(bundled, bound, binarize=binarize)
        assert register(bundled).alias == "champion"


def test_a_run_that_this_store_does_not_have_is_replaced(bundled):
    """A model from DVC's cache, in a workspace whose mlflow.db was deleted, is still registered."""
    manifest = json.loads((bundled.bundle / MANIFEST).read_text())
    assert find_run(bundled, manifest["run_id"]) is None
    version = connect(bundled).get_model_version(NAME, register(bundled).version)
    run = connect(bundled).get_run(version.run_id)
    assert run.data.tags["trained_in_run"] == manifest["run_id"]
    assert run.info.status == "FINISHED"


def test_a_tampered_bundle_is_not_registered(bundled):
    (bundled.bundle / "model.keras").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"model\.keras"):
        register(bundled)


@pytest.mark.parametrize("address", ["@champion", "/1"])
def test_a_registered_model_is_pulled_and_answers(bundled, digits, address):
    register(bundled)
    shutil.rmtree(bundled.bundle)
    model = vaeflow.load(f"models:/{NAME}{address}")
    assert model.score(digits[:5]).shape == (5,)


def test_a_pulled_model_is_cached_by_content(bundled):
    register(bundled)
    folder = pull(f"models:/{NAME}@champion")
    assert folder.name == bundle_sha256(bundled.bundle)
    shutil.rmtree(bundled.root / "mlartifacts")
    assert pull(f"models:/{NAME}/1") == folder


def test_artifacts_changed_in_the_store_are_refused_and_not_kept(bundled, tmp_path):
    register(bundled)
    (stored,) = (bundled.root / "mlartifacts").rglob("encoder.onnx")
    stored.write_bytes(stored.read_bytes() + b"x")
    with pytest.raises(BundleError, match=r"encoder\.onnx"):
        pull(f"models:/{NAME}/1")
    assert not [path for path in (tmp_path / "cache" / "bundles").iterdir() if path.is_dir()]


def test_a_bundle_exchanged_whole_in_the_store_is_refused(bundled):
    register(bundled)
    (stored,) = (bundled.root / "mlartifacts").rglob(MANIFEST)
    stored.write_text(stored.read_text().replace("digits-vae", "others-vae"))
    with pytest.raises(BundleError, match="not the one that was registered as version 1"):
        pull(f"models:/{NAME}/1")


def test_a_cached_bundle_that_was_damaged_is_downloaded_again(bundled, digits):
    register(bundled)
    folder = pull(f"models:/{NAME}/1")
    (folder / "decoder.onnx").write_bytes(b"x")
    assert vaeflow.load(f"models:/{NAME}/1").score(digits[:2]).shape == (2,)
    (folder / "model.keras").unlink()
    assert pull(f"models:/{NAME}/1") == folder
    assert (folder / "model.keras").is_file()


@pytest.mark.parametrize("digest", ["../../outside", "/etc", "", "A" * 64])
def test_a_tag_of_the_registry_cannot_lead_outside_the_cache(bundled, digest):
    register(bundled)
    connect(bundled).set_model_version_tag(NAME, "1", "bundle_sha256", digest)
    with pytest.raises(RegistryError, match="not registered by vaeflow"):
        pull(f"models:/{NAME}/1")


def test_an_alias_that_people_moved_stays_where_they_put_it(bundled):
    set_bound(bundled, -21.0)
    register(bundled)
    set_bound(bundled, -20.0)
    assert register(bundled).alias == "champion"
    connect(bundled).set_registered_model_alias(NAME, "champion", "1")
    again = register(bundled)
    assert (again.version, again.alias) == ("2", None)
    assert "holds no alias: it was registered before" in str(again)
    assert aliases(bundled.root) == {"champion": "1"}


def test_a_registration_cut_short_before_the_alias_is_completed(bundled):
    register(bundled)
    client = connect(bundled)
    client.delete_registered_model_alias(NAME, "champion")
    client.delete_model_version_tag(NAME, "1", "judged")
    assert register(bundled)[:3] == (NAME, "1", "champion")


def test_a_run_deleted_by_hand_is_replaced(bundled):
    first = register(bundled)
    client = connect(bundled)
    run_id = client.get_model_version(NAME, first.version).run_id
    client.delete_run(run_id)
    assert find_run(bundled, run_id) is None
    set_bound(bundled, 0.0)
    assert register(bundled).version == "2"


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
    with pytest.raises(RegistryError, match=expected):
        pull(uri)


def test_missing_artifacts_are_one_clear_error(bundled):
    register(bundled)
    shutil.rmtree(bundled.root / "mlartifacts")
    with pytest.raises(RegistryError, match="cannot be fetched"):
        pull(f"models:/{NAME}/1")


def test_a_real_tracking_server_works_as_the_file_does(bundled, tmp_path, monkeypatch, digits):
    """Register and pull over HTTP, the server keeping the artifacts."""
    import socket
    import time
    import urllib.request

    from vaeflow.processes import process_group

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--workers", "1"]
    command += ["--artifacts-destination", str(tmp_path / "store")]
    address = f"http://127.0.0.1:{port}"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with process_group(command, cwd=tmp_path, **quiet):
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.3)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        assert register(bundled).alias == "champion"
        model = vaeflow.load(f"models:/{NAME}@champion")
        assert model.score(digits[:3]).shape == (3,)
    assert not (bundled.root / "mlflow.db").exists()
    assert list(Path(tmp_path / "store").rglob("encoder.onnx"))
