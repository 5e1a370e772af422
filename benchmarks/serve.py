"""What `vaeflow serve` adds to the bare onnxruntime call, what batching gains, and other servers.

    python benchmarks/serve.py [--networks digits mnist] [--seconds 5]

For the network of each preset, at 28x28 and untrained (no speed depends on the weights):

- `latency_ms`: of one client with one connection; the bare call, `/v2/models/NAME/infer` with
  binary tensors both ways, `mlflow models serve` of the same bundle, whose bodies are JSON, and the
  same encoder by LitServe and MLServer (`serve_peers/`). `tritonclient_http` and
  `tritonclient_grpc` are vaeflow through the protocol's own clients, whose time is in it, and
  `mlserver_grpc` is MLServer through the latter;
- `images_per_second`: of 32 clients, each with one image a request and the next when it is
  answered; with batching and without (`--batch 1`), in turns, the median; and of the others with
  their batching. `cpu_us_per_image` is the server's processor time. `bare` is what runs of 1 and of
  32 images could give if requests cost nothing, `of_possible` the share that is reached of what
  they could give if each cost as much as an empty answer (`cpu_us_empty`, /v2/health/live);
- `seconds_to_ready`, `memory_mb`: from the start of the process, and at most until the end.

The servers have one core and the load the others. The load is sent by `wrk` where it is installed
(`apt install wrk`), else by `http_load.py`, which is slower. Writes `results/serve.json`.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from machine import machine

from vaeflow.bundle.runtime import Bundle
from vaeflow.common.files import write_json
from vaeflow.common.processes import process_group

HERE = Path(__file__).parent
FIRST, *OTHERS = sorted(os.sched_getaffinity(0))
SERVER_CORE, LOAD_CORES = {FIRST}, set(OTHERS or [FIRST])
CLIENTS = 32
ROUNDS = 3
ROWS = (1, 32, 256)
FEWEST = 20  # calls that a latency is of
JSON = "Content-Type: application/json"
PEERS = ("litserve==0.2.19", "mlserver==1.7.1", "onnxruntime", "numpy")
PATIENCE = 120  # seconds for a server to become ready


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["digits", "mnist"], help="presets")
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    parser.add_argument(
        "--peers", type=Path, help="environment of LitServe and MLServer; else one is made for it"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "serve.json")
    options = parser.parse_args()

    results = {
        "machine": machine(),
        "command": f"python benchmarks/serve.py --networks {' '.join(options.networks)} "
        f"--seconds {options.seconds:g}",
        "load": "wrk" if shutil.which("wrk") else "http_load.py",
        "clients": CLIENTS,
        "networks": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        peers = options.peers or _environment(Path(folder) / "peers")
        for network in options.networks:
            bundle = Path(folder) / network
            _python(HERE / "bundles.py", network, bundle)
            results["networks"][network] = measured = _measure(bundle, options.seconds, peers)
            _print(network, measured)
    write_json(options.out, results)


def _environment(folder: Path) -> Path:
    """Make the environment of the servers whose packages do not go with ours."""
    _python("-m", "uv", "venv", "--quiet", "--python", sys.executable, folder)
    install = ["-m", "uv", "pip", "install", "--quiet", "--python", folder / "bin" / "python"]
    _python(*install, *PEERS)
    return folder


def _measure(folder: Path, seconds: float, peers: Path) -> dict[str, object]:
    os.sched_setaffinity(0, SERVER_CORE)  # the bare call, on the core that the servers will have
    bundle = Bundle(folder, threads=1)  # more would not keep to that core
    requests = {rows: Request(bundle, rows) for rows in ROWS}
    bare = {
        rows: _latency(partial(bundle.encode, request.images), seconds)
        for rows, request in requests.items()
    }
    os.sched_setaffinity(0, LOAD_CORES)
    latency = {rows: {"bare": times} for rows, times in bare.items()}
    results = {"latency_ms": latency, "seconds_to_ready": {}, "memory_mb": {}}

    def note(server: Server) -> None:
        results["seconds_to_ready"][server.name] = server.seconds
        results["memory_mb"][server.name] = server.memory_mb()

    with _vaeflow(folder) as batched, _vaeflow(folder, "--batch", "1") as single:
        for rows, request in requests.items():
            call = _sender(batched, *request.to_vaeflow())
            latency[rows]["vaeflow"] = _latency(call, seconds)
            for kind in ("http", "grpc"):
                port = batched.port if kind == "http" else batched.port + 1
                call = request.by_client(kind, port, bundle.manifest.name)
                latency[rows][f"tritonclient_{kind}"] = _latency(call, seconds)
        results |= _throughput(batched, single, requests[1], seconds)
        note(batched)
    rates = results["images_per_second"]
    possible = bare[32]["p50"] / 32 + results["cpu_us_empty"] / 1000  # ms an image
    results["of_possible"] = round(rates["batched"] * possible / 1000, 3)
    for times, key in zip(
        (bare[1]["p50"], bare[32]["p50"] / 32), ("single", "batched"), strict=True
    ):
        results["images_per_second"][f"bare_{key}"] = round(1000 / times)
    with _mlflow(folder) as mlflow:
        for rows, request in requests.items():
            call = _sender(mlflow, *request.to_mlflow())
            latency[rows]["mlflow"] = _latency(call, seconds)
        rates["mlflow"] = round(_load(mlflow, requests[1].to_mlflow(), seconds)[1])
        note(mlflow)
    for kind in ("litserve", "mlserver"):
        with _peer(kind, peers, folder, 1) as server:
            for rows, request in requests.items():
                sent = request.to_litserve() if kind == "litserve" else request.to_mlserver()
                latency[rows][kind] = _latency(_sender(server, *sent), seconds)
                if kind == "mlserver":
                    call = request.by_client("grpc", server.port + 1, "encoder")
                    latency[rows]["mlserver_grpc"] = _latency(call, seconds)
            note(server)
        with _peer(kind, peers, folder, CLIENTS) as server:
            sent = requests[1].to_litserve() if kind == "litserve" else requests[1].to_mlserver()
            rates[kind] = round(_load(server, sent, seconds)[1])
    return results


def _latency(call: Callable[[], object], seconds: float) -> dict[str, float]:
    """Median and 99th percentile in milliseconds, after a tenth of the time to warm up."""
    times, start = [], time.perf_counter()
    while (now := time.perf_counter()) < start + 1.1 * seconds or len(times) < FEWEST:
        call()
        if now > start + 0.1 * seconds:
            times.append(1000 * (time.perf_counter() - now))
    p50, p99 = np.percentile(times, [50, 99])
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3), "requests": len(times)}


class Sent(NamedTuple):
    """What is sent of an HTTP request."""

    path: str
    header: str
    body: bytes


class Request:
    """The same images for every server, in the form that each takes."""

    def __init__(self, bundle: Bundle, rows: int):
        random = np.random.default_rng(0)
        self.images = random.random((rows, *bundle.image_shape), dtype=np.float32)
        tensor = {"name": "images", "shape": self.images.shape, "datatype": "FP32"}
        tensor["parameters"] = {"binary_data_size": self.images.nbytes}
        content = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
        header = json.dumps(content).encode()
        self.path = f"/v2/models/{bundle.manifest.name}/infer"
        self.body = header + self.images.tobytes()
        self.header = f"Inference-Header-Content-Length: {len(header)}"

    def to_vaeflow(self) -> Sent:
        """For `vaeflow serve`: raw bytes."""
        return Sent(self.path, self.header, self.body)

    def to_mlflow(self) -> Sent:
        """For MLflow's server: JSON."""
        content = {"inputs": self.images.tolist(), "params": {"output": "encode"}}
        return Sent("/invocations", JSON, json.dumps(content).encode())

    def to_litserve(self) -> Sent:
        """For LitServe: base64 in JSON."""
        encoded = base64.b64encode(self.images.tobytes()).decode()
        content = {"images": encoded, "shape": self.images.shape}
        return Sent("/predict", JSON, json.dumps(content).encode())

    def to_mlserver(self) -> Sent:
        """For MLServer: the protocol's JSON."""
        tensor = {"name": "images", "shape": self.images.shape, "datatype": "FP32"}
        content = {"inputs": [{**tensor, "data": self.images.ravel().tolist()}]}
        return Sent("/v2/models/encoder/infer", JSON, json.dumps(content).encode())

    def by_client(self, kind: str, port: int, model: str) -> Callable[[], object]:
        """A function that asks through one of the protocol's own clients."""
        client = __import__(f"tritonclient.{kind}", fromlist=[kind])
        opened = client.InferenceServerClient(f"127.0.0.1:{port}")
        tensor = client.InferInput("images", list(self.images.shape), "FP32")
        tensor.set_data_from_numpy(self.images)
        outputs = [client.InferRequestedOutput(name) for name in ("mean", "log_variance")]
        return lambda: opened.infer(model, [tensor], outputs=outputs).as_numpy("mean")


def _sender(server: Server, path: str, header: str, body: bytes) -> Callable[[], None]:
    """As little of an HTTP client as it takes, so that it is the server that is measured."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{header}\r\nContent-Length: {len(body)}"
    request = head.encode() + b"\r\n\r\n" + body
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send() -> None:
        connection.sendall(request)
        answer = b""
        while (head := answer.find(b"\r\n\r\n")) < 0:
            answer += connection.recv(1 << 20)
        left = int(re.search(rb"\ncontent-length: (\d+)", answer)[1]) - len(answer) + head + 4
        while left > 0:
            left -= len(connection.recv(1 << 20))
        if not answer.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"{path}: {answer[:500]!r}")

    return send


class Server:
    """A server on the servers' core, ready to answer.

    Args:
        name: in the results.
        command: that starts it on `port`.
        port: to be answered on.
        ready: path that is answered with 200 once it is.
    """

    def __init__(self, name: str, command: list[str], port: int, ready: str):
        self.name, self.port, self._ready = name, port, ready
        self._command = command

    def __enter__(self) -> Server:
        self._log = tempfile.NamedTemporaryFile("w+")
        start = time.perf_counter()
        self._group = process_group(
            self._command,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            # MLflow's starts uvicorn by its name.
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            preexec_fn=lambda: os.sched_setaffinity(0, SERVER_CORE),
        )
        self._process = self._group.__enter__()
        while not self._answers():
            if self._process.poll() is not None or time.perf_counter() > start + PATIENCE:
                raise SystemExit(Path(self._log.name).read_text())
            time.sleep(0.01)
        self.seconds = round(time.perf_counter() - start, 2)
        return self

    def __exit__(self, *error) -> None:
        self._group.__exit__(*error)
        self._log.close()

    def _answers(self) -> bool:
        request = f"GET {self._ready} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode()
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(request)
                return connection.recv(100).split()[1:2] == [b"200"]
        except OSError:
            return False

    def cpu_seconds(self) -> float:
        """Processor time so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mb(self) -> float:
        """Largest resident size so far, of all its processes together."""
        total = 0
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                if os.getpgid(int(status.parent.name)) == self._process.pid:
                    total += int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
            except (OSError, TypeError):  # it has just ended
                continue
        return round(total / 1024, 1)


def _vaeflow(bundle: Path, *arguments: str) -> Server:
    port = _free_port()
    command = [sys.executable, "-m", "vaeflow", "serve", "--model", str(bundle)]
    ports = ["--port", str(port), "--grpc-port", str(port + 1)]
    return Server("vaeflow", [*command, *ports, *arguments], port, "/v2/health/ready")


def _peer(kind: str, environment: Path, bundle: Path, batch: int) -> Server:
    """LitServe or MLServer with the same encoder."""
    port = _free_port()
    python, script = environment / "bin" / "python", HERE / "serve_peers" / f"by_{kind}.py"
    command = [str(python), str(script), str(bundle / "encoder.onnx"), str(port), str(batch)]
    ready = {"litserve": "/health", "mlserver": "/v2/models/encoder/ready"}[kind]
    return Server(kind, command, port, ready)


def _mlflow(bundle: Path) -> Server:
    """`mlflow models serve` of the bundle as it is kept in the registry."""
    model, port = bundle.with_name(f"{bundle.name}-mlflow"), _free_port()
    _python("-c", WRITE_MODEL, model, bundle)
    program = str(Path(sys.executable).with_name("mlflow"))
    command = [program, "models", "serve", "--model-uri", str(model), "--env-manager", "local"]
    return Server("mlflow", [*command, "--port", str(port)], port, "/ping")


WRITE_MODEL = """
import sys
from pathlib import Path
from vaeflow.bundle.manifest import read_verified
from vaeflow.registry.register import write_mlflow_model
folder, bundle = map(Path, sys.argv[1:])
write_mlflow_model(folder, bundle, read_verified(bundle))
"""


def _throughput(
    batched: Server, single: Server, request: Request, seconds: float
) -> dict[str, object]:
    rates, costs = {"batched": [], "single": []}, {"batched": [], "single": []}
    for _ in range(ROUNDS):
        for name, server in (("batched", batched), ("single", single)):
            before = server.cpu_seconds()
            count, rate = _load(server, request.to_vaeflow(), seconds)
            rates[name].append(rate)
            costs[name].append(1e6 * (server.cpu_seconds() - before) / count)
    before = batched.cpu_seconds()
    count, _ = _load(batched, Sent("/v2/health/live", "Accept: */*", b""), seconds)
    empty = 1e6 * (batched.cpu_seconds() - before) / count
    return {
        "cpu_us_empty": round(empty, 1),
        "images_per_second": {name: round(float(np.median(rates[name]))) for name in rates},
        "cpu_us_per_image": {name: round(float(np.median(costs[name])), 1) for name in costs},
    }


def _load(server: Server, request: Sent, seconds: float) -> tuple[int, float]:
    """Answers, and answers a second, of all clients together."""
    url = f"http://127.0.0.1:{server.port}{request.path}"
    with tempfile.TemporaryDirectory() as folder:
        body = Path(folder) / "body"
        body.write_bytes(request.body)
        if not shutil.which("wrk"):
            clients = ["--clients", CLIENTS, "--seconds", seconds]
            options = ["--body", body, "--header", request.header, *clients]
            seen = json.loads(_python(HERE / "http_load.py", url, *options))
            if set(seen["statuses"]) != {"200"}:
                raise SystemExit(f"{url}: {seen}")
            return seen["statuses"]["200"], seen["accepted_per_second"]
        script = Path(folder) / "post.lua"
        name, _, value = request.header.partition(": ")
        script.write_text(
            f'local file = io.open("{body}", "rb")\n'
            f'wrk.method = "{"POST" if request.body else "GET"}"\n'
            f'wrk.body = file:read("*all")\nwrk.headers["{name}"] = "{value}"\n'
        )
        length = f"-d{max(1, round(seconds))}s"
        seen = _run("wrk", "-t1", f"-c{CLIENTS}", length, "-s", script, url)
        if "Non-2xx" in seen or "Socket errors" in seen:
            raise SystemExit(f"{url}: {seen}")
        count = int(re.search(r"(\d+) requests in", seen)[1])
        return count, float(re.search(r"Requests/sec:\s+(\S+)", seen)[1])


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def _python(*arguments: object) -> str:
    return _run(sys.executable, *arguments)


def _run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[:3]}: {done.stderr[-2000:]}")
    return done.stdout


def _print(network: str, results: dict) -> None:
    names = list(results["latency_ms"][1])
    print(f"{network}, p50 in ms\n{'batch':>6}", *(f"{name:>18}" for name in names))
    for rows, times in results["latency_ms"].items():
        print(f"{rows:>6}", *(f"{times[name]['p50']:18.3f}" for name in names))
    for what, values in results.items():
        if what != "latency_ms":
            print(f"  {what}: {values}", flush=True)


if __name__ == "__main__":
    main()
