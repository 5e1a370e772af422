import json

import pytest

from vaeflow.bundle.manifest import MANIFEST, bundle_sha256, read_verified
from vaeflow.errors import BundleError

pytestmark = pytest.mark.slow  # a real bundle has to be made first


def files_of(bundle):
    return sorted(path for path in bundle.rglob("*") if path.is_file())


def edit(bundle, change):
    path = bundle / MANIFEST
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_an_untouched_bundle_is_accepted(bundle):
    manifest = read_verified(bundle)
    names = {path.relative_to(bundle).as_posix() for path in files_of(bundle)}
    assert set(manifest.files) == names - {MANIFEST}
    assert {"encoder.onnx", "decoder.onnx", "model.keras"} <= names
    assert "saved_model/1/saved_model.pb" in names
    assert max(manifest.export_differences.values()) <= 1e-4
    assert set(manifest.export_differences) == {
        "encoder.onnx",
        "decoder.onnx",
        "saved_model",
        "model.keras",
    }


def test_one_changed_byte_in_any_file_is_refused_and_named(bundle):
    for path in files_of(bundle):
        if path.name == MANIFEST:
            continue
        original = path.read_bytes()
        changed = bytearray(original)
        changed[len(changed) // 2] ^= 1
        path.write_bytes(changed)
        with pytest.raises(BundleError, match=path.name.replace(".", r"\.")):
            read_verified(bundle)
        path.write_bytes(original)
    read_verified(bundle)


def test_missing_unknown_and_linked_files_are_refused(bundle):
    (bundle / "encoder.onnx").rename(bundle / "aside.onnx")
    with pytest.raises(BundleError, match=r"missing from the bundle: encoder\.onnx"):
        read_verified(bundle)
    (bundle / "encoder.onnx").symlink_to(bundle / "aside.onnx")
    with pytest.raises(BundleError, match=r"encoder\.onnx is a link"):
        read_verified(bundle)
    (bundle / "encoder.onnx").unlink()
    (bundle / "aside.onnx").rename(bundle / "encoder.onnx")
    (bundle / "saved_model" / "extra.py").write_text("import os")
    with pytest.raises(BundleError, match=r"not in the bundle's manifest: saved_model/extra\.py"):
        read_verified(bundle)


def test_linked_folders_are_refused(bundle):
    (bundle / "saved_model").rename(bundle.parent / "outside")
    (bundle / "saved_model").symlink_to(bundle.parent / "outside")
    with pytest.raises(BundleError, match="saved_model is a link"):
        read_verified(bundle)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "./a", "a\\b"])
def test_a_manifest_cannot_lead_outside(bundle, name):
    entry = {"size": 1, "sha256": "0" * 64}
    edit(bundle, lambda content: content["files"].update({name: entry}))
    with pytest.raises(BundleError, match="files"):
        read_verified(bundle)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format_version": 3}, "format_version"),
        ({"prior": "flow"}, "needs prior.onnx"),
        ({"surprise": 1}, "surprise"),
        ({"latent_dim": 0}, "latent_dim"),
        ({"likelihood": "poisson"}, "likelihood"),
        ({"files": {"a": {"size": -1, "sha256": "x"}}}, "files"),
        ({"files": {}}, r"decoder\.onnx and encoder\.onnx must be among them"),
        ({"metrics": {"elbo": float("nan")}}, "metrics"),
        ({"score_quantiles": {"0.5": 1, "0.1": 2}}, "shares must rise"),
        ({"score_quantiles": {"0": 2, "1": 1}}, "scores must rise"),
        ({"score_quantiles": {"half": 2}}, "score_quantiles"),
    ],
)
def test_a_manifest_of_another_form_is_refused_with_the_key(bundle, change, named):
    edit(bundle, lambda content: content.update(change))
    with pytest.raises(BundleError, match=named):
        read_verified(bundle)


def test_no_manifest_or_no_json_is_refused(bundle, tmp_path):
    (bundle / MANIFEST).write_text("{")
    with pytest.raises(BundleError, match=r"manifest\.json"):
        read_verified(bundle)
    with pytest.raises(BundleError, match="is no bundle"):
        read_verified(tmp_path)


def test_the_digest_covers_every_file_through_the_manifest(bundle):
    before = bundle_sha256(bundle)
    edit(bundle, lambda content: content["metrics"].update(elbo=0))
    assert bundle_sha256(bundle) != before
