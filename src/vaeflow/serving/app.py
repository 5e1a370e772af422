"""The plain routes, and the application that holds all of them."""

from typing import Annotated

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response

import vaeflow
from vaeflow.bundle.runtime import SCORE_SAMPLES
from vaeflow.serving import bodies, inference_protocol
from vaeflow.serving.answers import answer
from vaeflow.serving.gate import Gate
from vaeflow.serving.openapi import answers_of, body_of
from vaeflow.serving.refusals import RefusedError
from vaeflow.serving.service import MOST_SAMPLES, OPERATIONS, Service

LARGEST_SEED = 2**63 - 1
Seed = Annotated[int, Query(ge=0, le=LARGEST_SEED, description="The same gives the same answer.")]


def create_app(service: Service) -> Gate:
    """All routes over a service."""
    app = FastAPI(
        title="vaeflow",
        version=vaeflow.__version__,
        description="A variational autoencoder: embeddings, reconstructions, samples, scores.",
        redirect_slashes=False,
    )
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    _add_operations(app, service)
    inference_protocol.add_routes(app, service)

    @app.get("/metrics", response_class=Response, tags=["operation"])
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return Gate(inference_protocol.Direct(app, service), service)


def _add_operations(app: FastAPI, service: Service) -> None:
    async def run(request: Request, operation: str, **options: int) -> Response:
        served, deadline = service.served, service.deadline()
        body = await service.read(request.scope, request.receive)
        read = getattr(bodies, f"{OPERATIONS[operation].takes}_of")
        rows = read(body, request.headers.get("content-type", ""), served.bundle)
        arrays = await service.run(served, operation, rows, deadline, **options)
        return answer(arrays, request.headers.get("accept", ""), served.headers)

    def post(operation: str):
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
        """Mean and log variance of the posterior of each image; as .npy the means."""
        return await run(request, "encode")

    @post("decode")
    async def decode(request: Request) -> Response:
        """The image of each latent."""
        return await run(request, "decode")

    @post("reconstruct")
    async def reconstruct(request: Request) -> Response:
        """Each image decoded from its posterior mean."""
        return await run(request, "reconstruct")

    @post("score")
    async def score(
        request: Request,
        samples: Annotated[
            int, Query(ge=1, le=MOST_SAMPLES, description="Draws for each image.")
        ] = SCORE_SAMPLES,
        seed: Seed = 0,
    ) -> Response:
        """Minus the ELBO in nats, and the percentage of validation images that score lower."""
        return await run(request, "score", samples=samples, seed=seed)

    responses = answers_of(service.example("decode")[1])

    @app.post("/sample", response_class=Response, responses=responses, tags=["model"])
    async def sample(
        request: Request,
        count: Annotated[int, Query(ge=1, le=service.settings.rows)] = 1,
        seed: Seed = 0,
    ) -> Response:
        """New images from the prior."""
        served = service.served
        latents = served.bundle.draw(count, seed)
        arrays = await service.run(served, "decode", latents, service.deadline())
        return answer(arrays, request.headers.get("accept", ""), served.headers)


async def _refused(request: Request, refusal: RefusedError) -> JSONResponse:
    return JSONResponse(refusal.content(), refusal.status, refusal.headers)


async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    fault = error.errors()[0]
    field = ".".join(str(part) for part in fault["loc"][1:])
    return JSONResponse({"error": f"{field}: {fault['msg']}.", "field": field}, 422)
