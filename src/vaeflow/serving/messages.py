"""The messages of the Open Inference Protocol's gRPC service, and how to build them.

They are described here as the protocol numbers them, and their classes are made by protobuf at
import: generated modules are bound to one version of it, and there would be no reading them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "inference"
SERVICE = "GRPCInferenceService"
# Each field: its name, number and type; `*` before a type is a list, `{}` a map from strings to it.
MESSAGES: dict[str, str] = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "live 1 bool",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready 1 bool",
    "ModelReadyRequest": "name 1 string, version 2 string",
    "ModelReadyResponse": "ready 1 bool",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "name 1 string, version 2 string, extensions 3 *string",
    "ModelMetadataRequest": "name 1 string, version 2 string",
    "TensorMetadata": "name 1 string, datatype 2 string, shape 3 *int64",
    "ModelMetadataResponse": (
        "name 1 string, versions 2 *string, platform 3 string, inputs 4 *TensorMetadata, "
        "outputs 5 *TensorMetadata"
    ),
    "InferParameter": (
        "bool_param 1 bool, int64_param 2 int64, string_param 3 string, double_param 4 double, "
        "uint64_param 5 uint64"
    ),
    "InferTensorContents": (
        "bool_contents 1 *bool, int_contents 2 *int32, int64_contents 3 *int64, "
        "uint_contents 4 *uint32, uint64_contents 5 *uint64, fp32_contents 6 *float, "
        "fp64_contents 7 *double, bytes_contents 8 *bytes"
    ),
    "InferInputTensor": (
        "name 1 string, datatype 2 string, shape 3 *int64, parameters 4 {}InferParameter, "
        "contents 5 InferTensorContents"
    ),
    "InferRequestedOutputTensor": "name 1 string, parameters 2 {}InferParameter",
    "ModelInferRequest": (
        "model_name 1 string, model_version 2 string, id 3 string, parameters 4 {}InferParameter, "
        "inputs 5 *InferInputTensor, outputs 6 *InferRequestedOutputTensor, "
        "raw_input_contents 7 *bytes"
    ),
    "InferOutputTensor": (
        "name 1 string, datatype 2 string, shape 3 *int64, parameters 4 {}InferParameter, "
        "contents 5 InferTensorContents"
    ),
    "ModelInferResponse": (
        "model_name 1 string, model_version 2 string, id 3 string, parameters 4 {}InferParameter, "
        "outputs 5 *InferOutputTensor, raw_output_contents 6 *bytes"
    ),
}


def _describe() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="open_inference.proto", package=PACKAGE, syntax="proto3"
    )
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for described in filter(None, fields.split(", ")):
            field, number, kind = described.split()
            _add_field(message, field, int(number), kind)
        if name == "InferParameter":  # one of its fields at most
            message.oneof_decl.add(name="parameter_choice")
            for choice in message.field:
                choice.oneof_index = 0
    return file


def _add_field(message: descriptor_pb2.DescriptorProto, name: str, number: int, kind: str) -> None:
    field = message.field.add(name=name, number=number)
    field.label = field.LABEL_REPEATED if kind[0] in "*{" else field.LABEL_OPTIONAL
    if kind.startswith("{}"):  # a list of entries, as protobuf has it
        entry = message.nested_type.add(name="ParametersEntry")
        entry.options.map_entry = True
        _add_field(entry, "key", 1, "string")
        _add_field(entry, "value", 2, kind[2:])
        kind = f"{message.name}.ParametersEntry"
    kind = kind.lstrip("*")
    scalar = f"TYPE_{kind.upper()}"
    types = dict(descriptor_pb2.FieldDescriptorProto.Type.items())
    if scalar in types:
        field.type = types[scalar]
    else:
        field.type, field.type_name = field.TYPE_MESSAGE, f".{PACKAGE}.{kind}"


_POOL = descriptor_pool.DescriptorPool()  # its own: a client's modules may lie in the default one
_POOL.Add(_describe())


@cache
def message(name: str) -> Any:
    """Return the class of a message."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{PACKAGE}.{name}"))
