import asyncio
import http.client
import json
import signal
import subprocess
import sys

import httpx
import numpy as np
import pytest
from helpers import REPOSITORY
from serving_helpers import npy, sent, serving, together, wait_for

from vaeflow.bundle.manifest import MANIFEST, bundle_sha256
from vaeflow.errors import BundleError, DataError
from vaeflow.registry.versions import Located
from vaeflow.serving.service import Service, open_model
from vaeflow.serving.settings import Settings

pytestmark = pytest.mark.slow  # a real bundle has to be made first


@pytest.fixture
def folder(finished):
    return finished / "outputs" / "bundle"


def test_sigterm_ends_it_well_after_what_was_accepted(folder, tmp_path):
    with (
        serving(folder, tmp_path) as server,
        httpx.Client(base_url=server.url, timeout=60) as kept,
    ):
        kept.get("/v2/health/ready")
        slow = sent(server, "/sample?count=200&seed=1", 8)
        # A request whose body is still coming counts as accepted.
        body = json.dumps({"latents": np.zeros((1, 8)).tolist()}).encode()
        half = http.client.HTTPConnection(slow[0].host, slow[0].port, timeout=60)
        half.putrequest("POST", "/decode")
        half.putheader("Content-Type", "application/json")
        half.putheader("Content-Length", str(len(body)))
        half.endheaders(body[:9])
        server.process.terminate()
        wait_for(lambda: kept.get("/v2/health/ready").status_code == 503)
        assert [connection.getresponse().status for connection in slow] == [200] * 8
        # It stops accepting at its next tick, up to a tenth of a second after the signal.
        wait_for(lambda: httpx.post(f"{server.url}/sample", timeout=60).status_code == 503)
        half.send(body[9:])
        assert half.getresponse().status == 200
        assert server.process.wait(60) == 0


def test_what_reached_the_machine_before_sigterm_is_answered(folder, tmp_path):
    """Stopped meanwhile, the server cannot have seen any of it when the signal comes."""
    with serving(folder, tmp_path) as server:
        server.process.send_signal(signal.SIGSTOP)
        connections = sent(server, "/sample", 200)
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGCONT)
        assert [connection.getresponse().status for connection in connections] == [200] * 200
        assert server.process.wait(60) == 0


def test_a_full_queue_is_429_and_says_when_to_come_back(folder, tmp_path):
    with serving(folder, tmp_path, "--queue", "4", "--batch", "1") as server:
        answers = together(
            48,
            lambda index: httpx.post(
                f"{server.url}/score?samples=128&count=1",
                content=npy(np.zeros((4, 8, 8, 1), np.uint8)),
                headers={"Content-Type": "application/x-npy"},
                timeout=30,
            ),
        )
        statuses = {answer.status_code for answer in answers}
        assert statuses == {200, 429}
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert httpx.post(f"{server.url}/sample").status_code == 200


def test_past_the_deadline_is_504(folder, tmp_path):
    with serving(folder, tmp_path, "--deadline", "0.001") as server:
        answer = httpx.post(f"{server.url}/sample?count=1024")
        assert answer.status_code == 504


def test_requests_that_arrive_together_run_together(folder, tmp_path):
    """Stopped meanwhile, the server finds all of them at once."""
    with serving(folder, tmp_path) as server:
        server.process.send_signal(signal.SIGSTOP)
        connections = sent(server, "/sample", 32)
        server.process.send_signal(signal.SIGCONT)
        assert [connection.getresponse().status for connection in connections] == [200] * 32
        text = httpx.get(f"{server.url}/metrics", timeout=60).text
    rows = float(text.split("vaeflow_batch_rows_sum ")[1].split()[0])
    batches = float(text.split("vaeflow_batch_rows_count ")[1].split()[0])
    assert rows == 32
    assert batches < 32


def test_with_a_token_only_health_is_for_everyone(folder, tmp_path):
    with serving(folder, tmp_path, VAEFLOW_TOKEN="secret") as server:
        for path in ("/metrics", "/openapi.json"):
            answer = httpx.get(server.url + path)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        wrong = {"Authorization": "Bearer secre"}
        assert httpx.post(f"{server.url}/sample", headers=wrong).status_code == 401
        right = {"Authorization": "Bearer secret"}
        assert httpx.post(f"{server.url}/sample", headers=right).status_code == 200
        assert "secret" not in server.log.read_text()


def test_what_cannot_be_served_is_said_in_a_paragraph(folder, tmp_path):
    for options, expected in (
        (["--model", str(tmp_path)], "is no bundle"),
        (["--model", str(folder), "--follow", "30s"], "only models:/"),
        (["--model", str(folder), "--follow", "soon"], "30s"),
        (["--model", str(folder), "--host", "256.0.0.1"], "cannot be listened on"),
        (["--model", str(folder), "--workers", "2", "--grpc-port", "0"], "name one"),
        (["--model", str(folder), "--token-file", str(tmp_path / "none")], "cannot be read"),
    ):
        command = [sys.executable, "-m", "vaeflow", "serve", "--port", "0", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert expected in done.stderr
        assert "Traceback" not in done.stderr


def test_the_rate_of_false_alarms_is_the_servers(finished, digits):
    located = Located(finished / "outputs" / "bundle", None)
    shares = {}
    for rate in (0.02, 0.5):
        settings = Settings("any", false_alarm_rate=rate)
        service = Service(open_model(located, settings), settings)
        try:
            answer = asyncio.run(
                service.run(service.model, "score", digits[:300], service.deadline())
            )
        finally:
            service.close()
        shares[rate] = answer["anomalous"].mean()
    assert shares[0.02] < 0.2 < shares[0.5]
    with pytest.raises(DataError, match="cannot vouch for a false alarm rate"):
        open_model(located, Settings("any", false_alarm_rate=1e-5))


def test_any_flipped_byte_of_a_bundle_is_refused(bundle, monkeypatch):
    """A thousand of them, anywhere in the bundle, each refused before anything is loaded."""
    import onnxruntime

    made, session = [], onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *given: made.append(given) or session(*given)
    )
    random = np.random.default_rng(7)
    digest = bundle_sha256(bundle)
    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    for trial in range(1000):
        path = files[trial % len(files)]
        content = path.read_bytes()
        position = int(random.integers(len(content)))
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        if path.name == MANIFEST:  # it has no digest inside the bundle: the registry has it
            assert bundle_sha256(bundle) != digest
        else:
            with pytest.raises(BundleError):
                open_model(Located(bundle, None), Settings(str(bundle)))
        path.write_bytes(content)
    assert not made
    open_model(Located(bundle, None), Settings(str(bundle)))
    assert len(made) == 2


def test_the_extra_alone_serves_a_local_bundle(folder, tmp_path):
    """In an environment of its own: no TensorFlow, no MLflow."""
    environment = tmp_path / "environment"
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, environment], check=True)
    python = environment / "bin" / "python"
    install = [*uv, "pip", "install", "--quiet", "--python", python, f"{REPOSITORY}[serve]"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300)
    if done.returncode:
        # Where not even one of them can be had by itself, it is not the extra that is wrong.
        alone = subprocess.run([*install[:-1], "numpy"], capture_output=True, text=True)
        assert alone.returncode, done.stderr
        pytest.skip(f"packages cannot be fetched: {alone.stderr.strip()[:200]}")
    look = (
        "import importlib.util as u; print([n for n in ('tensorflow', 'mlflow') if u.find_spec(n)])"
    )
    found = subprocess.run([python, "-c", look], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    with serving(folder, tmp_path, python=python) as server:
        assert httpx.post(f"{server.url}/sample").status_code == 200
        assert server.stop() == 0
