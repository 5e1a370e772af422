"""The inference protocol's own clients, over HTTP and gRPC: each call works, or is refused.

`docs/reference/clients.md` has the table, which is made of `CALLS`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers import REPOSITORY
from serving_helpers import Server, serving
from tritonclient.utils import InferenceServerException

import vaeflow

pytestmark = pytest.mark.slow  # a real bundle has to be made first

MODEL = "digits-vae"
PAGE = REPOSITORY / "docs" / "reference" / "clients.md"


@pytest.fixture(scope="module")
def both(finished, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("both")
    with serving(finished / "outputs" / "bundle", folder, "--grpc-port", "0") as running:
        yield running
        assert running.stop() == 0
        assert "Traceback" not in running.log.read_text()


@pytest.fixture(scope="module")
def model(finished):
    return vaeflow.load(finished / "outputs" / "bundle")


def opened(server: Server, kind: str) -> Any:
    if kind == "http":
        return tritonclient.http.InferenceServerClient(server.url.removeprefix("http://"))
    return tritonclient.grpc.InferenceServerClient(server.grpc)


def module(kind: str) -> Any:
    return {"http": tritonclient.http, "grpc": tritonclient.grpc}[kind]


def images(kind: str, pixels: np.ndarray, binary: bool = True) -> Any:
    tensor = module(kind).InferInput("images", list(pixels.shape), "FP32")
    if kind == "http":
        tensor.set_data_from_numpy(pixels, binary_data=binary)
    else:
        tensor.set_data_from_numpy(pixels)
    return tensor


def asked(kind: str, *names: str, **options: Any) -> list[Any]:
    return [module(kind).InferRequestedOutput(name, **options) for name in names]


PIXELS = np.linspace(0, 1, 128, dtype=np.float32).reshape(2, 8, 8, 1)


def infer(client: Any, kind: str, **options: Any) -> Any:
    return client.infer(MODEL, [images(kind, PIXELS)], **options)


def infer_async(client: Any, kind: str) -> Any:
    if kind == "http":
        return client.async_infer(MODEL, [images(kind, PIXELS)]).get_result()
    done, found = threading.Event(), []

    def keep(result: Any, error: Exception | None) -> None:
        found.append(error or result)
        done.set()

    client.async_infer(MODEL, [images(kind, PIXELS)], keep)
    assert done.wait(30)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def stream(client: Any, kind: str) -> None:
    assert kind == "grpc"
    done, found = threading.Event(), []

    def keep(result: Any, error: Exception | None) -> None:
        found.append(error)
        done.set()

    client.start_stream(keep)
    client.async_stream_infer(MODEL, [images(kind, PIXELS)])
    assert done.wait(30)
    client.stop_stream()
    raise found[0]


def set_region(client: Any, kind: str) -> Any:
    tensor = module(kind).InferInput("images", [2, 8, 8, 1], "FP32")
    tensor.set_shared_memory("region", 512)
    return client.infer(MODEL, [tensor])


WORKS, REFUSED = "works", "refused"
Call = Callable[[Any, str], Any]
# Each call of the clients: what it is in the table, how it is made, and what becomes of it.
CALLS: dict[str, tuple[Call, str]] = {
    "is_server_live": (lambda client, kind: client.is_server_live(), WORKS),
    "is_server_ready": (lambda client, kind: client.is_server_ready(), WORKS),
    "is_model_ready": (lambda client, kind: client.is_model_ready(MODEL), WORKS),
    "is_model_ready, with a version": (
        lambda client, kind: client.is_model_ready(MODEL, version_of(client, kind)),
        WORKS,
    ),
    "get_server_metadata": (lambda client, kind: client.get_server_metadata(), WORKS),
    "get_model_metadata": (lambda client, kind: client.get_model_metadata(MODEL), WORKS),
    "get_model_metadata, with a version": (
        lambda client, kind: client.get_model_metadata(MODEL, version_of(client, kind)),
        WORKS,
    ),
    "infer": (infer, WORKS),
    "infer, with a version": (
        lambda client, kind: infer(client, kind, model_version=version_of(client, kind)),
        WORKS,
    ),
    "infer, some outputs": (
        lambda client, kind: infer(client, kind, outputs=asked(kind, "score", "anomaly_map")),
        WORKS,
    ),
    "infer, with a request_id": (
        lambda client, kind: infer(client, kind, request_id="7"),
        WORKS,
    ),
    "infer, with a time-out": (
        lambda client, kind: infer(client, kind, timeout=5_000_000),
        WORKS,
    ),
    "infer, with a priority": (lambda client, kind: infer(client, kind, priority=1), WORKS),
    "async_infer": (infer_async, WORKS),
    "infer, class_count": (
        lambda client, kind: infer(client, kind, outputs=asked(kind, "mean", class_count=2)),
        REFUSED,
    ),
    "infer, shared memory": (set_region, REFUSED),
    "infer, as one of a sequence": (
        lambda client, kind: infer(client, kind, sequence_id=3, sequence_start=True),
        REFUSED,
    ),
    "infer, another model": (
        lambda client, kind: client.infer("other", [images(kind, PIXELS)]),
        REFUSED,
    ),
    "get_model_config": (lambda client, kind: client.get_model_config(MODEL), REFUSED),
    "get_inference_statistics": (
        lambda client, kind: client.get_inference_statistics(MODEL),
        REFUSED,
    ),
    "get_model_repository_index": (
        lambda client, kind: client.get_model_repository_index(),
        REFUSED,
    ),
    "load_model": (lambda client, kind: client.load_model(MODEL), REFUSED),
    "unload_model": (lambda client, kind: client.unload_model(MODEL), REFUSED),
    "get_trace_settings": (lambda client, kind: client.get_trace_settings(), REFUSED),
    "update_trace_settings": (
        lambda client, kind: client.update_trace_settings(settings={}),
        REFUSED,
    ),
    "get_log_settings": (lambda client, kind: client.get_log_settings(), REFUSED),
    "update_log_settings": (lambda client, kind: client.update_log_settings({}), REFUSED),
    "get_system_shared_memory_status": (
        lambda client, kind: client.get_system_shared_memory_status(),
        REFUSED,
    ),
    "register_system_shared_memory": (
        lambda client, kind: client.register_system_shared_memory("a", "/a", 8),
        REFUSED,
    ),
    "unregister_system_shared_memory": (
        lambda client, kind: client.unregister_system_shared_memory(),
        REFUSED,
    ),
    "get_cuda_shared_memory_status": (
        lambda client, kind: client.get_cuda_shared_memory_status(),
        REFUSED,
    ),
    "register_cuda_shared_memory": (
        lambda client, kind: client.register_cuda_shared_memory("a", b"AAAA", 0, 8),
        REFUSED,
    ),
    "unregister_cuda_shared_memory": (
        lambda client, kind: client.unregister_cuda_shared_memory(),
        REFUSED,
    ),
}
OF_ONE = {
    "http": {
        "infer, in JSON": (
            lambda client, kind: client.infer(MODEL, [images(kind, PIXELS, binary=False)]),
            WORKS,
        ),
        "infer, answered in JSON": (
            lambda client, kind: infer(
                client, kind, outputs=asked(kind, "score", binary_data=False)
            ),
            WORKS,
        ),
        "infer, answer compressed": (
            lambda client, kind: infer(client, kind, response_compression_algorithm="gzip"),
            WORKS,
        ),
        "infer, request compressed": (
            lambda client, kind: infer(client, kind, request_compression_algorithm="gzip"),
            REFUSED,
        ),
    },
    "grpc": {
        "infer, compressed": (
            lambda client, kind: infer(client, kind, compression_algorithm="gzip"),
            WORKS,
        ),
        "infer, client_timeout": (
            lambda client, kind: infer(client, kind, client_timeout=10),
            WORKS,
        ),
        "async_stream_infer": (stream, REFUSED),
    },
}
CASES = [
    (kind, name, *case)
    for kind in ("http", "grpc")
    for name, case in {**CALLS, **OF_ONE[kind]}.items()
]


def version_of(client: Any, kind: str) -> str:
    found = client.get_model_metadata(MODEL)
    return (found["versions"] if kind == "http" else found.versions)[0]


@pytest.mark.parametrize(
    ("kind", "call", "expected"),
    [(kind, call, expected) for kind, _, call, expected in CASES],
    ids=[f"{kind}-{name}" for kind, name, _, _ in CASES],
)
def test_each_call_works_or_is_refused(both, kind, call, expected):
    client = opened(both, kind)
    try:
        if expected == REFUSED:
            with pytest.raises(InferenceServerException) as raised:
                call(client, kind)
            assert raised.value.message()
        else:
            assert call(client, kind)
    finally:
        client.close()


def test_the_table_says_so():
    lines = ["| call | HTTP | gRPC |", "|---|---|---|"]
    names = dict.fromkeys(name for _, name, *_ in CASES)
    becomes = {(kind, name): expected for kind, name, _, expected in CASES}
    for name in names:
        cells = [becomes.get((kind, name), "") for kind in ("http", "grpc")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    assert "\n".join(lines) in PAGE.read_text()


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_answers_are_the_bundles(both, model, kind):
    client = opened(both, kind)
    names = ["mean", "log_variance", "reconstruction", "score", "anomalous", "anomaly_map"]
    answer = client.infer(MODEL, [images(kind, PIXELS)], outputs=asked(kind, *names))
    mean, log_variance = model.encode(PIXELS)
    found = model.detect(PIXELS, maps=True)
    expected = [mean, log_variance, model.reconstruct(PIXELS), found.score, found.anomalous]
    for name, values in zip(names, [*expected, found.maps], strict=True):
        np.testing.assert_allclose(answer.as_numpy(name), values, rtol=1e-3, atol=0.02)
    latents = module(kind).InferInput("latents", [2, 8], "FP32")
    latents.set_data_from_numpy(mean)
    decoded = client.infer(MODEL, [latents]).as_numpy("image")
    np.testing.assert_allclose(decoded, model.decode(mean), atol=1e-5)
    client.close()


def test_numbers_may_lie_in_contents(both, model):
    """As clients without NumPy send them."""
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    with grpc.insecure_channel(both.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = service_pb2.ModelInferRequest(model_name=MODEL)
        tensor = request.inputs.add(name="images", datatype="FP32", shape=PIXELS.shape)
        tensor.contents.fp32_contents.extend(PIXELS.ravel().tolist())
        answer = stub.ModelInfer(request)
        mean = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(2, 8)
        np.testing.assert_allclose(mean, model.encode(PIXELS).mean, atol=1e-5)
        request.inputs[0].datatype = "UINT8"
        for change, expected in (
            ({"datatype": "UINT8"}, "uint_contents"),
            ({"shape": [0, 2**31, 2**31, 2**31]}, "no such shape"),
            ({"shape": [2000, 8, 8, 1]}, "one request may have 1024"),
            ({"name": "other"}, "expected images or latents"),
            ({"datatype": "BYTES"}, "inputs.0.datatype"),
        ):
            wrong = service_pb2.ModelInferRequest(model_name=MODEL)
            tensor = {"name": "images", "datatype": "FP32", "shape": PIXELS.shape} | change
            wrong.inputs.add(**tensor)
            with pytest.raises(grpc.RpcError) as raised:
                stub.ModelInfer(wrong)
            assert expected in raised.value.details()
        with pytest.raises(grpc.RpcError) as raised:
            stub.ModelInfer(service_pb2.ModelInferRequest(model_name=MODEL))
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_too_large_and_too_late(both):
    client = opened(both, "grpc")
    with pytest.raises(InferenceServerException, match="larger than max"):
        client.infer(MODEL, [images("grpc", np.zeros((70_000, 8, 8, 1), np.float32))])
    with pytest.raises(InferenceServerException, match=r"[Dd]eadline"):
        client.infer(
            MODEL,
            [images("grpc", np.zeros((1024, 8, 8, 1), np.float32))],
            outputs=asked("grpc", "score"),
            client_timeout=0.01,
        )
    assert client.is_server_live()
    client.close()


def test_health_token_and_draining(finished, tmp_path):
    folder = finished / "outputs" / "bundle"
    with serving(folder, tmp_path, "--grpc-port", "0", VAEFLOW_TOKEN="secret") as server:
        client = opened(server, "grpc")
        assert client.is_server_live()
        with pytest.raises(InferenceServerException, match="authorization"):
            infer(client, "grpc")
        headers = {"authorization": "bearer secret"}
        assert infer(client, "grpc", headers=headers)
        with grpc.insecure_channel(server.grpc) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            watched = health.Watch(health_pb2.HealthCheckRequest())
            states = health_pb2.HealthCheckResponse
            assert next(watched).status == states.SERVING
            large = images("grpc", np.zeros((1024, 8, 8, 1), np.float32))
            slow, done = [], threading.Event()

            def keep(result: Any, error: Exception | None) -> None:
                slow.append(error or result)
                done.set()

            client.async_infer(
                MODEL, [large], keep, outputs=asked("grpc", "score"), headers=headers
            )
            time.sleep(0.1)
            server.process.terminate()
            assert next(watched).status == states.NOT_SERVING
            assert done.wait(30)
            assert len(slow[0].as_numpy("score")) == 1024
        client.close()
        assert server.process.wait(30) == 0


def test_it_counts_beside_http(both):
    import httpx

    client = opened(both, "grpc")
    infer(client, "grpc")
    client.close()
    text = httpx.get(f"{both.url}/metrics").text
    assert 'vaeflow_requests_total{route="grpc ModelInfer",status="200"}' in text
