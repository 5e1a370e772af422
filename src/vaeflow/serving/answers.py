"""What is answered, in the form that the client asked for."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import pydantic_core
from starlette.responses import Response

from vaeflow.pictures import grid
from vaeflow.serving.bodies import JSON, NPY
from vaeflow.serving.refusals import RefusedError

PNG = "image/png"


def answer(arrays: Mapping[str, np.ndarray], accept: str, headers: Mapping[str, str]) -> Response:
    """JSON of all arrays, or the first of them as `.npy`, or as PNG where it is of images.

    Args:
        arrays: by name; `images` are float32 in [0, 1], `(count, height, width, channels)`.
        accept: the request's header; empty takes JSON.
        headers: of the answer.

    Raises:
        RefusedError: 406 when none of the forms is accepted.
    """
    name, first = next(iter(arrays.items()))
    writers = {JSON: lambda: _json(arrays), NPY: lambda: _npy(first)}
    if name == "images" and first.shape[-1] in (1, 3):
        writers[PNG] = lambda: _png(first)
    chosen = choose(accept, list(writers))
    return Response(writers[chosen](), media_type=chosen, headers=dict(headers))


def choose(accept: str, offered: list[str]) -> str:
    """The offered media type that an Accept header likes best; the first among equals."""
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


def _json(arrays: Mapping[str, np.ndarray]) -> bytes:
    return pydantic_core.to_json({name: values.tolist() for name, values in arrays.items()})


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _png(images: np.ndarray) -> bytes:
    """One image as it is, several as a sheet."""
    from PIL import Image

    if len(images) == 1:
        pixels = np.rint(np.clip(images[0], 0, 1) * 255).astype(np.uint8)
        pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    else:
        pixels = grid(images)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()
