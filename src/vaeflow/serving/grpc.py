"""The Open Inference Protocol over gRPC: the same model, queue and limits as over HTTP.

Answers go as raw bytes. The methods that the protocol has beyond these, which load models or share
memory, are answered with UNIMPLEMENTED.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from starlette.types import Scope

from vaeflow.common.code import package_version
from vaeflow.errors import ServingError
from vaeflow.registry.model import Model
from vaeflow.serving import numbers, protocol
from vaeflow.serving.app import is_token
from vaeflow.serving.connections import (
    HEAD_BYTES,
    HEAD_SECONDS,
    IDLE_SECONDS,
    LEAVE_SECONDS,
)
from vaeflow.serving.messages import PACKAGE, SERVICE, message
from vaeflow.serving.refusals import RefusedError
from vaeflow.serving.service import Service

Context: TypeAlias = Any  # grpc.aio.ServicerContext: the package has no types
Method = Callable[[Any, Context, Scope], Awaitable[Any]]

HEALTH = {"ServerLive", "ServerReady", "ModelReady"}  # answered while draining and under load
FREE = {"ServerLive", "ServerReady"}  # and without a token
TELL_SECONDS = 0.1
CALLS = 128  # at once: each is whole in memory before anything here sees it
CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.OUT_OF_RANGE,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
# Where each type lies among the contents of a tensor that is not sent raw.
CONTENTS = {"UINT8": "uint_contents", "FP32": "fp32_contents", "FP64": "fp64_contents"}


@asynccontextmanager
async def answering(service: Service, address: str) -> AsyncIterator[int]:
    """Answer over gRPC within the block; then what was accepted is finished.

    Args:
        service: whose model it is.
        address: host and port; port 0 for any.

    Yields:
        The port.

    Raises:
        ServingError: the address is not to be had.
    """
    settings = service.settings
    server = grpc.aio.server(
        maximum_concurrent_rpcs=min(CALLS, settings.in_flight),
        options=[
            ("grpc.max_receive_message_length", settings.body),
            ("grpc.max_send_message_length", -1),  # what is sent is bounded by its rows
            ("grpc.max_metadata_size", HEAD_BYTES),
            ("grpc.absolute_max_metadata_size", HEAD_BYTES),
            ("grpc.max_concurrent_streams", 64),
            ("grpc.max_connection_idle_ms", 1000 * IDLE_SECONDS),
            ("grpc.server_handshake_timeout_ms", 1000 * HEAD_SECONDS),
            # A client that does not answer is gone; one that asks all the time is sent away.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ("grpc.so_reuseport", int(settings.workers > 1)),
        ],
    )
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    server.add_generic_rpc_handlers((_Methods(service),))
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ServingError(f"{address} cannot be listened on: {error}.") from None
    await server.start()

    watching = asyncio.create_task(_report(service, health))
    try:
        yield port
    finally:
        watching.cancel()
        # All is answered by now; who watches the server's health is told, and sent away.
        await server.stop(LEAVE_SECONDS)


async def _report(service: Service, health: HealthServicer) -> None:
    """Tell those who watch the server's health whether it is ready, when that changes."""
    told = None
    states = health_pb2.HealthCheckResponse
    while True:
        if service.ready != told:
            told = service.ready
            state = states.SERVING if told else states.NOT_SERVING
            for name in ("", f"{PACKAGE}.{SERVICE}"):
                await health.set(name, state)
        await asyncio.sleep(TELL_SECONDS)


class _Methods(grpc.GenericRpcHandler):
    """The methods of the service, by their paths."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._token = f"Bearer {service.settings.token}".encode() if service.settings.token else b""
        self._handlers = {
            f"/{PACKAGE}.{SERVICE}/{name}": grpc.unary_unary_rpc_method_handler(
                self._answering(name, method),
                request_deserializer=message(f"{name}Request").FromString,
                response_serializer=message(f"{name}Response").SerializeToString,
            )
            for name, method in {
                "ServerLive": self._live,
                "ServerReady": self._ready,
                "ModelReady": self._model_ready,
                "ServerMetadata": self._server,
                "ModelMetadata": self._model,
                "ModelInfer": self._infer,
            }.items()
        }

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return what answers a call; None where there is no such method."""
        return self._handlers.get(call.method)

    def _answering(self, name: str, method: Method) -> Callable[[Any, Context], Awaitable[Any]]:
        """Wrap a method in what every call passes: the token, the load, and the count."""
        service = self._service

        async def answer(request: Any, context: Context) -> Any:
            start, status, refused = time.perf_counter(), 500, ""
            scope: Scope = {"client": (context.peer().rpartition(":")[0], 0)}
            working = name not in HEALTH
            service.received += working
            service.in_flight += working
            try:
                self._check(name, working, context)
                answered = await method(request, context, scope)
                status = 200
                return answered
            except RefusedError as refusal:
                status, refused = refusal.status, refusal.named()
            except asyncio.CancelledError:
                status = 499  # the client has gone
                raise
            finally:
                # What is raised here is kept a while, with all that this function knows.
                del request
                service.in_flight -= working
                service.release(scope)
                service.metrics.request(f"grpc {name}", status, time.perf_counter() - start)
            return await context.abort(CODES.get(status, grpc.StatusCode.INVALID_ARGUMENT), refused)

        return answer

    def _check(self, name: str, working: bool, context: Context) -> None:
        service = self._service
        if working and service.draining:
            raise RefusedError(503, "the server is about to end.")
        if self._token and name not in FREE:
            metadata = dict(context.invocation_metadata() or ())
            if not is_token(str(metadata.get("authorization", "")), self._token):
                raise RefusedError(401, "expected the metadata authorization: Bearer TOKEN.")
        if working and service.in_flight > service.settings.in_flight:
            raise RefusedError(429, "too many requests at once; try again later.")

    async def _live(self, request: Any, context: Context, scope: Scope) -> Any:
        return message("ServerLiveResponse")(live=True)

    async def _ready(self, request: Any, context: Context, scope: Scope) -> Any:
        return message("ServerReadyResponse")(ready=self._service.ready)

    async def _model_ready(self, request: Any, context: Context, scope: Scope) -> Any:
        protocol.named(self._service, request.name, request.version)
        return message("ModelReadyResponse")(ready=self._service.ready)

    async def _server(self, request: Any, context: Context, scope: Scope) -> Any:
        return message("ServerMetadataResponse")(name="vaeflow", version=package_version())

    async def _model(self, request: Any, context: Context, scope: Scope) -> Any:
        model = protocol.named(self._service, request.name, request.version)
        described = protocol.describe_model(model)
        tensor = message("TensorMetadata")
        for part in ("inputs", "outputs"):
            described[part] = [tensor(**each) for each in described[part]]
        return message("ModelMetadataResponse")(**described)

    async def _infer(self, request: Any, context: Context, scope: Scope) -> Any:
        service = self._service
        model = protocol.named(service, request.model_name, request.model_version)
        left = context.time_remaining()
        deadline = service.deadline()
        if left is not None:
            deadline = min(deadline, time.monotonic() + left)
        size = request.ByteSize()
        service.hold(scope, size)
        most = service.most_rows(model)
        # Numbers of their own are made Python objects first; raw bytes are taken as they are.
        size = 0 if request.raw_input_contents else size
        rows = await service.apart(size, deadline, _rows, request, model, most)
        takes = request.inputs[0].name
        wanted = [output.name for output in request.outputs] or list(protocol.DEFAULT[takes])
        client = service.client(scope)
        arrays = await protocol.compute(service, model, takes, wanted, rows, deadline, client)
        service.hold(scope, sum(array.nbytes for array in arrays.values()))
        return _answer(request, model, arrays)


def _rows(request: Any, model: Model, most: int) -> np.ndarray:
    """Read the one tensor of a request as rows that the bundle has checked."""
    if len(request.inputs) != 1:
        raise RefusedError(422, f"inputs: {len(request.inputs)} tensors; expected one.", "inputs")
    tensor = request.inputs[0]
    protocol.check_parameters(
        request.parameters, tensor.parameters, [output.parameters for output in request.outputs]
    )
    dtype, count = protocol.check_tensor(tensor.name, tensor.datatype, tensor.shape, most)
    raw = request.raw_input_contents
    if raw:
        if len(raw) != 1 or len(raw[0]) != count * dtype.itemsize:
            field = "raw_input_contents"
            expected = f"{field}: expected one, of {count * dtype.itemsize} bytes."
            raise RefusedError(422, expected, field)
        array = np.frombuffer(raw[0], dtype)
    else:
        array = _contents(tensor, dtype, count)
    return protocol.rows_of(tensor.name, array.reshape(tensor.shape), model)


def _contents(tensor: Any, dtype: np.dtype, count: int) -> np.ndarray:
    field = "inputs.0.contents"
    values = getattr(tensor.contents, CONTENTS.get(tensor.datatype, ""), ())
    if len(values) != count:
        kind = CONTENTS.get(tensor.datatype, "raw_input_contents")
        raise RefusedError(422, f"{field}: expected {count} numbers in {kind}.", field)
    array = np.empty(count, dtype)
    for start in range(0, count, numbers.PIECE):
        piece = values[start : start + numbers.PIECE]
        if dtype.kind == "u" and max(piece) > 255:
            raise RefusedError(422, f"{field}: expected integers 0..255.", field)
        array[start : start + numbers.PIECE] = piece
    return array


def _answer(request: Any, model: Model, arrays: dict[str, np.ndarray]) -> Any:
    answer = message("ModelInferResponse")(
        model_name=model.name, model_version=model.version, id=request.id
    )
    for name, array in arrays.items():
        answer.outputs.add(name=name, datatype=protocol.datatype(array), shape=array.shape)
        little = array.dtype.newbyteorder("<")
        answer.raw_output_contents.append(np.ascontiguousarray(array, little).tobytes())
    return answer
