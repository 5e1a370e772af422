import threading

import httpx
import pytest
from serving_helpers import better, serving, wait_for

from vaeflow.files import sha256_of
from vaeflow.registry.register import register

pytestmark = pytest.mark.slow  # a real bundle has to be made first


@pytest.fixture
def place(bundled):
    """The same, registered."""
    register(bundled)
    return bundled


def version(server):
    return httpx.get(f"{server.url}/v2/models/digits-vae").json()["versions"]


def test_a_new_champion_takes_over_and_a_bad_one_does_not(place):
    with serving("models:/digits-vae@champion", place.root, "--follow", "1s") as server:
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
            assert better(place, 100.0) == "2"
            wait_for(lambda: version(server) == ["2"])

            junk = b"as its manifest says, but no model"
            (place.bundle / "decoder.onnx").write_bytes(junk)
            assert better(place, 200.0, {"size": len(junk), "sha256": sha256_of(junk)}) == "3"
            refusals = "vaeflow_refused_models_total 1.0"
            wait_for(lambda: refusals in httpx.get(f"{server.url}/metrics").text)
            assert version(server) == ["2"]
        finally:
            done.set()
            asking.join()
        assert "decoder.onnx: not a readable ONNX model" in server.log.read_text()
        assert set(statuses) == {200}
        assert sorted(set(versions)) == list(dict.fromkeys(versions))
        assert server.stop() == 0
