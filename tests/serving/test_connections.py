"""What HTTP has beside requests: heads, upgrades, pipelines, refusals of what is still sent."""

import contextlib
import json
import socket
import sys
import threading
from collections import Counter
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from serving_helpers import npy, serving, wait_for

pytestmark = pytest.mark.slow  # a real bundle has to be made first

LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n"


def exchange(server, sent: bytes) -> bytes:
    """Everything that comes back, until the server closes."""
    host = urlsplit(server.url)
    with socket.create_connection((host.hostname, host.port), 30) as connection:
        connection.sendall(sent)
        parts = []
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def statuses(answer: bytes) -> list[int]:
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


@pytest.mark.parametrize("length", [40_000, 1_000_000])
def test_long_headers_are_431(server, length):
    answer = exchange(server, LIVE + b"X: " + b"a" * length + b"\r\n\r\n")
    assert statuses(answer) == [431]
    assert b"32768 bytes at most" in answer


def test_long_headers_behind_a_request_that_is_being_answered(server):
    body = json.dumps({"images": np.zeros((128, 8, 8, 1)).tolist()}).encode()
    head = b"POST /score?samples=128 HTTP/1.1\r\nHost: localhost\r\n"
    kind = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    with contextlib.suppress(ConnectionResetError):
        answer = exchange(server, head + kind + body + LIVE + b"X: " + b"a" * 1_000_000)
        assert statuses(answer) in ([], [200])
    with contextlib.suppress(ConnectionResetError):
        exchange(server, head + kind + body + LIVE + b"X: a")  # closed after ten seconds
    assert httpx.get(f"{server.url}/v2/health/live").status_code == 200


def test_what_is_no_http_is_400(server):
    answer = exchange(server, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9 + b"\r\n\r\n")
    assert statuses(answer) == [400]


def test_some_requests_may_be_sent_at_once_and_not_many(server):
    last = LIVE + b"Connection: close\r\n\r\n"
    assert statuses(exchange(server, (LIVE + b"\r\n") * 9 + last)) == [200] * 10
    with contextlib.suppress(ConnectionResetError):
        assert len(statuses(exchange(server, (LIVE + b"\r\n") * 500))) < 500


@pytest.mark.parametrize(
    "offer",
    [
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAA",
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZQ==",
    ],
)
def test_an_offer_of_another_protocol_is_not_taken(server, offer):
    body = json.dumps({"latents": [[0.0] * 8]}).encode()
    kind = "Content-Type: application/json\r\n"
    head = f"POST /decode HTTP/1.1\r\nHost: localhost\r\n{kind}{offer}\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    answer = exchange(server, request + request + LIVE + b"Connection: close\r\n\r\n")
    assert statuses(answer) == [200] * 3
    plain = f"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n{offer}\r\n\r\n".encode()
    answer = exchange(server, plain + LIVE + b"Connection: close\r\n\r\n")
    assert statuses(answer) == [200] * 2


def test_a_client_that_sends_first_and_reads_later_gets_its_refusal(server):
    """20 of 20, with a length and in chunks."""
    large = bytes(1 << 20)
    for _ in range(10):
        for body in (large * 40, (large for _ in range(40))):
            answer = httpx.post(f"{server.url}/score", content=body, timeout=60)
            assert answer.status_code == 413


def test_more_connections_than_there_may_be(finished, tmp_path):
    """Idle ones make room; where all work, there is an answer that says so."""
    options = ("--connections", "8", "--connections-of-address", "4")
    with serving(finished / "outputs" / "bundle", tmp_path, *options) as server:
        host = urlsplit(server.url)
        idle = [socket.create_connection((host.hostname, host.port)) for _ in range(12)]
        assert httpx.get(f"{server.url}/v2/health/live").status_code == 200
        for connection in idle:
            connection.close()
        body = b"POST /decode HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{"
        busy = [socket.create_connection((host.hostname, host.port)) for _ in range(4)]
        for connection in busy:
            connection.sendall(body)
        wait_for(lambda: _status(server) == 503)
        for connection in busy:
            connection.close()
        wait_for(lambda: _status(server) == 200)


def _status(server) -> int:
    try:
        return httpx.get(f"{server.url}/v2/health/live").status_code
    except httpx.TransportError:
        return 0


def test_a_request_under_way_at_the_end_is_answered(finished, tmp_path):
    """Sent over a connection that was open and idle when the server was told to end."""
    with serving(finished / "outputs" / "bundle", tmp_path) as server:
        host = urlsplit(server.url)
        kept = [socket.create_connection((host.hostname, host.port), 30) for _ in range(16)]
        for connection in kept[8:]:
            connection.sendall(LIVE + b"\r\n")
            read = b""
            while not read.endswith(b"}"):
                read += connection.recv(1000)
            assert read.startswith(b"HTTP/1.1 200")
        server.process.terminate()
        wait_for(lambda: "Shutting down" in server.log.read_text())
        for connection in kept:
            connection.sendall(b"POST /sample HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for connection in kept:
            assert connection.recv(1000).startswith(b"HTTP/1.1 503")
        assert server.process.wait(30) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="its sockets take filters")
def test_clients_that_connect_again_and_again_are_answered_or_find_it_closed(finished, tmp_path):
    """None is cut off: a server that ends answers those who are at the door."""
    seen: Counter[object] = Counter()

    def ask(url: str) -> None:
        while True:
            try:
                seen[httpx.post(f"{url}/sample", timeout=60).status_code] += 1
            except httpx.ConnectError:
                return
            except httpx.TransportError as error:
                seen[repr(error)] += 1

    with serving(finished / "outputs" / "bundle", tmp_path) as server:
        threads = [threading.Thread(target=ask, args=(server.url,)) for _ in range(16)]
        for thread in threads:
            thread.start()
        wait_for(lambda: seen[200] > 100)
        assert server.stop() == 0
        for thread in threads:
            thread.join()
    assert set(seen) <= {200, 503}


def test_what_is_compressed_is_refused(client):
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    answer = client.post("/decode", content=b"x", headers=headers)
    assert (answer.status_code, answer.json()["field"]) == (415, "content-encoding")


def test_requests_of_other_sites_are_refused(client, server):
    own = urlsplit(server.url).netloc
    assert client.post("/sample", headers={"Origin": "http://evil.example"}).status_code == 403
    assert client.post("/sample", headers={"Origin": "null"}).status_code == 403
    assert client.post("/sample", headers={"Origin": f"http://{own}"}).status_code == 200
    assert client.post("/sample", headers={"Host": "evil.example:8000"}).status_code == 421
    assert client.post("/sample", headers={"Host": "LocalHost:1"}).status_code == 200
    assert client.get("/v2/health/live", headers={"Host": "10.0.0.7"}).status_code == 200


def test_the_names_of_the_server_can_be_set(finished, tmp_path):
    folder = finished / "outputs" / "bundle"
    with serving(folder, tmp_path, "--allowed-host", "models.example") as server:
        named = {"Host": "models.example"}
        assert httpx.post(f"{server.url}/sample", headers=named).status_code == 200
        assert httpx.post(f"{server.url}/sample").status_code == 421


def test_shapes_that_no_array_has_are_refused(client):
    def of(shape: str) -> bytes:
        whole = npy(np.zeros((0, 8), np.float32))
        head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        return whole[:8] + len(head).to_bytes(2, "little") + head

    kind = {"Content-Type": "application/x-npy"}
    for shape in (
        f"(0, {2**62}, {2**62})",
        f"(0, {2**64})",
        f"({'9' * 4000}, {'9' * 4000})",
        "(" + "1, " * 70 + ")",
        "(-1, -8)",
    ):
        answer = client.post("/decode", content=of(shape), headers=kind)
        assert answer.status_code == 422, shape
    for shape in ([0, 2**31, 2**31, 2**31], [2**31] * 8, [0] + [2**31] * 7, [1] * 9):
        tensor = {"name": "latents", "shape": shape, "datatype": "FP32", "data": []}
        answer = client.post("/v2/models/digits-vae/infer", json={"inputs": [tensor]})
        assert answer.status_code in (413, 422), shape


def test_errors_of_the_protocol_have_one_field(client):
    for answer in (
        client.get("/v2/models/digits-vae/infer"),
        client.get("/v2/other"),
        client.get("/v2/models/other"),
        client.get("/v2/models/digits-vae/versions/other/ready"),
        client.post("/v2/models/digits-vae/infer", content=b"{"),
    ):
        assert list(answer.json()) == ["error"]
        assert 400 <= answer.status_code < 500


def test_a_version_may_be_named(client):
    version = client.get("/v2/models/digits-vae").json()["versions"][0]
    path = f"/v2/models/digits-vae/versions/{version}"
    assert client.get(path).json()["name"] == "digits-vae"
    assert client.get(f"{path}/ready").json() == {"ready": True}
    tensor = {"name": "latents", "shape": [1, 8], "datatype": "FP32", "data": [0] * 8}
    answer = client.post(f"{path}/infer", json={"inputs": [tensor]})
    assert answer.json()["model_version"] == version


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": {"shared_memory_region": "a"}},
        {"outputs": {"classification": 2}},
        {"outputs": {"shared_memory_offset": 0}},
        {"request": {"sequence_id": 1}},
    ],
)
def test_what_this_server_does_not_do_is_refused_and_not_ignored(client, changes):
    tensor = {"name": "latents", "shape": [1, 8], "datatype": "FP32", "data": [0] * 8}
    content = {
        "inputs": [{**tensor, "parameters": changes.get("inputs", {})}],
        "outputs": [{"name": "image", "parameters": changes.get("outputs", {})}],
        "parameters": changes.get("request", {}),
    }
    answer = client.post("/v2/models/digits-vae/infer", json=content)
    assert answer.status_code == 422
    assert "does not do that" in answer.json()["error"]
