"""Refuse an ONNX file that holds more than a graph of known operators and its numbers.

A model may name files of the machine that it is loaded on as its weights (external data), and
operators that a library of its own implements. Neither has a place in a bundle, whose files are all
in its manifest. The package `onnx` is not needed to use a bundle, so the few fields of the message
that matter are read here, as `onnx.proto` numbers them; all others are stepped over.
"""

from __future__ import annotations

from collections.abc import Iterator

from vaeflow.errors import BundleError

# The fields that hold graphs, nodes, attributes or tensors, by message; see onnx.proto.
WITHIN = {
    "model": {7: "graph", 20: "training"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
OPERATOR, DOMAIN = 4, 7  # of a node
FUNCTIONS = 25  # of a model: operators that it defines
LOCATION, EXTERNAL = 14, 13  # of a tensor
KNOWN = (b"", b"ai.onnx")
DEEPEST = 32  # graphs within graphs

Field = tuple[int, int, "int | memoryview"]  # number, wire type, content


def check_graph(content: bytes, name: str) -> None:
    """Check that a model is complete in itself.

    Args:
        content: of the file.
        name: of the file, for errors.

    Raises:
        BundleError: it names other files, or operators that are not ONNX's own, or is no model.
    """
    try:
        fault = _fault(memoryview(content), "model", 0)
    except (IndexError, ValueError):
        fault = "not a readable ONNX model"
    if fault:
        raise BundleError(f"{name}: {fault}.")


def _fault(message: memoryview, kind: str, depth: int) -> str | None:
    """Return what is wrong with a message; None where nothing is."""
    if depth > DEEPEST:
        return "graphs within graphs within graphs"
    operator = domain = b""
    for number, wire, value in _fields(message):
        if kind == "tensor" and number in (LOCATION, EXTERNAL) and value != 0:
            return "weights in another file; a bundle's models hold their own"
        if kind == "model" and number == FUNCTIONS:
            return "operators of its own; a bundle's models have ONNX's only"
        if isinstance(value, int):
            continue
        if kind == "node" and number in (OPERATOR, DOMAIN):
            operator, domain = (
                (bytes(value), domain) if number == OPERATOR else (operator, bytes(value))
            )
        elif (
            wire == 2
            and (inner := WITHIN[kind].get(number))
            and (fault := _fault(value, inner, depth + 1))
        ):
            return fault
    if domain not in KNOWN:
        named = f"{domain.decode(errors='replace')}.{operator.decode(errors='replace')}"
        return f"the operator {named[:100]!r}; a bundle's models have ONNX's only"
    return None


def _fields(message: memoryview) -> Iterator[Field]:
    """Iterate over the fields of a message, as protobuf encodes them.

    Raises:
        IndexError, ValueError: it ends within a field, or has one of no known kind.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        value: int | memoryview
        if wire == 0:
            value, at = _varint(message, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
            value, at = message[at : at + length], at + length
        elif wire == 2:
            length, at = _varint(message, at)
            value, at = message[at : at + length], at + length
        else:
            raise ValueError(f"wire type {wire}")
        if at > len(message):
            raise ValueError("it ends within a field")
        yield number, wire, value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Read a number of seven bits a byte; return it, and where the next field begins."""
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
