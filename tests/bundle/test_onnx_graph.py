"""Which ONNX files are refused before onnxruntime sees them; made with the package `onnx`."""

import contextlib

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from onnx import helper as make

from vaeflow.bundle.onnx_graph import check_graph
from vaeflow.errors import BundleError


def tensor(name: str, external: str = "") -> TensorProto:
    if not external:
        return make.make_tensor(name, TensorProto.FLOAT, [2], [0.0, 1.0])
    made = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2])
    made.data_location = TensorProto.EXTERNAL
    entry = made.external_data.add()
    entry.key, entry.value = "location", external
    return made


def graph(nodes, initializer=()):
    value = make.make_tensor_value_info
    return make.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, ["N", 2])],
        [value("y", TensorProto.FLOAT, ["N", 2])],
        list(initializer),
    )


def model(nodes, initializer=(), **more) -> bytes:
    imports = [make.make_opsetid("", 17), make.make_opsetid("ai.onnx.ml", 2)]
    made = make.make_model(graph(nodes, initializer), opset_imports=imports, **more)
    return made.SerializeToString()


ADD = make.make_node("Add", ["x", "w"], ["y"])


def within_if(inner: onnx.NodeProto, *initializer: TensorProto) -> onnx.NodeProto:
    """A node with graphs of its own."""
    value = make.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])
    branch = make.make_graph([inner], "b", [], [value], list(initializer))
    return make.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)


FUNCTION = make.make_function(
    "own", "F", ["x"], ["y"], [make.make_node("Neg", ["x"], ["y"])], [make.make_opsetid("", 17)]
)
SPARSE = make.make_sparse_tensor(tensor("v", "/etc/passwd"), tensor("i"), [4])


def test_a_whole_model_passes():
    check_graph(model([ADD], [tensor("w")]), "encoder.onnx")
    check_graph(model([within_if(ADD, tensor("w"))]), "encoder.onnx")
    assert check_graph(b"", "encoder.onnx") is None  # onnxruntime says what is missing


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (model([ADD], [tensor("w", "/etc/passwd")]), "weights in another file"),
        (model([within_if(ADD, tensor("w", "weights"))]), "weights in another file"),
        (
            model([make.make_node("Constant", [], ["y"], value=tensor("w", "weights"))]),
            "weights in another file",
        ),
        (
            model([make.make_node("Constant", [], ["y"], sparse_value=SPARSE)]),
            "weights in another file",
        ),
        (
            model([make.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")]),
            "com.microsoft.Gelu",
        ),
        (
            model([within_if(make.make_node("F", ["x"], ["y"], domain="a.b"))]),
            "a.b.F",
        ),
        (model([ADD], [tensor("w")], functions=[FUNCTION]), "its own"),
        (b"\xff" * 40, "not a readable"),
        (model([ADD], [tensor("w")])[:-3], "not a readable"),
    ],
)
def test_what_is_not_complete_in_itself_is_refused(content, named):
    with pytest.raises(BundleError, match=r"encoder\.onnx: ") as raised:
        check_graph(content, "encoder.onnx")
    assert named in str(raised.value)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 100))
def test_any_bytes_pass_or_are_refused(content, position):
    whole = bytearray(model([ADD], [tensor("w", "weights")]))
    for damaged in (content, bytes(whole[:position]) + content + bytes(whole[position:])):
        with contextlib.suppress(BundleError):
            check_graph(damaged, "encoder.onnx")


def test_other_shapes_than_the_manifest_has_are_refused(bundle):
    """The case of an encoder of 9x9 in a bundle of 8x8."""
    from helpers import change_manifest

    from vaeflow.bundle.manifest import MANIFEST, describe_files
    from vaeflow.bundle.runtime import Bundle

    value = make.make_tensor_value_info
    wide = make.make_graph(
        [
            make.make_node("Flatten", ["images"], ["f"]),
            make.make_node("MatMul", ["f", "w"], ["mean"]),
            make.make_node("MatMul", ["f", "w"], ["log_variance"]),
        ],
        "g",
        [value("images", TensorProto.FLOAT, ["N", 9, 9, 1])],
        [value(name, TensorProto.FLOAT, ["N", 8]) for name in ("mean", "log_variance")],
        [make.make_tensor("w", TensorProto.FLOAT, [81, 8], np.zeros(648))],
    )
    made = make.make_model(wide, opset_imports=[make.make_opsetid("", 17)], ir_version=8)
    (bundle / "encoder.onnx").write_bytes(made.SerializeToString())
    described = describe_files(bundle)
    del described[MANIFEST]
    files = {name: file.model_dump() for name, file in described.items()}
    change_manifest(bundle, files=files)
    with pytest.raises(BundleError, match=r"9, 9, 1.*\[8, 8, 1\]"):
        Bundle(bundle)
