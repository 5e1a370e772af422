import threading

import httpx
import pytest
from serving_helpers import register_champion, serving, wait_for

from vaeflow.bundle.manifest import MANIFEST, describe_files

pytestmark = pytest.mark.slow  # a real bundle has to be made first


def version(server):
    return httpx.get(f"{server.url}/v2/models/digits-vae").json()["versions"]


def test_a_new_champion_takes_over_and_a_bad_one_does_not(bundled):
    assert register_champion(bundled) == "1"
    with serving("models:/digits-vae@champion", bundled.root, "--follow", "1s") as server:
        assert version(server) == ["1"]
        statuses, versions, done = [], [], threading.Event()

        def ask() -> None:
            with httpx.Client(base_url=server.url, timeout=30) as client:
                while not done.is_set():
                    answer = client.post("/sample")
                    statuses.append(answer.status_code)
                    versions.append(answer.headers["x-model-version"])

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            wait_for(lambda: "1" in versions)
            assert register_champion(bundled, metrics={"elbo": 1.0}) == "2"
            wait_for(lambda: version(server) == ["2"])

            (bundled.bundle / "decoder.onnx").write_bytes(b"as its manifest says, but no model")
            described = describe_files(bundled.bundle)
            del described[MANIFEST]
            files = {name: file.model_dump() for name, file in described.items()}
            assert register_champion(bundled, files=files) == "3"
            refusals = "vaeflow_refused_models_total 1.0"
            wait_for(lambda: refusals in httpx.get(f"{server.url}/metrics").text)
            assert version(server) == ["2"]
        finally:
            done.set()
            asking.join()
        assert "decoder.onnx: not a readable ONNX model" in server.log.read_text()
        assert set(statuses) == {200}
        assert list(dict.fromkeys(versions)) == ["1", "2"]  # never back
        assert server.stop() == 0
