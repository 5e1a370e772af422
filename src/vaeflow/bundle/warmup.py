"""Warm-up requests that TensorFlow Serving runs before it takes any other.

Its documentation wants a TFRecord of `PredictionLog` messages in `assets.extra`. TensorFlow does
not have that protocol buffer, so its few fields are written here, numbered as in
`tensorflow_serving/apis`:

    PredictionLog.predict_log = 6, PredictLog.request = 1,
    PredictRequest.model_spec = 1, ModelSpec.signature_name = 3,
    PredictRequest.inputs = 2, a map: key = 1, value (a TensorProto) = 2
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

WARMUP = Path("assets.extra", "tf_serving_warmup_requests")


def write_warmup(saved_model: Path, requests: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write a request for each signature into a SavedModel.

    Args:
        saved_model: its folder.
        requests: by signature, the input arrays by name.
    """
    import tensorflow as tf

    path = saved_model / WARMUP
    path.parent.mkdir()
    with tf.io.TFRecordWriter(str(path)) as writer:
        for signature, inputs in requests.items():
            writer.write(_prediction_log(signature, inputs))


def _prediction_log(signature: str, inputs: Mapping[str, np.ndarray]) -> bytes:
    import tensorflow as tf

    request = _field(1, _field(3, signature.encode()))
    for name, array in inputs.items():
        tensor = tf.make_tensor_proto(array).SerializeToString()
        request += _field(2, _field(1, name.encode()) + _field(2, tensor))
    return _field(6, _field(1, request))


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a protocol buffer: wire type 2."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])
