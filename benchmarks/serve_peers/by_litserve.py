"""Answer from an encoder's ONNX file by LitServe, as somebody would who tunes it.

    python by_litserve.py ENCODER PORT BATCH

It takes JSON and forms, so the numbers go as base64 of float32, both ways. With a BATCH of 1 every
request runs by itself. Runs in the environment that `benchmarks/serve.py` makes.
"""

from __future__ import annotations

import base64
import sys

import litserve
import numpy as np
import onnxruntime

OUTPUTS = ["mean", "log_variance"]
WAIT = 0.002  # seconds for a batch to fill


class Encoder(litserve.LitAPI):
    """POST /predict: `{"images": base64, "shape": [...]}` to base64 of both outputs."""

    def setup(self, device):
        """Load the model; one thread, since the server has one core."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(sys.argv[1], options, ["CPUExecutionProvider"])

    def decode_request(self, request):
        """Read the images."""
        raw = base64.b64decode(request["images"])
        return np.frombuffer(raw, np.float32).reshape(request["shape"])

    def batch(self, inputs):
        """Join the images of several requests."""
        self.rows = [len(rows) for rows in inputs]
        return np.concatenate(inputs)

    def unbatch(self, output):
        """Split the outputs again."""
        ends = np.cumsum(self.rows)[:-1]
        return list(zip(*(np.split(values, ends) for values in output), strict=True))

    def predict(self, images):
        """Run the model."""
        return self.session.run(OUTPUTS, {"images": images})

    def encode_response(self, output):
        """Write both outputs."""
        return [base64.b64encode(values.tobytes()).decode() for values in output]


if __name__ == "__main__":
    port, batch = map(int, sys.argv[2:])
    api = Encoder(max_batch_size=batch, batch_timeout=WAIT) if batch > 1 else Encoder()
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(host="127.0.0.1", port=port, log_level="error", generate_client_file=False)
