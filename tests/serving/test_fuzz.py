"""Generated requests: nothing but documented answers, and a server that still stands.

`VAEFLOW_FUZZ` is how many in all; `make test-fuzz` sends more than ten thousand.
"""

import json
import os

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error

pytestmark = pytest.mark.slow  # a real bundle has to be made first

REQUESTS = int(os.environ.get("VAEFLOW_FUZZ", "600"))
UNDISTURBED = settings(
    max_examples=REQUESTS // 6,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SURPRISING = {500, 501, 502}

numbers = st.floats() | st.integers() | st.booleans() | st.none() | st.text(max_size=3)
values = st.recursive(numbers, lambda inner: st.lists(inner, max_size=9), max_leaves=80)
kinds = st.sampled_from(
    ["application/json", "application/x-npy", "image/png", "image/jpeg", "text/plain", "", "a/b;c"]
)
accepts = st.sampled_from(
    ["", "*/*", "image/png", "application/x-npy", "application/json;q=x", "a", ";;,", "*/*;q=nan"]
)
paths = st.sampled_from(["/encode", "/decode", "/reconstruct", "/score", "/sample?count=2"])


def send(client, path, body, **headers):
    answer = client.post(path, content=body, headers=headers)
    assert answer.status_code not in SURPRISING, (path, body[:200], headers, answer.text)
    assert client.get("/v2/health/live").status_code == 200
    return answer


@UNDISTURBED
@given(path=paths, body=st.binary(max_size=300), kind=kinds, accept=accepts)
def test_any_bytes(client, path, body, kind, accept):
    send(client, path, body, **{"Content-Type": kind, "Accept": accept})


@UNDISTURBED
@given(path=paths, content=st.dictionaries(st.sampled_from(["images", "latents", "dtype"]), values))
def test_any_json(client, path, content):
    send(client, path, json.dumps(content).encode(), **{"Content-Type": "application/json"})


@UNDISTURBED
@given(
    path=paths,
    magic=st.sampled_from([b"\x93NUMPY\x01\x00", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"]),
    rest=st.binary(max_size=200),
    kind=kinds,
)
def test_what_begins_as_a_known_format(client, path, magic, rest, kind):
    send(client, path, magic + rest, **{"Content-Type": kind})


@UNDISTURBED
@given(
    shape=st.lists(st.integers(0, 9), max_size=5) | st.just([1, 8, 8, 1]) | st.just([2, 8]),
    dtype=st.sampled_from(["FP16", "FP32", "FP64", "UINT8", "INT64"]),
    name=st.sampled_from(["images", "latents"]),
    outputs=st.lists(
        st.sampled_from(["mean", "score", "image", "percentile", "anomaly_map", "x"]), max_size=3
    ),
    fill=st.floats(width=16) | st.sampled_from([3e38, -3e38, 0.5]),
    cut=st.integers(0, 3),
)
def test_any_tensor(client, shape, dtype, name, outputs, fill, cut):
    numpy_type = {"UINT8": "u1", "INT64": "i8"}.get(dtype, "<f" + dtype[2:].replace("16", "2"))
    numpy_type = {"<f32": "<f4", "<f64": "<f8"}.get(numpy_type, numpy_type)
    with np.errstate(all="ignore"):
        raw = np.full(shape, fill).astype(numpy_type).tobytes()
    tensor = {"name": name, "shape": shape, "datatype": dtype}
    tensor["parameters"] = {"binary_data_size": len(raw)}
    content = {"inputs": [tensor], "outputs": [{"name": output} for output in outputs]}
    header = json.dumps(content).encode()
    length = {"Inference-Header-Content-Length": str(len(header))}
    send(client, "/v2/models/digits-vae/infer", header + raw[: len(raw) - cut], **length)


@UNDISTURBED
@given(content=st.dictionaries(st.sampled_from(["id", "inputs", "outputs", "parameters"]), values))
def test_any_inference_request(client, content):
    send(client, "/v2/models/digits-vae/infer", json.dumps(content).encode())


@pytest.fixture(scope="session")
def schema(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_the_schema_itself(server, schema):
    """Schemathesis, on every route of the OpenAPI page."""
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert len(operations) >= 10
    for operation in operations:

        @settings(UNDISTURBED, max_examples=max(1, REQUESTS // 6 // len(operations)))
        @given(case=operation.as_strategy())
        def run(case):
            case.call_and_validate(base_url=server.url, checks=[not_a_server_error])

        run()
