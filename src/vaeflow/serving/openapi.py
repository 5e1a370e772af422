"""What the OpenAPI page says of bodies and answers."""

from __future__ import annotations

import numpy as np

from vaeflow.bundle.runtime import Bundle
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
RESPONSES = {
    **ERRORS,
    200: {
        "description": "JSON of all arrays; .npy or, of images, PNG where Accept asks for it",
        "content": {
            JSON: {"schema": {"type": "object"}},
            NPY: {"schema": _BINARY},
            "image/png": {"schema": _BINARY},
        },
    },
}


def body_of(takes: str, bundle: Bundle) -> dict:
    """The request body of an operation on images or latents, with an example of the right shape."""
    shape = bundle.image_shape if takes == "images" else (bundle.latent_dim,)
    lists = {"type": "number"}
    if takes == "images":
        lists |= {"minimum": 0, "maximum": 1}
    for length in reversed(shape):
        lists = {"type": "array", "items": lists, "minItems": length, "maxItems": length}
    properties = {
        takes: {"type": "array", "items": lists, "minItems": 1},
        "dtype": {"enum": ["float32"], "description": "or uint8, for images in 0..255"},
    }
    content = {
        JSON: {
            "schema": {"type": "object", "properties": properties, "required": [takes]},
            "example": {takes: np.zeros((1, *shape)).tolist()},
        },
        NPY: {"schema": _BINARY},
    }
    if takes == "images" and shape[-1] in (1, 3):
        content |= {kind: {"schema": _BINARY} for kind in PICTURES}
    return {"requestBody": {"required": True, "content": content}}
