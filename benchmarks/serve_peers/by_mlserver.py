"""Answer from an encoder's ONNX file by MLServer: the inference protocol, in JSON or over gRPC.

    python by_mlserver.py ENCODER PORT BATCH

gRPC is at the next port. With a BATCH of 1 every request runs by itself. Runs in the environment
that `benchmarks/serve.py` makes.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse

OUTPUTS = ["mean", "log_variance"]
WAIT = 0.002  # seconds for a batch to fill


class Encoder(MLModel):
    """The encoder of the environment's ENCODER."""

    async def load(self):
        """Load the model; one thread, since the server has one core."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        encoder = os.environ["ENCODER"]
        self.session = onnxruntime.InferenceSession(encoder, options, ["CPUExecutionProvider"])
        return True

    async def predict(self, payload):
        """Run the model."""
        images = self.decode(payload.inputs[0], default_codec=NumpyCodec)
        found = self.session.run(OUTPUTS, {"images": images})
        outputs = [NumpyCodec.encode_output(*named) for named in zip(OUTPUTS, found, strict=True)]
        return InferenceResponse(model_name=self.name, outputs=outputs)


if __name__ == "__main__":
    port, batch = map(int, sys.argv[2:])
    folder = Path(tempfile.mkdtemp())
    settings = {"http_port": port, "grpc_port": port + 1, "metrics_port": port + 2}
    settings |= {"host": "127.0.0.1", "parallel_workers": 0, "debug": False}
    settings |= {"grpc_max_message_length": 64 << 20}
    (folder / "settings.json").write_text(json.dumps(settings))
    of_model = {"name": "encoder", "implementation": "by_mlserver.Encoder"}
    if batch > 1:
        of_model |= {"max_batch_size": batch, "max_batch_time": WAIT}
    (folder / "model-settings.json").write_text(json.dumps(of_model))
    own = {"ENCODER": str(Path(sys.argv[1]).absolute()), "PYTHONPATH": str(Path(__file__).parent)}
    program = str(Path(sys.executable).with_name("mlserver"))
    os.execve(program, [program, "start", str(folder)], {**os.environ, **own})
