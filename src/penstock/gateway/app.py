"""The whole gateway in one place: its routes, and the onion of plain ASGI middleware around them."""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.core.errors import Forbidden, InvalidRequest, NotFound
from penstock.gateway.http import Endpoint, Handler, refuse
from penstock.gateway.routes import (
    anthropic,
    batches,
    embeddings,
    files,
    jobs,
    models,
    openai,
    ops,
    page,
    responses,
    seeds,
    tokens,
)
from penstock.gateway.service import Gateway

Middleware = Callable[[ASGIApp], ASGIApp]
Render = Callable[[], tuple[bytes, str]]

#: Method, path, handler. The OpenAPI document and docs/api.md are checked against this table.
ROUTES: list[tuple[str, str, Handler]] = [
    ("POST", "/v1/jobs", jobs.submit),
    ("GET", "/v1/jobs", jobs.list_jobs),
    ("GET", "/v1/jobs/{id}", jobs.show),
    ("DELETE", "/v1/jobs/{id}", jobs.forget),
    ("GET", "/v1/jobs/{id}/events", jobs.events),
    ("POST", "/v1/jobs/{id}/cancel", jobs.cancel),
    ("GET", "/v1/events", jobs.user_events),
    ("POST", "/v1/generate", jobs.generate),
    ("POST", "/v1/chat/completions", openai.chat_completions),
    ("POST", "/v1/completions", openai.completions),
    ("POST", "/v1/responses", responses.create),
    ("POST", "/v1/responses/compact", responses.compact),
    ("POST", "/v1/responses/input_tokens", responses.count_input_tokens),
    ("GET", "/v1/responses/{id}", responses.retrieve),
    ("DELETE", "/v1/responses/{id}", responses.delete),
    ("POST", "/v1/responses/{id}/cancel", responses.cancel),
    ("GET", "/v1/responses/{id}/input_items", responses.list_input_items),
    ("POST", "/v1/files", files.create),
    ("GET", "/v1/files", files.list_files),
    ("GET", "/v1/files/{id}", files.show),
    ("DELETE", "/v1/files/{id}", files.delete),
    ("GET", "/v1/files/{id}/content", files.content),
    ("POST", "/v1/batches", batches.create),
    ("GET", "/v1/batches", batches.list_batches),
    ("GET", "/v1/batches/{id}", batches.show),
    ("POST", "/v1/batches/{id}/cancel", batches.cancel),
    ("POST", "/v1/embeddings", embeddings.embeddings),
    ("POST", "/tokenize", tokens.tokenize),
    ("POST", "/detokenize", tokens.detokenize),
    ("POST", "/v1/messages", anthropic.messages),
    ("POST", "/v1/messages/count_tokens", anthropic.count_tokens),
    ("POST", "/v1/models/{model:path}/load", models.load_model),
    ("POST", "/v1/models/{model:path}/unload", models.unload_model),
    ("GET", "/v1/models", models.list_models),
    ("GET", "/v1/models/{model:path}", models.show_model),
    ("POST", "/submit_job", seeds.submit_job),
    ("GET", "/events", jobs.user_events),
    ("POST", "/generate", seeds.generate),
    ("GET", "/result/{id}", seeds.result),
    ("GET", "/status/{id}", seeds.status),
    ("POST", "/basic_generate", seeds.basic_generate),
    ("POST", "/generate_stream", seeds.generate_stream),
    ("POST", "/api/v1/req", seeds.generate_stream),
    ("POST", "/generate_vllm", seeds.generate_vllm),
    ("GET", "/healthz", ops.healthz),
    ("GET", "/readyz", ops.readyz),
    ("GET", "/health", ops.health),
    ("GET", "/openapi.json", ops.openapi_json),
    ("GET", "/docs", ops.docs),
    ("GET", "/", page.index),
    ("GET", "/static/{path:path}", page.static),
]

#: What a worker without a gateway answers about its models, on its metrics port.
WORKER_ROUTES = [route for route in ROUTES if route[1].startswith("/v1/models")]


def create_app(
    gateway: Gateway,
    *,
    metrics: Render | None = None,
    middleware: Sequence[Middleware] = (),
    routes: Sequence[tuple[str, str, Handler]] = ROUTES,
) -> ASGIApp:
    """The ASGI app. *metrics* renders ``/metrics``; *middleware* (outermost first) sees every request."""
    table = [*routes, ("GET", "/metrics", ops.metrics(metrics))] if metrics is not None else routes
    methods: dict[str, dict[str, Endpoint]] = {}
    for method, path, handler in table:
        methods.setdefault(path, {})[method] = Endpoint(gateway, handler)
    paths = [Route(path, ByMethod(endpoints)) for path, endpoints in methods.items()]

    @contextlib.asynccontextmanager
    async def lifespan(app: object) -> AsyncIterator[None]:
        async with gateway.running():
            yield

    app: ASGIApp = Router(paths, default=_nothing_here, redirect_slashes=False, lifespan=lifespan)
    app = Slashes(app)
    app = OriginCheck(app, gateway.config.allowed_origins)
    app = HostCheck(app, gateway.config.allowed_hosts)
    app = RequestId(app)
    for layer in reversed(middleware):
        app = layer(app)
    return app


class ByMethod:
    """The endpoints of one path."""

    def __init__(self, endpoints: dict[str, Endpoint]) -> None:
        self.endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self.endpoints.get("GET" if scope["method"] == "HEAD" else scope["method"])
        if endpoint is not None:
            await endpoint(scope, receive, send)
            return
        allowed = ", ".join(self.endpoints)
        error = InvalidRequest(f"{scope['method']} is not allowed on {scope['path']}: {allowed} is.")
        error.status = 405
        await refuse(error, scope, receive, send, {"allow": allowed})


class Slashes:
    """A path with slashes too many is the one without: a base URL that ends with one brings two, or one at the end."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "/")
        if path != "/" and (path.endswith("/") or "//" in path):
            scope["path"] = re.sub("/+", "/", path).rstrip("/") or "/"
        await self.app(scope, receive, send)


#: What clients of other servers may ask for, by the beginning of its path, and what to do instead.
_INSTEAD = {
    "/v1/messages/batches": "Message Batches are not offered: POST /v1/batches runs files of OpenAI's requests.",
}


async def _nothing_here(scope: Scope, receive: Receive, send: Send) -> None:
    hint = next((hint for path, hint in _INSTEAD.items() if scope["path"].startswith(path)), "See /docs.")
    await refuse(NotFound(f"There is nothing at {scope['path']}. {hint}"), scope, receive, send)


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


class OriginCheck:
    """Pages of other origins may change nothing here, nor read what they asked for; *allowed* ones may both (CORS).

    A browser says where a request comes from, in ``Sec-Fetch-Site`` (to loopback addresses and over TLS) or ``Origin``;
    other clients say nothing, and are not meant. The rules are those of Go's ``http.CrossOriginProtection``.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self.allowed = frozenset(allowed)
        self.app = app
        if self.allowed:
            self.app = CORSMiddleware(
                app,
                allow_origins=list(allowed),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "x-penstock-job", "retry-after", "retry-after-ms", "location"],
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
            origin = headers.get(b"origin")
            if self._foreign(headers, origin) and not self.allowed & {origin, "*"}:
                error = Forbidden(
                    f"Pages of {str(origin)[:100]} may not do this. If they are yours, name them in allowed_origins."
                )
                await refuse(error, scope, receive, send)
                return
        await self.app(scope, receive, send)

    @staticmethod
    def _foreign(headers: dict[bytes, str], origin: str | None) -> bool:
        if (site := headers.get(b"sec-fetch-site")) is not None:
            return site not in ("same-origin", "none")
        return origin is not None and urlsplit(origin).netloc != headers.get(b"host")


_HOST = re.compile(r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::\d+)?$")


class HostCheck:
    """Refuse hosts that the operator did not name (DNS rebinding); ``*`` allows all."""

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self.app = app
        self.allowed = None if "*" in allowed else frozenset(name.lower() for name in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.allowed is not None:
            host = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
            found = _HOST.match(host)
            if found is None or found[1].strip("[]").lower() not in self.allowed:
                await refuse(InvalidRequest(f"This server is not called {host[:100]!r}."), scope, receive, send)
                return
        await self.app(scope, receive, send)
