"""The Open Inference Protocol, version 2, over HTTP, with its binary tensor extension.

The outputs that are asked for decide what is run: `mean` and `log_variance` (the default),
`reconstruction`, `score`, `percentile`, `anomaly`, `p_value`, `anomalous` and `anomaly_map` of the
input `images`; `image` of the input `latents`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import numpy as np
import pydantic_core
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field, ValidationError
from starlette.types import Receive, Scope, Send

from vaeflow.bundle.manifest import OF_ALARMS
from vaeflow.common.code import package_version
from vaeflow.registry.model import Model
from vaeflow.serving import bodies, numbers
from vaeflow.serving.answers import BYTES_OF, ERRORS, MOST_SHOWN, shown
from vaeflow.serving.refusals import RefusedError
from vaeflow.serving.service import OPERATIONS, Service

Answer = tuple[list[tuple[bytes, bytes]], bytes]  # headers and body

MODELS = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")
INFER_PATH = re.compile("/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
# Parameters of tensors and requests; any other would change what is meant.
OF_INPUT, OF_OUTPUT = {"binary_data_size"}, {"binary_data"}
NOT_TAKEN = re.compile("shared_memory|classification|sequence")
HEADER_LENGTH = b"inference-header-content-length"
LENGTH = re.compile("[0-9]{1,18}")
GIVEN = {"f4": "FP32", "f8": "FP64", "b1": "BOOL"}
DATATYPES = {"UINT8": "u1", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}
# Output to the operation that gives it, and its name there.
OUTPUTS = {
    "images": {
        "mean": ("encode", "mean"),
        "log_variance": ("encode", "log_variance"),
        "reconstruction": ("reconstruct", "images"),
        "score": ("score", "score"),
        **{name: ("score", name) for name in ("percentile", *OF_ALARMS, "anomaly_map")},
    },
    "latents": {"image": ("decode", "images")},
}
DEFAULT = {"images": ("mean", "log_variance"), "latents": ("image",)}


class _Tensor(BaseModel):
    name: str
    shape: Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(max_length=8)]
    datatype: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    data: Any = None


class _Output(BaseModel):
    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class _Inference(BaseModel):
    id: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    inputs: Annotated[list[_Tensor], Field(min_length=1, max_length=1)]
    outputs: list[_Output] = Field(default_factory=list)


def add_routes(app: FastAPI, service: Service) -> None:
    """Add health, metadata and inference."""

    @app.get("/v2/health/live", tags=["operation"])
    async def live() -> dict[str, bool]:
        """Report whether the process answers at all."""
        return {"live": True}

    @app.get("/v2/health/ready", responses={503: ERRORS[503]}, tags=["operation"])
    async def ready() -> JSONResponse:
        """Report whether it takes work."""
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    @app.get("/v2", tags=["inference protocol"])
    async def server() -> dict[str, Any]:
        """Describe the server."""
        return {
            "name": "vaeflow",
            "version": package_version(),
            "extensions": ["binary_tensor_data"],
        }

    failures: dict[int | str, dict[str, Any]] = {
        404: {**ERRORS[422], "description": "No such model"}
    }

    # The paths without a version mean the one that answers now, and so do those with its number.
    for model in MODELS:
        about: dict[str, Any] = {"responses": failures, "tags": ["inference protocol"]}

        @app.get(model, **about)
        async def metadata(name: str, version: str = "") -> dict[str, Any]:
            """Describe the tensors that the model takes and gives."""
            return describe_model(named(service, name, version))

        @app.get(f"{model}/ready", **about)
        async def model_ready(name: str, version: str = "") -> JSONResponse:
            """Report whether the model takes work."""
            named(service, name, version)
            return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

        about["responses"] = {**ERRORS, **failures}

        @app.post(f"{model}/infer", response_class=Response, openapi_extra=_body(service), **about)
        async def infer(name: str, version: str = "") -> Response:
            """Run the model on one tensor; the outputs asked for decide what is computed."""
            # Direct has answered by now, but for names with a line break at their end.
            named(service, "", version)
            raise AssertionError


class Direct:
    """ASGI middleware that answers inference requests itself, and passes all others on.

    FastAPI's way to such a route takes longer than a small model's run. It has the route too, for
    the OpenAPI page and for other methods.
    """

    def __init__(self, app: FastAPI, service: Service):
        self._app, self._service = app, service
        self._routes = [
            next(route for route in app.routes if getattr(route, "path", "") == f"{model}/infer")
            for model in MODELS
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on; what is wrong with a request is raised as RefusedError."""
        found = INFER_PATH.fullmatch(scope["path"]) if scope["type"] == "http" else None
        if found is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        name, version = found[1], found[2] or ""
        scope["route"] = self._routes[bool(version)]
        headers, body = await _infer(self._service, name, version, scope, receive)
        headers = [*headers, (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


async def _infer(
    service: Service, name: str, version: str, scope: Scope, receive: Receive
) -> Answer:
    model, deadline = named(service, name, version), service.deadline()
    body = await service.read(scope, receive)
    length = _length(body, bodies.header(scope, HEADER_LENGTH))
    most = service.most_rows(model)
    asked, rows = await service.apart(length, deadline, _read, body, length, model, most)
    tensor = asked.inputs[0]
    wanted = [output.name for output in asked.outputs] or list(DEFAULT[tensor.name])
    client = service.client(scope)
    arrays = await compute(service, model, tensor.name, wanted, rows, deadline, client)
    binary = _in_binary(asked)
    written = sum(array.size for name, array in arrays.items() if not binary(name))
    raw = sum(array.nbytes for name, array in arrays.items() if binary(name))
    service.hold(scope, BYTES_OF[bodies.JSON] * written + raw)
    return await service.apart(written, deadline, _answer, asked, model, arrays)


def named(service: Service, name: str, version: str = "") -> Model:
    """Return the model that answers, if it is the one that is named.

    Raises:
        RefusedError: 404, it is another.
    """
    model = service.model
    if name != model.name:
        raise RefusedError(404, f"no model of that name; this is {model.name}.", "name")
    if version not in ("", model.version):
        raise RefusedError(404, f"no such version; this is {model.version}.", "version")
    return model


def describe_model(model: Model) -> dict[str, Any]:
    """Describe the tensors that a model takes and gives, as the protocol does."""
    image, latent = list(model.bundle.image_shape), [model.bundle.latent_dim]
    shapes = {
        "mean": latent,
        "log_variance": latent,
        "reconstruction": image,
        "score": [],
        "percentile": [],
        "image": image,
    }
    if model.bundle.detects:
        shapes |= {**{name: [] for name in OF_ALARMS}, "anomaly_map": image[:2]}

    def tensor(name: str, shape: list[int]) -> dict[str, Any]:
        datatype = {"percentile": "FP64", "p_value": "FP64", "anomalous": "BOOL"}.get(name, "FP32")
        return {"name": name, "datatype": datatype, "shape": [-1, *shape]}

    return {
        "name": model.name,
        "versions": [model.version],
        "platform": "onnxruntime",
        "inputs": [tensor("images", image), tensor("latents", latent)],
        "outputs": [tensor(name, shape) for name, shape in shapes.items()],
    }


def _length(body: bytes, header_length: str) -> int:
    """Return where the request's JSON ends, and its raw tensor begins."""
    if not header_length:
        return len(body)
    if not LENGTH.fullmatch(header_length) or int(header_length) > len(body):
        field = HEADER_LENGTH.decode()
        raise RefusedError(422, f"{field}: no length within the body.", field)
    return int(header_length)


def _read(body: bytes, length: int, model: Model, most: int) -> tuple[_Inference, np.ndarray]:
    """Parse the request's JSON, and the input as an array that the bundle has checked."""
    text, lists = numbers.parse(body[:length], "data")
    try:
        asked = _Inference.model_validate_json(text)
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(str(part) for part in fault["loc"]) or "body"
        raise RefusedError(422, f"{field}: {fault['msg']}.", field) from None
    outputs = [output.parameters for output in asked.outputs]
    check_parameters(asked.parameters, asked.inputs[0].parameters, outputs)
    return asked, _rows(asked.inputs[0], lists, memoryview(body)[length:], model, most)


def check_parameters(
    request: Iterable[str], tensor: Iterable[str], outputs: Sequence[Iterable[str]]
) -> None:
    """Refuse what would be ignored, and is not meant to be, by the names of all parameters."""
    given = [("parameters", key) for key in request if NOT_TAKEN.match(key)]
    given += [("inputs.0.parameters", key) for key in set(tensor) - OF_INPUT]
    for index, output in enumerate(outputs):
        given += [(f"outputs.{index}.parameters", key) for key in set(output) - OF_OUTPUT]
    for path, key in given:
        field = f"{path}.{key[:100]}"
        raise RefusedError(422, f"{field}: this server does not do that.", field)


def check_tensor(name: str, datatype: str, shape: Sequence[int], most: int) -> tuple[np.dtype, int]:
    """Check what a request says of its tensor; return its type and how many numbers it has."""
    if name not in OUTPUTS:
        raise RefusedError(422, f"inputs.0.name: expected {' or '.join(OUTPUTS)}.", "inputs.0.name")
    if datatype not in DATATYPES:
        known = ", ".join(DATATYPES)
        raise RefusedError(422, f"inputs.0.datatype: expected {known}.", "inputs.0.datatype")
    bodies.check_shape(shape, "inputs.0.shape")
    if shape and shape[0] > most:
        message = f"inputs.0.shape: {shape[0]} rows; one request may have {most}."
        raise RefusedError(413, message, "inputs.0.shape")
    return np.dtype(DATATYPES[datatype]), math.prod(shape)


def rows_of(name: str, array: np.ndarray, model: Model) -> np.ndarray:
    """Check a tensor as images or latents of a model, by its name."""
    field = f"inputs.0 ({name})"
    if name == "images":
        return bodies.pixels_of(array, model.bundle, field)
    return bodies.checked(model.bundle.as_latents, array, field)


def _rows(
    tensor: _Tensor, lists: list[numbers.Found], binary: memoryview, model: Model, most: int
) -> np.ndarray:
    dtype, count = check_tensor(tensor.name, tensor.datatype, tensor.shape, most)
    size = tensor.parameters.get("binary_data_size")
    if size is not None:
        if type(size) is not int or size != len(binary) or size != count * dtype.itemsize:
            raise RefusedError(
                422,
                f"binary_data_size: {count * dtype.itemsize} bytes make this shape and type; "
                f"{len(binary)} follow the JSON.",
                "inputs.0.parameters.binary_data_size",
            )
        array = np.frombuffer(binary, dtype)
    else:
        if binary or not lists or tensor.data != len(lists) - 1:
            raise RefusedError(422, "inputs.0.data: expected a list of numbers.", "inputs.0.data")
        array = lists[-1].read(dtype, "inputs.0.data", max(1, count))
        if array.size != count:
            raise RefusedError(
                422, f"inputs.0.data: {array.size} numbers; the shape has {count}.", "inputs.0.data"
            )
    return rows_of(tensor.name, array.reshape(tensor.shape), model)


async def compute(
    service: Service,
    model: Model,
    takes: str,
    wanted: list[str],
    rows: np.ndarray,
    deadline: float,
    client: str,
) -> dict[str, np.ndarray]:
    """Compute each wanted output; what several of them come from is run once."""
    known = OUTPUTS[takes]
    if unknown := [name for name in wanted if name not in known]:
        index = wanted.index(unknown[0])
        raise RefusedError(
            422, f"outputs: of {takes} there are {', '.join(known)}.", f"outputs.{index}"
        )
    computed, arrays = {}, {}
    for name in wanted:
        operation, part = known[name]
        if operation not in computed:
            options = {"maps": 1} if "anomaly_map" in wanted and operation == "score" else {}
            computed[operation] = await service.run(
                model, operation, rows, deadline, client, **options
            )
        if part not in computed[operation]:
            raise RefusedError(422, f"outputs: this model was exported without {part}.", "outputs")
        arrays[name] = computed[operation][part]
    return arrays


def datatype(array: np.ndarray) -> str:
    """Return the protocol's name of an array's type."""
    return GIVEN[array.dtype.kind + str(array.dtype.itemsize)]


def _in_binary(asked: _Inference) -> Callable[[str], bool]:
    """Return what says of an output whether it goes as raw bytes."""
    everywhere = asked.parameters.get("binary_data_output") is True
    binary = {
        output.name: output.parameters.get("binary_data", everywhere) is True
        for output in asked.outputs
    }
    return lambda name: binary.get(name, everywhere)


def _answer(asked: _Inference, model: Model, arrays: dict[str, np.ndarray]) -> Answer:
    """Write JSON, and behind it those outputs that were asked for in binary."""
    binary = _in_binary(asked)
    outputs, raw = [], []
    for name, array in arrays.items():
        output: dict[str, Any] = {"name": name, "datatype": datatype(array)}
        output["shape"] = array.shape
        data = b""
        if binary(name):
            raw.append(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
            output["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            data = b',"data":' + numbers.write_flat(array)
        outputs.append(pydantic_core.to_json(output)[:-1] + data + b"}")
    content: dict[str, Any] = {"model_name": model.name, "model_version": model.version}
    if asked.id is not None:
        content["id"] = asked.id
    header = b'%s,"outputs":[%s]}' % (pydantic_core.to_json(content)[:-1], b",".join(outputs))
    if not raw:
        return [(b"content-type", bodies.JSON.encode()), *model.raw_headers], header
    headers = [
        (b"content-type", b"application/octet-stream"),
        (HEADER_LENGTH, b"%d" % len(header)),
        *model.raw_headers,
    ]
    return headers, b"".join([header, *raw])


def _body(service: Service) -> dict[str, Any]:
    examples = {}
    for operation in ("score", "decode"):
        rows, given = service.example(operation)
        outputs = list(given) if operation == "score" else ["image"]
        if rows.size <= MOST_SHOWN:
            tensor = {"name": OPERATIONS[operation].takes, "shape": rows.shape, "datatype": "FP32"}
            inputs = [{**tensor, "data": shown(rows.ravel())}]
            asked = [{"name": output} for output in outputs]
            examples[operation] = {"value": {"inputs": inputs, "outputs": asked}}
    schema = {"type": "object", "required": ["inputs"]}
    content = {
        bodies.JSON: {"schema": schema, "examples": examples},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    }
    return {"requestBody": {"required": True, "content": content}}
