"""The hot path: a raw HTTP/1.1 client that reads server-sent events and takes times.

One `Connection` is one keep-alive socket with at most one request in flight. What runs per `data_received` is kept to a
handful of C-speed calls (`find`, `count`, `endswith`, one slice a chunk); everything else waits for the end of the
request. No event is JSON-parsed here: tokens are counted by a marker that cannot occur inside a JSON string (see
`dialects.py`), and the whole reply is kept so that `--verify` can parse it all afterwards.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.dialects import Dialect


class ProtocolError(Exception):
    """The server sent something that is not HTTP/1.1 as we know it."""


class ChunkedDecoder:
    """Decodes `Transfer-Encoding: chunked` incrementally; hands out whole chunks only."""

    __slots__ = ("_rest", "done")

    def __init__(self) -> None:
        self._rest = b""
        self.done = False

    def feed(self, data: bytes) -> bytes:
        """Take what was received, return the payload it completed. `done` tells that the last chunk was seen."""
        if self._rest:
            data = self._rest + data
        pos, end, parts = 0, len(data), []
        while pos < end:
            eol = data.find(b"\r\n", pos)
            if eol < 0:
                break
            line = data[pos:eol]
            try:
                size = int(line, 16)
            except ValueError:
                try:
                    size = int(line.partition(b";")[0], 16)  # a chunk extension, which nobody sends
                except ValueError:
                    raise ProtocolError(f"bad chunk size {line[:20]!r}") from None
            if size == 0:
                stop = data.find(b"\r\n\r\n", eol)  # without trailers, `eol` itself starts the empty line
                if stop >= 0:
                    self.done, pos = True, stop + 4
                break
            start = eol + 2
            stop = start + size
            if stop + 2 > end:
                break
            parts.append(data[start:stop])
            pos = stop + 2
        self._rest = data[pos:] if pos < end else b""
        return parts[0] if len(parts) == 1 else b"".join(parts)


class EventSplitter:
    """Cuts a byte stream after its last complete SSE block; the cut-off remainder starts the next piece."""

    __slots__ = ("_rest", "_separator")

    def __init__(self) -> None:
        self._rest = b""
        self._separator = b""

    def feed(self, payload: bytes) -> bytes:
        """Return the complete blocks among what has been fed so far and not returned yet."""
        if self._rest:
            payload = self._rest + payload
            self._rest = b""
        separator = self._separator
        if not separator:  # the first block tells which line ends this server uses
            lf, crlf = payload.find(b"\n\n"), payload.find(b"\r\n\r\n")
            if lf < 0 and crlf < 0:
                self._rest = payload
                return b""
            separator = self._separator = b"\r\n\r\n" if lf < 0 or 0 <= crlf < lf else b"\n\n"
        if payload.endswith(separator):
            return payload
        cut = payload.rfind(separator)
        if cut < 0:
            self._rest = payload
            return b""
        cut += len(separator)
        self._rest = payload[cut:]
        return payload[:cut]


@dataclass(slots=True)
class Gaps:
    """Times between consecutive token events of a stream. Events of one read share a timestamp: their gaps are 0."""

    seconds: array[float] = field(default_factory=lambda: array("d"))
    zeros: int = 0


@dataclass(slots=True)
class Exchange:
    """One request and what became of it. Times are `perf_counter` seconds."""

    body: bytes
    expected_tokens: int
    due: float = 0.0
    """When it should have been sent: equal to `sent` in a closed loop, the arrival time in an open one."""
    sent: float = 0.0
    first: float = 0.0
    last: float = 0.0
    ended: float = 0.0
    status: int = 0
    events: int = 0
    """Token events counted in the stream."""
    tokens: int = 0
    """What `usage` says, or `events` where the server reports no usage."""
    error: str = ""
    blocks: list[bytes] = field(default_factory=list)

    def reply(self) -> bytes:
        """The whole reply body."""
        return b"".join(self.blocks)


class Connection(asyncio.Protocol):
    """One keep-alive connection. `finished(connection, exchange)` is called from within `data_received`."""

    __slots__ = (
        "_chunks",
        "_dialect",
        "_events",
        "_finished",
        "_gaps",
        "_head",
        "_length",
        "_markers",
        "_received",
        "_request_head",
        "_transport",
        "closing",
        "exchange",
        "lost",
        "served",
    )

    def __init__(
        self,
        request_head: bytes,
        dialect: Dialect,
        gaps: Gaps,
        finished: Callable[[Connection, Exchange], None],
        lost: Callable[[Connection, Exchange | None, bool], None],
    ) -> None:
        self._request_head = request_head
        self._dialect = dialect
        self._gaps = gaps
        self._finished = finished
        self.lost = lost
        self._transport: Any = None
        self.exchange: Exchange | None = None
        self.served = 0
        self.closing = False
        self._reset()

    def _reset(self) -> None:
        self._head: bytes | None = b""
        self._chunks: ChunkedDecoder | None = None
        self._events: EventSplitter | None = None
        self._length = -1
        self._received = 0

    # asyncio callbacks

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.closing = True
        exchange, self.exchange = self.exchange, None
        if exchange is not None and self._head is None and self._chunks is None and self._length < 0:
            self._end(exchange, perf_counter())  # a reply without length or chunks ends with its connection
            return
        # A reused connection that the server closed before one byte of reply may be tried again: HTTP allows it.
        unanswered = exchange is not None and self.served > 0 and self._head == b""
        self.lost(self, exchange, unanswered)

    def data_received(self, data: bytes) -> None:
        now = perf_counter()
        exchange = self.exchange
        if exchange is None:
            self.close()
            return
        try:
            if self._head is not None:
                data = self._read_head(data, exchange)
                if self._head is not None:
                    return
            chunks = self._chunks
            if chunks is not None:
                payload = chunks.feed(data)
                complete = chunks.done
            else:
                payload = data
                self._received += len(data)
                complete = 0 <= self._length <= self._received
        except ProtocolError as error:
            self.exchange = None
            exchange.error = f"protocol: {error}"
            exchange.ended = now
            self.close()
            self._finished(self, exchange)
            return
        if payload:
            if self._events is not None:
                payload = self._events.feed(payload)
                if payload:
                    exchange.blocks.append(payload)
                    markers = self._dialect.markers or self._dialect.learn(payload)
                    if markers is not None:
                        token, empty = markers
                        count = payload.count(token)
                        if empty and count:
                            count -= payload.count(empty)
                        if count:
                            if exchange.events:
                                self._gaps.seconds.append(now - exchange.last)
                            else:
                                exchange.first = now
                            exchange.events += count
                            exchange.last = now
                            self._gaps.zeros += count - 1
            else:
                exchange.blocks.append(payload)
        if complete:
            self.exchange = None
            self._end(exchange, now)

    # requests

    def send(self, exchange: Exchange) -> None:
        """Write one request; nothing may be in flight."""
        body = exchange.body
        self._reset()
        self.exchange = exchange
        exchange.sent = perf_counter()
        if not exchange.due:
            exchange.due = exchange.sent
        self._transport.write(b"%b%d\r\n\r\n%b" % (self._request_head, len(body), body))

    def close(self) -> None:
        self.closing = True
        if self._transport is not None:
            self._transport.abort()

    def _read_head(self, data: bytes, exchange: Exchange) -> bytes:
        """Parse the status line and the three headers that matter; returns what follows them."""
        data = (self._head or b"") + data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self._head = data
            return b""
        if not data.startswith(b"HTTP/1."):
            raise ProtocolError(f"not an HTTP reply: {data[:40]!r}")
        exchange.status = int(data[9:12])
        for line in data[:end].split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            name, value = name.lower(), value.strip().lower()
            if name == b"transfer-encoding" and value == b"chunked":
                self._chunks = ChunkedDecoder()
            elif name == b"content-length":
                self._length = int(value)
            elif name == b"connection" and value == b"close":
                self.closing = True
            elif name == b"content-type" and value.startswith(b"text/event-stream"):
                self._events = EventSplitter()
        self._head = None
        return data[end + 4 :]

    def _end(self, exchange: Exchange, now: float) -> None:
        self.served += 1
        exchange.ended = now
        if self.closing:
            self.close()
        if exchange.status != 200:
            exchange.error = f"http {exchange.status}"
        elif self._events is None:
            exchange.error = self._dialect.finish_plain(exchange)
        else:
            exchange.error = self._dialect.finish(exchange)
        self._finished(self, exchange)
