"""Read what a request holds, limits first, or refuse it.

A refusal is an answer with a status; it says what is wrong with which field.
"""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pydantic_core
from starlette.types import Receive, Scope

from vaeflow.bundle.runtime import Bundle
from vaeflow.config.schema import Limits
from vaeflow.data.io.arrays import read_npy_header
from vaeflow.data.io.conversion import Conversion
from vaeflow.data.io.decoding import Picture, decode
from vaeflow.data.io.rules import BYTE, UNIT, Rules, outside, to_bytes
from vaeflow.errors import BadImageError, DataError
from vaeflow.serving import numbers
from vaeflow.serving.refusals import RefusedError

PNG = "image/png"
PICTURES = {PNG: b"\x89PNG\r\n\x1a\n", "image/jpeg": b"\xff\xd8\xff"}
NPY = "application/x-npy"
JSON = "application/json"
LIMITS = Limits(max_pixels=2**24)  # of a picture that is to be resized: many come at once
DTYPES = {"uint8": np.uint8, "float32": np.float32}
MOST_AXES, LONGEST_AXIS = 8, 2**31
# Pieces of a picture's file: each costs the decoder more than its bytes.
MOST_CHUNKS, MOST_COMMENTS, MOST_SEGMENTS, MOST_SCANS = 20_000, 64, 256, 64


def header(scope: Scope, name: bytes) -> str:
    """Return the value of a request's header, of a lower-case name; empty where it is not given."""
    for key, value in scope["headers"]:
        if key == name:
            return value.decode("latin-1")
    return ""


async def read(
    scope: Scope, receive: Receive, limit: int, seconds: float, hold: Callable[[int], None]
) -> bytes:
    """Receive the body within the limits.

    Args:
        limit: bytes that it may have.
        seconds: in which it must be whole.
        hold: called with the bytes of each part; may refuse them.

    Raises:
        RefusedError: 413 when it is larger, 408 when it takes longer, 400 when it ends early, 415
            when it is compressed.
    """
    if header(scope, b"content-encoding").strip().lower() not in ("", "identity"):
        raise RefusedError(415, "Content-Encoding: send the body as it is.", "content-encoding")
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
                hold(len(parts[-1]))
                more = message.get("more_body", False)
    except TimeoutError:
        raise RefusedError(
            408, f"the body did not arrive within {seconds:g} seconds.", "body"
        ) from None
    if allowed < 0:
        raise RefusedError(413, f"the body may hold {limit} bytes at most.", "body")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def images_of(body: bytes, content_type: str, bundle: Bundle, rows: int) -> np.ndarray:
    """Read the images of a body, `rows` at most: one PNG or JPEG, an array in `.npy`, or JSON.

    Returns:
        As `Bundle.as_pixels`.

    Raises:
        RefusedError: 415 for another type, 422 for what are no images for this model.
    """
    kind = media_type(content_type)
    if kind in PICTURES:
        return _picture(body, kind, bundle)
    most = rows * math.prod(bundle.image_shape)
    return pixels_of(array_of(body, kind, "images", most), bundle, "images")


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


def latents_of(body: bytes, content_type: str, bundle: Bundle, rows: int) -> np.ndarray:
    """Read the latents of a body, `rows` at most, in `.npy` or JSON; as `Bundle.as_latents`."""
    latents = array_of(body, media_type(content_type), "latents", rows * bundle.latent_dim)
    return checked(bundle.as_latents, latents, "latents")


def media_type(content_type: str) -> str:
    """Return a content type without its parameters."""
    return content_type.partition(";")[0].strip().lower()


def array_of(body: bytes, kind: str, field: str, most: int) -> np.ndarray:
    """Read the array of a body of some media type, of `most` numbers at most."""
    if kind == NPY:
        return _npy(body, field)
    if kind == JSON:
        return _json(body, field, most)
    accepted = [*(PICTURES if field == "images" else ()), NPY, JSON]
    raise RefusedError(415, f"Content-Type: expected one of {', '.join(accepted)}.", "content-type")


def _json(body: bytes, field: str, most: int) -> np.ndarray:
    text, lists = numbers.parse(body, field)
    try:
        content = pydantic_core.from_json(text)
    except ValueError as error:
        raise RefusedError(422, f"not JSON: {error}.", "body") from None
    if not isinstance(content, dict) or field not in content:
        raise RefusedError(422, f"expected a JSON object with {field!r}.", field)
    dtype = content.get("dtype", "float32")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise RefusedError(422, f"dtype: expected one of {', '.join(DTYPES)}.", "dtype")
    if not lists:
        raise RefusedError(422, f"{field}: expected nested lists of numbers.", field)
    return lists[-1].read(np.dtype(DTYPES[dtype]), field, most)  # of several, JSON takes the last


def check_shape(shape: Sequence[int], field: str) -> None:
    """Refuse a shape that no array can have, before anything is computed with it.

    An axis of length 0 makes all of it empty, and does not make the other axes harmless.
    """
    if len(shape) > MOST_AXES or not all(0 <= edge <= LONGEST_AXIS for edge in shape):
        raise RefusedError(422, f"{field}: no such shape.", field)
    if math.prod(edge for edge in shape if edge) > 2**40:
        raise RefusedError(422, f"{field}: no such shape.", field)


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
    check_shape(shape, field)
    size = math.prod(shape) * dtype.itemsize
    if size != len(body) - offset:
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
        found = _png_size(body) if kind == PNG else _jpeg_size(body)
        if rules.size is None and sorted(found) != sorted((width, height)):
            same_shape("images", (found[1], found[0], channels))
        pixels = decode(Picture("images", body), conversion, LIMITS, same_shape)
    except BadImageError as error:
        raise RefusedError(422, str(error), "images") from None
    return pixels[np.newaxis]


def _png_size(body: bytes) -> tuple[int, int]:
    """Return width and height; refuse what would keep the decoder busy with other things.

    Raises:
        BadImageError: it has too many chunks.
    """
    chunks, comments, at = 0, 0, 8
    while at + 8 <= len(body) and (kind := body[at + 4 : at + 8]) != b"IEND":
        chunks, comments = chunks + 1, comments + bool(kind[0] & 0x20)
        if chunks > MOST_CHUNKS or comments > MOST_COMMENTS:
            raise BadImageError("images", "a PNG in too many chunks. Save it again.")
        at += 12 + int.from_bytes(body[at : at + 4], "big")
    return int.from_bytes(body[16:20], "big"), int.from_bytes(body[20:24], "big")


def _jpeg_size(body: bytes) -> tuple[int, int]:
    """Return width and height; refuse what would keep the decoder busy with other things.

    Raises:
        BadImageError: it has too many segments or scans, or ends before its size.
    """
    if body.count(b"\xff\xda") > MOST_SCANS:
        raise BadImageError("images", "a JPEG in too many scans. Save it again.")
    at = 2
    for _ in range(MOST_SEGMENTS):
        while body[at + 1 : at + 2] == b"\xff":  # filling
            at += 1
        marker, length = body[at + 1 : at + 2], int.from_bytes(body[at + 2 : at + 4], "big")
        if not marker or length < 2:
            break
        if 0xC0 <= marker[0] <= 0xCF and marker[0] not in (0xC4, 0xC8, 0xCC):  # a frame begins
            height, width = body[at + 5 : at + 7], body[at + 7 : at + 9]
            return int.from_bytes(width, "big"), int.from_bytes(height, "big")
        at += 2 + length
    raise BadImageError("images", "not a readable JPEG (its size was not found).")
