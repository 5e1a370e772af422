"""The application: what every request passes, and the plain routes."""

# Annotations are not postponed: FastAPI reads those of the routes, which name local values.
import asyncio
import hmac
import html
import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, cast

import numpy as np
import pydantic_core
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi_offline import FastAPIOffline
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vaeflow.bundle.runtime import SCORE_SAMPLES
from vaeflow.common.code import package_version
from vaeflow.registry.model import Model
from vaeflow.report.page import page_of
from vaeflow.serving import bodies, protocol
from vaeflow.serving.answers import BYTES_OF, answers_of, body_of, writer
from vaeflow.serving.bodies import JSON, NPY, header
from vaeflow.serving.refusals import RefusedError
from vaeflow.serving.service import MOST_SAMPLES, OPERATIONS, Service

ALWAYS = frozenset({"/v2/health/live", "/v2/health/ready"})  # answered to anyone, at any time
WATCHED = ALWAYS | {"/metrics"}  # not work: answered while draining and under load
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
PORT = re.compile(r":\d*$")
PIECE = 64 << 10  # bytes of an answer that are sent at once
# What is read of a request that was refused already.
LINGER_SECONDS, LINGER_BYTES = 5, 64 << 20
LARGEST_SEED = 2**63 - 1
INDEX = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<h1>{title}</h1>
<ul>
<li><a href="docs">docs</a>: every route, to be tried here
<li><a href="explore">explore</a>: the latent space, to walk in
<li><a href="openapi.json">openapi.json</a>: the same routes, for programs
<li><a href="v2">v2</a>: the Open Inference Protocol
<li><a href="metrics">metrics</a>: for Prometheus
<li><a href="v2/health/ready">v2/health/ready</a>: whether it takes work
</ul>
"""
Seed = Annotated[int, Query(ge=0, le=LARGEST_SEED, description="The same gives the same answer.")]


class RequestFilter:
    """ASGI middleware before all routes."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._token = f"Bearer {service.settings.token}".encode() if service.settings.token else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it with a refusal."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service, start = self._service, time.perf_counter()
        exchange = _Exchange(receive, send, service)
        working = scope["path"] not in WATCHED
        service.received += working
        service.in_flight += working
        try:
            self._check(scope, working)
            await self._app(scope, exchange.receive, exchange.send)
        except RefusedError as refusal:
            await _refuse(refusal, scope, exchange.send)
        finally:
            service.in_flight -= working
            service.release(scope)
            # A path that is no route is a name that the client made up: not a label.
            route = getattr(scope.get("route"), "path", "none")
            service.metrics.request(route, exchange.status, time.perf_counter() - start)
        await exchange.end()

    def _check(self, scope: Scope, working: bool) -> None:
        service = self._service
        if working and service.draining:
            raise RefusedError(503, "the server is about to end.", retry_after=1)
        if scope["path"] not in ALWAYS:
            self._check_source(scope)
            if self._token and not is_token(header(scope, b"authorization"), self._token):
                raise RefusedError(401, "expected the header Authorization: Bearer TOKEN.")
        if working and service.in_flight > service.settings.in_flight:
            raise RefusedError(429, "too many requests at once; try again later.", retry_after=1)

    def _check_source(self, scope: Scope) -> None:
        """Refuse what a page of another site makes its visitor's browser send."""
        host, hosts = header(scope, b"host").lower(), self._service.settings.hosts
        if hosts and PORT.sub("", host) not in hosts:
            raise RefusedError(
                421, "the Host header names another server; see vaeflow serve --allowed-host."
            )
        origin = header(scope, b"origin").lower()
        if origin and origin.partition("://")[2] != host and scope["method"] not in SAFE:
            raise RefusedError(403, "a page of another site may not ask this.")


class _Exchange:
    """A request and its answer.

    An answer is sent in pieces, each when the client has taken those before it, so that what is
    not taken lies in memory once and is counted. Where the connection is to be closed, what the
    client still sends is read for a while: it would else get an error in the place of the answer.
    """

    def __init__(self, receive: Receive, send: Send, service: Service):
        self._receive, self._send, self._service = receive, send, service
        self._whole = self._closes = self._lingers = False
        self.status = 500

    async def receive(self) -> Message:
        message = await self._receive()
        self._whole |= not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._closes = self.status in (408, 413) or self._service.draining
            if self._closes:
                MutableHeaders(scope=message)["Connection"] = "close"
            await self._send(message)
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        self._lingers = self._closes and not self._whole and not more
        for start in range(0, len(body) - PIECE, PIECE):
            await self._send(_part(body[start : start + PIECE], True))
        rest = max(0, (len(body) - 1) // PIECE * PIECE)
        await self._send(_part(body[rest:], more or self._lingers))

    async def end(self) -> None:
        """Read what is left of the request, within bounds, and close."""
        if not self._lingers:
            return
        left = LINGER_BYTES
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while left > 0 and not self._whole:
                    left -= len((await self.receive()).get("body", b""))
        await self._send(_part(b"", False))


def _part(body: bytes, more: bool) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


async def _refuse(refusal: RefusedError, scope: Scope, send: Send) -> None:
    """Answer with a refusal; under too much load these are most answers, and must be cheap."""
    body = pydantic_core.to_json(_content(refusal, scope["path"]))
    headers = [(name.lower().encode(), value.encode()) for name, value in refusal.headers.items()]
    headers += [(b"content-type", JSON.encode()), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send(_part(body, False))


def _content(refusal: RefusedError, path: str) -> dict[str, str]:
    """Return the JSON of a refusal; that of the inference protocol has no other field."""
    return {"error": refusal.named()} if path.startswith("/v2") else refusal.content()


def is_token(given: str, expected: bytes) -> bool:
    """Compare what a request carries with `Bearer TOKEN`; the scheme may be in small letters."""
    scheme, _, token = given.encode("latin-1", "replace").partition(b" ")
    return hmac.compare_digest(scheme.capitalize() + b" " + token.strip(), expected)


def create_app(service: Service) -> RequestFilter:
    """Make the application with all routes over a service."""
    app = FastAPIOffline(  # its page brings its scripts along
        title="vaeflow",
        version=package_version(),
        description="A variational autoencoder: embeddings, reconstructions, samples, scores.",
        redirect_slashes=False,
        redoc_url=None,
    )
    app.add_exception_handler(RefusedError, cast("Any", _refused))
    app.add_exception_handler(RequestValidationError, cast("Any", _invalid))
    app.add_exception_handler(HTTPException, cast("Any", _not_found))
    _add_operations(app, service)
    protocol.add_routes(app, service)

    pages = _Pages()

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> Response:
        model = service.model
        title = f"{html.escape(model.name)}, version {html.escape(model.version)}"
        return HTMLResponse(INDEX.format(title=title), headers=model.headers)

    @app.get("/explore", response_class=HTMLResponse, tags=["model"])
    async def explore() -> Response:
        """Show a page on the model, with its latent space to walk in; it decodes by itself."""
        return HTMLResponse(await pages.of(service.model), headers=service.model.headers)

    @app.get("/metrics", response_class=Response, tags=["operation"])
    async def metrics() -> Response:
        """Return figures for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return RequestFilter(protocol.Direct(app, service), service)


class _Pages:
    """The page on the model that answers, made when it is asked for first."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._model: Model | None = None
        self._page = b""

    async def of(self, model: Model) -> bytes:
        """Return the model's page; who asks meanwhile waits for the same one."""
        async with self._lock:
            if self._model is not model:
                self._page = (await asyncio.to_thread(page_of, model.bundle)).encode()
                self._model = model
            return self._page


def _add_operations(app: FastAPI, service: Service) -> None:
    async def run(request: Request, operation: str, **options: int) -> Response:
        model, deadline = service.model, service.deadline()
        body = await service.read(request.scope, request.receive)
        read = getattr(bodies, f"{OPERATIONS[operation].takes}_of")
        kind, most = request.headers.get("content-type", ""), service.most_rows(model)
        # A small picture can be a large one, packed.
        size = 1 << 30 if bodies.media_type(kind) in bodies.PICTURES else len(body)
        size = 0 if bodies.media_type(kind) == bodies.NPY else size
        rows = await service.apart(size, deadline, read, body, kind, model.bundle, most)
        client = service.client(request.scope)
        arrays = await service.run(model, operation, rows, deadline, client, **options)
        return await _give(service, request, model, arrays, deadline)

    def post(operation: str) -> Callable[[Any], Any]:
        taken, given = service.example(operation)
        return app.post(
            f"/{operation}",
            response_class=Response,
            responses=answers_of(given),
            openapi_extra=body_of(OPERATIONS[operation].takes, taken),
            tags=["model"],
        )

    @post("encode")
    async def encode(request: Request) -> Response:
        """Encode each image: mean and log variance of the posterior; as .npy the means."""
        return await run(request, "encode")

    @post("decode")
    async def decode(request: Request) -> Response:
        """Decode each latent to an image."""
        return await run(request, "decode")

    @post("reconstruct")
    async def reconstruct(request: Request) -> Response:
        """Decode each image again from its posterior mean."""
        return await run(request, "reconstruct")

    @post("score")
    async def score(
        request: Request,
        samples: Annotated[
            int, Query(ge=1, le=MOST_SAMPLES, description="Draws for each image.")
        ] = SCORE_SAMPLES,
        seed: Seed = 0,
        maps: Annotated[
            bool, Query(alias="map", description="Whether to say where an image is unusual.")
        ] = False,
    ) -> Response:
        """Score each image: minus the ELBO in nats, how unusual it is, and whether to be alarmed.

        `percentile` is the score's among validation images. `anomaly` is about 1 for usual images
        and more for others; `p_value` is how often usual ones have as much, and `anomalous` whether
        that is too seldom. With other samples or another seed there is the score alone.
        """
        return await run(request, "score", samples=samples, seed=seed, maps=maps)

    responses = answers_of(service.example("decode")[1])

    @app.post("/sample", response_class=Response, responses=responses, tags=["model"])
    async def sample(
        request: Request,
        count: Annotated[int, Query(ge=1, le=service.settings.rows)] = 1,
        seed: Seed = 0,
        pixels: Annotated[
            bool, Query(description="Draw the pixels, too, instead of showing their means.")
        ] = False,
    ) -> Response:
        """Draw new images from the prior."""
        model, deadline = service.model, service.deadline()
        latents = model.bundle.draw(count, seed)
        client = service.client(request.scope)
        if pixels:
            arrays = await service.run(model, "draw_pixels", latents, deadline, client, seed=seed)
        else:
            arrays = await service.run(model, "decode", latents, deadline, client)
        return await _give(service, request, model, arrays, deadline)


async def _give(
    service: Service, request: Request, model: Model, arrays: dict[str, np.ndarray], deadline: float
) -> Response:
    """Write an answer in the form that the request asks for."""
    write, kind = writer(arrays, request.headers.get("accept", ""))
    size = sum(array.size for array in arrays.values())
    # Held before it is there: as JSON it is longer than in memory.
    service.hold(request.scope, size * BYTES_OF[kind])
    content = await service.apart(0 if kind == NPY else size, deadline, write)
    return Response(content, media_type=kind, headers=model.headers)


async def _refused(request: Request, refusal: RefusedError) -> JSONResponse:
    content = _content(refusal, request.url.path)
    return JSONResponse(content, refusal.status, refusal.headers)


async def _not_found(request: Request, error: HTTPException) -> JSONResponse:
    message = f"{error.detail}: {request.method} {request.url.path[:200]}. See /docs."
    return JSONResponse({"error": message}, error.status_code, error.headers)


async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    fault = error.errors()[0]
    field = ".".join(str(part) for part in fault["loc"][1:])
    refusal = RefusedError(422, f"{field}: {fault['msg']}.", field)
    return await _refused(request, refusal)
