"""What differs between the blocking and the asynchronous client: the few things that touch HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Generator, Mapping
from typing import Any, Protocol, TypeVar

import httpx

from penstock import __version__
from penstock.core.errors import InvalidRequest

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"


class Wire(Protocol):
    """What differs between the two clients."""

    @property
    def http(self) -> httpx.Client | httpx.AsyncClient: ...
    async def open(self, request: httpx.Request) -> httpx.Response:
        """Send *request* and return when the headers have come."""
        ...

    def chunks(self, response: httpx.Response) -> AsyncIterator[bytes]: ...
    async def read(self, response: httpx.Response) -> bytes: ...
    async def end(self, response: httpx.Response) -> None: ...
    async def sleep(self, seconds: float) -> None: ...


class BlockingWire:
    """Coroutines that never suspend: `run` takes them to their end in one step."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    async def open(self, request: httpx.Request) -> httpx.Response:
        return self.http.send(request, stream=True)

    async def chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        for chunk in response.iter_bytes():
            yield chunk

    async def read(self, response: httpx.Response) -> bytes:
        return response.read()

    async def end(self, response: httpx.Response) -> None:
        response.close()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251  # there is no event loop here


class AsyncWire:
    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def open(self, request: httpx.Request) -> httpx.Response:
        return await self.http.send(request, stream=True)

    def chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        return response.aiter_bytes()

    async def read(self, response: httpx.Response) -> bytes:
        return await response.aread()

    async def end(self, response: httpx.Response) -> None:
        await response.aclose()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine over the blocking wire: it ends without ever suspending."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        value: T = stop.value
        return value
    raise AssertionError("a coroutine over the blocking wire suspended")


def iterate(source: AsyncGenerator[T, None]) -> Generator[T, None, None]:
    try:
        while True:
            try:
                item = run(source.__anext__())
            except StopAsyncIteration:
                return
            yield item
    finally:
        run(source.aclose())


def http_options(url: str, headers: Mapping[str, str] | None, timeout: float) -> dict[str, Any]:
    try:
        base = httpx.URL(url if "://" in url else f"http://{url}")
    except httpx.InvalidURL as error:
        raise InvalidRequest(f"{url!r} is not a URL: {error}") from error
    if base.scheme not in ("http", "https") or not base.host:
        raise InvalidRequest(f"{url!r} is not the URL of a server: it looks like {DEFAULT_URL}.")
    return {
        "base_url": base,
        "headers": {"user-agent": f"penstock/{__version__}", **(headers or {})},
        "timeout": httpx.Timeout(timeout, connect=5.0, pool=None),
        # Few idle connections: httpcore's pool looks at every connection for every idle one at every request, which
        # with 60 streams at once cost five times the throughput.
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=10),
        # The environment's proxy is never meant for this very machine.
        "trust_env": base.host not in ("localhost", "127.0.0.1", "::1"),
    }
