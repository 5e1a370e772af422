"""Write an answer in the form that the client asked for, and describe it on the OpenAPI page."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vaeflow.common.pictures import grid
from vaeflow.serving import numbers
from vaeflow.serving.bodies import JSON, NPY, PICTURES, PNG
from vaeflow.serving.refusals import RefusedError

BYTES_OF = {JSON: 24, NPY: 4, PNG: 4}  # of a number, at the most or nearly so
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
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": meaning, "content": {JSON: {"schema": _ERROR}}}
    for status, meaning in _MEANINGS.items()
}
SHOWN_DIGITS = 3  # after the point, in an example
MOST_SHOWN = 4096  # numbers in an example; those of larger images would fill the page


def writer(arrays: Mapping[str, np.ndarray], accept: str) -> tuple[Callable[[], bytes], str]:
    """Choose how to write an answer: JSON of all arrays, or `.npy` or PNG of the first of them.

    Args:
        arrays: by name; `images` are float32 in [0, 1], `(count, height, width, channels)`.
        accept: the request's header; empty takes JSON.

    Returns:
        What writes it, and its media type.

    Raises:
        RefusedError: 406 when none of the forms is accepted.
    """
    name, first = next(iter(arrays.items()))
    writers: dict[str, Callable[[], bytes]] = {
        JSON: lambda: numbers.write(arrays),
        NPY: lambda: _npy(first),
    }
    if name == "images" and first.shape[-1] in (1, 3):
        writers[PNG] = lambda: _png(first)
    chosen = choose_media_type(accept, list(writers))
    return writers[chosen], chosen


def choose_media_type(accept: str, offered: list[str]) -> str:
    """Choose the offered media type that an Accept header likes best; the first among equals."""
    liked = {}
    for part in accept.split(",") if accept.strip() else ["*/*"]:
        pattern, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    quality = float(parameter[2:])
                except ValueError:
                    quality = 0.0
        liked[pattern] = quality

    def quality_of(kind: str) -> float:
        for pattern in (kind, kind.partition("/")[0] + "/*", "*/*"):
            if pattern in liked:
                return liked[pattern]
        return 0.0

    best = max(offered, key=quality_of)
    if not quality_of(best) > 0:
        raise RefusedError(406, f"Accept: this can be answered as {', '.join(offered)}.", "accept")
    return best


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _png(images: np.ndarray) -> bytes:
    """Draw one image as it is, several as a sheet."""
    from PIL import Image

    if len(images) == 1:
        pixels = np.rint(np.clip(images[0], 0, 1) * 255).astype(np.uint8)
        pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    else:
        pixels = grid(images)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def body_of(takes: str, example: np.ndarray) -> dict[str, Any]:
    """Describe the request body of an operation.

    Args:
        takes: `images` or `latents`.
        example: one of them, `(1, ...)`.
    """
    shape = example.shape[1:]
    lists: dict[str, Any] = {"type": "number"}
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


def answers_of(example: Mapping[str, np.ndarray]) -> dict[int | str, dict[str, Any]]:
    """Describe the answers of an operation, by status.

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


def shown(array: np.ndarray) -> list[Any]:
    """Round numbers as a page shows them; what is no number stays."""
    if array.dtype == bool:
        return array.tolist()
    return array.astype(np.float64).round(SHOWN_DIGITS).tolist()


def _example(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    if max(array.size for array in arrays.values()) > MOST_SHOWN:
        return {}
    return {"example": {name: shown(array) for name, array in arrays.items()}}
