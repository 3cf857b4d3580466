"""What a serving process needs: an address, HTTP on it, and the signal to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import urllib.parse
from collections.abc import Iterator
from typing import Any

import httptools
import msgspec
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from penstock.api.errors import ErrorBody
from penstock.core.errors import InvalidRequest, PenstockError

#: Connections that may wait to be accepted.
BACKLOG = 4096
#: Largest head of a request in bytes; also the limit of trailers and of everything else that is not a body.
MAX_HEAD = 64 << 10
#: Pipelined requests that may wait while one is answered, and the largest body of each in bytes.
MAX_PIPELINED = 16
MAX_PIPELINED_BODY = HIGH_WATER_LIMIT
#: Seconds between two checks of a connection that its client has half closed, and between two probes of it.
LOOK_INTERVAL = 0.5
PROBE_INTERVAL = 10.0


class Address:
    """A place to listen, bound at once, so that a port in use is reported before anything slow begins.

    `open` starts listening once something can answer. Until then connections are refused, so a proxy goes elsewhere.
    """

    def __init__(self, host: str, port: int, *, flag: str) -> None:
        self._hint = f"Cannot listen on {host}:{port}: {{}}. Choose another port with {flag}."
        self.socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        with self._told():
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind((host, port))

    def open(self) -> None:
        with self._told():
            self.socket.listen(BACKLOG)

    @property
    def url(self) -> str:
        host, port = self.socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def __enter__(self) -> Address:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.socket.close()
            raise InvalidRequest(self._hint.format(os.strerror(error.errno or 0))) from error


def http_server(app: ASGIApp, *, drain_timeout: float) -> uvicorn.Server:
    return _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",  # `Gateway.running` is entered and left by us, around the drain
            http=_Connection,
            ws="none",
            proxy_headers=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=round(drain_timeout) + 2,
            server_header=False,
            date_header=False,
            backlog=BACKLOG,
        )
    )


class _Exchange(RequestResponseCycle):
    """A request and its answer."""

    broken = False
    """Will the rest of its body never come?"""
    _until_close = False

    async def receive(self) -> Any:
        message = None if self.broken else await super().receive()
        return {"type": "http.disconnect"} if message is None or self.broken else message

    async def send(self, message: Any) -> None:
        """HTTP/1.0 has no chunks: a body of unknown length ends with the connection (RFC 9112, 6.3)."""
        if self.scope["http_version"] == "1.0":
            if message["type"] == "http.response.start":
                self._until_close = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
                if self._until_close:
                    self.chunked_encoding = False
            elif self._until_close:
                self.expected_content_length = len(message.get("body", b""))
        await super().send(message)

    async def send_500_response(self) -> None:
        error = PenstockError("Something broke inside the server; its log has the details.")
        body = msgspec.json.encode(ErrorBody.of(error.info))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"cache-control", b"no-store"),
            (b"connection", b"close"),
        ]
        if (request_id := self.scope.get("penstock.request_id")) is not None:
            headers.append((b"x-request-id", str(request_id).encode()))
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})


class _Connection(HttpToolsProtocol):
    """uvicorn's connection, made to keep to the RFCs and to watch its client.

    It goes on reading while requests wait, so it notices a client that leaves. Requests pipelined beyond
    `MAX_PIPELINED` stay unanswered when the connection closes, and clients send them again (RFC 9112, 9.3.2). An
    ``Upgrade`` is ignored: the request with its body, and all that follows, is read as HTTP (RFC 9110, 7.8). A client
    that has only closed its side gets its answer. The app refuses bytes that are not HTTP in its own error shape: it
    finds the error in its scope, as ``penstock.refusal``.
    """

    cycle: _Exchange
    scope: Any
    _answering: _Exchange | None = None
    _deaf = False
    """Is everything else from this client ignored?"""
    _unread = 0
    """Bytes received since the last complete head or piece of a body."""
    _looking: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------------------------------ what comes

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._deaf:
            return
        self._unread += len(data)
        try:
            while data:
                data = self._feed(data)
        except httptools.HttpParserError as error:
            self._refuse(f"This is not a request in HTTP/1.1: {error.__context__ or error}.")
        if self._unread > MAX_HEAD and not self._deaf:
            self._refuse(f"The head of the request is longer than {MAX_HEAD} bytes.", 431)

    def _feed(self, data: bytes) -> bytes:
        """Parse *data*; what has to be parsed again: a request for an upgrade, without the header that asks for it."""
        try:
            self.parser.feed_data(data)
            return b""
        except httptools.HttpParserUpgrade as upgrade:
            method = self.parser.get_method()
            if method == b"CONNECT":
                self._refuse("This is no proxy: CONNECT is not offered.", 405)
                return b""
            hop = {b"upgrade", b"http2-settings"}
            lines = [b"%s %s HTTP/%s" % (method, self.url, self.parser.get_http_version().encode())]
            for name, value in self.headers:
                if name == b"connection":
                    value = b", ".join(word for word in value.split(b",") if word.strip().lower() not in hop)
                if name not in hop:
                    lines.append(name + b": " + value)
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            return b"\r\n".join([*lines, b"", data[upgrade.args[0] :]])

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # else it is a trailer
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._deaf or self.parser.should_upgrade():
            return
        self._unread = 0
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            self._refuse(f"HTTP/{version} is not spoken here: HTTP/1.1 is.", 505)
            return
        url = httptools.parse_url(self.url)
        path = url.path or b"/"  # of http://host, without a path
        self.scope["http_version"] = version
        self.scope["method"] = self.parser.get_method().decode("ascii")
        self.scope["raw_path"] = path
        self.scope["path"] = urllib.parse.unquote(path.decode("ascii"))
        self.scope["query_string"] = url.query or b""
        self._take(self.parser.should_keep_alive() and version == "1.1")

    def _take(self, keep_alive: bool) -> None:
        """Answer the request of `scope`: now, or after those that came before."""
        if len(self.pipeline) >= MAX_PIPELINED:
            self._stop_taking()
            return
        self.cycle = _Exchange(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue and self.scope["http_version"] == "1.1",
            keep_alive=keep_alive,
            on_response=self.on_response_complete,
        )
        if self._idle:
            self._start_asgi_task(self.cycle, self.app)
        else:
            self.pipeline.appendleft((self.cycle, self.app))

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        if self._deaf or self.cycle.response_complete:
            return
        self.cycle.body += body
        self.cycle.message_event.set()
        if self.cycle is not self._answering:
            if len(self.cycle.body) > MAX_PIPELINED_BODY:
                self._stop_taking()
        elif len(self.cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()

    def on_message_complete(self) -> None:
        self._unread = 0
        if self._deaf or self.parser.should_upgrade():
            return
        self.cycle.more_body = False
        self.cycle.message_event.set()

    # ------------------------------------------------------------------------------------ what is wrong with it

    def _refuse(self, message: str, status: int = 400) -> None:
        """Answer with an error once all requests before are answered: this one, and what follows, cannot be parsed."""
        if self._deaf:
            return
        self._deaf = True
        if self._drop_incomplete():
            return  # it was in the body of a request, whose own answer says so
        error = InvalidRequest(message)
        error.status = status
        super().on_message_begin()
        self.scope.update(method="GET", path="/", raw_path=b"/", query_string=b"")
        self.scope["penstock.refusal"] = error
        self.expect_100_continue = False
        self._take(keep_alive=False)
        self.cycle.more_body = False

    def _stop_taking(self) -> None:
        """Close the connection after the answer to the last request that is complete by now."""
        self._deaf = True
        self._drop_incomplete()
        if self._answering is not None:
            last = self.pipeline[0][0] if self.pipeline else self._answering
            last.keep_alive = False

    def _drop_incomplete(self) -> bool:
        """Drop the request that is being read: its rest will not come. True if its answer has begun or was given."""
        if self._answering is None or not self.cycle.more_body:
            return False
        if self.cycle is not self._answering:
            self.pipeline.popleft()
            return False
        if self._answering.response_started:
            self.transport.abort()
        self._answering.keep_alive = False
        self._answering.broken = True
        self._answering.message_event.set()
        return True

    @property
    def _idle(self) -> bool:
        return self._answering is None or self._answering.response_complete

    # ------------------------------------------------------------------------------------ the client leaves

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more. Only sending it something shows whether it still listens."""
        if self._idle or self.scheme == "https":
            return False
        self._stop_taking()
        self._look(0.0)
        return True

    def _look(self, since_probe: float) -> None:
        """Has the client reset the connection (RST)? To find out before the answer begins, send ``100 Continue``, which
        every client of HTTP/1.1 ignores. For HTTP/1.0, TCP's keep-alive probes find out."""
        sock = self.transport.get_extra_info("socket")
        if self.transport.is_closing() or self._answering is None or sock is None:
            return
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
            return
        if since_probe <= 0.0:
            since_probe = PROBE_INTERVAL
            if self._answering.scope["http_version"] == "1.0":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):  # not on every system
                    if hasattr(socket, option):
                        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), round(PROBE_INTERVAL))
            elif not self._answering.response_started:
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._looking = self.loop.call_later(LOOK_INTERVAL, self._look, since_probe - LOOK_INTERVAL)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._looking is not None:
            self._looking.cancel()
        self.pipeline.clear()
        if self._answering is not None:
            self.cycle = self._answering  # whom uvicorn tells
        super().connection_lost(exc)

    def shutdown(self) -> None:
        if self._idle:
            self.transport.close()
            return
        assert self._answering is not None
        self._answering.keep_alive = False
        if self.cycle is not self._answering:
            self._deaf = True
            self.pipeline.clear()


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the drain is ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def termination() -> Iterator[asyncio.Event]:
    """An event set by the first SIGTERM or SIGINT; the second one ends the process at once."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if event.is_set():
            raise SystemExit(1)
        event.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        yield event
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
