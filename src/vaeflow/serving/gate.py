"""What every request passes: is the server open, may it come in, how long did it take."""

from __future__ import annotations

import hmac
import time

import pydantic_core
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vaeflow.serving.bodies import JSON, header
from vaeflow.serving.refusals import RefusedError
from vaeflow.serving.service import Service

ALWAYS = frozenset({"/v2/health/live", "/v2/health/ready"})  # answered to anyone, at any time
WATCHED = ALWAYS | {"/metrics"}  # not work: answered while draining and under load


class Gate:
    """ASGI middleware before all routes."""

    def __init__(self, app: ASGIApp, service: Service):
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
