"""The whole gateway in one place: its routes, and the onion of plain ASGI middleware around them."""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.core.errors import Forbidden, InvalidRequest, NotFound, PenstockError
from penstock.gateway.batches import routes as batches
from penstock.gateway.dialects.anthropic import routes as anthropic
from penstock.gateway.dialects.compat import routes as seeds
from penstock.gateway.dialects.native import routes as jobs
from penstock.gateway.dialects.openai import chat as openai
from penstock.gateway.dialects.openai import completions, embeddings
from penstock.gateway.dialects.responses import routes as responses
from penstock.gateway.dialects.tokens import routes as tokens
from penstock.gateway.files import routes as files
from penstock.gateway.http import Endpoint, Handler, refuse
from penstock.gateway.operator import health as ops
from penstock.gateway.operator import models, page
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
    ("POST", "/v1/completions", completions.completions),
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

#: Whose answers take as long as a model does (``POST``): their latency is measured.
GENERATION = {
    "/v1/generate",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/embeddings",
    "/generate",
    "/basic_generate",
    "/generate_stream",
    "/api/v1/req",
    "/generate_vllm",
}

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
    paths = [Route(path, ByMethod(path, endpoints)) for path, endpoints in methods.items()]

    @contextlib.asynccontextmanager
    async def lifespan(app: object) -> AsyncIterator[None]:
        async with gateway.running():
            yield

    app: ASGIApp = Router(paths, default=_nothing_here, redirect_slashes=False, lifespan=lifespan)
    app = OriginCheck(app, gateway.config.allowed_origins)
    app = HostCheck(app, gateway.config.allowed_hosts)
    app = Frame(app)
    app = Slashes(app)
    for layer in reversed(middleware):
        app = layer(app)
    return app


class ByMethod:
    """The endpoints of one path."""

    def __init__(self, path: str, endpoints: dict[str, Endpoint]) -> None:
        self.path = path
        self.endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self.endpoints.get("GET" if scope["method"] == "HEAD" else scope["method"])
        if endpoint is not None:
            if scope["method"] == "POST" and self.path in GENERATION:
                scope["penstock.generation"] = self.path
            await endpoint(scope, receive, send)
            return
        allowed = ", ".join([*self.endpoints, *(["HEAD"] if "GET" in self.endpoints else [])])
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


class Frame:
    """What every answer has, whoever gives it.

    ``x-request-id`` is the client's, if it is well-formed, or a new one. Browsers shall not guess what an answer is,
    nor keep it unless it says so. What was no HTTP (`penstock.server`) is refused here.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        request_id = given if _REQUEST_ID.match(given) else "req_" + secrets.token_hex(12)
        scope["penstock.request_id"] = request_id
        if _is_anthropics(scope):
            scope["penstock.refuse"] = partial(anthropic.refusal, request_id)

        async def send_framed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", [])
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
                headers.setdefault("cache-control", "no-store")
            await send(message)

        if (error := scope.get("penstock.refusal")) is not None:
            await refuse(error, scope, receive, send_framed)
        else:
            await self.app(scope, receive, send_framed)


def _is_anthropics(scope: Scope) -> bool:
    """Is it asked in Anthropic's way? Its models have the path of OpenAI's."""
    path = f"{scope['path']}/"
    if path.startswith("/v1/models/"):
        return any(name == b"anthropic-version" for name, _ in scope["headers"])
    return path.startswith("/v1/messages/")


class OriginCheck:
    """Pages of other origins may change nothing here, nor read what they asked for; *allowed* ones may both (CORS).

    A browser says where a request comes from, in ``Sec-Fetch-Site`` (to loopback addresses and over TLS) or ``Origin``;
    other clients say nothing, and are not meant. The rules are those of Go's ``http.CrossOriginProtection``.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self.allowed = frozenset(allowed)
        self.app = app
        if self.allowed:
            self.app = Cors(
                app,
                allow_origins=list(allowed),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                allow_private_network=True,  # pages of public addresses ask for it before they reach a local one
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


class Cors(CORSMiddleware):
    """Starlette's, whose refusals are plain text."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" and scope["method"] == "OPTIONS" else {}
        if "origin" not in headers or "access-control-request-method" not in headers:
            await super().__call__(scope, receive, send)
            return
        answer = self.preflight_response(Headers(scope=scope))
        if answer.status_code < 400:
            await answer(scope, receive, send)
            return
        failed = bytes(answer.body).decode()
        error = Forbidden(
            f"Pages of {headers['origin'][:100]} may not do this: {failed}. Those that are named in allowed_origins "
            f"may use {', '.join(self.allow_methods)}."
        )
        await refuse(error, scope, receive, send, {"vary": answer.headers["vary"]})


_HOST = re.compile(r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]+)(?::\d*)?$")


class HostCheck:
    """Refuse hosts that the operator did not name (DNS rebinding); ``*`` allows all.

    A request has one host; of HTTP/1.0, which browsers do not speak, it may have none (RFC 9112, 3.2).
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self.app = app
        self.allowed = None if "*" in allowed else frozenset(name.lower() for name in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._wrong(scope)) is not None:
            await refuse(error, scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _wrong(self, scope: Scope) -> PenstockError | None:
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if not hosts and scope["http_version"] == "1.0":
            return None
        if len(hosts) != 1:
            return InvalidRequest(f"A request has one Host header, not {len(hosts)}.")
        found = _HOST.match(hosts[0])
        if found is None:
            return InvalidRequest(f"The Host header {hosts[0][:100]!r} names no host.")
        if self.allowed is not None and found[1].strip("[]").lower() not in self.allowed:
            return InvalidRequest(f"This server is not called {hosts[0][:100]!r}.")
        return None
