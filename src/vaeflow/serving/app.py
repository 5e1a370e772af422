"""The application: what every request passes, and the plain routes."""

# Annotations are not postponed: FastAPI reads those of the routes, which name local values.
import asyncio
import hmac
import time
from collections.abc import Callable
from typing import Annotated, Any, cast

import pydantic_core
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vaeflow.bundle.runtime import SCORE_SAMPLES
from vaeflow.common.code import package_version
from vaeflow.registry.model import Model
from vaeflow.report.page import page_of
from vaeflow.serving import bodies, protocol
from vaeflow.serving.answers import answer, answers_of, body_of
from vaeflow.serving.bodies import JSON, RefusedError, header
from vaeflow.serving.service import MOST_SAMPLES, OPERATIONS, Service

ALWAYS = frozenset({"/v2/health/live", "/v2/health/ready"})  # answered to anyone, at any time
WATCHED = ALWAYS | {"/metrics"}  # not work: answered while draining and under load
LARGEST_SEED = 2**63 - 1
Seed = Annotated[int, Query(ge=0, le=LARGEST_SEED, description="The same gives the same answer.")]


class RequestFilter:
    """ASGI middleware before all routes."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it with a refusal."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service, start, status = self._service, time.perf_counter(), 500

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status in (408, 413) or service.draining:
                    # The rest of such a body is not worth reading.
                    MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        working = scope["path"] not in WATCHED
        service.in_flight += working
        try:
            self._check(scope, working)
            await self._app(scope, receive, note)
        except RefusedError as refusal:
            await _refuse(refusal, note)
        finally:
            service.in_flight -= working
            # A path that is no route is a name that the client made up: not a label.
            route = getattr(scope.get("route"), "path", "none")
            service.metrics.request(route, status, time.perf_counter() - start)

    def _check(self, scope: Scope, working: bool) -> None:
        service = self._service
        if working and service.draining:
            raise RefusedError(503, "the server is about to end.", retry_after=1)
        if service.settings.token and scope["path"] not in ALWAYS:
            given = header(scope, b"authorization").encode("latin-1")
            expected = f"Bearer {service.settings.token}".encode()
            if not hmac.compare_digest(given, expected):
                raise RefusedError(401, "expected the header Authorization: Bearer TOKEN.")
        if working and service.in_flight > service.settings.in_flight:
            raise RefusedError(429, "too many requests at once; try again later.", retry_after=1)


async def _refuse(refusal: RefusedError, send: Send) -> None:
    """Answer with a refusal; under too much load these are most answers, and must be cheap."""
    body = pydantic_core.to_json(refusal.content())
    headers = [(name.lower().encode(), value.encode()) for name, value in refusal.headers.items()]
    headers += [(b"content-type", JSON.encode()), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def create_app(service: Service) -> RequestFilter:
    """Make the application with all routes over a service."""
    app = FastAPI(
        title="vaeflow",
        version=package_version(),
        description="A variational autoencoder: embeddings, reconstructions, samples, scores.",
        redirect_slashes=False,
    )
    app.add_exception_handler(RefusedError, cast("Any", _refused))
    app.add_exception_handler(RequestValidationError, cast("Any", _invalid))
    _add_operations(app, service)
    protocol.add_routes(app, service)

    pages = _Pages()

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
        rows = read(body, request.headers.get("content-type", ""), model.bundle)
        arrays = await service.run(model, operation, rows, deadline, **options)
        return answer(arrays, request.headers.get("accept", ""), model.headers)

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
        if pixels:
            arrays = await service.run(model, "draw_pixels", latents, deadline, seed=seed)
        else:
            arrays = await service.run(model, "decode", latents, deadline)
        return answer(arrays, request.headers.get("accept", ""), model.headers)


async def _refused(request: Request, refusal: RefusedError) -> JSONResponse:
    return JSONResponse(refusal.content(), refusal.status, refusal.headers)


async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    fault = error.errors()[0]
    field = ".".join(str(part) for part in fault["loc"][1:])
    return JSONResponse({"error": f"{field}: {fault['msg']}.", "field": field}, 422)
