"""Read what a request holds, limits first, or refuse it.

A refusal is an answer with a status; it says what is wrong with which field.
"""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pydantic_core
from starlette.types import Receive, Scope

from vaeflow.bundle.runtime import Bundle
from vaeflow.config.schema import Limits
from vaeflow.data.io.arrays import read_npy_header
from vaeflow.data.io.conversion import Conversion
from vaeflow.data.io.decoding import Picture, decode
from vaeflow.data.io.rules import BYTE, UNIT, Rules, outside, to_bytes
from vaeflow.errors import BadImageError, DataError, VaeflowError

PICTURES = {"image/png": b"\x89PNG\r\n\x1a\n", "image/jpeg": b"\xff\xd8\xff"}
NPY = "application/x-npy"
JSON = "application/json"
LIMITS = Limits(max_pixels=2**24)  # of a picture that is to be resized: many come at once
DTYPES = {"uint8": np.uint8, "float32": np.float32}


class RefusedError(VaeflowError):
    """A request that is not answered with a result.

    Args:
        status: the HTTP status.
        message: what is wrong, and what would be right; never the content itself.
        field: of the request, such as `images`; empty where it is not about one.
        retry_after: seconds until it is worth trying again, where it is.
    """

    def __init__(
        self, status: int, message: str, field: str = "", retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.field = field
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def content(self) -> dict[str, str]:
        """Return the answer's JSON."""
        return {"error": str(self), **({"field": self.field} if self.field else {})}


def header(scope: Scope, name: bytes) -> str:
    """Return the value of a request's header, of a lower-case name; empty where it is not given."""
    for key, value in scope["headers"]:
        if key == name:
            return value.decode("latin-1")
    return ""


async def read(scope: Scope, receive: Receive, limit: int, seconds: float) -> bytes:
    """Receive the body within the limits.

    Raises:
        RefusedError: 413 when it is larger than `limit` bytes, 408 when it takes longer, 400 when
            it ends early.
    """
    declared = header(scope, b"content-length")
    # What is declared too large is not read at all.
    allowed = -1 if declared.isdecimal() and int(declared) > limit else limit
    parts, more = [], True
    try:
        async with asyncio.timeout(seconds):
            while more and allowed >= 0:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise RefusedError(400, "the body ended before it was whole.", "body")
                parts.append(message.get("body", b""))
                allowed -= len(parts[-1])
                more = message.get("more_body", False)
    except TimeoutError:
        raise RefusedError(
            408, f"the body did not arrive within {seconds:g} seconds.", "body"
        ) from None
    if allowed < 0:
        raise RefusedError(413, f"the body may hold {limit} bytes at most.", "body")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def images_of(body: bytes, content_type: str, bundle: Bundle) -> np.ndarray:
    """Read the images of a body: one PNG or JPEG, an array in `.npy`, or JSON.

    Returns:
        As `Bundle.as_pixels`.

    Raises:
        RefusedError: 415 for another type, 422 for what are no images for this model.
    """
    kind = media_type(content_type)
    if kind in PICTURES:
        return _picture(body, kind, bundle)
    return pixels_of(array_of(body, kind, "images"), bundle, "images")


def pixels_of(array: np.ndarray, bundle: Bundle, field: str) -> np.ndarray:
    """Check images, and read their numbers by the range of those that the model was trained on.

    Returns:
        As `Bundle.as_pixels`.
    """
    of = Conversion.by(bundle.manifest.image.reading or Rules()).range_of_array(array.dtype)
    if array.ndim and of is not None and of != (BYTE if array.dtype == np.uint8 else UNIT):
        for index, fault in outside(array, of).items():
            raise RefusedError(422, f"{field}: image {index} has {fault}.", field)
        array = to_bytes(array, of)
    return checked(bundle.as_pixels, array, field)


def latents_of(body: bytes, content_type: str, bundle: Bundle) -> np.ndarray:
    """Read the latents of a body: an array in `.npy`, or JSON; as `Bundle.as_latents`."""
    latents = array_of(body, media_type(content_type), "latents")
    return checked(bundle.as_latents, latents, "latents")


def media_type(content_type: str) -> str:
    """Return a content type without its parameters."""
    return content_type.partition(";")[0].strip().lower()


def array_of(body: bytes, kind: str, field: str) -> np.ndarray:
    """Read the array of a body of some media type."""
    if kind == NPY:
        return _npy(body, field)
    if kind == JSON:
        content = json_of(body)
        if not isinstance(content, dict) or field not in content:
            raise RefusedError(422, f"expected a JSON object with {field!r}.", field)
        dtype = content.get("dtype", "float32")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise RefusedError(422, f"dtype: expected one of {', '.join(DTYPES)}.", "dtype")
        return numbers(content[field], np.dtype(DTYPES[dtype]), field)
    accepted = [*(PICTURES if field == "images" else ()), NPY, JSON]
    raise RefusedError(415, f"Content-Type: expected one of {', '.join(accepted)}.", "content-type")


def json_of(body: bytes) -> Any:
    """Parse JSON."""
    try:
        return pydantic_core.from_json(body)
    except ValueError as error:
        raise RefusedError(422, f"not JSON: {error}.", "body") from None


def numbers(values: Any, dtype: np.dtype, field: str) -> np.ndarray:
    """Convert nested lists of numbers to an array.

    Raises:
        RefusedError: 422 when they are ragged, no numbers, or do not fit into the type.
    """
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError, RecursionError):
        raise RefusedError(422, f"{field}: the lists differ in length.", field) from None
    if array.dtype.kind not in "iuf":
        raise RefusedError(
            422, f"{field}: expected nested lists of numbers, of equal lengths.", field
        )
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        whole = array.dtype.kind in "iu"
        if not whole or (array.size and not info.min <= array.min() <= array.max() <= info.max):
            raise RefusedError(422, f"{field}: expected integers {info.min}..{info.max}.", field)
    with np.errstate(over="ignore"):  # becomes infinite, which is refused with its field
        return array.astype(dtype)


def checked(check: Callable[[np.ndarray], np.ndarray], array: np.ndarray, field: str) -> np.ndarray:
    """Apply a check of the bundle to an array; its errors name the field."""
    try:
        return check(array)
    except DataError as error:
        raise RefusedError(422, str(error), field) from None


def _npy(body: bytes, field: str) -> np.ndarray:
    """Read an array of NumPy's format; nothing is unpickled."""
    try:
        shape, fortran, dtype, offset = read_npy_header(io.BytesIO(body), len(body))
    except Exception:  # the header is a Python literal, and can be wrong in as many ways
        raise RefusedError(422, f"{field}: not an array in NumPy's .npy format.", field) from None
    if dtype.kind not in "uif" or dtype.itemsize > 8:
        raise RefusedError(422, f"{field}: dtype {dtype}; expected uint8 or floating point.", field)
    size = math.prod(shape) * dtype.itemsize
    if any(edge < 0 for edge in shape) or size != len(body) - offset:
        raise RefusedError(
            422,
            f"{field}: the header declares {size} bytes, {len(body) - offset} follow.",
            field,
        )
    values = np.frombuffer(body, dtype, offset=offset)
    array = values.reshape(shape, order="F" if fortran else "C")
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def _picture(body: bytes, kind: str, bundle: Bundle) -> np.ndarray:
    if not body.startswith(PICTURES[kind]):
        raise RefusedError(422, f"images: the body is no {kind}.", "images")
    height, width, channels = bundle.image_shape
    if channels not in (1, 3):
        raise RefusedError(415, f"images of {channels} channels: send {NPY} or {JSON}.", "images")

    def same_shape(name: str, shape: tuple[int, int, int]) -> None:
        if shape != bundle.image_shape:
            raise BadImageError(
                name,
                f"an image of {shape[1]}x{shape[0]} pixels (width x height); "
                f"this model takes {width}x{height}.",
            )

    rules = Conversion.by(bundle.manifest.image.reading or Rules())
    size = None if rules.size is None else (width, height)
    conversion = replace(rules, size=size, channels=channels)
    try:
        pixels = decode(Picture("images", body), conversion, LIMITS, same_shape)
    except BadImageError as error:
        raise RefusedError(422, str(error), "images") from None
    return pixels[np.newaxis]
