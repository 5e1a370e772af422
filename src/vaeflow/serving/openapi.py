"""What the OpenAPI page says of bodies and answers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vaeflow.serving.bodies import JSON, NPY, PICTURES

_ERROR = {
    "type": "object",
    "properties": {"error": {"type": "string"}, "field": {"type": "string"}},
    "required": ["error"],
}
_BINARY = {"type": "string", "format": "binary"}
_MEANINGS = {
    400: "The body ended early",
    401: "No token, or a wrong one",
    406: "Cannot be answered in the form that Accept asks for",
    408: "The body took too long",
    413: "Too large",
    415: "A body of another type than those",
    422: "Wrong content; the field is named",
    429: "Too many requests; see Retry-After",
    503: "The server is about to end",
    504: "Not answered within the deadline",
}
ERRORS = {
    status: {"description": meaning, "content": {JSON: {"schema": _ERROR}}}
    for status, meaning in _MEANINGS.items()
}
MOST_SHOWN = 4096  # numbers in an example; those of larger images would fill the page


def body_of(takes: str, example: np.ndarray) -> dict:
    """The request body of an operation.

    Args:
        takes: `images` or `latents`.
        example: one of them, `(1, ...)`.
    """
    shape = example.shape[1:]
    lists = {"type": "number"}
    if takes == "images":
        lists |= {"minimum": 0, "maximum": 1}
    for length in reversed(shape):
        lists = {"type": "array", "items": lists, "minItems": length, "maxItems": length}
    properties = {
        takes: {"type": "array", "items": lists, "minItems": 1},
        "dtype": {"enum": ["float32"], "description": "or uint8, for images in 0..255"},
    }
    schema = {"type": "object", "properties": properties, "required": [takes]}
    content = {
        JSON: {"schema": schema, **_example({takes: example})},
        NPY: {"schema": _BINARY},
    }
    if takes == "images" and shape[-1] in (1, 3):
        content |= {kind: {"schema": _BINARY} for kind in PICTURES}
    return {"requestBody": {"required": True, "content": content}}


def answers_of(example: Mapping[str, np.ndarray]) -> dict:
    """The answers of an operation, by status.

    Args:
        example: arrays by name that it gave.
    """
    lists = {name: {"type": "array"} for name in example}
    schema = {"type": "object", "properties": lists, "required": list(example)}
    content = {JSON: {"schema": schema, **_example(example)}, NPY: {"schema": _BINARY}}
    description = f"JSON, or .npy of {next(iter(example))}, as Accept asks"
    if "images" in example:
        content["image/png"] = {"schema": _BINARY}
        description = "JSON, .npy or PNG, as Accept asks"
    return {**ERRORS, 200: {"description": description, "content": content}}


def shown(array: np.ndarray) -> list:
    """Numbers as a page shows them: three decimals."""
    return array.astype(np.float64).round(3).tolist()


def _example(arrays: Mapping[str, np.ndarray]) -> dict:
    if max(array.size for array in arrays.values()) > MOST_SHOWN:
        return {}
    return {"example": {name: shown(array) for name, array in arrays.items()}}
