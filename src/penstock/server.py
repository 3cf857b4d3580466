"""What a process that serves needs: an address, HTTP on it, and to be told when it is over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from penstock.core.errors import InvalidRequest

#: Connections that wait to be accepted.
BACKLOG = 4096


class Address:
    """A place to listen, claimed at once, so that a taken port is told before anything slow happens.

    It is `open` only when there is something behind it: until then a proxy is refused, and goes elsewhere.
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
            http="httptools",
            ws="none",
            proxy_headers=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=round(drain_timeout) + 2,
            server_header=False,
            date_header=False,
            backlog=BACKLOG,
        )
    )


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
