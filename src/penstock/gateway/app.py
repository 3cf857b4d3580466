"""The whole gateway in one place: its routes, and the onion of plain ASGI middleware around them."""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import AsyncIterator, Callable, Sequence

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as StarletteRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.core.errors import BrokerUnavailable, InvalidRequest, NotFound, PenstockError
from penstock.gateway.http import Endpoint, Handler, error_reply
from penstock.gateway.routes import jobs, openai, ops
from penstock.gateway.service import Gateway

log = structlog.get_logger("penstock.gateway")

Middleware = Callable[[ASGIApp], ASGIApp]
Render = Callable[[], tuple[bytes, str]]

#: Method, path, handler. The OpenAPI document and docs/api.md are checked against this table.
ROUTES: list[tuple[str, str, Handler]] = [
    ("POST", "/v1/jobs", jobs.submit),
    ("GET", "/v1/jobs", jobs.list_jobs),
    ("GET", "/v1/jobs/{id}", jobs.show),
    ("GET", "/v1/jobs/{id}/events", jobs.events),
    ("POST", "/v1/jobs/{id}/cancel", jobs.cancel),
    ("GET", "/v1/events", jobs.user_events),
    ("POST", "/v1/generate", jobs.generate),
    ("POST", "/v1/chat/completions", openai.chat_completions),
    ("POST", "/v1/completions", openai.completions),
    ("GET", "/v1/models", openai.list_models),
    ("GET", "/v1/models/{model:path}", openai.show_model),
    ("GET", "/healthz", ops.healthz),
    ("GET", "/readyz", ops.readyz),
    ("GET", "/health", ops.health),
    ("GET", "/openapi.json", ops.openapi_json),
    ("GET", "/docs", ops.docs),
]


def create_app(gateway: Gateway, *, metrics: Render | None = None, middleware: Sequence[Middleware] = ()) -> ASGIApp:
    """The ASGI app. *metrics* renders ``/metrics``; *middleware* (outermost first) sees every request."""
    routes = [Route(path, Endpoint(gateway, handler), methods=[method]) for method, path, handler in ROUTES]
    if metrics is not None:
        routes.append(Route("/metrics", Endpoint(gateway, ops.metrics(metrics)), methods=["GET"]))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with gateway.running():
            yield

    app: ASGIApp = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_exception},
    )
    app = ErrorShield(app)
    app = HostCheck(app, gateway.config.allowed_hosts)
    app = RequestId(app)
    for layer in reversed(middleware):
        app = layer(app)
    return app


async def _http_exception(request: StarletteRequest, error: Exception) -> Response:
    """Routing failures (no such path, wrong method) in the one error shape."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        failure: PenstockError = InvalidRequest(f"{request.method} is not allowed on {request.url.path}.")
        failure.status = 405
        return error_reply(failure, dict(error.headers or {}))
    return error_reply(NotFound(f"There is nothing at {request.url.path}. See /docs."))


_REQUEST_ID = re.compile(r"^[A-Za-z0-9._:-]{1,128}$")


class RequestId:
    """Every answer carries ``x-request-id``: the client's, if it is well-formed, or a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        request_id = given if _REQUEST_ID.match(given) else "req_" + secrets.token_hex(12)
        scope["penstock.request_id"] = request_id
        header = (b"x-request-id", request_id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        await self.app(scope, receive, send_with_id)


class HostCheck:
    """Refuse hosts that the operator did not name (DNS rebinding); ``*`` allows all."""

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self.app = app
        self.allowed = None if "*" in allowed else frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.allowed is not None:
            host = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
            name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
            if name.strip("[]") not in self.allowed:
                await error_reply(InvalidRequest(f"This server is not called {name[:100]!r}."))(scope, receive, send)
                return
        await self.app(scope, receive, send)


class ErrorShield:
    """A bug is a 500 in the one error shape and a traceback in the log, never a torn connection."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watching(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watching)
        except Exception as error:
            if isinstance(error, BrokerUnavailable):
                failure: PenstockError = error
            else:
                log.exception("request_failed", path=scope["path"], request_id=scope.get("penstock.request_id"))
                failure = PenstockError("Something broke inside the server; its log has the details.")
            if not started:
                await error_reply(failure)(scope, receive, send)
