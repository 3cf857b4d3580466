"""What an idle SSE connection costs the server: memory of one, and the CPU share of all of them."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from benchmarks.load import Server, loop_factory
from benchmarks.resources import Meter, rss


@dataclass(frozen=True)
class IdleCost:
    """CPU shares are of one core."""

    asked: int
    opened: int
    """Connections that were answered with 200 and are still open at the end."""
    rss_before: int
    rss_open: int
    rss_closed: int
    bytes_per_connection: float
    cpu_share_before: float
    cpu_share_open: float
    received: int
    """Bytes that came in while idle: heartbeats."""
    seconds: float


class _Listener(asyncio.Protocol):
    def __init__(self) -> None:
        self.transport: Any = None
        self.status = b""
        self.received = 0
        self.open = True

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.status = self.status or data[9:12]
        self.received += len(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False


def measure(
    server: Server,
    connections: int = 2000,
    seconds: float = 30.0,
    path: str = "/v1/events?user_id=u{i}",
    announce: Callable[[str], None] = lambda _: None,
) -> IdleCost:
    """Open the connections, leave them alone for `seconds`, and close them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < connections + 200:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(connections + 200, hard), hard))
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_measure(server, connections, seconds, path, announce))


async def _measure(
    server: Server, connections: int, seconds: float, path: str, announce: Callable[[str], None]
) -> IdleCost:
    pids = list(server.pids)
    url = urlsplit(server.url)
    loop = asyncio.get_running_loop()
    extra = "".join(f"{name}: {value}\r\n" for name, value in server.headers.items())

    async def share(over: float) -> float:
        meter = Meter(pids)
        await asyncio.sleep(over)
        return sum(use.cpu_s for use in meter.read()[:-1]) / meter.elapsed()

    async def open_one(number: int) -> _Listener:
        _, listener = await loop.create_connection(_Listener, url.hostname or "", url.port or 80)
        target = path.replace("{i}", str(number))
        head = f"GET {target} HTTP/1.1\r\nHost: {url.netloc}\r\nAccept: text/event-stream\r\n{extra}\r\n"
        listener.transport.write(head.encode())
        return listener

    announce("nothing connected")
    share_before = await share(min(seconds, 10.0))
    rss_before = rss(pids)
    announce(f"opening {connections} connections")
    listeners: list[_Listener] = []
    for start in range(0, connections, 100):
        listeners += await asyncio.gather(*(open_one(i) for i in range(start, min(start + 100, connections))))
    await asyncio.sleep(2)
    announce(f"{connections} connections, idle")
    first = sum(listener.received for listener in listeners)
    share_open = await share(seconds)
    rss_open = rss(pids)
    received = sum(listener.received for listener in listeners) - first
    opened = sum(listener.open and listener.status == b"200" for listener in listeners)
    announce("closing")
    for listener in listeners:
        listener.transport.abort()
    await asyncio.sleep(3)
    return IdleCost(
        asked=connections,
        opened=opened,
        rss_before=rss_before,
        rss_open=rss_open,
        rss_closed=rss(pids),
        bytes_per_connection=(rss_open - rss_before) / max(opened, 1),
        cpu_share_before=share_before,
        cpu_share_open=share_open,
        received=received,
        seconds=seconds,
    )
