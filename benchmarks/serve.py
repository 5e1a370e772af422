"""How much the server adds to the bare onnxruntime call, and what batching gains.

    python benchmarks/serve.py outputs/bundle --out benchmarks/results/serve.json

The server and the load run on separate cores where there are two or more. Latencies are of
`/v2/models/NAME/infer` with binary tensors both ways, one client, one connection; throughput is of
32 clients in a closed loop, each with one image a request. `--mlflow URL` compares with a running
`mlflow models serve` of the same model (its `/invocations`, JSON).
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from machine import CORES, machine

from vaeflow.bundle.runtime import Bundle
from vaeflow.files import write_json
from vaeflow.processes import process_group

CLIENTS = 32


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--requests", type=int, default=2000, help="of each latency")
    parser.add_argument("--seconds", type=float, default=20, help="of each throughput")
    parser.add_argument("--mlflow", help="address of a running mlflow models serve")
    options = parser.parse_args()

    server_core, load_cores = _share_cores()
    bundle = Bundle(options.bundle)
    results: dict[str, object] = {"machine": machine(), "image": bundle.image_shape}
    os.sched_setaffinity(0, server_core)  # the bare call, on the core that the server will have
    bare_bundle = Bundle(options.bundle)
    bare = {
        rows: _latency(partial(bare_bundle.encode, _images(bundle, rows)), options)
        for rows in (1, 256)
    }
    os.sched_setaffinity(0, load_cores)

    with _Serving(options.bundle, server_core) as served:
        results["seconds_to_ready"] = served.seconds
        for rows in (1, 256):
            send = served.sender(bundle, rows)
            results[f"batch_{rows}_ms"] = {"bare": bare[rows], "server": _latency(send, options)}
            if options.mlflow:
                call = _mlflow_sender(options.mlflow, _images(bundle, rows))
                results[f"batch_{rows}_ms"]["mlflow"] = _latency(call, options)
        results["clients"] = CLIENTS
        results["images_per_second_batched"] = _throughput(served, bundle, options.seconds)
        results["memory_mb"] = served.memory_mb()
    with _Serving(options.bundle, server_core, "--batch", "1") as served:
        results["images_per_second_one_by_one"] = _throughput(served, bundle, options.seconds)

    print(json.dumps(results, indent=2))
    if options.out:
        write_json(options.out, results)


def _share_cores() -> tuple[set[int], set[int]]:
    """One core for the server, the others for the load."""
    cores = sorted(os.sched_getaffinity(0))
    return {cores[0]}, set(cores[1:] if CORES > 1 else cores)


def _images(bundle: Bundle, rows: int) -> np.ndarray:
    random = np.random.default_rng(0)
    return random.random((rows, *bundle.image_shape), dtype=np.float32)


def _latency(call, options) -> dict[str, float]:
    """Median and 99th percentile in milliseconds, after a tenth as many to warm up."""
    times = []
    for index in range(options.requests + options.requests // 10):
        start = time.perf_counter()
        call()
        if index >= options.requests // 10:
            times.append(1000 * (time.perf_counter() - start))
    p50, p99 = np.percentile(times, [50, 99])
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3)}


class _Serving:
    """`vaeflow serve` on some cores."""

    def __init__(self, bundle: Path, cores: set[int], *arguments: str):
        self._command = [sys.executable, "-m", "vaeflow", "serve", "--model", str(bundle)]
        self._command += ["--port", "0", *arguments]
        self._cores = cores

    def __enter__(self):
        self._log = tempfile.NamedTemporaryFile("w+")
        start = time.perf_counter()
        cores = self._cores
        self._group = process_group(
            self._command,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        self.process = self._group.__enter__()
        while not (found := re.search(r"running on (\S+)", Path(self._log.name).read_text())):
            if self.process.poll() is not None:
                raise SystemExit(Path(self._log.name).read_text())
            time.sleep(0.005)
        self.address = urlsplit(found[1]).netloc
        self.seconds = round(time.perf_counter() - start, 2)
        return self

    def __exit__(self, *error) -> None:
        self._group.__exit__(*error)
        self._log.close()

    def sender(self, bundle: Bundle, rows: int):
        """A function that sends the same request again on a connection of its own."""
        images = _images(bundle, rows)
        tensor = {"name": "images", "shape": images.shape, "datatype": "FP32"}
        tensor["parameters"] = {"binary_data_size": images.nbytes}
        content = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
        header = json.dumps(content).encode()
        body = header + images.tobytes()
        headers = {"Inference-Header-Content-Length": str(len(header))}
        path = f"/v2/models/{bundle.manifest.name}/infer"
        connection = http.client.HTTPConnection(self.address)

        def send() -> None:
            _post(connection, path, body, headers)

        return send

    def memory_mb(self) -> float:
        """Largest resident size so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return round(int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024, 1)


def _mlflow_sender(address: str, images: np.ndarray):
    body = json.dumps({"inputs": images.tolist()}).encode()
    connection = http.client.HTTPConnection(urlsplit(address).netloc)
    headers = {"Content-Type": "application/json"}
    return lambda: _post(connection, "/invocations", body, headers)


def _post(connection: http.client.HTTPConnection, path: str, body: bytes, headers: dict) -> None:
    connection.request("POST", path, body, headers)
    answer = connection.getresponse()
    content = answer.read()
    if answer.status != 200:
        raise SystemExit(f"{answer.status}: {content[:300]!r}")


def _throughput(served: _Serving, bundle: Bundle, seconds: float) -> float:
    """Images a second that all clients together are answered."""
    counts, end = [0] * CLIENTS, time.perf_counter() + seconds

    def work(index: int) -> None:
        send = served.sender(bundle, 1)
        while time.perf_counter() < end:
            send()
            counts[index] += 1

    threads = [threading.Thread(target=work, args=(index,)) for index in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return round(sum(counts) / seconds, 1)


if __name__ == "__main__":
    main()
