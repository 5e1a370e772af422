"""What is written is read with Google's protobuf, by the messages that TensorFlow Serving has."""

import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st
from tensorflow.core.framework import tensor_pb2

from vaeflow.bundle.export import WARMUP, _varint, export_saved_model
from vaeflow.bundle.manifest import read_verified
from vaeflow.config.model import VAEConfig
from vaeflow.model.vae import VAE

PROTOS = {  # of tensorflow_serving/apis: the fields that a warm-up request may have
    "ModelSpec": [("name", 1, "string"), ("signature_name", 3, "string")],
    "PredictRequest": [
        ("model_spec", 1, "ModelSpec"),
        ("inputs", 2, "repeated PredictRequest.InputsEntry"),
        ("output_filter", 3, "repeated string"),
    ],
    "PredictLog": [("request", 1, "PredictRequest")],
    "PredictionLog": [("predict_log", 6, "PredictLog")],
}


@pytest.fixture(scope="module")
def prediction_log():
    """The message class, made from its description."""
    field_type = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="serving.proto",
        package="tensorflow.serving",
        syntax="proto3",
        dependency=[tensor_pb2.DESCRIPTOR.name],
    )

    def add(message, name, number, kind):
        *repeated, kind = kind.split()
        field = message.field.add(name=name, number=number)
        field.label = field_type.LABEL_REPEATED if repeated else field_type.LABEL_OPTIONAL
        if kind == "string":
            field.type = field_type.TYPE_STRING
        else:
            field.type = field_type.TYPE_MESSAGE
            field.type_name = kind if kind[0] == "." else f".tensorflow.serving.{kind}"

    for name, fields in PROTOS.items():
        message = file.message_type.add(name=name)
        for field in fields:
            add(message, *field)
        if name == "PredictRequest":  # how a map is described
            entry = message.nested_type.add(name="InputsEntry")
            entry.options.map_entry = True
            add(entry, "key", 1, "string")
            add(entry, "value", 2, ".tensorflow.TensorProto")
    pool = descriptor_pool.DescriptorPool()
    for known in (*_needed_by(tensor_pb2.DESCRIPTOR), file):
        pool.Add(known)
    found = pool.FindMessageTypeByName("tensorflow.serving.PredictionLog")
    return message_factory.GetMessageClass(found)


def _needed_by(descriptor) -> list[descriptor_pb2.FileDescriptorProto]:
    """A file's description after those of all that it imports."""
    needed = {}

    def visit(one):
        for other in one.dependencies:
            visit(other)
        copy = descriptor_pb2.FileDescriptorProto()
        one.CopyToProto(copy)
        needed[one.name] = copy

    visit(descriptor)
    return list(needed.values())


def test_there_is_a_request_for_every_signature_which_can_run(tmp_path, prediction_log):
    vae = VAE(VAEConfig((8, 6, 3), latent_dim=2, filters=(4,), hidden_units=8))
    folder = tmp_path / "1"
    export_saved_model(folder, vae)
    loaded = tf.saved_model.load(str(folder))
    signatures = []
    for record in tf.data.TFRecordDataset(str(folder / WARMUP)):
        log = prediction_log.FromString(record.numpy())
        request = log.predict_log.request
        signatures.append(request.model_spec.signature_name)
        inputs = {
            name: tf.constant(tf.make_ndarray(tensor)) for name, tensor in request.inputs.items()
        }
        answer = loaded.signatures[signatures[-1]](**inputs)
        assert all(np.isfinite(values).all() for values in answer.values())
    assert sorted(signatures) == ["decode", "encode", "reconstruct", "score"]


@pytest.mark.slow
def test_the_manifest_lists_it(finished):
    manifest = read_verified(finished / "outputs" / "bundle")
    assert f"saved_model/1/{WARMUP.as_posix()}" in manifest.files


@given(st.integers(0, 2**35))
def test_a_varint_is_read_back(value):
    read, shift = 0, 0
    for byte in _varint(value):
        read |= (byte & 0x7F) << shift
        shift += 7
    assert read == value
    assert [byte > 0x7F for byte in _varint(value)] == [True] * (len(_varint(value)) - 1) + [False]
