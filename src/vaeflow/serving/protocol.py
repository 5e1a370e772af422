"""The Open Inference Protocol, version 2, over HTTP, with its binary tensor extension.

The outputs that are asked for decide what is run: `mean` and `log_variance` (the default),
`reconstruction`, `score`, `percentile`, `anomaly`, `p_value`, `anomalous` and `anomaly_map` of the
input `images`; `image` of the input `latents`.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

import numpy as np
import pydantic_core
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field, ValidationError
from starlette.types import Receive, Scope, Send

from vaeflow.bundle.manifest import OF_ALARMS
from vaeflow.common.code import package_version
from vaeflow.registry.model import Model
from vaeflow.serving import bodies
from vaeflow.serving.answers import ERRORS, MOST_SHOWN, shown
from vaeflow.serving.bodies import RefusedError
from vaeflow.serving.service import OPERATIONS, Service

Answer = tuple[list[tuple[bytes, bytes]], bytes]  # headers and body

INFER = "/v2/models/{name}/infer"
INFER_PATH = re.compile("/v2/models/([^/]+)/infer")
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

    @app.get("/v2/models/{name}", responses=failures, tags=["inference protocol"])
    async def metadata(name: str) -> dict[str, Any]:
        """Describe the tensors that the model takes and gives."""
        return _metadata(_named(service, name))

    @app.get("/v2/models/{name}/ready", responses=failures, tags=["inference protocol"])
    async def model_ready(name: str) -> JSONResponse:
        """Report whether the model takes work."""
        _named(service, name)
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    @app.post(
        INFER,
        response_class=Response,
        responses={**ERRORS, **failures},
        openapi_extra=_body(service),
        tags=["inference protocol"],
    )
    async def infer(name: str, request: Request) -> Response:
        """Run the model on one tensor; the outputs asked for decide what is computed."""
        # Direct has answered by now, but for names with a line break at their end.
        raise RefusedError(404, f"no model of that name; this is {service.model.name}.", "name")


class Direct:
    """ASGI middleware that answers inference requests itself, and passes all others on.

    FastAPI's way to such a route takes longer than a small model's run. It has the route too, for
    the OpenAPI page and for other methods.
    """

    def __init__(self, app: FastAPI, service: Service):
        self._app, self._service = app, service
        self._route = next(route for route in app.routes if getattr(route, "path", "") == INFER)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on; what is wrong with a request is raised as RefusedError."""
        found = INFER_PATH.fullmatch(scope["path"]) if scope["type"] == "http" else None
        if found is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        scope["route"] = self._route
        headers, body = await _infer(self._service, found[1], scope, receive)
        headers = [*headers, (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


async def _infer(service: Service, name: str, scope: Scope, receive: Receive) -> Answer:
    model, deadline = _named(service, name), service.deadline()
    body = await service.read(scope, receive)
    asked, binary = _parse(body, bodies.header(scope, HEADER_LENGTH))
    tensor = asked.inputs[0]
    rows = _rows(tensor, binary, model)
    wanted = [output.name for output in asked.outputs] or list(DEFAULT[tensor.name])
    arrays = await _compute(service, model, tensor.name, wanted, rows, deadline)
    return _answer(asked, model, arrays)


def _named(service: Service, name: str) -> Model:
    if name != service.model.name:
        raise RefusedError(404, f"no model of that name; this is {service.model.name}.", "name")
    return service.model


def _metadata(model: Model) -> dict[str, Any]:
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


def _parse(body: bytes, header_length: str) -> tuple[_Inference, memoryview]:
    """Parse the request's JSON, and return the raw tensor after it."""
    length = len(body)
    if header_length:
        if not LENGTH.fullmatch(header_length) or int(header_length) > len(body):
            field = HEADER_LENGTH.decode()
            raise RefusedError(422, f"{field}: no length within the body.", field)
        length = int(header_length)
    try:
        return _Inference.model_validate_json(body[:length]), memoryview(body)[length:]
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(str(part) for part in fault["loc"]) or "body"
        raise RefusedError(422, f"{field}: {fault['msg']}.", field) from None


def _rows(tensor: _Tensor, binary: memoryview, model: Model) -> np.ndarray:
    """Read the input as an array that the bundle has checked."""
    if tensor.name not in OUTPUTS:
        raise RefusedError(422, f"inputs.0.name: expected {' or '.join(OUTPUTS)}.", "inputs.0.name")
    if tensor.datatype not in DATATYPES:
        known = ", ".join(DATATYPES)
        raise RefusedError(422, f"inputs.0.datatype: expected {known}.", "inputs.0.datatype")
    dtype = np.dtype(DATATYPES[tensor.datatype])
    count = math.prod(tensor.shape)
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
        if binary or not isinstance(tensor.data, list):
            raise RefusedError(422, "inputs.0.data: expected a list of numbers.", "inputs.0.data")
        array = bodies.numbers(tensor.data, dtype, "inputs.0.data")
        if array.size != count:
            raise RefusedError(
                422, f"inputs.0.data: {array.size} numbers; the shape has {count}.", "inputs.0.data"
            )
    array, field = array.reshape(tensor.shape), f"inputs.0 ({tensor.name})"
    if tensor.name == "images":
        return bodies.pixels_of(array, model.bundle, field)
    return bodies.checked(model.bundle.as_latents, array, field)


async def _compute(
    service: Service,
    model: Model,
    takes: str,
    wanted: list[str],
    rows: np.ndarray,
    deadline: float,
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
            computed[operation] = await service.run(model, operation, rows, deadline, **options)
        if part not in computed[operation]:
            raise RefusedError(422, f"outputs: this model was exported without {part}.", "outputs")
        arrays[name] = computed[operation][part]
    return arrays


def _answer(asked: _Inference, model: Model, arrays: dict[str, np.ndarray]) -> Answer:
    """Write JSON, and behind it those outputs that were asked for in binary."""
    everywhere = asked.parameters.get("binary_data_output") is True
    binary = {
        output.name: output.parameters.get("binary_data", everywhere) is True
        for output in asked.outputs
    }
    outputs, raw = [], []
    for name, array in arrays.items():
        datatype = GIVEN[array.dtype.kind + str(array.dtype.itemsize)]
        output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": array.shape}
        if binary.get(name, everywhere):
            raw.append(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
            output["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            output["data"] = array.ravel().tolist()
        outputs.append(output)
    content = {"model_name": model.name, "model_version": model.version, "outputs": outputs}
    if asked.id is not None:
        content["id"] = asked.id
    header = pydantic_core.to_json(content)
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
