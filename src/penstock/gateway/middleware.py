"""The onion of plain ASGI middleware around the routes."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.core.errors import Forbidden, InvalidRequest, PenstockError
from penstock.gateway.http import refuse

Middleware = Callable[[ASGIApp], ASGIApp]


class Slashes:
    """A path with slashes too many is the one without: a base URL that ends with one brings two, or one at the end."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "/")
        if path != "/" and (path.endswith("/") or "//" in path):
            scope["path"] = re.sub("/+", "/", path).rstrip("/") or "/"
        await self.app(scope, receive, send)


_REQUEST_ID = re.compile(r"^[A-Za-z0-9._:-]{1,128}$")


class Frame:
    """What every answer has, whoever gives it.

    ``x-request-id`` is the client's, if it is well-formed, or a new one. Browsers shall not guess what an answer is,
    nor keep it unless it says so.
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

        async def send_framed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", [])
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
                headers.setdefault("cache-control", "no-store")
            await send(message)

        await self.app(scope, receive, send_framed)


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
